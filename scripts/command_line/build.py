"""From the options of a run to its learner."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from command_line.device import find_device
from command_line.options import RunOptions
from metaimplicit import MetaLearner
from metaimplicit.inner import InnerLoop, make_inner
from metaimplicit.learner.heads import ConvexHead, Head, make_head
from metaimplicit.methods import Method, make_method
from metaimplicit.models import MLP, ConvNet, ResNet12
from tasks import TaskFamily

Network = ConvNet | ResNet12 | MLP


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
    head = build_head(options, family)
    learner = MetaLearner(
        model,
        **build_losses(options, family, head),
        head=head,
        inner=build_inner(options),
        method=build_method(options),
        proximal=options.proximal,
        adapt=what_adapts(options, model),
        learn=learn,
        vectorize=options.vectorize,
        chunk_size=options.chunk_size,
        compile=options.compile is True,  # "auto" is for the plan of the run
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


def build_losses(options: RunOptions, family: TaskFamily, head: Head | None) -> dict[str, Any]:
    """The losses of a run. Only that of the query set has smooth labels.

    Raises:
        ValueError: The targets of the family are no labels.
    """
    smoothing = options.label_smoothing
    if family.kind == "regression":
        if smoothing:
            raise ValueError(
                f"--label-smoothing: got {smoothing} for regression, expected 0; targets that are "
                "values have no labels to smooth"
            )
        return {"loss": F.mse_loss}
    if not smoothing:
        return {"loss": F.cross_entropy}
    query_loss = partial(F.cross_entropy, label_smoothing=smoothing)
    if head is not None and head.is_convex:
        return {"loss": query_loss}  # the head has its own loss of the support set
    return {"loss": F.cross_entropy, "query_loss": query_loss}


def what_adapts(options: RunOptions, model: Network) -> str | None:
    """The patterns of the parameters that adapt, or None for all that can."""
    if options.head != "linear":
        return "head.*" if options.adapt == "head" else None
    return None if options.adapt == "all" else f"{model.head_name}.*"


def build_model(options: RunOptions, family: TaskFamily) -> Network:
    """The network of a run. In front of a head, it ends with features.

    Raises:
        ValueError: A network for images cannot take the inputs of the family, or blocks are to be
            joined in a network that is not conv.
    """
    shape = family.input_shape
    outputs = family.outputs if options.head == "linear" else None
    network = options.network or ("conv" if len(shape) == 3 else "mlp")
    joined = options.joined_blocks
    if joined > 1 and network != "conv":
        raise ValueError(
            f"--joined-blocks: got {joined} for the network {network}, expected 1, or conv"
        )
    if network == "mlp":
        return MLP(shape, outputs, hidden=options.hidden)
    settings: Any = {
        "filters": options.filters,
        "activation": options.activation,
        "norm": options.norm,
    }
    if network == "resnet-12":
        return ResNet12(shape, outputs, **settings)
    return ConvNet(
        shape,
        outputs,
        strided=not options.pool,
        joined=joined,
        **settings,
    )


def build_optimizer(options: RunOptions, learner: MetaLearner) -> torch.optim.Optimizer:
    """The outer optimiser of a run.

    The parameters of the model decay. The numbers that are learnt beside them do not, because they
    are logarithms, such as that of a step size.
    """
    groups: list[dict[str, Any]] = [{"params": learner.parameters()}]
    if options.outer_weight_decay:
        groups = [
            {"params": learner.model.parameters()},
            {"params": learner.learnt.parameters(), "weight_decay": 0.0},
        ]
    settings: Any = {"lr": options.outer_lr, "weight_decay": options.outer_weight_decay}
    if options.outer_optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, **settings)
    kind = torch.optim.AdamW if options.outer_optimizer == "adamw" else torch.optim.Adam
    return kind(groups, **settings)


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
