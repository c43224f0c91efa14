"""The options of a run: a typed command line and a config file in one."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch

from metaimplicit.methods import make_method


@dataclass(frozen=True)
class Options:
    """Meta-train a few-shot learner and test it. Defaults depend on the task; shown are those of glyphs."""

    task: str = "glyphs"
    """Where tasks come from: one of the tasks listed above. Others than glyphs have other defaults."""
    ways: int = 5
    """Classes in a task."""
    shots: int = 1
    """Support examples of a class that a task adapts on (sinusoid: points; default 10)."""
    queries: int = 5
    """Query examples of a class that it is judged on (folder, learn2learn: default 15; sinusoid: points, 10)."""
    method: str = "cg"
    """How the meta-gradient is taken: unrolled (MAML), truncated, first-order, reptile; or implicitly (iMAML) by a
    solver, cg, auto, neumann, nystrom, dense … (any other word lists them all; sinusoid: unrolled)."""
    solver_steps: int = 5
    """Products of CG, terms of Neumann, or inner steps that truncated keeps (default 2; sinusoid's CG: 10)."""
    rank: int = 10
    """Columns that Nystrom samples."""
    rho: float | None = None
    """Damping of Nystrom; by default 0 beside a proximal term, else 0.01."""
    curvature: Literal["gauss-newton", "hessian"] = "gauss-newton"
    """What implicit methods invert; the Hessian of a few-shot support loss is indefinite."""
    damping: float = 0.0
    """Added to the curvature of implicit methods."""
    scale: float | None = None
    """Step of neumann, soba and amigo (by default from the curvature), and of t1-t2 (1)."""
    penalty: float = 10.0
    """λ of f2sa."""
    inner_steps: int = 4
    """Inner steps of training (sinusoid: 1; implicit methods: omniglot 8, sinusoid 32)."""
    inner_lr: float = 0.5
    """Inner step size (sinusoid: 0.01; implicit methods: omniglot 0.3, sinusoid 0.02)."""
    proximal: float = 0.1
    """λ of λ/2 ‖θ − φ‖² in the inner loss (omniglot, sinusoid: 0.5; 0 with a method that is not implicit)."""
    inner_optimizer: Literal[
        "gradient-descent", "momentum", "adam", "adamw", "rmsprop", "adagrad", "newton-cg"
    ] = "gradient-descent"
    """The inner loop's optimiser; momentum is SGD with 0.9 (sinusoid with an implicit method: adam). newton-cg, for
    implicit methods, takes no --inner-lr."""
    inner_cg_steps: int = 3
    """Products with the Hessian in a step of newton-cg, at most."""
    outer_lr: float = 4e-3
    """Adam's step size on the meta-parameters at the start (sinusoid: 0.001, implicit methods 0.002)."""
    meta_batch: int = 8
    """Tasks in a meta-step (sinusoid: 25)."""
    steps: int | None = None
    """Meta-steps to train for."""
    minutes: float | None = None
    """Wall-clock minutes to train for; with --steps, whichever ends first. Neither given: 3.5 minutes."""
    seed: int = 0
    """Of the initialisation and the training episodes."""
    device: str = "auto"
    """auto takes CUDA where there is any; else cpu, cuda, cuda:1 …"""
    data_root: Path | None = None
    """Where the data is: a folder or zip of images, or Omniglot's zips or tree (downloaded if not given)."""
    out: Path | None = None
    """Folder for what the run leaves; by default runs/TASK-METHOD-SEED."""
    resume: bool = False
    """Go on with the run in --out, with its options; only limits, workers, threads and device may change."""
    learn: tuple[str, ...] = ()
    """Inner numbers to learn, too: lr, proximal, lr=per-tensor, lr=per-element (Meta-SGD)."""
    task_options: tuple[str, ...] = ()
    """Further options of the task, such as split=vinyals (omniglot), size=32 color=false (folder)."""
    filters: int = 32
    """Channels of each of the four convolutions."""
    activation: Literal["relu", "softplus", "gelu"] = "relu"
    """Of the convolutions; a smooth one brings newton-cg to the argmin, where relu leaves it beside a kink."""
    pool: bool = False
    """Halve images by max-pooling, not by strided convolutions: slower."""
    hidden: tuple[int, ...] = (40, 40)
    """Widths of the network for inputs that are not images."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Of the outer step size, over the steps or minutes given."""
    clip: float | None = None
    """Largest norm of the meta-gradient; by default any."""
    vectorize: Literal["auto", "vmap", "loop"] = "auto"
    """How tasks are batched; auto times both once and keeps the faster."""
    chunk_size: int | None = None
    """Tasks vmapped at a time, to bound memory; by default all."""
    workers: int = 0
    """Processes that draw episodes; 0, the main one."""
    threads: int | None = None
    """CPU threads of torch; by default torch's choice."""
    strict: bool = False
    """Stop on negative curvature or a broken solve, where the default warns once and goes on."""
    validate_every: int = 200
    """Meta-steps between validations (sinusoid: 1000)."""
    validation_episodes: int = 100
    """Validation tasks, the same each time; whole meta-batches of them."""
    checkpoint_every: int = 100
    """Meta-steps between checkpoints (sinusoid: 1000)."""
    test_episodes: int = 600
    """Test tasks at the end."""
    test_steps: int = 16
    """Inner steps at test: enough for an implicit method's argmin (sinusoid 64); other methods: 4 (sinusoid 10)."""

    @classmethod
    def of(cls, task: str, method: str | None = None) -> Options:
        """The defaults of a task and a method; None, the task's own method.

        Raises:
            ValueError: an unknown method.
        """
        options = cls(task=task, **_TASKS.get(task, {"queries": 15}))
        if method is not None:
            options = replace(options, method=method)
        if make_method(options.method).reach == {
            "loss"
        }:  # implicit, or of its kind: it needs the proximal term
            return replace(options, **_IMPLICIT.get(task, {}))
        if options.method == "truncated":
            options = replace(options, solver_steps=min(2, options.inner_steps))
        return replace(
            options,
            proximal=0.0,
            test_steps=min(10 if task == "sinusoid" else 4, options.test_steps),
        )

    @classmethod
    def load(cls, stored: Mapping[str, Any]) -> Options:
        """From what `asdict` and JSON made of one; ValueError on a name that is not an option."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(stored) - known):
            raise ValueError(
                f"options: got {', '.join(unknown)}, which this version does not know; use the run's own"
            )
        values: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in stored.items()
        }
        values |= {
            name: Path(values[name])
            for name in ("data_root", "out")
            if values.get(name) is not None
        }
        return cls(**values)

    def dump(self) -> dict[str, Any]:
        """A dictionary for JSON."""
        values = asdict(replace(self, resume=False))
        return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}

    @property
    def folder(self) -> Path:
        """Where the run leaves its files."""
        return self.out or Path("runs", f"{self.task}-{self.method}-{self.seed}")

    def resolved(self) -> Options:
        """Limit and folder filled in; ValueError for numbers that nothing else checks."""
        for name, least in {"seed": 0, "validate_every": 1, "validation_episodes": 2, "checkpoint_every": 1,
                            "test_episodes": 2, "test_steps": 0, "workers": 0, "threads": 1}.items():  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(
                    f"--{name.replace('_', '-')}: got {value}, expected at least {least}"
                )
        for name, value in asdict(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(
                    f"--{name.replace('_', '-')}: got {value}, expected a finite number"
                )
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"--clip: got {self.clip}, expected a norm > 0")
        minutes = 3.5 if self.steps is None and self.minutes is None else self.minutes
        return replace(self, minutes=minutes, out=self.folder)

    def changed(self, other: Options) -> list[str]:
        """The options that must stay as they are for a run to be resumed, and do not."""
        return [
            f.name
            for f in fields(self)
            if f.name not in _FREE and getattr(self, f.name) != getattr(other, f.name)
        ]

    def torch_device(self) -> torch.device:
        """The device meant; ValueError if there is no such."""
        return find_device(self.device)

    @property
    def test_seed(self) -> int:
        """Of the test episodes: no other stream of the run has it."""
        return self.seed + 1_000_000

    def task_arguments(self) -> dict[str, Any]:
        """What `tasks.load` takes; --task-options are Python literals, true, false, none, or strings."""
        found: dict[str, Any] = {
            "name": self.task,
            "ways": self.ways,
            "shots": self.shots,
            "queries": self.queries,
            "data_root": self.data_root,
        }
        for item in self.task_options:
            name, equals, text = item.partition("=")
            if not (name and equals):
                raise ValueError(f"--task-options: got {item!r}, expected name=value")
            if name in _FLAGS:
                raise ValueError(
                    f"--task-options: got {item!r}, expected an option of its own; use --{_FLAGS[name]}"
                )
            try:
                found[name] = ast.literal_eval(
                    text.capitalize() if text in ("true", "false", "none") else text
                )
            except (ValueError, SyntaxError):
                found[name] = text
        return found


def find_device(name: str) -> torch.device:
    """The device of a --device: "auto" takes CUDA where there is any.

    Raises:
        ValueError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"--device: got {name!r}, expected auto, cpu or a CUDA device here ({reason})"
        ) from error
    return device


_FLAGS = {
    "name": "task",
    "ways": "ways",
    "shots": "shots",
    "queries": "queries",
    "data_root": "data-root",
}
_FREE = (
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
)
_IMPLICIT: dict[str, dict[str, Any]] = {  # what brings the inner loop near the argmin
    "omniglot": {"inner_steps": 8, "inner_lr": 0.3, "proximal": 0.5},
    "sinusoid": {
        "inner_optimizer": "adam",
        "inner_steps": 32,
        "inner_lr": 0.02,
        "proximal": 0.5,
        "solver_steps": 10,
        "outer_lr": 2e-3,
        "test_steps": 64,
    },
}
_TASKS: dict[str, dict[str, Any]] = {
    "glyphs": {},
    "omniglot": {},
    "sinusoid": {
        "shots": 10,
        "queries": 10,
        "method": "unrolled",
        "inner_steps": 1,
        "inner_lr": 0.01,
        "outer_lr": 1e-3,
        "meta_batch": 25,
        "validate_every": 1000,
        "checkpoint_every": 1000,
        "test_steps": 10,
    },
}
