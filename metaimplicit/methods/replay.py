"""Reverse mode that keeps the iterates alone, and linearises each step again on the way back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from metaimplicit.inner import InnerLoop, Trajectory
from metaimplicit.inner.kept_state import KeptState
from metaimplicit.inner.step import align_tasks
from metaimplicit.iterate import Iterate, OptimizerState
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods.base import (
    Adaptation,
    Gradients,
    Method,
    vector_jacobian_product,
)
from metaimplicit.methods.compiled_steps import make_steps
from metaimplicit.methods.report import Report
from metaimplicit.methods.shared import InnerRun
from metaimplicit.methods.step_functions import Cotangents, StepFunctions
from metaimplicit.params import Params, detached
from metaimplicit.problem import StartAtMeta
from metaimplicit.random_state import RandomState, restored_random_state
from metaimplicit.solvers import SolverState

Key = TypeVar("Key")


def replay(
    method: Method,
    problem: LiftedProblem,
    inner: InnerLoop,
    meta: Params,
    *,
    steps: int,
    iterates: bool = False,
) -> Adaptation:
    """θ_T, whose pullback goes through the last `steps` steps, and then as the identity to θ_0.

    Args:
        method: The method, for the report.
        problem: The problem, lifted over the task axis.
        inner: The inner loop, without a `replay_objection`.
        meta: φ, leaves of autograd.
        steps: The number of steps that are differentiated.
        iterates: Whether the parameters are all iterates, `{name: [tasks, T + 1, *shape]}`.
    """
    initial = problem.init(meta)
    functions = make_steps(problem, inner, meta, initial)
    run = _run(functions, _start(problem, initial), differentiated_steps=steps)
    report = Report(method.flag, run.taken, run.gradient_norm)

    def pullback(vectors: Params, _: SolverState) -> tuple[Gradients, Report]:
        # What the outer loss reads of θ_T, or of θ_0 … θ_T.
        seeds: list[Cotangents] = [_of_params(vectors)]
        if iterates:
            count = len(run.moments) + 1
            seeds = [_of_params({n: v[:, t] for n, v in vectors.items()}) for t in range(count)]
        device = next(iter(initial.values())).device
        with torch.enable_grad(), restored_random_state(device):
            cotangents, of_meta = _pull_back(functions, run.moments, seeds)
        functions.warn_if_replay_differed()
        of_start = {name: v for (name, key), v in cotangents.items() if not key and v is not None}
        return _add(
            of_meta,
            _pull_start_back(
                problem,
                initial,
                of_start,
                meta,
            ),
        ), report

    params = run.end.params
    if iterates:
        path = [moment.at.params for moment in run.moments] + [params]
        params = {name: torch.stack([at[name] for at in path], dim=1) for name in params}
    return Adaptation(params, report, functions.dependencies, run.end, pullback)


def run_by_steps(problem: LiftedProblem, inner: InnerLoop, meta: Params) -> InnerRun:
    """The same as `run_inner` without a graph, by step functions."""
    initial = problem.init(meta)
    functions = make_steps(problem, inner, meta, initial)
    run = _run(functions, _start(problem, initial), differentiated_steps=0)
    end = run.end
    trajectory = Trajectory(
        end.params,
        run.taken,
        run.gradient_norm,
        state=end.state,
    )
    return InnerRun(initial, trajectory, functions.dependencies)


@dataclass(frozen=True)
class _Moment:
    """Where the loop stands before a step.

    Attributes:
        number: t.
        at: s_t.
        random: The random state in which the step is taken.
        active: The tasks that the step moves, `[tasks]`. None stands for all of them.
    """

    number: int
    at: Iterate
    random: RandomState
    active: Tensor | None


@dataclass(frozen=True)
class _Run:
    """How a loop went.

    Attributes:
        end: s_T.
        moments: Those before the differentiated steps.
        taken: The number of steps that each task took, `[tasks]`.
        gradient_norm: ‖∂f/∂θ‖ at θ_{T−1}, `[tasks]`.
    """

    end: Iterate
    moments: list[_Moment]
    taken: Tensor
    gradient_norm: Tensor


def _start(problem: LiftedProblem, initial: Params) -> Iterate:
    """Where the loop starts: at the state of the last call's end, if it continues."""
    state = {} if problem.start is None else problem.start.detach().state
    return Iterate(detached(initial), state)


def _run(functions: StepFunctions, start: Iterate, *, differentiated_steps: int) -> _Run:
    """Take the steps of the loop, until no task is active."""
    inner = functions.inner
    inner.check_at(start.params, functions.meta)
    first = next(iter(start.params.values()))
    active = None
    kept = None
    if inner.tol is not None:
        active = torch.ones(len(first), dtype=torch.bool, device=first.device)
        initial = inner.initial_slots(start.params, functions.meta)
        kept = KeptState(start.params, start.state, initial)
    taken = torch.zeros(len(first), dtype=torch.int64, device=first.device)
    moments = []
    at = functions.start(start)
    for t in range(inner.steps):
        random = RandomState.read(first.device)
        end, norm = functions.step(at, t)
        if active is not None and kept is not None and inner.tol is not None:
            active = active & ~(norm <= inner.tol)  # a norm of NaN does not stop a task
            end = Iterate(_choose(active, end.params, at.params), end.state)
            kept.update(end.state, active)
        if t >= inner.steps - differentiated_steps:
            moments.append(_Moment(t, at, random, active))
        at = end
        taken = taken + (1 if active is None else active)
        if active is not None and not bool(active.any()):
            break
    end = functions.finish(at)
    if kept is not None:
        end = replace(end, state=_with_numbers(kept.finish(taken), end.state))
    return _Run(end, moments, taken, norm)


def _pull_back(
    functions: StepFunctions, moments: list[_Moment], seeds: list[Cotangents]
) -> tuple[Cotangents, Gradients]:
    """λ at the first moment, and what φ gains through the steps since.

    Args:
        functions: They have the pull of a step.
        moments: Those before each step.
        seeds: ∂g/∂s at the end alone, or at each moment and at the end.
    """
    *earlier, cotangents = seeds
    of_meta: Gradients = dict.fromkeys(functions.meta)
    for index, moment in reversed(list(enumerate(moments))):
        moment.random.restore()
        moves, stays = _split(cotangents, moment.active)
        # λ_t = (∂Φ_t/∂s)ᵀ λ_{t+1}, and dg/dφ gains (∂Φ_t/∂φ)ᵀ λ_{t+1}.
        cotangents, of_step = functions.pull(moment.at, moment.number, moves)
        cotangents = _add(cotangents, stays)
        of_meta = _add(of_meta, of_step)
        if earlier:
            cotangents = _add(cotangents, earlier[index])
    return cotangents, of_meta


def _pull_start_back(
    problem: LiftedProblem, initial: Params, vectors: Params, meta: Params
) -> Gradients:
    """(∂θ_0/∂φ)ᵀ λ."""
    if isinstance(problem.problem.init, StartAtMeta) and problem.start is None:
        return {name: v.sum(0) for name, v in vectors.items()}
    return vector_jacobian_product({name: initial[name] for name in vectors}, meta, vectors)


def _split(cotangents: Cotangents, active: Tensor | None) -> tuple[Cotangents, Cotangents]:
    """λ of what a step moves, and λ of the parameters of tasks that it leaves as they are."""
    if active is None:
        return cotangents, {}
    moves = dict(cotangents)
    stays = {}
    for (name, key), v in cotangents.items():
        if key == "" and v is not None:
            mask = align_tasks(active, v)
            moves[name, key] = torch.where(mask, v, 0.0)
            stays[name, key] = torch.where(mask, 0.0, v)
    return moves, stays


def _choose(active: Tensor, new: Params, old: Params) -> Params:
    """`new` for the active tasks, `old` for the others."""
    return {name: torch.where(align_tasks(active, p), p, old[name]) for name, p in new.items()}


def _with_numbers(state: OptimizerState, like: OptimizerState) -> OptimizerState:
    """The state with numbers where `like` has them, unless they differ between tasks."""

    def number(value: Any, like: Any) -> Any:
        if not isinstance(value, Tensor) or isinstance(like, Tensor):
            return value
        values = set(value.flatten().tolist())
        return type(like)(values.pop()) if len(values) == 1 else value

    return {
        name: {key: number(x, like[name].get(key, x)) for key, x in slots.items()}
        for name, slots in state.items()
    }


def _of_params(vectors: Params) -> Cotangents:
    return {(name, ""): v for name, v in vectors.items()}


def _add(
    first: Mapping[Key, Tensor | None], second: Mapping[Key, Tensor | None]
) -> dict[Key, Tensor | None]:
    """The sum of gradients by name, of which None and a missing one are zero."""
    total = dict(first)
    for key, value in second.items():
        known = total.get(key)
        total[key] = value if known is None else known if value is None else known + value
    return total
