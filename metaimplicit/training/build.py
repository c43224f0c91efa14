"""From options to a learner, and to the record of what ran."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from metaimplicit.inner import InnerLoop, NewtonCG, make_inner
from metaimplicit.learner import MetaLearner
from metaimplicit.methods import Implicit, Report, known_options, make_method
from metaimplicit.models import MLP, ConvNet
from metaimplicit.training.options import Options


class Family(Protocol):
    """Where tasks come from, as far as a model cares."""

    @property
    def kind(self) -> str: ...

    @property
    def input_shape(self) -> tuple[int, ...]: ...

    @property
    def outputs(self) -> int: ...


def build_learner(options: Options, family: Family) -> MetaLearner:
    """The learner that `options` describe for tasks of `family`, initialised from torch's generator, on its device.

    Raises:
        ValueError: an option out of range, or that does not fit the others.
    """
    device = options.torch_device()
    model: nn.Module
    if len(family.input_shape) == 3:
        model = ConvNet(
            family.input_shape,
            family.outputs,
            filters=options.filters,
            strided=not options.pool,
            activation=options.activation,
        )
    elif len(family.input_shape) == 1:
        model = MLP(family.input_shape[0], family.outputs, hidden=options.hidden)
    else:
        raise ValueError(
            f"task: its inputs have shape {family.input_shape}, expected an image or a vector"
        )
    inner: InnerLoop
    if options.inner_optimizer == "newton-cg":
        inner = NewtonCG(steps=options.inner_steps, cg_steps=options.inner_cg_steps)
    else:
        inner = make_inner(options.inner_optimizer).updated(
            steps=options.inner_steps, lr=options.inner_lr
        )
    method = make_method(
        options.method,
        **known_options(
            options.method,
            solver_steps=options.solver_steps,
            rank=options.rank,
            rho=options.rho,
            curvature="hessian" if options.curvature == "hessian" else None,
            damping=options.damping,
            scale=options.scale,
            penalty=options.penalty,
        ),
    )
    if options.strict and isinstance(method, Implicit):
        method = replace(method, strict=True)
    learn: dict[str, Any] = {
        name: size or "scalar" for name, _, size in (x.partition("=") for x in options.learn)
    }
    return MetaLearner(
        model,
        F.cross_entropy if family.kind == "classification" else F.mse_loss,
        inner=inner,
        method=method,
        proximal=options.proximal,
        learn=learn,
        vectorize=options.vectorize,
        chunk_size=options.chunk_size,
    ).to(device)


def describe(
    options: Options, learner: MetaLearner, report: Report | None = None
) -> dict[str, Any]:
    """What config.json holds: the options, what was chosen for them (as `report` of a step says), what they ran on."""
    device = next(learner.parameters()).device
    return {
        "options": options.dump(),
        "chosen": {
            "vectorize": learner.vectorize,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
            "threads": torch.get_num_threads(),
            "solver": report.chosen if report is not None else "",
        },
        "parameters": sum(p.numel() for p in learner.parameters()),
        "versions": {name: _version(name) for name in ("metaimplicit", "higher", "numpy")}
        | {"torch": str(torch.__version__), "python": platform.python_version()},
        "commit": _commit(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit of this source tree, if it is one; "-dirty" where files differ from it."""
    command = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=40",
    ]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
