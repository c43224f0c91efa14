"""A solver of your own: steepest descent for A u = v, used by an implicit method.

A solver sees only an operator. Right-hand sides come with norm one, one for each task.

python scripts/examples/own_solver.py           # a few seconds
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from metaimplicit import GradientDescent, Implicit, MetaLearner
from metaimplicit.solvers import LinearSystem, Solution, Solver, Status


@dataclass(frozen=True)
class SteepestDescent(Solver):
    """u ← u + α r with r = v − A u and α = rᵀr / rᵀAr, `steps` times from zero."""

    steps: int = 20

    def solve_unit(self, system: LinearSystem) -> Solution:
        """Solve A u = b, where b has norm one for each task."""
        b = system.b
        u = torch.zeros_like(b)
        r = b
        smallest = torch.full((len(b),), torch.inf, dtype=b.dtype)
        for _ in range(self.steps):
            ar = system.operator.matvec(r)
            rr = (r * r).sum(dim=-1)
            curvature = (r * ar).sum(dim=-1)
            smallest = torch.minimum(smallest, curvature / rr)
            alpha = (rr / curvature).unsqueeze(-1)
            u = u + alpha * r
            r = r - alpha * ar
        tasks = len(b)
        return Solution(
            value=u,
            status=torch.full((tasks,), int(Status.MAX_STEPS)),
            residual=r.norm(dim=-1),
            products=self.steps,
            needed=torch.full((tasks,), self.steps),
            rayleigh=smallest,
        )


def main() -> float:
    """Compare the meta-gradient with that of a dense solve; return the relative error."""
    gradients = []
    methods: list[str | Implicit] = [Implicit(SteepestDescent(steps=40)), "dense"]
    for method in methods:
        torch.manual_seed(0)
        labels = torch.arange(4).repeat(3, 1)
        support = torch.randn(3, 4, 6), labels
        query = torch.randn(3, 4, 6), labels
        model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
        inner = GradientDescent(steps=20, lr=0.1)
        learner = MetaLearner(
            model,
            F.cross_entropy,
            inner=inner,
            method=method,
            proximal=0.5,
        )
        learner.backward(SimpleNamespace(support=support, query=query))
        gradients.append(
            torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        )
    error = float((gradients[0] - gradients[1]).norm() / gradients[1].norm())
    print(f"relative error against the dense solve: {error:.1e}")
    return error


if __name__ == "__main__":
    main()
