"""Hyperparameters by gradient steps of a length found on the way, from inner problems solved ever more exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from metaimplicit.hypergradient import hypergradient
from metaimplicit.inner import LBFGS, InnerLoop
from metaimplicit.iterate import Iterate
from metaimplicit.methods import Implicit, Report
from metaimplicit.params import Params
from metaimplicit.problem import BilevelProblem, Stream
from metaimplicit.solvers import CG, SolverState
from metaimplicit.tuning.domains import Domain, FreeMeta, norm

SCHEDULES: dict[str, Callable[[int], float]] = {  # k = 1, 2, …; each has a finite sum
    "exponential": lambda k: 0.9**k,
    "quadratic": lambda k: 1 / k**2,
    "cubic": lambda k: 1 / k**3,
}
PATIENCE = 2  # steps taken back in turn, before the point they went back to is solved again


@dataclass(frozen=True)
class HOAGStep:
    """One inner solve and what followed.

    Attributes:
        outer_loss: g at φ_k.
        norm: ‖dg/dφ‖ in the free coordinates.
        tolerance: ε_k.
        lipschitz: L, the steps being 1/L long for each unit of gradient.
        accepted: whether φ_k lowered g enough, or is a point solved again; if not, φ went back and L grew.
        report: of the inner loop and the solve.
    """

    outer_loss: float
    norm: float
    tolerance: float
    lipschitz: float
    accepted: bool
    report: Report


class HOAG:
    """Hyperparameter optimisation with approximate gradient (Pedregosa 2016, alg. 1).

    At step k: θ to ‖∂f/∂θ‖ ≤ ε_k and the linear system to ‖Au − v‖ ≤ ε_k‖v‖, both from where the last step left them;
    then φ ← φ − p/L with p the hypergradient. With Σε_k < ∞ φ converges to a stationary point (ibid., theorem 2); with
    ε_k constant only to within its error.

    L is observed: ‖p_k − p‖/‖φ_k − φ‖ between φ_k and the point φ accepted before it, but no less than makes the next
    step 4 times as long as this one; the first has length one. Where g(φ_k) > g(φ) − L/4 ‖φ_k − φ‖² by more than the
    tolerances explain, the step is taken back, and L at least doubles (at most × 8). A second time in turn, φ is solved
    again to the present ε_k, as what was found there may have been too good, and L is observed between the two.
    A deviation from ibid., §4, where L is not measured, but found by doubling and shrinking alone; and 1/4 for 1/2, as
    on a quadratic, whose L this finds, a step of 1/L lowers g by L/2 ‖φ_k − φ‖² to the last bit.

    Args:
        problem: its inner loss is given `train`, its outer loss `validation`.
        meta: φ, the values to start from.
        train, validation: the data.
        inner: solves to a tolerance, which is set here.
        schedule: ε_k over `tolerance`, "exponential" 0.9ᵏ, "quadratic" 1/k², "cubic" 1/k³, or a function of k ≥ 1; ε_k
            stays above four times the square root of the working precision.
        tolerance: what the schedule multiplies, > 0.
        solver: CG's cap on its steps; its tolerance is set here.
        domains: of the hyperparameters, as for `Tuner`.

    Raises:
        ValueError: an option out of range; whatever `hypergradient` refuses.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        meta: Params,
        train: Any,
        validation: Any,
        *,
        inner: InnerLoop | None = None,
        schedule: Literal["exponential", "quadratic", "cubic"] | Callable[[int], float] = "cubic",
        tolerance: float = 0.1,
        solver: CG | None = None,
        domains: Mapping[str, Domain] | None = None,
    ) -> None:
        if not callable(schedule) and schedule not in SCHEDULES:
            raise ValueError(
                f"schedule: got {schedule!r}, expected one of {', '.join(SCHEDULES)}, or a function"
            )
        if not tolerance > 0:
            raise ValueError(f"tolerance: got {tolerance}, expected a number > 0")
        self.problem, self.inner, self.solver = (
            problem,
            inner or LBFGS(),
            solver or CG(max_steps=100),
        )
        self.train, self.validation = train, validation
        self.schedule, self.tolerance = (
            schedule if callable(schedule) else SCHEDULES[schedule],
            tolerance,
        )
        self.free = FreeMeta(meta, domains)
        self.end: Iterate | None = None
        self.state = SolverState()
        self.lipschitz = math.nan  # until the first gradient
        self.steps = 0
        self._last: _Point | None = None  # accepted
        self._rejected: list[_Point] = []  # since then

    @property
    def meta(self) -> Params:
        """φ as it stands, detached."""
        return self.free.values()

    @property
    def params(self) -> Params:
        """θ of the last inner solve, `{name: [*shape]}`; ValueError before the first."""
        if self.end is None:
            raise ValueError("params: there are none before the first step")
        return self.end.single

    def step(self) -> HOAGStep:
        """One inner solve, and a step of φ forward or back.

        Raises:
            FloatingPointError: a hypergradient with a NaN or an Inf; nothing was changed.
        """
        # near the square root of the working precision the line search cannot tell losses apart
        floor = 4 * torch.finfo(next(iter(self.free.tensors.values())).dtype).eps ** 0.5
        epsilon = max(self.tolerance * self.schedule(self.steps + 1), floor)
        inner = self.inner.updated(tol=epsilon)
        found = hypergradient(
            self.problem,
            self.meta,
            Stream(lambda t: self.train if t < inner.steps else self.validation),
            inner=inner,
            method=Implicit(replace(self.solver, tol=min(epsilon, 1.0)), batch=self.train),
            state=self.state,
            start=self.end,
        )
        g, slope = found.outer_loss.item(), self.free.pull_back(found.grads)
        length = norm(slope)
        if not math.isfinite(length + g):
            raise FloatingPointError(
                f"step {self.steps}: got a hypergradient of norm {length} at outer loss {g}, expected finite numbers; "
                "nothing was changed"
            )
        self.end, self.state = found.end, found.report.state
        here = _Point(
            {n: x.detach().clone() for n, x in self.free.tensors.items()}, slope, g, epsilon
        )
        accepted, self.lipschitz = self._judge(here)
        if accepted:
            self._rejected, self._last = [], here
        else:
            self._rejected.append(here)
        self.steps += 1
        self._move()
        return HOAGStep(g, length, epsilon, self.lipschitz, accepted, found.report)

    def _judge(self, here: _Point) -> tuple[bool, float]:
        """Whether to stay here, and the next L."""
        last = self._last
        if last is None:
            return True, max(norm(here.slope), 1e-12)
        if len(self._rejected) == PATIENCE:  # this is `last` again, solved better
            return True, self._observed(here, self._rejected[-1])
        seen = self._observed(here, last)
        if self._sufficient(last, here):
            return True, seen
        return False, min(max(seen, 2 * self.lipschitz), 8 * self.lipschitz)

    def _observed(self, here: _Point, other: _Point) -> float:
        """L between two points, but no less than makes a step from here 4 times as long as their distance."""
        moved = norm(_minus(here.at, other.at))
        if moved == 0:  # projected back to where it was
            return self.lipschitz
        return max(norm(_minus(here.slope, other.slope)), norm(here.slope) / 4, 1e-12) / moved

    def _move(self) -> None:
        """φ to where the next inner problem is solved."""
        assert self._last is not None
        length = 0.0 if len(self._rejected) == PATIENCE else 1 / self.lipschitz
        with torch.no_grad():
            for name, x in self.free.tensors.items():
                x.copy_(self._last.at[name] - length * self._last.slope[name])
        self.free.project()

    def _sufficient(self, last: _Point, here: _Point) -> bool:
        moved = norm(_minus(here.at, last.at))
        if moved == 0:
            return True
        # ibid., §4: what inexact solves may add
        slack = here.tolerance / 4 + last.tolerance * (1 / 4 + self.lipschitz) * moved
        return here.loss <= last.loss + slack - self.lipschitz / 4 * moved**2


@dataclass(frozen=True)
class _Point:
    """φ in free coordinates, and p, g and ε there."""

    at: Params
    slope: Params
    loss: float
    tolerance: float


def _minus(a: Params, b: Params) -> Params:
    return {name: x - b[name] for name, x in a.items()}
