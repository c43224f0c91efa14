"""One step of meta-training, which moves nothing if anything is not finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from metaimplicit.learner import EpisodeBatch, MetaLearner, Ranks, Step, name_parts
from metaimplicit.solvers import Status
from metaimplicit.tensors import tensors_in
from metaimplicit.training.log import Values
from metaimplicit.training.metrics import measure_name, to_device
from metaimplicit.training.unsettled import leftover_share


class NonFiniteError(FloatingPointError):
    """NaN or Inf in the data, the loss or the meta-gradient, noticed before a parameter moved.

    Example:
        >>> try:
        ...     raise NonFiniteError("step 7: the query loss is nan")
        ... except FloatingPointError as error:  # catches those of the solvers, too
        ...     print(error)
        step 7: the query loss is nan
    """


def take_step(
    learner: MetaLearner,
    optimizer: torch.optim.Optimizer,
    episodes: EpisodeBatch,
    *,
    ranks: Ranks,
    clip: float | None,
    step: int,
    context: str,
) -> Values:
    """Take one meta-step and return what it measured. Nothing moves if anything is not finite.

    The norm of the meta-gradient, and its clipping, are over the parameters that the optimiser
    moves. All of several processes move alike, and all raise the same error.

    Args:
        learner: The learner.
        optimizer: The optimiser of its parameters, or of some of them.
        episodes: The batch of tasks, on any device, of which each process computes its share.
        ranks: The processes.
        clip: The largest norm of the meta-gradient. If None, it is not clipped.
        step: The number of the step, for errors.
        context: What an error says about the state of the run.

    Raises:
        NonFiniteError: The data, the loss or the meta-gradient holds NaN or Inf.
    """
    _require_finite_data(episodes, step, context)
    optimizer.zero_grad()
    learner.zero_grad()  # the optimiser may move a part of the parameters alone
    device = next(learner.parameters()).device
    share = to_device(ranks.share(episodes), device)
    result = ranks.average(learner, learner.backward(share))
    moved = moved_parameters(learner, optimizer)
    gradients = {name: p.grad for name, p in moved.items() if p.grad is not None}
    norm = torch.nn.utils.get_total_norm(gradients.values())
    own = _read_values(result, norm, measure=measure_name(learner))
    values = ranks.means(own, tasks=len(result.report.inner_steps))
    _require_finite_values(values, gradients, step, context)
    if clip is not None:
        torch.nn.utils.clip_grads_with_norm_(moved.values(), clip, norm)
    optimizer.step()
    return values | {"learning_rate": float(optimizer.param_groups[0]["lr"])}


def moved_parameters(
    learner: MetaLearner, optimizer: torch.optim.Optimizer
) -> dict[str, nn.Parameter]:
    """The parameters of the learner that the optimiser moves, by name.

    Example:
        >>> learner = MetaLearner(nn.Linear(2, 3), nn.functional.cross_entropy)
        >>> list(moved_parameters(learner, torch.optim.SGD([learner.model.bias], lr=0.1)))
        ['model.bias']
    """
    moved = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name: p for name, p in learner.named_parameters() if id(p) in moved}


def _require_finite_data(episodes: EpisodeBatch, step: int, context: str) -> None:
    named = name_parts(episodes)
    for episode in named if isinstance(named, list) else [named]:
        for name, pair in episode._asdict().items():
            for part, tree in pair._asdict().items():
                numbers = [x for x in tensors_in(tree) if x.is_floating_point()]
                if not all(_holds_finite(x) for x in numbers):
                    raise NonFiniteError(
                        f"step {step}: the {name} {part} hold NaN or Inf; {context}. "
                        "Clean the data, then resume"
                    )


def _holds_finite(numbers: Tensor) -> bool:
    """Whether all numbers are finite. A finite sum, which takes a tenth of the time, proves it."""
    return bool(numbers.sum().isfinite()) or bool(numbers.isfinite().all())


def _require_finite_values(
    values: Values, gradients: dict[str, Tensor], step: int, context: str
) -> None:
    if not _is_finite(values["loss"]):
        raise NonFiniteError(
            f"step {step}: the query loss is {values['loss']}; {context}. "
            "Lower the inner step size, or raise proximal"
        )
    if not _is_finite(values["gradient_norm"]):
        names = [name for name, g in gradients.items() if not g.isfinite().all()]
        if not names:
            names = ["its norm overflows"]
        if len(names) > 3:
            names = [*names[:3], "…"]
        raise NonFiniteError(
            f"step {step}: the meta-gradient is not finite ({', '.join(names)}); {context}. Lower "
            "the inner or the outer step size, add damping or proximal, or try another method"
        )


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _read_values(step: Step, norm: Tensor, measure: str) -> Values:
    """The numbers of a step. None for those that it does not have."""
    report = step.report
    negative = None
    if report.status is not None:
        negative = (report.status == int(Status.NEGATIVE_CURVATURE)).double().mean()
    tensors = {
        "loss": step.loss,
        measure: step.accuracy,
        "residual": _mean(report.residual),
        "hessian_residual": _mean(report.hessian_residual),
        "inner_gradient_norm": report.inner_gradient_norm.mean(),
        "leftover": leftover_share(report, step.loss),
        "gradient_norm": norm,
        "negative_curvature": negative,
    }
    present = {name: t.detach().double() for name, t in tensors.items() if t is not None}
    numbers = torch.stack(list(present.values())).tolist()  # one transfer from the device
    return dict.fromkeys(tensors) | dict(zip(present, numbers, strict=True))


def _mean(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.mean()
