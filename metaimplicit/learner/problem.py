"""The bilevel problem of few-shot learning, and the path of its inner loop."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metaimplicit.functional import functional_call
from metaimplicit.graph import find_dependencies
from metaimplicit.inner import InnerLoop, Trajectory
from metaimplicit.learner.episodes import Episode
from metaimplicit.learner.losses import MetaLoss
from metaimplicit.lifted import LiftedProblem
from metaimplicit.mended import without_fast_path
from metaimplicit.params import Params
from metaimplicit.problem import BilevelProblem, Composite, Proximal, StartAtMeta

Call = Callable[[Params, Params, Any], Tensor]  # (params, meta, inputs) -> outputs


@dataclass(frozen=True)
class SupportLoss(Composite):
    """A composite whose loss reads φ: its data is the pair (φ, data)."""

    def output_loss(self, outputs: Tensor, meta: Params, data: Any) -> Tensor:
        """The first term of f as a function of the outputs."""
        return self.loss(outputs, (meta, data))


def few_shot_problem(
    call: Call,
    loss: MetaLoss,
    *,
    query_loss: MetaLoss,
    adapted: Sequence[str],
    penalty: Proximal | None,
    model: nn.Module,
    checked: dict[Any, Any] | None = None,
) -> BilevelProblem:
    """min_φ ℓ'(outputs_{θ*}(query)), θ* = argmin_θ ℓ(outputs_θ(support)) + penalty(θ, φ).

    The problem is that of one task. Its data is an `Episode`, or any pair (support, query) of
    (inputs, targets) pairs. Its outer loss returns the query outputs as aux.

    Args:
        call: `(params, meta, inputs) -> outputs`.
        loss: ℓ, the loss of the support set.
        query_loss: ℓ', the loss of the query set.
        adapted: The names of the parameters that adapt. They start at the entries of φ that have
            their names.
        penalty: The proximal term. If None, there is none.
        model: The module that `call` calls, for curvature that looks into layers.
        checked: As in `Composite`, for a learner that builds this problem for every batch.

    Example:
        >>> mse = MetaLoss(nn.functional.mse_loss, "loss")
        >>> problem = few_shot_problem(
        ...     call=lambda params, meta, inputs: params["w"] * inputs,
        ...     loss=mse,
        ...     query_loss=mse,
        ...     adapted=["w"],
        ...     penalty=None,
        ...     model=nn.Identity(),
        ... )
        >>> support = (torch.ones(2), torch.zeros(2))
        >>> meta = {"w": torch.tensor(3.0)}
        >>> problem.inner_loss(problem.init(meta, None), meta, (support, support))
        tensor(9.)
    """

    def support_outputs(params: Params, meta: Params, data: Any) -> Tensor:
        return call(params, meta, Episode.of(*data).support.inputs)

    def support_loss(outputs: Tensor, meta_and_data: Any) -> Tensor:
        meta, data = meta_and_data
        return loss(meta, outputs, Episode.of(*data).support.targets)

    def outer_loss(params: Params, meta: Params, data: Any) -> tuple[Tensor, Tensor]:
        query = Episode.of(*data).query
        outputs = call(params, meta, query.inputs)
        value = query_loss(meta, outputs, query.targets)
        if not isinstance(value, Tensor):
            raise ValueError(
                f"query loss: got {type(value).__name__}, expected a scalar tensor; measure what "
                "else it returns by metric="
            )
        return value, outputs

    inner_loss = SupportLoss(
        support_outputs,
        support_loss,
        penalty=penalty,
        module=model,
        checked={} if checked is None else checked,
    )
    return BilevelProblem(StartAtMeta(adapted), inner_loss, outer_loss)


def call_model(model: nn.Module, params: Params, inputs: Any) -> Tensor:
    """The outputs of the model with the parameters of these names replaced.

    Args:
        model: The model.
        params: Some of its parameters.
        inputs: What it is called with: a tuple is its positional arguments, a dict its keyword
            arguments, and anything else its only argument.

    Raises:
        ValueError: The model does not return one tensor.

    Example:
        >>> model = nn.Bilinear(1, 1, 1, bias=False)
        >>> inputs = (torch.ones(1, 1), torch.tensor([[3.0]]))
        >>> call_model(model, {"weight": torch.tensor([[[2.0]]])}, inputs)
        tensor([[6.]])
    """
    args: tuple[Any, ...] = ()
    kwargs = {}
    if isinstance(inputs, dict):
        kwargs = inputs
    else:
        args = inputs if type(inputs) is tuple else (inputs,)
    is_compiling = torch.compiler.is_compiling()  # within `mended_derivatives`
    try:
        with nullcontext() if is_compiling else without_fast_path:
            outputs = functional_call(model, params, args, kwargs)
    except TypeError:
        _check_arguments(model, args, kwargs)
        raise
    if not isinstance(outputs, Tensor):
        raise ValueError(
            f"model: got a call that returns {type(outputs).__name__}, expected one tensor; "
            "wrap the model"
        )
    return outputs


def _check_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise ValueError if the signature of the model does not take these inputs."""
    try:
        inspect.signature(model.forward).bind(*args, **kwargs)
    except TypeError as error:
        got = f"{len(args)} inputs" if args else f"the inputs {sorted(kwargs)}"
        raise ValueError(
            f"model: got {got}, but its forward has {error}; a tuple holds several inputs, a dict "
            "holds keyword arguments, and two tasks are a list, [task, task]"
        ) from error


def step_counts(steps: int | Sequence[int] | None, inner: InnerLoop) -> list[int]:
    """The numbers of inner steps after which to measure.

    Args:
        steps: 0, 1, …, `steps`, or the numbers themselves. If None, 0 … T. Of a loop that keeps no
            iterates, the first and the last number alone.
        inner: The inner loop, whose T is the default.

    Raises:
        ValueError: A number is negative or not whole, or there is none.

    Example:
        >>> from metaimplicit.inner import GradientDescent
        >>> step_counts(None, GradientDescent(steps=2)), step_counts([5, 1], GradientDescent())
        ([0, 1, 2], [5, 1])
    """
    # Arrays and tensors hold one number or several.
    given: Any = getattr(steps, "tolist", lambda: steps)()
    try:
        if isinstance(given, Sequence):
            counts = [operator.index(count) for count in given]
        else:
            last = inner.steps if given is None else operator.index(given)
            counts = list(range(last + 1))
            if not inner.keeps_iterates and last > 0:
                counts = [0, last]
    except TypeError as error:
        raise ValueError(
            f"steps: got {steps!r}, expected a whole number of inner steps, or a sequence of them"
        ) from error
    if not counts or min(counts) < 0:
        raise ValueError(f"steps: got {steps}, expected at least 0 inner steps")
    return counts


def inner_iterates(
    problem: LiftedProblem,
    inner: InnerLoop,
    meta: Params,
    counts: Sequence[int],
    *,
    originals: Params | None = None,
) -> list[Params]:
    """θ of an inner loop after some numbers of steps, each `{name: [tasks, *shape]}`.

    Args:
        problem: The lifted problem, whose data every step sees.
        inner: The inner loop. One that keeps no iterates is run for each of the numbers.
        meta: φ, tensors without a graph.
        counts: The numbers of steps, ≥ 0.
        originals: The parameters that θ replaces. The inner loss must not depend on them, because
            they stay as they are while θ moves.

    Returns:
        An iterate for each number. If the loop stops early at its `tol`, its last one is taken.

    Raises:
        ValueError: The inner loss depends on one of the `originals`.

    Example:
        >>> from metaimplicit.inner import GradientDescent
        >>> problem = BilevelProblem(
        ...     init=lambda meta, data: {"w": torch.ones(())},
        ...     inner_loss=lambda params, meta, data: data * params["w"].square(),
        ...     outer_loss=lambda params, meta, data: params["w"],
        ... )
        >>> lifted = LiftedProblem(problem, torch.tensor([1.0]), batched=True)
        >>> inner_iterates(lifted, GradientDescent(lr=0.25), {}, [2])[0]["w"].item()
        0.25
    """
    unchecked = dict(originals or {})

    def loss(params: Params, _: int) -> Tensor:
        losses = problem.inner(params, meta, problem.data)
        if unchecked:
            _check_independent(losses, params, unchecked)
            unchecked.clear()
        return losses

    def run(steps: int) -> Trajectory:
        loop = inner.with_steps(max(steps, 1)).bound_to(problem)
        with torch.enable_grad():
            return loop.run(
                loss,
                problem.init(meta),
                meta,
                differentiated_steps=0,
                keep_iterates=inner.keeps_iterates,
            )

    if not inner.keeps_iterates:
        return [run(count).params if count else problem.init(meta) for count in counts]
    iterates = run(max(counts)).iterates
    return [iterates[min(count, len(iterates) - 1)] for count in counts]


def _check_independent(losses: Tensor, params: Params, originals: Params) -> None:
    for name in find_dependencies([losses], originals, params=params.values()):
        raise ValueError(
            f"loss: it depends on the parameter {name!r} of the model itself, which stays as it is "
            "while a copy of it adapts; return what the loss needs from the model, or use proximal "
            "as a penalty"
        )
