"""What a method is: it adapts θ to φ, and pulls a vector at θ* back to φ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from metaimplicit.data import describe_entry
from metaimplicit.inner import InnerLoop
from metaimplicit.iterate import Iterate
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods.report import Report
from metaimplicit.params import Params
from metaimplicit.problem import BilevelProblem, Decay
from metaimplicit.solvers import SolverState

# By name of a meta-parameter. None: no path leads from θ* to it.
Gradients = dict[str, Tensor | None]

# Which batches of a stream a method evaluates more than once.
Rereads = Literal["none", "last", "all"]

# The `batch` of a method that was not given one. None is a valid batch.
UNSET: Any = ...


@dataclass(frozen=True)
class Dependencies:
    """What θ* depends on.

    Attributes:
        inner: The inner loop, whose numbers may be meta-parameters, such as a step size.
        start: The names of the meta-parameters that θ₀ = init(φ) depends on.
        loss: The names of those that the inner loss depends on.
        idle: The names of the parameters that the inner loss does not depend on. They keep their
            initial values, weight decay or not.
        in_loop: Finds the names of those that the step of the inner loop depends on, beside the
            numbers that the loop says it reads.

    Example:
        >>> from metaimplicit import FromMeta, GradientDescent
        >>> inner = GradientDescent(lr=FromMeta("lr"))
        >>> Dependencies(inner, loss={"decay"}).routes("lr")
        {'loop'}
    """

    inner: InnerLoop
    start: set[str] = field(default_factory=set)
    loss: set[str] = field(default_factory=set)
    idle: set[str] = field(default_factory=set)
    in_loop: Callable[[], set[str]] = set

    def routes(self, name: str) -> set[str]:
        """By which of the routes "start", "loss" and "loop" θ* depends on a meta-parameter."""
        depends = {
            "start": name in self.start,
            "loss": name in self.loss,
            "loop": self.inner.reads(name) or name in self.in_loop(),
        }
        return {route for route, does in depends.items() if does}

    def decay(self, params: Params, meta: Params) -> Decay | None:
        """The penalty that the inner loop adds to the loss of the parameters that it moves."""
        strengths = {name: self.inner.decay(meta, name) for name in params if name not in self.idle}
        if not any(isinstance(value, Tensor) or value != 0 for value in strengths.values()):
            return None
        return Decay(strengths)

    def through(self, reads: Mapping[str, set[str]]) -> Dependencies:
        """What θ* depends on if some of the entries are themselves functions of others.

        Args:
            reads: The entries that each of these functions depends on.

        Example:
            >>> from metaimplicit import GradientDescent
            >>> dependencies = Dependencies(GradientDescent(), loss={"features"})
            >>> dependencies.through({"features": {"body"}}).loss
            {'body'}
        """

        def sources(names: set[str]) -> set[str]:
            return set().union(*(reads.get(name, {name}) for name in names))

        return replace(self, start=sources(self.start), loss=sources(self.loss))


ALL_ROUTES = frozenset({"start", "loss", "loop"})


@dataclass(frozen=True)
class Stationarity:
    """F(θ*, φ) = 0, of which all derivatives of θ* follow.

    Attributes:
        residual: F = ∂f/∂θ, `(θ, φ) -> {name: [tasks, *shape]}`, with its graph to both.
        solve: v ↦ A⁻¹ v at θ*, where A stands for ∂F/∂θ.
        is_exact: Whether A is ∂F/∂θ itself, so that the derivatives of the solve are known.
    """

    residual: Callable[[Params, Params], Params]
    solve: Callable[[Params], Params]
    is_exact: bool


@dataclass(frozen=True)
class Adaptation:
    """θ* and its pullback.

    Attributes:
        params: θ*, `{name: [tasks, *shape]}`. If there is no `pullback`, they carry their graph
            to φ.
        report: What is known after the inner loop.
        dependencies: What θ* depends on.
        end: Where the inner loop ended. Another inner loop can continue there.
        pullback: (v, solver state) ↦ ((dθ*/dφ)ᵀ v, the report completed by the solve).
        stationarity: What else is needed for other derivatives of θ*. None if there are none.

    Example:
        One step of size ¼ on f = w² takes w = φ to w − ¼·2w = φ/2, whose derivative is ½.

        >>> from metaimplicit import BilevelProblem, GradientDescent, Unrolled
        >>> problem = BilevelProblem(
        ...     init=lambda meta, data: {"w": meta["phi"]},
        ...     inner_loss=lambda params, meta, data: params["w"].square(),
        ...     outer_loss=lambda params, meta, data: params["w"],
        ... )
        >>> meta = {"phi": torch.tensor(3.0, requires_grad=True)}
        >>> inner = GradientDescent(steps=1, lr=0.25)
        >>> lifted = LiftedProblem(problem, data=None, batched=False)
        >>> adaptation = Unrolled().adapt(lifted, inner, meta)
        >>> gradients, report = adaptation.pull_back({"w": torch.ones(1)}, meta)
        >>> gradients
        {'phi': tensor(0.5000)}
    """

    params: Params
    report: Report
    dependencies: Dependencies
    end: Iterate
    pullback: Callable[[Params, SolverState], tuple[Gradients, Report]] | None = None
    stationarity: Stationarity | None = None

    def pull_back(
        self, vectors: Params, meta: Params, state: SolverState | None = None
    ) -> tuple[Gradients, Report]:
        """(dθ*/dφ)ᵀ v, and the completed report. It frees the graph of `params`.

        Args:
            vectors: v, `{name: [tasks, *shape]}`.
            meta: φ, the tensors that the method adapted to.
            state: Where the solver starts. If None, it starts without one.

        Returns:
            A gradient for each entry of φ, or None where no path leads to it.
        """
        if self.pullback is not None:
            return self.pullback(vectors, state or SolverState())
        return vector_jacobian_product(self.params, meta, vectors), self.report


class Method(ABC):
    """A way to compute (dθ*/dφ)ᵀ v. Subclasses are frozen dataclasses without subclasses.

    Attributes:
        flag: The name that messages give it.
        remedy: What to do about a gradient that it cannot give.
        differentiates_argmin: Whether it differentiates an argmin that an exact inner loop reaches.
        carries_graph: Whether θ* carries its graph to φ. If not, the adaptation has a pullback.

    Example:
        Two of these three can differentiate through the loop's numbers, such as a step size.

        >>> from metaimplicit.methods import METHODS
        >>> [flag for flag in ("unrolled", "forward", "cg") if "loop" in METHODS[flag].reach]
        ['unrolled', 'forward']
    """

    flag: str
    remedy: str = ""
    carries_graph: bool = False
    differentiates_argmin: bool = False

    @property
    def reach(self) -> frozenset[str]:
        """The routes from φ to θ* that it differentiates; see `Dependencies.routes`.

        By default, all of them.
        """
        return ALL_ROUTES

    @property
    def argmin_objection(self) -> str:
        """Why `argmin` cannot use it. By default it can, and this is empty."""
        return ""

    def compile_objection(self, inner: InnerLoop) -> str:
        """Why it has no compiled functions for an inner loop. If empty, it has."""
        return f"the method {self.flag!r} has no compiled functions"

    def prepare(self, problem: BilevelProblem, *, batched: bool) -> BilevelProblem:
        """The problem with the losses as the method evaluates them, by default those it has.

        Args:
            problem: The problem of one task. Its outer loss takes θ*.
            batched: Whether the data are a batch of tasks.

        Returns:
            The problem whose outer loss takes the parameters that `adapt` returns.

        Raises:
            ValueError: The method cannot evaluate it so on a batch of tasks.
        """
        return problem

    @property
    def second_derivatives(self) -> bool:
        """Whether it takes second derivatives, or tangents of gradients, of the inner loss.

        By default, it does.
        """
        return True

    @property
    def rereads(self) -> Rereads:
        """Which batches of a `Stream` it evaluates more than once: "none", "last" or "all".

        The last is the batch that A and the mixed derivative see; the validation batch is one of
        all. A `Tuner` warns of a model that writes into these. By default, it is "none".
        """
        return "none"

    @property
    def forward_mode(self) -> bool:
        """Whether tangents pass through `argmin` (`torch.autograd.forward_ad`).

        By default, they do not.
        """
        return False

    @abstractmethod
    def adapt(self, problem: LiftedProblem, inner: InnerLoop, meta: Params) -> Adaptation:
        """Run the inner loop from `problem.init(meta)`.

        Args:
            problem: The problem, lifted over the task axis.
            inner: The inner loop.
            meta: φ, the tensors that (dθ*/dφ)ᵀ v will be taken with respect to.

        Raises:
            ValueError: The method cannot differentiate this problem or this inner loop.
        """

    def check_inner(self, inner: InnerLoop) -> None:
        """Raise ValueError for an exact inner loop if the method follows the steps of a loop."""
        if inner.exact and not self.differentiates_argmin:
            raise ValueError(
                f"{self.flag}: got {type(inner).__name__}, which solves for its argmin and takes "
                "no steps from the initialisation, expected an implicit method or 'unrolled'; "
                "'auto' solves with the factor that the loop leaves"
            )

    def check_reach(
        self, name: str, dependencies: Dependencies, *, has_direct: bool = False
    ) -> None:
        """Raise ValueError if the method leaves out a route by which θ* depends on an entry of φ.

        It is called for entries whose gradient is None. If no route is left out, None means zero.

        Args:
            name: The entry of φ.
            dependencies: Those of the adaptation.
            has_direct: Whether the outer loss depends on the entry directly. If so, the route
                through the inner loss may be left out: first-order methods keep the direct
                gradient alone.
        """
        if self.reach == ALL_ROUTES:
            return
        missed = dependencies.routes(name) - self.reach
        if has_direct:
            missed.discard("loss")
        if missed:
            raise ValueError(
                f"{self.flag} cannot give the gradient of {describe_entry(name)}: {self.remedy}"
            )


def vector_jacobian_product(
    outputs: Params, meta: Params, vectors: Params, *, retain_graph: bool = False
) -> Gradients:
    """(∂outputs/∂meta)ᵀ vectors, along the graph that `outputs` carry.

    Args:
        outputs: Tensors by name. Those that do not require grad are constants.
        meta: Tensors by name. Those that do not require grad have no gradient.
        vectors: A tensor for each of the outputs, of its shape.
        retain_graph: Whether that graph is kept. It is freed otherwise.

    Returns:
        A gradient for each entry of `meta`, or None where no path leads to it.

    Example:
        >>> phi = {"a": torch.tensor(2.0, requires_grad=True), "b": torch.tensor(1.0)}
        >>> v = {"theta": torch.tensor(1.0)}
        >>> vector_jacobian_product({"theta": phi["a"] ** 3}, phi, v)
        {'a': tensor(12.), 'b': None}
    """
    variable = {name: out for name, out in outputs.items() if out.requires_grad}
    targets = {name: m for name, m in meta.items() if m.requires_grad}
    gradients: Gradients = dict.fromkeys(meta)
    if variable and targets:
        values = torch.autograd.grad(
            list(variable.values()),
            list(targets.values()),
            [vectors[name] for name in variable],
            retain_graph=retain_graph,
            allow_unused=True,
        )
        gradients |= dict(zip(targets, values, strict=True))
    return gradients
