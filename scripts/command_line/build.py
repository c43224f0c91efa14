"""From the options of a run to its learner."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from command_line.device import find_device
from command_line.options import RunOptions
from metaimplicit import MetaLearner
from metaimplicit.inner import InnerLoop, make_inner
from metaimplicit.learner.heads import ConvexHead, Head, make_head
from metaimplicit.methods import Method, make_method
from metaimplicit.models import MLP, ConvNet
from tasks import TaskFamily


def build_learner(options: RunOptions, family: TaskFamily) -> MetaLearner:
    """The learner of a run for tasks of a family, on the run's device.

    It is initialised from torch's random generator.

    Raises:
        ValueError: An option is out of range, or does not fit the others or the family.
    """
    device = find_device(options.device)
    learn: dict[str, Any] = {}
    for item in options.learn:
        name, _, granularity = item.partition("=")
        learn[name] = granularity or "scalar"
    model = build_model(options, family)
    if options.head != "linear" or options.adapt == "head":
        # Convolutions that all tasks share are faster in this format on CPUs.
        model.to(memory_format=torch.channels_last)
    learner = MetaLearner(
        model,
        F.cross_entropy if family.kind == "classification" else F.mse_loss,
        head=build_head(options, family),
        inner=build_inner(options),
        method=build_method(options),
        proximal=options.proximal,
        adapt=what_adapts(options, model),
        learn=learn,
        vectorize=options.vectorize,
        chunk_size=options.chunk_size,
        compile=options.compile,
    )
    return learner.to(device)


def build_head(options: RunOptions, family: TaskFamily) -> Head | None:
    """The head of a run, or None for a linear layer of the model."""
    if options.head == "linear":
        return None
    head = make_head(options.head)
    if family.kind == "regression" and isinstance(head, ConvexHead):
        return replace(head, scale=1.0)  # a scale of scores has no meaning for values
    return head


def what_adapts(options: RunOptions, model: nn.Module) -> str | None:
    """The patterns of the parameters that adapt, or None for all that can."""
    if options.head != "linear":
        return "head.*" if options.adapt == "head" else None
    if options.adapt == "all":
        return None
    return f"{len(model) - 1}.*" if isinstance(model, MLP) else "head.*"


def build_model(options: RunOptions, family: TaskFamily) -> nn.Module:
    """A `ConvNet` for images, an `MLP` for vectors. In front of a head, they end with features.

    Raises:
        ValueError: The inputs of the family are neither.
    """
    axes = len(family.input_shape)
    outputs = family.outputs if options.head == "linear" else None
    if axes == 3:
        return ConvNet(
            family.input_shape,
            outputs,
            filters=options.filters,
            strided=not options.pool,
            activation=options.activation,
            norm=options.norm,
        )
    if axes == 1:
        return MLP(family.input_shape[0], outputs, hidden=options.hidden)
    raise ValueError(
        f"task: got inputs of shape {family.input_shape}, expected an image or a vector"
    )


def build_inner(options: RunOptions) -> InnerLoop:
    """The inner loop of a run. Its step size is that of the options if it has one."""
    inner = make_inner(options.inner_optimizer).with_steps(options.inner_steps)
    numbers: dict[str, Any] = dict(options.inner_options)
    if hasattr(inner, "lr"):
        numbers["lr"] = options.inner_lr
    return inner.updated(**numbers)


def build_method(options: RunOptions) -> Method:
    """The method of a run.

    Raises:
        ValueError: It is unknown, does not have an option, or refuses its value.
    """
    return make_method(options.method, **options.method_options)
