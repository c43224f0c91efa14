"""The options of a run: the command line of train.py, and part of the config.json of a run."""

from __future__ import annotations

import ast
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
    Threads,
    check_ranges,
    within,
)

Suppressed = tyro.conf.Suppress[dict[str, Any]]

HeadFlag = Literal["linear", "ridge", "logistic", "hinge", "prototypes"]

DEFAULT_MINUTES = 3.5
CHANGEABLE = {  # what may differ when a run is resumed
    "steps",
    "minutes",
    "device",
    "data_root",
    "out",
    "resume",
    "workers",
    "threads",
    "test_episodes",
    "test_steps",
}


@dataclass(frozen=True)
class RunOptions:
    """Meta-train a few-shot learner, and test it on tasks it has never seen."""

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
    outer_lr: Number = 4e-3
    """Adam's step size on the meta-parameters at the start."""
    meta_batch: Annotated[int, within(1, 10_000)] = 8
    """Tasks in a meta-step."""
    steps: Annotated[int | None, within(1, 10**9)] = None
    """Meta-steps to train for."""
    minutes: Annotated[float | None, within(1e-6, 1_000_000)] = None
    """Wall-clock minutes to train for, with --steps whichever ends first. Without both: 3.5."""
    seed: Seed = 0
    """Seed of the initialisation and of the training episodes."""
    device: str = "auto"
    """auto (CUDA if there is any), cpu, cuda, cuda:1 …"""
    data_root: Path | None = None
    """Where the data is: a folder or archive of images or features, or Omniglot's zips or tree.
    Omniglot is downloaded without it."""
    out: Path | None = None
    """Folder for the files of the run. By default runs/TASK-METHOD-SEED, or with a head that is not
    linear runs/TASK-HEAD-SEED."""
    resume: bool = False
    """Continue the run in --out with its options.
    Only limits, workers, threads and device may change."""
    learn: tuple[str, ...] = ()
    """Inner numbers to learn as well: lr, proximal, lr=per-tensor, lr=per-element (Meta-SGD).
    Heads have lambda, temperature and scale."""
    task_options: tuple[str, ...] = ()
    """Further options of the task: split=vinyals (omniglot), size=32 color=false (folder), …"""
    filters: Annotated[int, within(1, 4096)] = 32
    """Channels of each of the four convolutions."""
    activation: Literal["relu", "softplus", "gelu"] = "relu"
    """Activation of the convolutions.
    A smooth one lets newton-cg reach the argmin; with relu it stops beside a kink."""
    pool: bool = False
    """Halve images by max-pooling instead of strided convolutions, which is slower."""
    hidden: Annotated[tuple[int, ...], within(1, 65_536)] = (40, 40)
    """Widths of the hidden layers for inputs that are not images."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Decay of the outer step size over the steps or minutes given."""
    clip: Annotated[float | None, within(1e-12, MOST)] = None
    """Largest norm of the meta-gradient. By default it is not clipped."""
    vectorize: Literal["auto", "vmap", "loop"] = "auto"
    """How tasks are batched. auto times both once and keeps the faster."""
    chunk_size: Annotated[int | None, within(1, 10_000)] = None
    """Tasks vmapped at a time, to bound memory. By default all."""
    compile: Literal["auto"] | bool = False
    """Whether the functions of a meta-step are compiled, which pays for small networks. With auto
    they run eager where there is no C++ compiler."""
    workers: Annotated[int, within(0, 128)] = 0
    """Processes that draw episodes. With 0, the main process does."""
    threads: Threads = None
    """CPU threads of torch. By default torch's own choice."""
    validate_every: Count = 200
    """Meta-steps between validations."""
    validation_episodes: Annotated[int, within(2, 1_000_000)] = 100
    """Validation tasks, the same each time, rounded up to whole meta-batches."""
    checkpoint_every: Count = 100
    """Meta-steps between checkpoints."""
    test_episodes: Annotated[int, within(2, 1_000_000)] = 600
    """Test tasks at the end."""
    test_steps: Annotated[int, within(0, 100_000)] = 16
    """Inner steps at test. An implicit method takes enough of them to reach the argmin."""
    method_options: Suppressed = field(default_factory=dict)
    """Options of the method that differ from its defaults, by name."""
    inner_options: Suppressed = field(default_factory=dict)
    """Options of the inner optimiser that differ from its defaults, by name."""

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
            if name in ("data_root", "out") and value is not None:
                values[name] = Path(value)
        return cls(**values)

    def dump(self) -> dict[str, Any]:
        """The options as a dictionary for JSON."""
        values = asdict(replace(self, resume=False))
        return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.out or default_folder(self.task, self.approach, self.seed)

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
        for kind in ("method", "inner"):
            options = values.pop(f"{kind}_options")
            values |= {f"{kind}_{name}": value for name, value in options.items()}
        identity: dict[str, Any] = json.loads(json.dumps(values))
        return identity

    def task_arguments(self) -> dict[str, Any]:
        """The arguments of `tasks.load` to test with, those in --task-options included.

        The values there are Python literals, true, false, none, or strings.

        Raises:
            ValueError: An option is not of the form name=value, or is set by another flag.
        """
        arguments: dict[str, Any] = {
            "name": self.task,
            "ways": self.ways,
            "shots": self.shots,
            "queries": self.queries,
            "data_root": self.data_root,
        }
        flags = {name: _flag("task" if name == "name" else name) for name in arguments}
        for item in self.task_options:
            name, equals, text = item.partition("=")
            if not (name and equals):
                raise ValueError(f"--task-options: got {item!r}, expected name=value")
            if name in flags:
                raise ValueError(
                    f"--task-options: got {item!r}, expected a further option; use {flags[name]}"
                )
            arguments[name] = _literal(text)
        return arguments

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


def default_folder(task: str, approach: str, seed: int | str) -> Path:
    """The folder of a run without --out, by its `approach`."""
    return Path("runs", f"{task}-{approach}-{seed}")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _literal(text: str) -> Any:
    if text in ("true", "false", "none"):
        text = text.capitalize()
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
