"""Hyperparameters by gradient descent, from inner problems that are solved ever more exactly."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch

from metaimplicit.buffers import load_buffers, stored_buffers
from metaimplicit.hypergradient import Hypergradient, hypergradient
from metaimplicit.inner import LBFGS, InnerLoop, make_inner
from metaimplicit.iterate import Iterate
from metaimplicit.methods import Implicit
from metaimplicit.params import Params
from metaimplicit.problem import BilevelProblem, Stream, check_problem
from metaimplicit.solvers import CG, Solver, SolverState
from metaimplicit.tensors import copied_tensors
from metaimplicit.tuning.domains import Domain
from metaimplicit.tuning.free_meta import FreeMeta, total_norm
from metaimplicit.tuning.line_search import LineSearch, Trial
from metaimplicit.tuning.results import HOAGStep
from metaimplicit.tuning.stored_end import (
    check_optimizer,
    model_of,
    moved_tensors,
    read_buffers,
    read_end,
)

SCHEDULES: dict[str, Callable[[int], float]] = {  # of k = 1, 2, …; each has a finite sum
    "exponential": lambda k: 0.9**k,
    "quadratic": lambda k: 1 / k**2,
    "cubic": lambda k: 1 / k**3,
}


class HOAG:
    """Hyperparameter optimisation with approximate gradient (Pedregosa 2016, algorithm 1).

    Step k solves the inner problem until ‖∂f/∂θ‖ ≤ ε_k, and the linear system A u = v = ∂g/∂θ of
    the hypergradient p_k until ‖A u − v‖ ≤ ε_k ‖v‖. Both solves start where those of the last step
    ended. Then, in the free coordinates of `domains`,

        φ_{k+1} = φ_k − p_k/L.

    If Σ ε_k < ∞, φ converges to a stationary point (theorem 2). If ε_k is constant, φ comes only as
    close as that error allows.

    There are four deviations from the paper. Its first tolerance bounds ‖θ_k − θ*‖, which is not
    known; here it bounds the gradient. Its second tolerance is absolute; here it is relative to
    ‖v‖. Its L is found by doubling and shrinking; here it is estimated, as `LineSearch` describes.
    Where φ is at a bound, the line search sees no slope into it.

    Args:
        problem: Its inner loss receives `train` as data, its outer loss `validation`.
        meta: φ to start from, `{name: tensor}`.
        train: The data of the inner loss and of its curvature.
        validation: The data of the outer loss.
        inner: An inner loop that stops at a tolerance, which is set here, or its flag. If None,
            `LBFGS()`.
        schedule: ε_k/`tolerance` as a function of k ≥ 1: `"exponential"` 0.9ᵏ, `"quadratic"` 1/k²,
            `"cubic"` 1/k³, or a function of k. ε_k is at least 4√ε, where ε is the unit round-off
            of φ: below it the line search of the inner loop cannot compare losses.
        tolerance: What the schedule is multiplied by, > 0.
        solver: Solves the linear system, to a tolerance that is set here. If None,
            `CG(max_steps=100)`.
        domains: The domain of each entry of `meta`, by name. An entry without one is `Real`.

    Attributes:
        free: φ in free coordinates.
        line_search: L and the point accepted last.
        end: Where the last inner loop ended. None before the first step.
        state: Where the last linear solve ended.
        steps: The number of steps taken.

    Raises:
        ValueError: An option is out of range, the inner loop or the solver has no tolerance, a
            value lies outside its domain, or no entry of `meta` is a floating-point tensor.

    Example:
        The minimiser of f = (w − 2)² + λw² is w = 2/(1 + λ), so g = (w − 1)² is minimal at λ = 1.

        >>> from metaimplicit.tuning import Positive
        >>> problem = BilevelProblem(
        ...     init=lambda meta, data: {"w": torch.zeros(())},
        ...     inner_loss=lambda params, meta, data: (
        ...         (params["w"] - data).square() + meta["decay"] * params["w"].square()
        ...     ),
        ...     outer_loss=lambda params, meta, data: (params["w"] - data).square(),
        ... )
        >>> hoag = HOAG(
        ...     problem,
        ...     {"decay": torch.tensor(0.1)},
        ...     train=torch.tensor(2.0),
        ...     validation=torch.tensor(1.0),
        ...     domains={"decay": Positive()},
        ... )
        >>> steps = [hoag.step() for _ in range(10)]
        >>> round(hoag.meta["decay"].item(), 2)
        1.0
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        problem: BilevelProblem,
        meta: Params,
        train: Any,
        validation: Any,
        *,
        inner: str | InnerLoop | None = None,
        schedule: Literal["exponential", "quadratic", "cubic"] | Callable[[int], float] = "cubic",
        tolerance: float = 0.1,
        solver: Solver | None = None,
        domains: Mapping[str, Domain] | None = None,
    ) -> None:
        check_problem(problem)
        if not callable(schedule) and schedule not in SCHEDULES:
            known = ", ".join(SCHEDULES)
            raise ValueError(
                f"schedule: got {schedule!r}, expected one of {known}, or a function of the step"
            )
        if not tolerance > 0:
            raise ValueError(f"tolerance: got {tolerance}, expected a number > 0")
        self.problem = problem
        self._model = model_of(problem)
        self.train = train
        self.validation = validation
        self.inner = LBFGS() if inner is None else make_inner(inner)
        if self.inner.exact or not _takes_tolerance(self.inner):
            raise ValueError(
                f"inner: got {type(self.inner).__name__}, expected a loop of steps that stops at a "
                "`tol`, which HOAG sets, such as LBFGS or GradientDescent"
            )
        self.solver: Any = CG(max_steps=100) if solver is None else solver
        # The tolerance of `Nystrom`, None unless given, is that of its sketch.
        has_tolerance = getattr(self.solver, "tol", None) is not None
        if not isinstance(self.solver, Solver) or not has_tolerance:
            raise ValueError(
                f"solver: got {solver!r}, expected one with a tolerance, which HOAG sets, such as "
                "CG(max_steps=100)"
            )
        self.schedule = schedule if callable(schedule) else SCHEDULES[schedule]
        self.tolerance = tolerance
        self.free = FreeMeta(meta, domains).require_coordinates()
        self.line_search = LineSearch()
        self.end: Iterate | None = None
        self.state = SolverState()
        self.steps = 0

    @property
    def meta(self) -> Params:
        """φ at present, detached: the point of the next inner solve."""
        return self.free.values()

    @property
    def params(self) -> Params:
        """A copy of θ of the last inner solve, `{name: [*shape]}`.

        Raises:
            ValueError: No step has been taken.
        """
        if self.end is None:
            raise ValueError("params: there are none before the first step")
        return self.end.single

    @property
    def lipschitz(self) -> float:
        """L of the line search; NaN before the first step."""
        return self.line_search.lipschitz

    @torch.inference_mode(False)
    def step(self) -> HOAGStep:
        """Solve the inner problem at φ once, and move φ.

        Raises:
            FloatingPointError: The outer loss or the hypergradient is not finite. Nothing changes.
            ValueError: The method cannot give a gradient; see `hypergradient`.
        """
        epsilon = self._tolerance_of_step(self.steps + 1)
        buffers = copied_tensors(dict(self._model.named_buffers()))
        result = self._solve(epsilon)
        loss = result.outer_loss.item()
        gradient = self.free.pull_back(result.grads)
        norm = total_norm(gradient)
        if not math.isfinite(norm + loss):
            load_buffers(self._model, buffers)
            raise FloatingPointError(
                f"step {self.steps}: got a hypergradient of norm {norm} at outer loss {loss}, "
                "expected finite numbers; nothing was changed"
            )
        self.end = result.end
        self.state = result.report.state
        self.steps += 1

        point = {name: x.detach().clone() for name, x in self.free.tensors.items()}
        # A slope into a bound never vanishes. It would shorten the steps of all others forever.
        slope = self.free.without_blocked(gradient)
        accepted = self.line_search.add(Trial(point, slope, loss=loss, tolerance=epsilon))
        self.free.load(self.line_search.next_point())
        self.free.project()
        return HOAGStep(
            outer_loss=loss,
            norm=norm,
            tolerance=epsilon,
            lipschitz=self.lipschitz,
            accepted=accepted,
            report=result.report,
        )

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to resume to the same bits.

        These are φ, θ, the buffers of the model, the solver and the line search. Batches and the
        states of random generators are not among them.
        """
        state = {
            "free": {name: free.detach() for name, free in self.free.tensors.items()},
            "end": None if self.end is None else self.end.to_dict(),
            "state": self.state.to_dict(),
            "steps": self.steps,
            "line_search": self.line_search.to_dict(),
            "buffers": stored_buffers(self._model),
        }
        return copied_tensors(state)

    @torch.inference_mode(False)
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to where `state_dict` was taken. θ goes to the device of the model.

        Raises:
            ValueError: The state has hyperparameters of other names or shapes, parameters or
                buffers other than those of the model, or is that of another inner optimiser.
                Nothing changes.
        """
        state = copied_tensors(state)
        self.free.check(state["free"])
        end = read_end(state["end"], self.problem, self.meta)
        check_optimizer(end, self.inner)
        buffers = read_buffers(state.get("buffers"), self._model)
        device = next(iter(self.free.tensors.values())).device
        line_search = LineSearch.from_dict(moved_tensors(state["line_search"], device))
        self.state = SolverState.from_dict(state["state"])
        self.steps = state["steps"]
        self.free.load(state["free"])
        self.end = end
        self.line_search = line_search
        load_buffers(self._model, buffers)

    def _tolerance_of_step(self, k: int) -> float:
        first = next(iter(self.free.tensors.values()))
        smallest = 4 * math.sqrt(torch.finfo(first.dtype).eps)
        return max(self.tolerance * self.schedule(k), smallest)

    def _solve(self, epsilon: float) -> Hypergradient:
        """The hypergradient at φ, with both solves to tolerance ε."""
        inner = self.inner.updated(tol=epsilon)
        solver = replace(self.solver, tol=min(epsilon, 1.0))
        return hypergradient(
            self.problem,
            self.meta,
            Stream(lambda t: self.train if t < inner.steps else self.validation),
            inner=inner,
            method=Implicit(solver, batch=self.train),
            state=self.state,
            start=self.end,
        )


def _takes_tolerance(inner: InnerLoop) -> bool:
    """Whether the loop can be given a tolerance."""
    try:
        inner.updated(tol=1.0)
    except (TypeError, ValueError):
        return False
    return True
