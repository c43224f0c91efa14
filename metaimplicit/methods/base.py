"""What a meta-gradient method is: adapt, and pull an outer gradient back to the meta-parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from metaimplicit.graph import find_dependencies
from metaimplicit.inner import InnerLoop, Trajectory
from metaimplicit.iterate import Iterate
from metaimplicit.lifted import LiftedProblem
from metaimplicit.params import Params
from metaimplicit.problem import Stream
from metaimplicit.solvers import SolverState, Status

Result = TypeVar("Result")
UNSET: Any = ...  # of a batch, which may be None
Gradients = dict[str, Tensor | None]  # None: nothing connects this meta-parameter


@dataclass(frozen=True)
class Report:
    """What happened on the way to a hypergradient; tensors are `[tasks]`.

    Attributes:
        method: the method as used, with its solver.
        inner_steps: the steps each task took.
        inner_gradient_norm: ‖∂f/∂θ‖, at θ_T for implicit methods (the theorem wants 0), else at θ_{T−1}.
        curvature: what A is made of; None for methods without a solve, as is all that follows.
        chosen: what `Auto` chose, and why.
        products: products with A executed, each over all tasks.
        residual: ‖v − Au‖/‖v‖ of the solve.
        status: members of `Status`.
        rayleigh: the smallest uᵀAu/uᵀu seen.
        sigma: σ, all of A that is known to be a multiple of the identity.
        rho: ρ, the damping that the solver adds to it.
        error_bound: ‖v − Au‖/σ ≥ ‖u − A⁻¹v‖, which bounds the solve's error (not that of the stationarity, nor
            Gauss–Newton's against the Hessian); None unless A − σI is positive semi-definite and σ > 0.
        state: what makes the next solve of a problem nearby cheaper: the solution, a sketch. Give it to the next call
            of `hypergradient`; save it with a checkpoint.
    """

    method: str
    inner_steps: Tensor
    inner_gradient_norm: Tensor
    curvature: str | None = None
    chosen: str = ""
    products: int = 0
    residual: Tensor | None = None
    status: Tensor | None = None
    rayleigh: Tensor | None = None
    sigma: float = 0.0
    rho: float = 0.0
    error_bound: Tensor | None = None
    state: SolverState = field(default_factory=SolverState, repr=False)

    def share(self, status: Status) -> float:
        """The share of tasks whose solve ended with `status`."""
        return 0.0 if self.status is None else (self.status == int(status)).double().mean().item()


@dataclass(frozen=True)
class Dependencies:
    """The names of the meta-parameters that the inner problem depends on: through θ₀, and through its loss."""

    start: set[str] = field(default_factory=set)
    loss: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Adaptation:
    """θ* and the way back from it.

    Attributes:
        params: `{name: [tasks, *shape]}`; without a `pullback` they carry their graph to `meta`.
        report: of the inner loop.
        reads: what the inner problem depends on.
        end: where the inner loop ended, for another one to go on from.
        pullback: (v, state) ↦ (dθ*/dφ)ᵀ v and the report completed by its solve.
    """

    params: Params
    report: Report
    reads: Dependencies
    end: Iterate
    pullback: Callable[[Params, SolverState], tuple[Gradients, Report]] | None = None

    def pull_back(
        self,
        vectors: Params,
        meta: Params,
        state: SolverState | None = None,
        retain_graph: bool = False,
    ) -> tuple[Gradients, Report]:
        """(dθ*/dφ)ᵀ v for v = `{name: [tasks, *shape]}`, None for meta-parameters that it does not reach."""
        if self.pullback is not None:
            return self.pullback(vectors, state or SolverState())
        return vector_jacobian_product(self.params, meta, vectors, retain_graph), self.report


class Method(ABC):
    """A row of the method table; leaves are frozen dataclasses.

    Attributes:
        flag: its name on command lines.
        reach: what it differentiates with respect to: the "start" of the inner loop, what the inner "loss" reads, the
            numbers of the "loop" itself.
        remedy: what to do about a gradient that it cannot give.
        graph: whether θ* carries its graph to φ, and no pullback.
    """

    flag: str
    reach: frozenset[str] = frozenset({"start", "loss", "loop"})
    remedy: str = ""
    graph: bool = False

    @abstractmethod
    def adapt(self, problem: LiftedProblem, inner: InnerLoop, meta: Params) -> Adaptation:
        """Run the inner loop from `problem.init(meta)`; `meta` are the tensors to differentiate with respect to."""


def run_inner(
    problem: LiftedProblem,
    inner: InnerLoop,
    meta: Params,
    *,
    differentiated_steps: int,
    keep_iterates: bool = False,
    detach: bool = False,
) -> tuple[Params, Trajectory, Dependencies]:
    """Run the inner loop on the problem's inner loss from θ₀ = init(meta), cut off from `meta` if `detach`.

    Returns θ₀ with its graph, the trajectory, and what θ₀ and the loss depend on.
    """
    initial = problem.init(meta)
    reads = Dependencies(find_dependencies(initial.values(), meta, [], [problem.problem.init]))

    def loss(params: Params, t: int) -> Tensor:
        losses = problem.inner(params, meta, problem.at(t))
        if t == 0 or isinstance(problem.data, Stream):
            reads.loss.update(
                find_dependencies([losses], meta, params.values(), [problem.problem.inner_loss])
            )
        return losses

    inner.check_captured()
    start = {name: p.detach() for name, p in initial.items()} if detach else initial
    state = None if problem.start is None else problem.start.state
    return (
        initial,
        inner.run(
            loss,
            start,
            meta,
            differentiated_steps=differentiated_steps,
            keep_iterates=keep_iterates,
            state=state,
        ),
        reads,
    )


def retry_under_vmap(function: Callable[[LiftedProblem], Result], problem: LiftedProblem) -> Result:
    """`function(problem)`; once more under vmap where torch finds the forward derivative of a gradient there alone.

    So it is with `F.mse_loss`: "ZeroTensors are immutable", says torch 2.14 without.
    """
    try:
        return function(problem)
    except RuntimeError as error:
        if "ZeroTensor" not in str(error):
            raise
        return function(problem.vmapped())


def data_at_solution(problem: LiftedProblem, batch: Any, name: str) -> Any:
    """The data that derivatives at θ* see: the problem's own, or beside a `Stream` the `batch` that a method names.

    Raises:
        ValueError: a `Stream` and no batch, or a batch and no `Stream`.
    """
    if not isinstance(problem.data, Stream):
        if batch is not UNSET and batch is not None:
            raise ValueError(
                f"{name} batch: got one with data that is not a Stream, expected none: it sees the data"
            )
        return problem.data
    if batch is UNSET:
        raise ValueError(
            f"{name} batch: got none with a Stream, expected the data that derivatives at θ* are taken on"
        )
    return batch


def vector_jacobian_product(
    outputs: Params, meta: Params, vectors: Params, retain_graph: bool = False
) -> Gradients:
    """(∂outputs/∂meta)ᵀ vectors along the graph that `outputs` carry; None for entries it does not reach."""
    pairs = [(out, vectors[name]) for name, out in outputs.items() if out.requires_grad]
    targets = {name: m for name, m in meta.items() if m.requires_grad}
    if not pairs or not targets:
        return dict.fromkeys(meta)
    gradients = torch.autograd.grad(
        [out for out, _ in pairs],
        list(targets.values()),
        [vector for _, vector in pairs],
        retain_graph=retain_graph,
        allow_unused=True,
    )
    found: Gradients = dict(zip(targets, gradients, strict=True))
    return {name: found.get(name) for name in meta}
