"""The defaults of train.py that depend on other options."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from command_line.options import HeadFlag, NetworkFlag, RunOptions
from metaimplicit.methods import known_options, make_method
from tasks import family_kind

Settings = dict[str, Any]

# A family without a row in this table has `OTHER_TASKS`, or, if it is regression, the rows of
# sinusoid in all tables: the step sizes that suit images diverge on targets of any size.
TASKS: dict[str, Settings] = {
    "glyphs": {},  # the defaults of RunOptions are those of glyphs with an implicit method
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
    },
}
OTHER_TASKS: Settings = {"queries": 15}

NETWORKS: dict[str, Settings] = {
    "conv": {},
    "resnet-12": {"filters": (64, 160, 320, 640), "activation": "leaky-relu"},
    "mlp": {},
}

# Implicit methods need an inner loop that comes near its argmin.
IMPLICIT: dict[str, Settings] = {
    "omniglot": {"inner_steps": 8, "inner_lr": 0.3, "proximal": 0.5},
    "sinusoid": {
        "inner_optimizer": "adam",
        "inner_steps": 32,
        "inner_lr": 0.02,
        "proximal": 0.5,
        "outer_lr": 2e-3,
        "test_steps": 64,
    },
}
IMPLICIT_METHOD: dict[str, Settings] = {"sinusoid": {"solver_steps": 10}}

# All other methods see the initialisation without a proximal term.
NOT_IMPLICIT: dict[str, Settings] = {"sinusoid": {"proximal": 0.0, "test_steps": 10}}
OTHERS_NOT_IMPLICIT: Settings = {"proximal": 0.0, "test_steps": 4}

# A head takes the method and the loop that suit it. The layers before it do not adapt, so that they
# can use running statistics, and learn more from tasks with many classes (Snell et al. 2017).
BESIDE_HEADS: Settings = {"adapt": "head", "norm": "running", "proximal": 0.0, "queries": 5}
TRAIN_WAYS = {  # of the tasks with classes
    "glyphs": 20,
    "omniglot": 20,
    "cifar-fs": 10,
    "fc100": 10,
    "mini-imagenet": 10,
    "folder": None,
    "dataset": None,
}
HEADS: dict[str, Settings] = {
    "ridge": {"method": "auto", "inner_optimizer": "ridge", "learn": ("lambda", "scale")},
    "logistic": {"method": "auto", "inner_optimizer": "newton", "learn": ("lambda", "scale")},
    "hinge": {"method": "auto", "inner_optimizer": "newton", "learn": ("lambda", "scale")},
    "prototypes": {"method": "unrolled", "inner_optimizer": "none", "learn": ("temperature",)},
}
EXACT = ("ridge", "newton", "none")  # loops with no number of steps to choose

INNER: dict[str, Settings] = {"newton-cg": {"cg_steps": 3}}


def default_options(
    task: str,
    method: str | None = None,
    inner_optimizer: str | None = None,
    head: HeadFlag | None = None,
    network: NetworkFlag | None = None,
) -> RunOptions:
    """The defaults of a task, a head, a network, a method and an inner optimiser.

    Args:
        task: The flag of a task. Its rows in the tables are those that `TASKS` says.
        method: The flag of a method. If None, that of the task or the head.
        inner_optimizer: The flag of an inner loop. If None, that of the task, the method or the
            head.
        head: The flag of a head. If None, it is ridge for tasks with classes, unless a method or an
            inner optimiser is given, which suit a linear layer.
        network: The flag of a network. If None, the task's inputs decide.

    Raises:
        ValueError: The task or the method is unknown.
    """
    row = _row_of(task)
    options = RunOptions(task=task, **TASKS.get(row, OTHER_TASKS))
    if network in NETWORKS:
        options = replace(options, network=network, **NETWORKS[network])
    if head is None:
        chosen = method is not None or inner_optimizer is not None or task not in TRAIN_WAYS
        head = "linear" if chosen else "ridge"
    if head in HEADS:
        options = _beside_head(options, head, method)
    else:
        options = _without_head(options, method, row)
    if inner_optimizer is not None:
        options = replace(options, inner_optimizer=inner_optimizer)
    if options.inner_optimizer in EXACT:
        steps = 0 if options.inner_optimizer == "none" else 1
        options = replace(options, inner_steps=1, test_steps=steps)
    return replace(options, inner_options=dict(INNER.get(options.inner_optimizer, {})))


def _row_of(task: str) -> str:
    """The task whose rows in the tables hold for this one."""
    if task not in TASKS and family_kind(task) == "regression":
        return "sinusoid"
    return task


def _beside_head(options: RunOptions, head: HeadFlag, method: str | None) -> RunOptions:
    train_ways = TRAIN_WAYS.get(options.task)
    settings = BESIDE_HEADS | {"head": head, "train_ways": train_ways} | HEADS[head]
    options = replace(options, **settings)
    return options if method is None else replace(options, method=method)


def _without_head(options: RunOptions, method: str | None, row: str) -> RunOptions:
    if method is not None:
        options = replace(options, method=method)
    # These methods see the initialisation through the proximal term alone.
    if "start" not in make_method(options.method).reach:
        known = known_options(options.method, **IMPLICIT_METHOD.get(row, {}))
        return replace(options, **IMPLICIT.get(row, {}), method_options=known)
    return replace(options, **NOT_IMPLICIT.get(row, OTHERS_NOT_IMPLICIT))
