"""Studies with tables of their own: the knobs of each solver on one problem, and systems that drift."""

from __future__ import annotations

import warnings
from statistics import mean, stdev
from typing import Any

import torch
from problems import Case, drifting, logistic
from tqdm import tqdm

from metaimplicit import (
    CG,
    Auto,
    Dense,
    Implicit,
    Lanczos,
    Neumann,
    Nystrom,
    NystromCG,
    Report,
    Solver,
    hypergradient,
)
from metaimplicit.solvers import SolverState


def robustness(seeds: int) -> list[dict[str, Any]]:
    """Error of the first hypergradient, and validation loss after ten outer steps, at every (k, ρ) and data set."""
    grid = [(k, rho) for k in (5, 10, 20) for rho in (0.01, 0.1, 1.0)]
    exact = Implicit(Dense())
    cells: list[tuple[str, int, float | None, Implicit]] = [
        (f"exact ×{s:g}", 100, None, exact) for s in (1, 10, 100)
    ]
    cells += [("cg", k, None, Implicit(CG(k, tol=0.0))) for k in (5, 10, 20)]
    cells += [("auto", k, None, Implicit(Auto(k, tol=0.0, dense=0))) for k in (5, 10, 20)]
    cells += [("nystrom", k, rho, Implicit(Nystrom(k, rho))) for k, rho in grid]
    cells += [("neumann", k, rho, Implicit(Neumann(k, scale=rho))) for k, rho in grid]
    rows = []
    print(
        f"{'method':<12} {'k':>4} {'rho':>6} {'error':>9} {'cosine':>8} {'norm':>8} {'validation loss':>20}"
    )
    for method, k, rho, how in tqdm(cells, disable=None):
        first = [_first(logistic(seed), how, seed) for seed in range(1, seeds + 1)]
        step = float(method.partition("×")[2] or 1)
        losses = [_tune(logistic(seed), how, seed, step) for seed in range(1, seeds + 1)]
        error, cosine, norm = (mean(column) for column in zip(*first, strict=True))
        spread = stdev(losses) if len(losses) > 1 else 0.0
        rows.append({"method": method, "k": k, "rho": rho, "error": error, "cosine": cosine, "norm": norm,
                     "loss": mean(losses), "std": spread})  # fmt: skip
        shown = "" if rho is None else f"{rho:g}"
        print(
            f"{method:<12} {k:>4} {shown:>6} {error:>9.1e} {cosine:>8.4f} {norm:>8.3f} "
            f"{mean(losses):>11.4f} ± {spread:.4f}",
            flush=True,
        )
    return rows


def drift() -> list[dict[str, Any]]:
    """Products to a residual of 1e-6 over 50 systems that drift, n = 200 and condition 1000, as shares of cold solves.

    A and b each move by the drift times their (spectral) norm; shares are of the systems before A turns indefinite,
    and "all", of all those of cold Lanczos; "worst" is the largest residual.
    """
    kept: dict[str, Solver] = {
        "auto": Auto(999, dense=0),
        "nystrom-cg": NystromCG(
            rank=100, max_steps=999, refresh=50, generator=torch.Generator().manual_seed(0)
        ),
        "lanczos": Lanczos(999),
    }
    cold: dict[str, Solver] = {"cg": CG(999), "lanczos": Lanczos(999)}
    rows = []
    print(
        f"{'drift':>6} {'definite':>9}  {'method':<11}{'/ cold cg':>10}{'/ lanczos':>10}{'all':>6}{'worst':>7}"
    )
    for step in (1e-4, 1e-3, 1e-2):
        systems = list(drifting(step))
        spent = {
            name: [_report(case, solver, SolverState()).products for case in systems]
            for name, solver in cold.items()
        }
        definite = next(
            (i for i, case in enumerate(systems) if torch.linalg.eigvalsh(case.data[0])[0] <= 0), 50
        )
        for name, solver in kept.items():
            state = SolverState()
            products, worst = [], 0.0
            for case in systems:
                report = _report(case, solver, state)
                state, worst = (
                    report.state,
                    max(worst, float(torch.as_tensor(report.residual).max())),
                )
                products.append(report.products)
            shares = {
                other: sum(products[:definite]) / sum(spent[other][:definite]) for other in cold
            }
            whole = sum(products) / sum(spent["lanczos"])
            rows.append(
                {
                    "drift": step,
                    "definite": definite,
                    "method": name,
                    "shares": shares,
                    "all": whole,
                    "worst": worst,
                }
            )
            print(
                f"{step:>6g} {definite:>9}  {name:<11}{shares['cg']:>10.2f}{shares['lanczos']:>10.2f}"
                f"{whole:>6.2f}{worst:>7.0e}",
                flush=True,
            )
    return rows


def _report(case: Case, solver: Solver, state: SolverState) -> Report:
    """The report of one hypergradient."""
    method = Implicit(solver)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # statuses of systems that have turned indefinite
        return hypergradient(
            case.problem, case.meta, case.data, inner=case.inner, method=method, state=state
        ).report


def _first(case: Case, method: Implicit, seed: int) -> tuple[float, float, float]:
    torch.manual_seed(seed)
    got, exact = (
        hypergradient(case.problem, case.meta, case.data, inner=case.inner, method=m).grads["decay"]
        for m in (method, Implicit(Dense()))
    )
    cosine = float(torch.nn.functional.cosine_similarity(got, exact, dim=0))
    return float((got - exact).norm() / exact.norm()), cosine, float(got.norm() / exact.norm())


def _tune(case: Case, method: Implicit, seed: int, size: float, steps: int = 10) -> float:
    """Validation loss after outer steps of SGD, step size `size`, momentum 0.9, weights of at least 1e-8."""
    torch.manual_seed(seed)
    decay, velocity = case.meta["decay"], torch.zeros_like(case.meta["decay"])
    for _ in range(steps):
        found = hypergradient(
            case.problem, {"decay": decay}, case.data, inner=case.inner, method=method
        )
        velocity = 0.9 * velocity + size * found.grads["decay"]
        decay = (decay - velocity).clamp(min=1e-8)
    last = hypergradient(case.problem, {"decay": decay}, case.data, inner=case.inner, method=method)
    return float(last.outer_loss)
