"""From the arguments of a learner to what adapts, how, and which numbers are learnt."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from metaimplicit.inner import InnerLoop, NoSteps, make_inner
from metaimplicit.learner.defaults import with_default_curvature
from metaimplicit.learner.heads import BIAS, WEIGHT, Head, make_head
from metaimplicit.learner.learnable import (
    Learn,
    Learnable,
    make_head_learnable,
    make_learnable,
    proximal_strength,
)
from metaimplicit.methods import Method, make_method
from metaimplicit.params import Adapt, Params, select
from metaimplicit.wrappers import reject_complex, reject_inference_tensors


class Plan(NamedTuple):
    """What adapts, and how.

    Attributes:
        method: The method, with its curvature.
        adapted: The names of the model's parameters that adapt.
        learnable: The inner loop and the proximal term, with the numbers they read from φ.
        head: The head, likewise. None if the outputs of the model count.
    """

    method: Method
    adapted: list[str]
    learnable: Learnable
    head: Head | None


def make_plan(
    model: nn.Module,
    *,
    head: str | Head | None,
    inner: str | InnerLoop | None,
    method: str | Method | None,
    proximal: float | None,
    learn: Learn,
    adapt: Adapt,
    query_loss: Any = None,
) -> Plan:
    """The plan of a learner; see `MetaLearner` for the arguments and their defaults.

    Raises:
        ValueError: An argument is out of range, or does not fit the others.

    Example:
        >>> plan = make_plan(
        ...     nn.Linear(2, 3),
        ...     head="ridge",
        ...     inner=None,
        ...     method=None,
        ...     proximal=None,
        ...     learn=["lambda"],
        ...     adapt=None,
        ... )
        >>> plan.learnable.inner, plan.adapted, list(plan.learnable.logs)
        (Ridge(), [], ['log_lambda'])
    """
    trainable: Params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trainable and (head is None or not learn):
        raise ValueError(
            "model: got no parameter that requires grad, expected some; call "
            "model.requires_grad_(), or learn the numbers of a head, as by learn=['lambda']"
        )
    reject_complex(trainable)
    reject_inference_tensors(model)
    if head is None:
        chosen = with_default_curvature(make_method(method or "unrolled"))
        loop = make_inner(inner or "gradient-descent")
        chosen.check_inner(loop)
        adapted = _select_parameters(model, list(trainable), adapt)
        strength = proximal_strength(proximal, chosen)
        params = {name: trainable[name] for name in adapted}
        learnable = make_learnable(
            learn,
            loop,
            strength,
            method=chosen,
            params=params,
        )
        return Plan(chosen, adapted, learnable, None)

    head = make_head(head)
    chosen = with_default_curvature(make_method(method or head.method))
    loop = make_inner(inner or head.inner)
    chosen.check_inner(loop)
    _check_head(head, chosen, proximal=proximal, query_loss=query_loss)
    _check_names(head, model)
    adapted = _select_beside_head(head, loop, model, adapt, names=list(trainable))
    head, learnable = make_head_learnable(
        learn,
        loop,
        head,
        method=chosen,
        params={name: trainable[name] for name in adapted},
        like=next(model.parameters(), torch.zeros(())),
    )
    return Plan(chosen, adapted, learnable, head)


def _select_parameters(model: nn.Module, names: list[str], adapt: Adapt) -> list[str]:
    """The parameters that `adapt` chooses, by any of the names that a tied one has.

    Args:
        model: The model.
        names: The parameters that may adapt, each by the name that it has in φ.
        adapt: As for `MetaLearner`.
    """
    if adapt is None:
        return names
    name_of = {id(p): name for name, p in model.named_parameters()}
    everywhere = model.named_parameters(remove_duplicate=False)
    of_name = {name: name_of[id(p)] for name, p in everywhere if name_of[id(p)] in names}
    of_name |= {name: name for name in names}
    chosen = {of_name[name] for name in select(of_name, adapt)}
    return [name for name in names if name in chosen]


def _select_beside_head(
    head: Head, inner: InnerLoop, model: nn.Module, adapt: Adapt, *, names: list[str]
) -> list[str]:
    """The names of the model's parameters that adapt beside a head.

    Args:
        head: The head, which adapts itself.
        inner: The inner loop. Where it takes no steps, nothing adapts.
        model: The model.
        adapt: As for `MetaLearner`. If None, the model adapts unless the head is convex.
        names: The parameters of the model that may adapt.

    Raises:
        ValueError: `adapt` leaves out the head, or chooses more for a convex one.
    """
    if adapt is None:
        alone = head.is_convex or isinstance(inner, NoSteps)
        return [] if alone else names
    chosen = _select_parameters(model, [*names, WEIGHT, BIAS], adapt)
    of_model = [name for name in chosen if name not in (WEIGHT, BIAS)]
    if len(chosen) - len(of_model) < 2 or (of_model and head.is_convex):
        expected = "the head alone" if head.is_convex else "the head among them"
        raise ValueError(
            f"adapt: got {chosen} with {type(head).__name__}, expected {expected}, 'head.*'"
        )
    return of_model


def _check_names(head: Head, model: nn.Module) -> None:
    """Raise ValueError if a parameter of the model is called as one of a head beside it."""
    taken = [name for name, _ in model.named_parameters() if name in (WEIGHT, BIAS)]
    if taken and not head.is_convex:
        raise ValueError(
            f"model: got a parameter {taken[0]!r}, which {type(head).__name__} has as well, "
            "expected another name; rename the module 'head' of the model"
        )


def _check_head(head: Head, method: Method, *, proximal: float | None, query_loss: Any) -> None:
    """Check arguments of a learner that a head leaves no room for.

    Raises:
        ValueError: There is a proximal term, or a loss of the query set beside that of a convex
            head, or an implicit method for a head whose start has to be differentiated.
    """
    name = type(head).__name__
    if proximal:
        raise ValueError(
            f"proximal: got {proximal} with {name}, expected none: a head has no initialisation "
            "in φ to stay near"
        )
    if head.is_convex and query_loss is not None:
        raise ValueError(
            f"query_loss: got one with {name}, which has its own loss of the support set, expected "
            "the loss of the query set as `loss`"
        )
    if not head.is_convex and "start" not in method.reach:
        raise ValueError(
            f"method: got {method.flag!r} with {name}, whose start it cannot differentiate, "
            "expected 'unrolled', 'first-order' or another method that reaches the start"
        )
