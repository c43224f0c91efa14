"""What several methods share: the inner loop, the data at θ*, and the retry under vmap."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from metaimplicit.graph import find_dependencies
from metaimplicit.inner import InnerLoop, Trajectory
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods.base import UNSET, Dependencies, Gradients, vector_jacobian_product
from metaimplicit.methods.report import Report
from metaimplicit.operators import central_difference
from metaimplicit.params import Params, detached
from metaimplicit.problem import Stream
from metaimplicit.random_state import restored_random_state
from metaimplicit.solvers import ADVICE, Solution, Solver, Status

Result = TypeVar("Result")

# What to do where a solution does not solve its equation.
REMEDIES = {
    "argmin": (
        "solve the inner problem more accurately, and check that inner_loss is all that was "
        "minimised. At active constraints and at kinks, as of an ℓ1 term, ∂f/∂θ does not vanish: "
        "use ProximalGradient with 'fixed-point'. For the loop as it is, use 'unrolled'"
    ),
    "root": "solve F = 0 more accurately, and check that F is what was solved",
}


@dataclass(frozen=True)
class InnerRun:
    """What `run_inner` returns.

    Attributes:
        start: θ₀, `{name: [tasks, *shape]}`, with its graph to φ.
        trajectory: The iterates.
        dependencies: What θ_T depends on.
    """

    start: Params
    trajectory: Trajectory
    dependencies: Dependencies


def run_inner(
    problem: LiftedProblem,
    inner: InnerLoop,
    meta: Params,
    *,
    differentiated_steps: int,
    keep_iterates: bool = False,
    detach: bool = False,
) -> InnerRun:
    """Run the inner loop on the inner loss, from θ₀ = init(φ).

    Args:
        problem: The problem, lifted over the task axis. With a `start`, the loop continues there.
        inner: The inner loop.
        meta: φ.
        differentiated_steps: How many of the last steps keep their graph.
        keep_iterates: Whether the trajectory holds all iterates.
        detach: Whether the loop starts from θ₀ without its graph to φ.

    Raises:
        ValueError: The initialisation, a loss or the loop depends on a tensor that requires grad
            and is not in `meta`.
    """
    initial = problem.init(meta)
    dependencies = initial_dependencies(problem, inner, initial, meta)

    def loss(params: Params, t: int) -> Tensor:
        losses = problem.inner(params, meta, problem.at(t))
        if t == 0 or isinstance(problem.data, Stream):
            in_loss, unread = dependencies_of_loss(
                problem,
                losses,
                params,
                meta=meta,
            )
            dependencies.loss.update(in_loss)
            if t == 0:
                dependencies.idle.update(unread)
        return losses

    trajectory = inner.bound_to(problem).run(
        loss,
        detached(initial) if detach else initial,
        meta,
        differentiated_steps=differentiated_steps,
        keep_iterates=keep_iterates,
        state=None if problem.start is None else problem.start.state,
    )
    return InnerRun(initial, trajectory, dependencies)


def initial_dependencies(
    problem: LiftedProblem, inner: InnerLoop, initial: Params, meta: Params
) -> Dependencies:
    """What θ₀ = `initial` and the loop depend on. What the loss depends on is to be added.

    Raises:
        ValueError: θ₀ or a number of the loop depends on a tensor that requires grad and is not in
            `meta`.
    """
    start = find_dependencies(initial.values(), meta, functions=[problem.problem.init])
    inner.check_captured()
    module = getattr(type(inner).take_step, "__module__", None) or ""
    if module.partition(".")[0] == __name__.partition(".")[0]:
        return Dependencies(inner, start)  # these steps read `FromMeta` numbers alone
    in_loop = cache(partial(read_by_step, inner, detached(initial), meta))
    return Dependencies(inner, start, in_loop=in_loop)


def read_by_step(inner: InnerLoop, params: Params, meta: Params) -> set[str]:
    """The meta-parameters that the first step of a loop depends on beside the inner loss.

    A copy of the loop takes it with the gradient θ + 1, and leaves the arguments as they are. If
    the loop cannot take it, nothing is known, and the set is empty.

    Args:
        inner: The inner loop.
        params: θ, `{name: [tasks, *shape]}`.
        meta: φ, tensors of which those that require grad are looked for.
    """
    try:
        loop = deepcopy(inner)
        theta = {name: p.clone() for name, p in params.items()}
        gradients = {name: p + 1 for name, p in theta.items()}
        phi = {name: m.detach().clone().requires_grad_(m.requires_grad) for name, m in meta.items()}
        device = next(iter(theta.values())).device
        with torch.enable_grad(), restored_random_state(device):
            state = loop.initial_slots(theta, phi)
            end, _ = loop.take_step(theta, gradients, state, phi, step=0)
        return find_dependencies(end.values(), phi)
    except Exception:  # of whatever kind the loop raises
        return set()


def dependencies_of_loss(
    problem: LiftedProblem, losses: Tensor, params: Params, *, meta: Params
) -> tuple[set[str], set[str]]:
    """What the inner loss depends on, by one walk along its graph.

    Args:
        problem: The lifted problem.
        losses: The inner losses at θ = `params`, `[tasks]`.
        params: θ, `{name: [tasks, *shape]}`.
        meta: φ, tensors of which those that require grad are looked for.

    Returns:
        The names of the meta-parameters that the loss depends on, and those of the parameters that
        it does not depend on.

    Raises:
        ValueError: It depends on no parameter. Or on a tensor that requires grad and is not in
            `meta`.
    """
    of_params = {("params", name): p for name, p in params.items()}
    of_meta = {("meta", name): m for name, m in meta.items()}
    found = find_dependencies([losses], of_params | of_meta, functions=[problem.problem.inner_loss])
    in_loss = {name for kind, name in found if kind == "meta"}
    unread = {name for name in params if ("params", name) not in found}
    if unread and len(unread) == len(params):
        first = next(iter(params))
        raise ValueError(
            f"inner loss: it depends on no adapted parameter, such as {first!r}, so no step would "
            "move one; compute it from them, without detach() or no_grad()"
        )
    return in_loss, unread


def retry_under_vmap(function: Callable[[LiftedProblem], Result], problem: LiftedProblem) -> Result:
    """`function(problem)`, repeated under vmap if torch needs that.

    Outside of vmap, torch 2.14 cannot take the forward derivative of the gradient of some
    operations. It raises RuntimeError "ZeroTensors are immutable". `mended_derivatives` has one of
    these, `F.mse_loss`.
    """
    try:
        return function(problem)
    except RuntimeError as error:
        if "ZeroTensor" not in str(error):
            raise
        return function(problem.vmapped())


def warn_or_raise(solver: Solver, solution: Solution, *, strict: bool) -> None:
    """Say how a solve failed, if it did.

    Raises:
        FloatingPointError: It failed, and `strict`.
    """
    for status, advice in ADVICE.items():
        if not bool((solution.status == int(status)).any()):
            continue
        message = f"{type(solver).__name__} ended with {status.name}: {advice}"
        if strict:
            raise FloatingPointError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def warn_if_inaccurate(name: str, report: Report) -> None:
    """Warn if a derivative of `argmin` or `root` is not that of a solution.

    These functions return no report, so that nothing else would say it.

    Args:
        name: The function that the warning names, `"argmin"` or `"root"`.
        report: The report of the solve, judged.
    """
    if report.share(Status.MAX_STEPS) and report.residual is not None:
        message = (
            f"{name}: the linear system was left with a residual of {report.residual.max():.1e}; "
            "take more solver steps"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    if report.share(Status.NOT_STATIONARY) and report.relative_leftover is not None:
        cause = f"{report.drift} keeps the loop from settling; " if report.drift else ""
        message = (
            f"{name}: the solution is inexact. It is off by about "
            f"{report.relative_leftover.max():.1e} of its size, and its derivative may be off by "
            f"more; {cause}{REMEDIES[name]}"
        )
        warnings.warn(message, RuntimeWarning, stacklevel=2)


def penalised_inner(
    problem: LiftedProblem, run: InnerRun, meta: Params, data: Any
) -> Callable[[Params], Tensor]:
    """The inner loss of each task at θ, with the weight decay that the inner loop adds to it.

    It is for a method that takes differences around the end of the loop.
    """
    around = problem.with_weights_at(run.trajectory.end.params)

    def loss(params: Params) -> Tensor:
        decay = run.dependencies.decay(params, meta)
        f = around.inner(params, meta, data)
        return f if decay is None else f + problem.penalty(decay, params, meta)

    return loss


def mixed_difference(
    loss: Callable[[Params], Tensor], params: Params, vector: Tensor, meta: Params
) -> Gradients:
    """(∂²ℓ/∂θ∂φ)ᵀ v, as ∂/∂φ of the slope of ℓ along v, by a difference of two gradients in φ.

    Args:
        loss: ℓ of each task, `[tasks]`, as a function of θ, with its graph to φ.
        params: θ, `{name: [tasks, *shape]}`.
        vector: v, `[tasks, n]`.
        meta: φ.
    """
    slope = central_difference(loss, params, vector)
    # Gradients in φ are rounded to the type of φ, before their difference is divided by h.
    read = find_dependencies([slope], meta)
    eps = max((torch.finfo(meta[name].dtype).eps for name in read), default=0.0)
    if eps > torch.finfo(vector.dtype).eps:
        slope = central_difference(loss, params, vector, eps=eps)
    return vector_jacobian_product({"slope": slope}, meta, {"slope": torch.ones_like(slope)})


def reject_half_precision(flag: str, params: Params) -> None:
    """Raise ValueError for a method that subtracts nearly equal numbers, in half precision."""
    for name, p in params.items():
        if torch.finfo(p.dtype).bits < 32:
            raise ValueError(
                f"{flag}: got {name!r} in {p.dtype}, expected float32 or float64, because the "
                "method subtracts nearly equal numbers; use another method"
            )


def data_at_solution(problem: LiftedProblem, batch: Any, name: str) -> Any:
    """The data that derivatives at θ* see: the problem's, or with a `Stream` the method's `batch`.

    Args:
        problem: The lifted problem.
        batch: The data that the method names, or `UNSET`.
        name: The method's name, for errors.

    Raises:
        ValueError: A `Stream` without a batch, or a batch (other than None) without a `Stream`.
    """
    if not isinstance(problem.data, Stream):
        if batch is not UNSET and batch is not None:
            raise ValueError(
                f"{name} batch: got one with data that is not a Stream, expected none: "
                "derivatives at θ* see the data itself"
            )
        return problem.data
    if batch is UNSET:
        raise ValueError(
            f"{name} batch: got none with a Stream, expected the data on which "
            "derivatives at θ* are taken"
        )
    return batch
