"""Implicit methods side by side: on one problem, from one state, at equal numbers of products."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from metaimplicit.counts import check_count
from metaimplicit.diagnostics.differences import cosine, relative_error
from metaimplicit.diagnostics.memory import LiveBytes
from metaimplicit.diagnostics.starting_point import RecordingDense, StartingPoint, solve_inner
from metaimplicit.inner import InnerLoop, make_inner
from metaimplicit.methods import METHODS, Curvature, Implicit
from metaimplicit.params import Params, flatten
from metaimplicit.problem import BilevelProblem, check_problem
from metaimplicit.solvers import Status
from metaimplicit.tensors import recordable
from metaimplicit.unsupported import explain_unsupported
from metaimplicit.vectorization import lift


@dataclass(frozen=True)
class Row:
    """One method at one number of products. Its numbers are medians over the seeds.

    Attributes:
        method: A key of `comparable_methods()`.
        products: P, the number of products asked for. One product more may measure the residual.
            Neumann takes five for its scale, so it takes at least six. Methods whose curvature is
            fixed take as many as that needs, for any P.
        error: ‖h − h*‖/‖h*‖ of the hypergradient h, where h* is that of a dense solve of the same
            system at the same θ. It is ‖h‖ if h* is zero.
        cosine: That of the angle between h and h*.
        residual: The largest ‖v − Au‖/‖v‖ over the tasks, with the method's own A.
        status: The names of the tasks' statuses, the most frequent first.
        seconds: The duration of the solve and the mixed product.
        mebibytes: The peak of the memory of tensors in the meantime, above what lived before.
        chosen: What the solver `Auto` chose, and why.

    Example:
        >>> from metaimplicit.inner import GradientDescent
        >>> problem = BilevelProblem(
        ...     init=lambda meta, data: {"w": torch.zeros(2)},
        ...     inner_loss=lambda params, meta, data: (params["w"] - meta["target"]).square().sum(),
        ...     outer_loss=lambda params, meta, data: params["w"].square().sum(),
        ... )
        >>> inner = GradientDescent(steps=20, lr=0.25)
        >>> meta = {"target": torch.ones(2)}
        >>> row = compare(problem, meta, None, inner=inner, methods=["cg"], products=[1]).rows[0]
        >>> row.method, row.products, row.status
        ('cg', 1, 'CONVERGED')
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
    """What `compare` returns.

    Attributes:
        rows: By number of products, the smallest error first.
        size: n, the number of parameters that adapt in one task.
        tasks: The number of tasks.
        curvature: What A is made of.
        direct: The error of ∂g/∂φ alone, without any solve.
        smallest: The smallest eigenvalue of A over all tasks.
        largest: The largest eigenvalue of A over all tasks.
        inner_gradient_norm: The largest over the tasks. Only if it is 0, h* is the hypergradient.

    Example:
        >>> from metaimplicit.inner import GradientDescent
        >>> problem = BilevelProblem(
        ...     init=lambda meta, data: {"w": torch.zeros(2)},
        ...     inner_loss=lambda params, meta, data: (data * params["w"].square()).sum(),
        ...     outer_loss=lambda params, meta, data: (params["w"] - meta["target"]).square().sum(),
        ... )
        >>> meta = {"target": torch.ones(2)}
        >>> data = torch.tensor([0.5, 2.0])
        >>> comparison = compare(problem, meta, data, inner=GradientDescent(), products=[1])
        >>> comparison.size, comparison.smallest, comparison.largest
        (2, 1.0, 4.0)
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
        """The relative error of a method at a number of products. KeyError if it did not run."""
        for row in self.rows:
            if (row.method, row.products) == (method, products):
                return row.error
        raise KeyError((method, products))


def comparable_methods() -> dict[str, Implicit]:
    """The rows of `METHODS` that `compare` runs, by flag.

    They are the implicit methods whose solver takes a budget of products (`Solver.with_budget`),
    and those whose curvature is fixed (K-FAC, EKFAC, the diagonal).

    Example:
        >>> methods = comparable_methods()
        >>> "cg" in methods, "kfac" in methods, "dense" in methods
        (True, True, False)
    """
    return {
        flag: method
        for flag, method in METHODS.items()
        if isinstance(method, Implicit) and (_takes_budget(method) or method.curvature is not None)
    }


@explain_unsupported()
@torch.inference_mode(False)
def compare(
    problem: BilevelProblem,
    meta: Params,
    data: Any,
    *,
    inner: str | InnerLoop,
    curvature: Curvature = "hessian",
    damping: float = 0.0,
    methods: Sequence[str] | None = None,
    products: Sequence[int] = (10, 30, 100),
    seeds: int = 5,
    batched: bool = False,
) -> Comparison:
    """Compare implicit methods: the inner loop runs once, and every method from where it ended.

    Args:
        problem: As for `hypergradient`.
        meta: As for `hypergradient`.
        data: As for `hypergradient`.
        inner: As for `hypergradient`.
        curvature: What A is made of; see `Implicit`. It must not be a random one.
        damping: Added to A, ≥ 0.
        methods: Keys of `comparable_methods()`. If None, all of them; but those whose curvature is
            fixed only if the inner loss is a `Composite` with a module.
        products: Numbers P of products with A, each ≥ 1. Solvers that sketch A are left out where P
            exceeds n.
        seeds: The number of seeds, ≥ 1, over which a method that draws random numbers takes its
            medians. The others run once.
        batched: As for `hypergradient`.

    Raises:
        ValueError: As in `hypergradient`; a method that cannot be compared; n too large for a dense
            solve.

    Example:
        >>> from metaimplicit.inner import GradientDescent
        >>> problem = BilevelProblem(
        ...     init=lambda meta, data: {"w": torch.zeros(2)},
        ...     inner_loss=lambda params, meta, data: (params["w"] - meta["target"]).square().sum(),
        ...     outer_loss=lambda params, meta, data: params["w"].square().sum(),
        ... )
        >>> meta = {"target": torch.ones(2)}
        >>> inner = GradientDescent(steps=20, lr=0.25)
        >>> compare(problem, meta, None, inner=inner, products=[1]).error("cg", 1) < 1e-6
        True
    """
    check_problem(problem)
    inner = make_inner(inner)
    meta = {name: recordable(m) for name, m in meta.items()}
    chosen = _choose_methods(methods, problem)
    budgets = _check_budgets(products)
    check_count("seeds", seeds)
    exact_solver = RecordingDense()
    exact = Implicit(exact_solver, curvature=curvature, damping=damping)
    lifted = lift(problem, meta, data, inner=inner, method=exact, batched=batched, vectorize="auto")
    point = solve_inner(exact, lifted, inner, meta)
    exact_run = point.run(exact, seed=0)
    expected = exact_run.hypergradient
    n = flatten(point.adaptation.params).shape[1]

    rows = []
    for budget in budgets:
        methods_at_budget = {
            flag: _with_budget(method, budget, curvature=curvature, damping=damping)
            for flag, method in chosen.items()
            if budget <= n or not method.solver.sketches
        }
        measured = [
            _measure(flag, method, point, products=budget, expected=expected, seeds=seeds)
            for flag, method in methods_at_budget.items()
        ]
        rows += sorted(measured, key=lambda row: row.error)
    return Comparison(
        rows=rows,
        size=n,
        tasks=point.problem.tasks,
        curvature=exact.curvature_name,
        direct=relative_error(point.direct(), expected),
        smallest=float(exact_solver.eigenvalues.min()),
        largest=float(exact_solver.eigenvalues.max()),
        inner_gradient_norm=float(exact_run.report.inner_gradient_norm.max()),
    )


def _choose_methods(methods: Sequence[str] | None, problem: BilevelProblem) -> dict[str, Implicit]:
    """The methods asked for. If None, those that the problem allows."""
    comparable = comparable_methods()
    if methods is None:
        has_module = getattr(problem.inner_loss, "module", None) is not None
        return {flag: m for flag, m in comparable.items() if has_module or _takes_budget(m)}
    methods = [methods] if isinstance(methods, str) else methods
    unknown = sorted(set(methods) - set(comparable))
    if unknown:
        raise ValueError(
            f"methods: got {', '.join(unknown)}, expected some of {', '.join(comparable)}"
        )
    return {flag: comparable[flag] for flag in methods}


def _check_budgets(products: Sequence[int]) -> list[int]:
    """The numbers of products. ValueError if one of them is out of range, or there are none."""
    budgets = list(products) if isinstance(products, Iterable) else []
    if not budgets:
        raise ValueError(f"products: got {products!r}, expected numbers, such as [10, 30]")
    for budget in budgets:
        check_count("products", budget)
    return budgets


def _takes_budget(method: Implicit) -> bool:
    return method.solver.with_budget(1) is not None


def _with_budget(
    method: Implicit, products: int, *, curvature: Curvature, damping: float
) -> Implicit:
    """A method at a number of products. Its curvature is `curvature` unless it is fixed."""
    solver = method.solver.with_budget(products)
    return replace(
        method,
        solver=method.solver if solver is None else solver,
        curvature=curvature if method.curvature is None else method.curvature,
        damping=damping,
    )


def _measure(
    flag: str,
    method: Implicit,
    point: StartingPoint,
    *,
    products: int,
    expected: Tensor,
    seeds: int,
) -> Row:
    """Run a method for its memory, and then once for each seed, or once if it draws nothing."""
    with LiveBytes() as memory:
        warmup = point.run(method, seed=0)
    runs = []
    errors = []
    seconds = []
    for seed in range(seeds if warmup.is_random else 1):
        start = time.perf_counter()
        run = point.run(method, seed=seed)
        # Reading the error as a number waits for the device.
        errors.append(relative_error(run.hypergradient, expected))
        seconds.append(time.perf_counter() - start)
        runs.append(run)

    cosines = [cosine(run.hypergradient, expected) for run in runs]
    residuals = [float(torch.as_tensor(run.report.residual, device="cpu").max()) for run in runs]
    statuses = Counter(
        Status(int(status)).name
        for run in runs
        for status in torch.as_tensor(run.report.status, device="cpu")
    )
    return Row(
        method=flag,
        products=products,
        error=median(errors),
        cosine=median(cosines),
        residual=median(residuals),
        status=", ".join(status for status, _ in statuses.most_common()),
        seconds=median(seconds),
        mebibytes=memory.peak / 2**20,
        chosen=runs[-1].report.chosen,
    )
