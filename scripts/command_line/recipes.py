"""Named sets of options for the rows of the few-shot tables, chosen on validation classes alone."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from command_line.defaults import Settings, default_options
from command_line.options import HeadFlag, RunOptions


@dataclass(frozen=True)
class Recipe:
    """The options of one row of a table, and what papers have in that row.

    Args:
        task: The flag of the task.
        papers: The test accuracies of papers, in %, by method.
        head: The flag of the head.
        method: The flag of the method. If None, that of the head.
        settings: The options that differ from the defaults of task, head and method, by name.
    """

    task: str
    papers: dict[str, str]
    head: HeadFlag = "linear"
    method: str | None = None
    settings: Settings = field(default_factory=dict)

    def options(self, name: str) -> RunOptions:
        """The options of a run of this recipe, whose name is `name`."""
        defaults = default_options(self.task, self.method, head=self.head)
        return replace(defaults, recipe=name, **self.settings)

    def describe_papers(self) -> str:
        """What papers have, as one line."""
        return ", ".join(f"{method} {accuracy} %" for method, accuracy in self.papers.items())


# Features for many classes at a time, evaluated once; predictions do not depend on one another.
FEATURES: Settings = {
    "norm": "running",
    "train_ways": 20,
    "queries": 5,
    "filters": 64,
    "meta_batch": 4,
    "test_episodes": 1000,
    "validate_every": 250,
    "validation_episodes": 400,
}
IMAGES: Settings = FEATURES | {
    "train_ways": 10,
    "queries": 6,
    "pool": True,
    "activation": "leaky-relu",
    "joined_blocks": 2,
    "augment": True,
    "jitter": 0.0,
    "outer_lr": 4e-3,
    "outer_weight_decay": 1e-4,
    "minutes": 30.0,
    "validate_every": 1000,
    "validation_episodes": 1000,
}
# In place of the four convolutions: residual blocks, of a quarter or half of the usual widths.
RESNET: Settings = {
    "network": "resnet-12",
    "activation": "leaky-relu",
    "pool": False,
    "joined_blocks": 1,
    "augment": True,
}
# iMAML: Rajeswaran et al. 2019, table 2, which has MAML's numbers as well. Prototypes: Snell et al.
# 2017. R2D2: Bertinetto et al. 2019, which has those of MAML and prototypes on CIFAR-FS.
CIFAR_FS_5W1S = {"MAML": "58.9", "prototypes": "55.5", "R2D2": "65.3"}
CIFAR_FS_5W5S = {"MAML": "71.5", "prototypes": "72.0", "R2D2": "79.4"}
MINI_IMAGENET_5W1S = {"MAML": "48.7", "prototypes": "49.4", "R2D2": "51.2"}
FC100_5W1S = {"prototypes": "35.3"}
OMNIGLOT_5W1S = {"MAML": "98.7", "iMAML": "99.5", "prototypes": "98.8"}
OMNIGLOT_5W5S = {"MAML": "99.9", "iMAML": "99.7", "prototypes": "99.7"}
OMNIGLOT_20W1S = {"MAML": "95.8", "iMAML": "96.2", "prototypes": "96.0"}

RECIPES: dict[str, Recipe] = {
    "omniglot-5w1s-ridge": Recipe(
        "omniglot",
        OMNIGLOT_5W1S,
        head="ridge",
        settings=FEATURES | {"minutes": 15.0},
    ),
    "omniglot-5w1s-resnet": Recipe(
        "omniglot",
        OMNIGLOT_5W1S,
        head="ridge",
        settings=FEATURES
        | RESNET
        | {
            "filters": (16, 32, 64, 128),
            "minutes": 60.0,
            "validate_every": 500,
            "validation_episodes": 1000,
        },
    ),
    "omniglot-5w5s-ridge": Recipe(
        "omniglot",
        OMNIGLOT_5W5S,
        head="ridge",
        settings=FEATURES | {"shots": 5, "train_shots": 1, "minutes": 30.0},
    ),
    "omniglot-20w1s-ridge": Recipe(
        "omniglot",
        OMNIGLOT_20W1S,
        head="ridge",
        settings=FEATURES | {"ways": 20, "minutes": 30.0},
    ),
    "cifar-fs-5w1s-ridge": Recipe(
        "cifar-fs",
        CIFAR_FS_5W1S,
        head="ridge",
        settings=IMAGES | {"train_shots": 1},
    ),
    "cifar-fs-5w5s-ridge": Recipe(
        "cifar-fs",
        CIFAR_FS_5W5S,
        head="ridge",
        settings=IMAGES | {"shots": 5, "train_shots": 3},
    ),
    "cifar-fs-5w1s-resnet": Recipe(
        "cifar-fs",
        CIFAR_FS_5W1S,
        head="ridge",
        settings=IMAGES
        | RESNET
        | {
            "filters": (32, 64, 128, 256),
            "train_shots": 1,
            "minutes": 108.0,
            "validation_episodes": 400,
        },
    ),
    "mini-imagenet-5w1s-ridge": Recipe(
        "mini-imagenet",
        MINI_IMAGENET_5W1S,
        head="ridge",
        settings=IMAGES | {"train_shots": 1},
    ),
    "fc100-5w1s-ridge": Recipe(
        "fc100", FC100_5W1S, head="ridge", settings=IMAGES | {"train_shots": 1}
    ),
}


def find_recipe(name: str) -> Recipe:
    """The recipe of a name.

    Raises:
        ValueError: The name is unknown.
    """
    if name not in RECIPES:
        raise ValueError(f"--recipe: got {name!r}, expected one of {', '.join(RECIPES)}")
    return RECIPES[name]
