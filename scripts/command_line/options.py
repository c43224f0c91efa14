"""The options of a run: the command line of train.py, and part of the config.json of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from command_line.ranges import (
    MOST,
    Count,
    InnerSteps,
    Number,
    Seed,
    Share,
    Threads,
    check_ranges,
    within,
)
from command_line.task_options import read_task_options

Suppressed = tyro.conf.Suppress[dict[str, Any]]

HeadFlag = Literal["linear", "ridge", "logistic", "hinge", "prototypes"]
NetworkFlag = Literal["conv", "resnet-12", "mlp"]

DEFAULT_MINUTES = 2.0
CHANGEABLE = {  # what may differ when a run is resumed
    "steps",
    "minutes",
    "device",
    "data_root",
    "out",
    "resume",
    "workers",
    "threads",
    "compile",
    "plan",
    "test_episodes",
    "select",
    "test_steps",
}
# Options that came later. At their defaults they are no part of the identity, so that runs which
# were stored before are resumed and evaluated.
ADDED = {
    "network",
    "augment",
    "outer_optimizer",
    "outer_weight_decay",
    "label_smoothing",
    "multi_step_loss",
    "init",
    "init_digest",
    "recipe",
    "first_order_share",
    "jitter",
    "joined_blocks",
}


@dataclass(frozen=True)
class RunOptions:
    """Meta-train a few-shot learner, and test it on tasks it has never seen."""

    recipe: str | None = None
    """A row of the published tables: one of the recipes above. Options that are given replace
    its own."""
    task: str = "glyphs"
    """Where tasks come from: one of the tasks listed above."""
    ways: Annotated[int, within(1, 10_000)] = 5
    """Classes of a task."""
    shots: Annotated[int, within(1, 10_000)] = 1
    """Support examples of each class; for sinusoid, support points."""
    queries: Annotated[int, within(1, 10_000)] = 5
    """Query examples of each class; for sinusoid, query points."""
    method: str = "cg"
    """How the meta-gradient is computed: unrolled (MAML), truncated, first-order, reptile, …,
    or implicitly (iMAML) by a solver: cg, auto, neumann, nystrom, dense, …"""
    head: HeadFlag = "linear"
    """What maps features to classes: a linear layer of the network; one that is fitted to the
    support exactly (ridge regression, softmax or smooth hinge); or one that starts at the class
    means, with --inner-optimizer none a prototypical network."""
    adapt: Literal["all", "head"] = "all"
    """What adapts. With head, the other layers run once, whatever the number of inner steps."""
    norm: Literal["batch", "running", "group", "layer"] = "batch"
    """Statistics of the normalisation: of the set of images, queries included (transductive); of
    training, where the convolutions do not adapt; of groups of channels or all of each image."""
    train_ways: Annotated[int | None, within(1, 10_000)] = None
    """Classes of a training task. By default --ways. A linear layer has one number of classes."""
    train_shots: Annotated[int | None, within(1, 10_000)] = None
    """Support examples of each class in training. By default --shots."""
    inner_steps: InnerSteps = 4
    """Inner steps in training."""
    inner_lr: Number = 0.5
    """Inner step size, for the inner optimisers that have one."""
    proximal: Number = 0.1
    """λ of the term λ/2 ‖θ − φ‖² of the inner loss. Implicit methods need λ > 0."""
    inner_optimizer: str = "gradient-descent"
    """The inner optimiser, such as gradient-descent, momentum, adam or adamw.
    Implicit methods also take newton-cg and lbfgs."""
    outer_optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Optimiser of the meta-parameters. sgd has Nesterov momentum 0.9, and wants larger steps."""
    outer_lr: Number = 4e-3
    """Step size on the meta-parameters at the start."""
    outer_weight_decay: Number = 0.0
    """Weight decay of the model in the outer optimiser, such as 5e-4. With adamw it is decoupled.
    The numbers of --learn do not decay."""
    meta_batch: Annotated[int, within(1, 10_000)] = 8
    """Tasks in a meta-step."""
    steps: Annotated[int | None, within(1, 10**9)] = None
    """Meta-steps to train for."""
    minutes: Annotated[float | None, within(1e-6, 1_000_000)] = None
    """Wall-clock minutes to train for, with --steps whichever ends first. Without both: 2."""
    seed: Seed = 0
    """Seed of the initialisation and of the training episodes."""
    device: str = "auto"
    """auto (CUDA if there is any), cpu, cuda, cuda:1 …"""
    data_root: Path | None = None
    """Where the data is: a folder or archive of images or features, or Omniglot's zips or tree.
    Omniglot and CIFAR-100 are downloaded without it."""
    out: Path | None = None
    """Folder for the files of the run. By default runs/NAME-SEED, where NAME says what runs."""
    resume: bool = False
    """Continue the run in --out with its options. Only --steps, --minutes, --device, --data-root,
    --workers, --threads, --compile, --plan and options of the test may change."""
    learn: tuple[str, ...] = ()
    """Inner numbers to learn as well: lr, proximal, lr=per-tensor, lr=per-element (Meta-SGD).
    Heads have lambda, temperature and scale."""
    task_options: tuple[str, ...] = ()
    """Further options of the task: split=vinyals (omniglot), size=32 color=false (folder), …"""
    network: NetworkFlag | None = None
    """The network: conv (four convolutions), resnet-12 (four residual blocks) or mlp.
    By default conv for images, and mlp for other inputs."""
    filters: Annotated[int | tuple[int, int, int, int], within(1, 4096)] = 32
    """Channels of each of the four convolutions or blocks, or of all of them. Four numbers are
    96 192 384 512 (R2D2), or by default 64 160 320 640 for resnet-12."""
    init: Path | None = None
    """Checkpoint or folder of a run whose network this one starts from. A last layer that does not
    fit is left out."""
    activation: Literal["relu", "leaky-relu", "softplus", "gelu"] = "relu"
    """Activation of the convolutions, by default leaky-relu for resnet-12.
    A smooth one lets newton-cg reach the argmin; with relu it stops beside a kink."""
    pool: bool = False
    """Halve images by max-pooling instead of strided convolutions, which is slower. resnet-12
    always does."""
    joined_blocks: Annotated[int, within(1, 4)] = 1
    """How many of the last blocks of conv give features, of which R2D2's network joins 2."""
    hidden: Annotated[tuple[int, ...], within(1, 65_536)] = (40, 40)
    """Widths of the hidden layers of an mlp."""
    augment: bool = False
    """Change training images at random. Natural images, of three channels, are cropped, flipped and
    coloured. Written characters, of one channel, are slightly turned, sheared, scaled and moved."""
    jitter: Share = 0.4
    """By how much --augment changes brightness, contrast and saturation."""
    label_smoothing: Annotated[float, within(0, 0.9)] = 0.0
    """Share of the query labels that goes to all classes alike, in training and validation."""
    multi_step_loss: Share = 0.0
    """Share of the run in which the query losses after all inner steps count, at first alike and
    more and more the last one alone (MAML++). For unrolled."""
    first_order_share: Share = 0.0
    """Share of the run that takes derivatives of first order alone, before unrolled (MAML++)."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Decay of the outer step size over the steps or minutes given."""
    clip: Annotated[float | None, within(1e-12, MOST)] = None
    """Largest norm of the meta-gradient. By default there is none."""
    vectorize: Literal["auto", "vmap", "loop"] = "auto"
    """How tasks are batched. auto times both and keeps the faster."""
    chunk_size: Annotated[int | None, within(1, 10_000)] = None
    """Tasks vmapped at a time, to bound memory. By default all, or half of them if that is
    faster."""
    compile: Literal["auto"] | bool = "auto"
    """Whether the functions of a meta-step are compiled. With auto they are where that is faster,
    which is tried for small networks in runs of more than five minutes."""
    plan: bool = False
    """Show the ways to compute a meta-step that were timed before the first one: by vmap or a loop,
    in chunks, with the weights of convolutions in another memory format, compiled, by several CPU
    threads. The fastest is kept for the whole run, and stands in its config.json."""
    workers: Annotated[int, within(0, 128)] = 0
    """Processes that draw episodes. With 0, the main process does."""
    threads: Threads = None
    """CPU threads of torch. By default 1, or all cores where they make a meta-step faster."""
    validate_every: Count = 200
    """Meta-steps between validations."""
    validation_episodes: Annotated[int, within(2, 1_000_000)] = 100
    """Validation tasks, the same each time, rounded up to whole meta-batches."""
    checkpoint_every: Count = 100
    """Meta-steps between checkpoints."""
    test_episodes: Annotated[int, within(2, 1_000_000)] = 600
    """Test tasks at the end."""
    select: Literal["best", "last"] = "best"
    """The checkpoint to test: that of the best validation, or the last one."""
    test_steps: Annotated[int, within(0, 100_000)] = 16
    """Inner steps at test. An implicit method takes enough to reach the argmin."""
    method_options: Suppressed = field(default_factory=dict)
    """Options of the method that differ from its defaults, by name."""
    inner_options: Suppressed = field(default_factory=dict)
    """Options of the inner optimiser that differ from its defaults, by name."""
    init_digest: tyro.conf.Suppress[tyro.conf.Fixed[str]] = ""
    """Digest of the checkpoint that --init named."""

    @classmethod
    def load(cls, stored: Mapping[str, Any]) -> RunOptions:
        """The inverse of `dump`.

        Raises:
            ValueError: A name is not that of an option.
        """
        unknown = sorted(set(stored) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(
                f"options: got {', '.join(unknown)}, which this version does not know; "
                "use the version that wrote the run"
            )
        values: dict[str, Any] = {}
        for name, value in stored.items():
            values[name] = tuple(value) if isinstance(value, list) else value
            if name in ("data_root", "init", "out") and value is not None:
                values[name] = Path(value)
        return cls(**values)

    def dump(self) -> dict[str, Any]:
        """The options as a dictionary for JSON."""
        values = asdict(replace(self, resume=False))
        return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.out or default_folder(self.recipe or f"{self.task}-{self.approach}", self.seed)

    @property
    def approach(self) -> str:
        """What the run is called by: its method, or its head if that is not linear."""
        return self.method if self.head == "linear" else self.head

    @property
    def test_seed(self) -> int:
        """The seed of the test episodes, which no other stream of the run has."""
        return self.seed + 1_000_000

    def completed(self) -> RunOptions:
        """The options with a limit and a folder.

        Raises:
            ValueError: A number is out of range.
        """
        check_ranges(self)
        unlimited = self.steps is None and self.minutes is None
        return replace(
            self, minutes=DEFAULT_MINUTES if unlimited else self.minutes, out=self.folder
        )

    def differences(self, other: RunOptions) -> list[str]:
        """The options in which a resumed run may not differ from `other`, but does."""
        changed = []
        for f in fields(self):
            before = getattr(other, f.name)
            now = getattr(self, f.name)
            if f.name in CHANGEABLE or now == before:
                continue
            if isinstance(now, dict):
                changed += [name for name in {**before, **now} if before.get(name) != now.get(name)]
            else:
                changed.append(f.name)
        return changed

    def identity(self) -> dict[str, Any]:
        """The options that a resumed run may not change, by name, in types that JSON has."""
        values = {n: value for n, value in self.dump().items() if n not in CHANGEABLE}
        for f in fields(self):
            if f.name in ADDED and values[f.name] == f.default:
                del values[f.name]
        for kind in ("method", "inner"):
            options = values.pop(f"{kind}_options")
            values |= {f"{kind}_{name}": value for name, value in options.items()}
        identity: dict[str, Any] = json.loads(json.dumps(values))
        return identity

    def task_arguments(self) -> dict[str, Any]:
        """The arguments of `tasks.load` to test with, those in --task-options included.

        Raises:
            ValueError: One of --task-options is not of the form name=value, or has a flag.
        """
        arguments: dict[str, Any] = {
            "name": self.task,
            "ways": self.ways,
            "shots": self.shots,
            "queries": self.queries,
            "data_root": self.data_root,
        }
        return arguments | read_task_options(self.task_options, taken=arguments)

    def training_arguments(self) -> dict[str, Any]:
        """The arguments of `tasks.load` to train with.

        Raises:
            ValueError: A linear layer is to have two numbers of classes.
        """
        if self.head == "linear" and self.train_ways not in (None, self.ways):
            raise ValueError(
                f"--train-ways: got {self.train_ways} with --ways {self.ways} and --head linear, "
                "which has one number of classes, expected another head, such as ridge"
            )
        changes = {"ways": self.train_ways, "shots": self.train_shots}
        given = {name: value for name, value in changes.items() if value is not None}
        return self.task_arguments() | given


def default_folder(name: str, seed: int | str) -> Path:
    """The folder of a run without --out."""
    return Path("runs", f"{name}-{seed}")
