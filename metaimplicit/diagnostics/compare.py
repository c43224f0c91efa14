"""Inverse curvature–vector products side by side, on one problem, from one state, at equal numbers of products."""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from metaimplicit.diagnostics.memory import LiveBytes
from metaimplicit.hypergradient import outer_gradients
from metaimplicit.inner import InnerLoop
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods import Curvature, Gradients, Implicit, Report
from metaimplicit.params import Params, flatten
from metaimplicit.problem import BilevelProblem
from metaimplicit.solvers import (
    CG,
    MINRES,
    Auto,
    Dense,
    Factored,
    Lanczos,
    LinearSystem,
    Neumann,
    Nystrom,
    NystromCG,
    Solution,
    Solver,
    Status,
)
from metaimplicit.solvers.direct import direct_solution, solve_by_eigenvalues

Make = Callable[[int], Solver]
SOLVERS: dict[str, Make] = {  # of a number of products P
    "cg": lambda p: CG(p, tol=0.0),
    "minres": lambda p: MINRES(p, tol=0.0),
    "lanczos": lambda p: Lanczos(p, tol=0.0),
    "neumann": lambda p: Neumann(terms=max(1, p - Neumann.power_steps)),
    "nystrom": lambda p: Nystrom(rank=p),
    "nystrom-gaussian": lambda p: Nystrom(rank=p, sketch="gaussian"),
    "nystrom-cg": lambda p: NystromCG(rank=(p + 1) // 2, max_steps=max(1, p // 2), tol=0.0),
    "auto": lambda p: Auto(p, tol=0.0, dense=0),
}
# a curvature of their own, whatever the number of products
FACTORED: dict[str, Curvature] = {"kfac": "kfac", "ekfac": "ekfac", "diagonal": "diagonal"}


@dataclass(frozen=True)
class Row:
    """One method at one number of products; medians over the seeds.

    Attributes:
        method: a key of `SOLVERS`, or "kfac", "ekfac" or "diagonal".
        products: P, asked for; a product more may measure the residual. Neumann takes five for its scale, P ≥ 6, and
            "diagonal" always ten.
        error: ‖h − h*‖/‖h*‖ of the hypergradient h, h* from the dense solve of the same curvature at the same θ.
        cosine: of the angle between h and h*.
        residual: the worst of the tasks' ‖v − Au‖/‖v‖, A the method's own.
        status: names of the tasks' statuses, the most frequent first.
        seconds: of the solve and the mixed product.
        mebibytes: the peak of live tensors meanwhile, above what lived before.
        chosen: by "auto".
    """

    method: str
    products: int
    error: float
    cosine: float
    residual: float
    status: str
    seconds: float
    mebibytes: float
    chosen: str = ""


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        rows: of each number of products, best error first.
        size: n, the adapted parameters of a task.
        tasks: how many.
        curvature: what A is made of.
        direct: the error of ∂g/∂φ alone, without any solve.
        smallest, largest: eigenvalues of A over all tasks.
        inner_gradient_norm: the largest of the tasks'; h* is the hypergradient only as far as it is 0.
    """

    rows: list[Row]
    size: int
    tasks: int
    curvature: str
    direct: float
    smallest: float
    largest: float
    inner_gradient_norm: float

    def error(self, method: str, products: int) -> float:
        """The relative error of a method at a number of products; KeyError if it did not run."""
        for row in self.rows:
            if (row.method, row.products) == (method, products):
                return row.error
        raise KeyError((method, products))


def compare(
    problem: BilevelProblem,
    meta: Params,
    data: Any,
    *,
    inner: InnerLoop,
    curvature: Curvature = "hessian",
    damping: float = 0.0,
    methods: Sequence[str] | None = None,
    products: Sequence[int] = (10, 30, 100),
    seeds: int = 5,
    batched: bool = False,
) -> Comparison:
    """Run the inner loop once, and every method from where it ended.

    Args:
        problem, meta, data, inner, batched: as for `hypergradient`.
        curvature, damping: of A, see `Implicit`; not a random one.
        methods: keys of `SOLVERS`, and of `FACTORED` where the problem's `Composite` has a module. None: all.
        products: numbers P of products with A; methods that sketch more than n columns are left out.
        seeds: sketches of which the median counts, ≥ 1.

    Raises:
        ValueError: as `hypergradient`; an unknown method; n too large for a dense solve.
    """
    known = [*SOLVERS, *FACTORED]
    module = getattr(problem.inner_loss, "module", None)
    names = list(methods) if methods is not None else known if module is not None else list(SOLVERS)
    if unknown := sorted(set(names) - set(known)):
        raise ValueError(f"methods: got {', '.join(unknown)}, expected some of {', '.join(known)}")
    if seeds < 1 or min(products) < 1:
        raise ValueError(f"seeds, products: got {seeds}, {tuple(products)}, expected at least 1")
    solver = _Exact()
    exact = Implicit(solver, curvature=curvature, damping=damping)
    lifted = LiftedProblem(problem, data, batched=batched)
    phi = {name: m.detach().requires_grad_(m.is_floating_point()) for name, m in meta.items()}
    with torch.enable_grad():
        found = exact.adapt(lifted, inner, phi)
        _, _, vectors, along = outer_gradients(lifted, found.params, phi, lifted.at(inner.steps))

    def flat(gradients: Gradients) -> Tensor:
        parts = [m if gradients[n] is None else gradients[n] for n, m in zeros.items()]
        return torch.cat([part.flatten() for part in parts])  # type: ignore[union-attr]

    zeros = {n: torch.zeros_like(m) for n, m in phi.items() if m.requires_grad}
    straight = flat(along)

    def pull(method: Implicit, seed: int) -> tuple[Tensor, Report]:
        with warnings.catch_warnings(), torch.enable_grad(), torch.random.fork_rng():
            torch.manual_seed(seed)
            warnings.simplefilter("ignore", RuntimeWarning)  # statuses are in the rows
            indirect, report = method.at_solution(
                found.end, lifted, phi, report=found.report, reads=found.reads
            ).pull_back(vectors, phi)
        return straight + flat(indirect), report

    best, report = pull(exact, 0)
    n = flatten(found.params).shape[1]
    rows = []
    for p in products:
        some = []
        for name in names:
            if name in FACTORED:
                method = Implicit(Factored(), curvature=FACTORED[name], damping=damping)
            elif name.startswith("nystrom") and p > n:
                continue
            else:
                method = replace(exact, solver=SOLVERS[name](p))
            random = name.startswith("nystrom") or name == "diagonal"
            some.append(_row(name, p, method, pull, best, seeds if random else 1))
        rows += sorted(some, key=lambda row: row.error)
    return Comparison(
        rows=rows,
        size=n,
        tasks=lifted.tasks,
        curvature=exact.curvature_name,
        smallest=float(solver.values.min()),
        largest=float(solver.values.max()),
        direct=float((straight - best).norm() / best.norm()),
        inner_gradient_norm=float(report.inner_gradient_norm.max()),
    )


def _row(
    name: str,
    p: int,
    method: Implicit,
    pull: Callable[[Implicit, int], tuple[Tensor, Report]],
    best: Tensor,
    seeds: int,
) -> Row:
    errors, cosines, residuals, seconds, statuses = [], [], [], [], Counter[str]()
    with LiveBytes() as memory:  # and warm up
        pull(method, 0)
    for seed in range(seeds):
        began = time.perf_counter()
        got, report = pull(method, seed)
        difference = float((got - best).norm())  # waits for the device
        seconds.append(time.perf_counter() - began)
        errors.append(difference / float(best.norm()))
        cosines.append(float(torch.nn.functional.cosine_similarity(got, best, dim=0)))
        residuals.append(float(torch.as_tensor(report.residual).max()))
        statuses.update(Status(int(s)).name for s in torch.as_tensor(report.status))
    return Row(
        method=name,
        products=p,
        error=median(errors),
        cosine=median(cosines),
        residual=median(residuals),
        status=", ".join(status for status, _ in statuses.most_common()),
        seconds=median(seconds),
        mebibytes=memory.peak / 2**20,
        chosen=report.chosen,
    )


class _Exact(Dense):
    """A⁻¹b by the eigenvalues of A, which it keeps."""

    values: Tensor

    def solve_unit(self, system: LinearSystem) -> Solution:
        matrix = self.matrix(system.operator)
        x, values, _ = solve_by_eigenvalues(0.5 * (matrix + matrix.mT), system.b)
        object.__setattr__(self, "values", values)
        return direct_solution(system, x, products=x.shape[1])
