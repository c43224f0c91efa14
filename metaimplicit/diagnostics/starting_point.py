"""Runs of implicit methods from one point, which differ in nothing but the solve."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from metaimplicit.hypergradient import meta_leaves
from metaimplicit.inner import InnerLoop
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods import Adaptation, Gradients, Implicit, Report
from metaimplicit.outer import OuterGradients, outer_gradients
from metaimplicit.params import Params
from metaimplicit.solvers import Dense, LinearSystem, Solution, Solver
from metaimplicit.solvers.direct import direct_solution, solve_by_eigenvalues


@dataclass(frozen=True)
class Run:
    """One run of a method.

    Attributes:
        hypergradient: h = dg/dφ as one vector.
        report: That of the solve.
        is_random: Whether the run drew random numbers.
    """

    hypergradient: Tensor
    report: Report
    is_random: bool


@dataclass(frozen=True)
class StartingPoint:
    """Where the inner loop ended: every method pulls the same v at the same θ back to φ.

    Attributes:
        problem: The lifted problem.
        meta: φ, leaves of autograd.
        adaptation: θ, and what is known of it.
        outer: v = ∂g/∂θ and ∂g/∂φ at θ.
    """

    problem: LiftedProblem
    meta: Params
    adaptation: Adaptation
    outer: OuterGradients

    def direct(self) -> Tensor:
        """∂g/∂φ as one vector."""
        return self._concatenate(self.outer.of_meta)

    def run(self, method: Implicit, *, seed: int) -> Run:
        """Run a method with torch's random state seeded, and restore that state afterwards."""
        with warnings.catch_warnings(), torch.enable_grad(), torch.random.fork_rng():
            warnings.simplefilter("ignore", RuntimeWarning)  # the rows hold the statuses
            torch.manual_seed(seed)
            before = _random_state()
            indirect, report = self._pull_back(method)
            is_random = before != _random_state()
        return Run(self.direct() + self._concatenate(indirect), report, is_random)

    def _pull_back(self, method: Implicit) -> tuple[Gradients, Report]:
        adaptation = method.at_solution(
            self.adaptation.end,
            self.problem,
            self.meta,
            report=self.adaptation.report,
            dependencies=self.adaptation.dependencies,
        )
        return adaptation.pull_back(self.outer.of_params, self.meta)

    def _concatenate(self, gradients: Gradients) -> Tensor:
        """Gradients of φ as one vector, None as zeros."""
        parts = []
        for name, m in self.meta.items():
            gradient = gradients[name]
            if m.requires_grad:
                parts.append((torch.zeros_like(m) if gradient is None else gradient).flatten())
        return torch.cat(parts)


def solve_inner(
    method: Implicit, problem: LiftedProblem, inner: InnerLoop, meta: Params
) -> StartingPoint:
    """Run the inner loop. Any implicit method serves: it matters for the check of its inputs."""
    with torch.enable_grad():
        phi = meta_leaves(meta)
        adaptation = method.adapt(problem, inner, phi)
        outer = outer_gradients(
            problem,
            adaptation.params,
            phi,
            data=problem.at(inner.steps),
        )
    return StartingPoint(problem, phi, adaptation, outer)


def _random_state() -> bytes:
    """That of the CPU, from which every method draws. It is no tensor, which would be measured."""
    return torch.get_rng_state().numpy().tobytes()


class RecordingDense(Solver):
    """A⁻¹b by the eigenvalues of A, which it records.

    Attributes:
        eigenvalues: Those of the last A, in ascending order, `[tasks, n]`.
    """

    eigenvalues: Tensor

    def solve_unit(self, system: LinearSystem) -> Solution:
        """The pseudo-inverse applied to right-hand sides of norm one."""
        matrix = Dense().matrix(system.operator)
        symmetric = 0.5 * (matrix + matrix.mT)
        x, self.eigenvalues, _ = solve_by_eigenvalues(symmetric, system.b)
        return direct_solution(system, x, products=x.shape[1])
