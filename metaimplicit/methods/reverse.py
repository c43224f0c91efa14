"""Reverse mode through the inner loop: through all of its steps, the last ones, or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from metaimplicit.counts import check_count
from metaimplicit.inner import InnerLoop
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods.base import ALL_ROUTES, Adaptation, Method
from metaimplicit.methods.replay import replay
from metaimplicit.methods.report import Report
from metaimplicit.methods.shared import run_inner
from metaimplicit.options import option
from metaimplicit.params import Params
from metaimplicit.problem import BilevelProblem

Memory = Literal["graph", "replay"]

START_ONLY = frozenset({"start"})


@dataclass(frozen=True)
class Unrolled(Method):
    """Reverse mode through the T inner steps (Maclaurin et al. 2015; MAML, Finn et al. 2017).

    It is exact for θ_T. With the graph of all steps, the result of `argmin` can be differentiated
    any number of times.

    Args:
        memory: What is kept of the steps. `"graph"` keeps the graph of each, which takes the memory
            of T forward passes. `"replay"` keeps θ_t and the optimiser's state alone, and takes
            each step again on the way back (Maclaurin et al. 2015, §2), with the random numbers
            that it drew. It costs one more step for each, and gives first derivatives only. A
            warning says so if a step differs, as with buffers that a forward pass writes to.
        iterates: Whether the outer loss receives all iterates θ_0 … θ_T, stacked as
            `[T+1, *shape]`. If False, it receives θ_T.
        weights: w_0 … w_T of a multi-step loss Σ_t w_t g(θ_t) (MAML++, Antoniou et al. 2019, §4).
            With them, the outer loss is written for one θ, and its aux is that of θ_T. They need
            `iterates`. If None, the outer loss receives the iterates stacked, except that of
            `MetaLearner`, whose weights are then 1/(T+1).

    Raises:
        ValueError: `memory` is neither. There are weights without `iterates`. On adapting: the
            outer loss is to receive all iterates, and T varies because the inner loop has a
            tolerance; there is not one weight for each iterate; or the steps of the inner loop
            cannot be taken again.

    Example:
        >>> from metaimplicit import BilevelProblem, GradientDescent
        >>> from metaimplicit.hypergradient import hypergradient
        >>> problem = BilevelProblem(
        ...     init=lambda meta, data: {"w": meta["w"]},
        ...     inner_loss=lambda params, meta, data: params["w"].square(),
        ...     outer_loss=lambda params, meta, data: params["w"],
        ... )
        >>> inner = GradientDescent(steps=2, lr=0.25)
        >>> meta = {"w": torch.tensor(1.0)}
        >>> hypergradient(problem, meta, data=None, inner=inner, method=Unrolled()).grads
        {'w': tensor(0.2500)}
    """

    memory: Memory = "graph"
    iterates: bool = option(False, flag=None)
    weights: Sequence[float] | None = option(None, flag=None)
    flag = "unrolled"
    differentiates_argmin = True

    def __post_init__(self) -> None:
        if self.memory not in get_args(Memory):
            raise ValueError(f"Unrolled memory: got {self.memory!r}, expected 'graph' or 'replay'")
        if self.weights is not None and not self.iterates:
            raise ValueError(
                f"Unrolled weights: got {self.weights} with iterates=False, "
                "expected iterates=True: they weigh the iterates"
            )

    @property
    def carries_graph(self) -> bool:  # type: ignore[override]
        """Whether the graph of the steps is kept."""
        return self.memory == "graph"

    @property
    def forward_mode(self) -> bool:
        """Whether the graph is kept, along which tangents pass."""
        return self.memory == "graph"

    @property
    def argmin_objection(self) -> str:
        """`argmin` has no outer loss that the weights could apply to."""
        return "" if self.weights is None else "weighted for an outer loss"

    def compile_objection(self, inner: InnerLoop) -> str:
        """Whether the outer loss receives all iterates, or the steps cannot be compiled."""
        if self.iterates:
            return "the outer loss of all iterates has no compiled functions"
        return _describe_steps(inner)

    def prepare(self, problem: BilevelProblem, *, batched: bool) -> BilevelProblem:
        """The problem with the outer loss Σ_t w_t g(θ_t), if there are weights."""
        if self.weights is None:
            return problem
        weights = [float(w) for w in self.weights]

        def multi_step_loss(params: Params, meta: Params, data: Any) -> tuple[Tensor, Any]:
            # `params` are stacked iterates, [T + 1, *shape] each.
            total: Any = 0.0
            for t, weight in enumerate(weights):
                iterate = {name: p[t] for name, p in params.items()}
                result = problem.outer_loss(iterate, meta, data)
                loss, aux = result if isinstance(result, tuple) else (result, None)
                total = total + weight * loss
            return total, aux

        return replace(problem, outer_loss=multi_step_loss)

    def adapt(self, problem: LiftedProblem, inner: InnerLoop, meta: Params) -> Adaptation:
        """Run the inner loop with the graph of all its steps, or with their iterates alone."""
        if self.iterates and inner.tol is not None and inner.differentiable:
            raise ValueError(
                f"Unrolled iterates: got an inner loop with tol={inner.tol}, "
                "expected a fixed number of steps; use tol=None"
            )
        if self.weights is not None and len(self.weights) != inner.steps + 1:
            raise ValueError(
                f"Unrolled weights: got {len(self.weights)} for {inner.steps} inner steps, "
                f"expected {inner.steps + 1}, one for each iterate θ_0 … θ_T"
            )
        if self.memory == "replay":
            return self._replay(problem, inner, meta)
        if self.iterates:
            return _stacked_iterates(self, problem, inner, meta=meta)
        return _reverse(self, problem, inner, meta=meta, steps=inner.steps)

    def _replay(self, problem: LiftedProblem, inner: InnerLoop, meta: Params) -> Adaptation:
        if inner.replay_objection:
            raise ValueError(
                f"Unrolled memory: got 'replay' with {type(inner).__name__}, "
                f"{inner.replay_objection}, expected 'graph'"
            )
        steps = inner.steps
        return replay(
            self,
            problem,
            inner,
            meta,
            steps=steps,
            iterates=self.iterates,
        )


@dataclass(frozen=True)
class Truncated(Method):
    """Reverse mode through the last K inner steps (Shaban et al. 2019).

    The T − K steps before them are taken for the identity on the initialisation. What else they
    depend on has no gradient through them.

    Args:
        steps: K, 0 ≤ K ≤ T. With K = T it is `Unrolled`, with K = 0 it is `FirstOrder`.

    Raises:
        ValueError: K is negative or larger than T, the inner loop has a tolerance, or a number of
            a step before the last K is read from φ.

    Example:
        >>> Truncated(steps=3)
        Truncated(steps=3)
    """

    steps: int = option(1, flag="solver_steps")
    flag = "truncated"
    carries_graph = True
    remedy = (
        "with steps=0 it reaches the initialisation alone; give it more steps or use 'unrolled'"
    )

    def __post_init__(self) -> None:
        check_count("Truncated steps", self.steps, least=0)

    @property
    def reach(self) -> frozenset[str]:
        """All routes, but with K = 0 the start alone."""
        return ALL_ROUTES if self.steps else START_ONLY

    @property
    def second_derivatives(self) -> bool:
        """Whether it differentiates a step."""
        return self.steps > 0

    @property
    def forward_mode(self) -> bool:
        """Whether it differentiates a step."""
        return self.steps > 0

    def compile_objection(self, inner: InnerLoop) -> str:
        """Whether the steps cannot be compiled."""
        return _describe_steps(inner)

    def adapt(self, problem: LiftedProblem, inner: InnerLoop, meta: Params) -> Adaptation:
        """Run the inner loop with the graph of its last K steps."""
        if self.steps > inner.steps:
            raise ValueError(
                f"Truncated steps: got {self.steps}, "
                f"expected at most {inner.steps}, the steps of the inner loop"
            )
        if inner.tol is not None and inner.differentiable:
            raise ValueError(
                f"Truncated: got an inner loop with tol={inner.tol}, expected a fixed "
                "number of steps, of which the last are known beforehand; use tol=None"
            )
        skipped = inner.steps - self.steps
        if self.steps > 0 and inner.learns_before(skipped):
            raise ValueError(
                f"Truncated: got an inner loop that reads the numbers of its first {skipped} steps "
                "from meta, expected constants there, since no gradient passes through these "
                "steps; give it more steps or use 'unrolled'"
            )
        return _reverse(self, problem, inner, meta=meta, steps=self.steps)


@dataclass(frozen=True)
class FirstOrder(Method):
    """The outer gradient at θ_T, as that of the initialisation: dθ_T/dθ_0 ≈ I.

    FOMAML (Finn et al. 2017, §5.2). What both losses read keeps its direct gradient ∂g/∂φ alone.

    Example:
        >>> FirstOrder().reach
        frozenset({'start'})
    """

    flag = "first-order"
    carries_graph = True
    reach = START_ONLY
    remedy = (
        "it reaches the initialisation alone, not a step size or a regulariser; "
        "use 'unrolled', or an implicit method for what the inner loss reads"
    )
    second_derivatives = False

    def compile_objection(self, inner: InnerLoop) -> str:
        """Whether the steps cannot be compiled."""
        return _describe_steps(inner)

    def adapt(self, problem: LiftedProblem, inner: InnerLoop, meta: Params) -> Adaptation:
        """Run the inner loop without a graph, but for the identity from θ_0 to θ_T."""
        return _reverse(self, problem, inner, meta=meta, steps=0)


def _describe_steps(inner: InnerLoop) -> str:
    """The inner loop and why its steps cannot be compiled. If empty, they can."""
    objection = inner.compile_objection
    return f"{type(inner).__name__}, {objection}, has no compiled step" if objection else ""


def _reverse(
    method: Method, problem: LiftedProblem, inner: InnerLoop, *, meta: Params, steps: int
) -> Adaptation:
    """θ_T, with the graph of the last `steps` steps, or a pullback where they are compiled."""
    if problem.compiler is not None:
        return replay(method, problem, inner, meta, steps=steps)
    run = run_inner(problem, inner, meta, differentiated_steps=steps)
    trajectory = run.trajectory
    report = Report(method.flag, trajectory.steps, trajectory.gradient_norm)
    return Adaptation(trajectory.params, report, run.dependencies, trajectory.end)


def _stacked_iterates(
    method: Method, problem: LiftedProblem, inner: InnerLoop, *, meta: Params
) -> Adaptation:
    """θ_0 … θ_T as `{name: [tasks, T + 1, *shape]}`, with the graph of all steps."""
    steps = inner.steps
    run = run_inner(
        problem,
        inner,
        meta,
        differentiated_steps=steps,
        keep_iterates=True,
    )
    trajectory = run.trajectory
    params = {
        name: torch.stack([iterate[name] for iterate in trajectory.iterates], dim=1)
        for name in trajectory.params
    }
    report = Report(method.flag, trajectory.steps, trajectory.gradient_norm)
    return Adaptation(params, report, run.dependencies, trajectory.end)
