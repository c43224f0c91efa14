"""Two studies of compare.py: the knobs of the solvers on one problem, and systems that drift."""

from __future__ import annotations

import warnings
from functools import partial
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from command_line import RowFile
from problems import Instance, drifting_systems, logistic
from torch import Tensor
from tqdm import tqdm

from metaimplicit import CG, Dense, Implicit, Neumann, Nystrom, hypergradient
from metaimplicit.hypergradient import Hypergradient
from metaimplicit.methods import Report
from metaimplicit.solvers import Auto, Lanczos, NystromCG, Solver, SolverState

COUNTS = (5, 10, 20)  # k: columns of Nyström, terms of Neumann's series, products of CG and auto
RHOS = (0.01, 0.1, 1.0)  # ρ: damping of Nyström, step of Neumann's series
EXACT_STEPS = (1, 10, 100)  # outer steps of the exact hypergradient
SYSTEMS = 50  # that drift
Record = dict[str, Any]


class Variant(NamedTuple):
    """A method with its knobs, and the step size of the outer steps."""

    name: str
    method: Implicit
    k: int
    rho: float | None = None
    outer_lr: float = 1.0


def robustness_variants() -> list[Variant]:
    """The exact hypergradient at several outer steps; CG, auto, Nyström, Neumann at every knob."""
    exact = Implicit(Dense())
    variants = [
        Variant(
            f"exact ×{lr}",
            exact,
            k=100,
            outer_lr=lr,
        )
        for lr in EXACT_STEPS
    ]
    variants += [Variant("cg", Implicit(CG(k, tol=0.0)), k=k) for k in COUNTS]
    variants += [Variant("auto", Implicit(Auto(k, tol=0.0, dense=0)), k=k) for k in COUNTS]
    grid = [(k, rho) for k in COUNTS for rho in RHOS]
    for k, rho in grid:
        variants.append(
            Variant(
                "nystrom",
                Implicit(Nystrom(k, rho)),
                k=k,
                rho=rho,
            )
        )
    for k, rho in grid:
        variants.append(
            Variant(
                "neumann",
                Implicit(Neumann(k, scale=rho)),
                k=k,
                rho=rho,
            )
        )
    return variants


def study_robustness(data_sets: int, rows: RowFile) -> list[Record]:
    """Every variant on Hataya & Yamada's logistic regression; prints a table.

    Args:
        data_sets: Number of data sets, of seeds 1, 2, ….
        rows: Where records are stored. Those that it has are not measured.

    Returns:
        A record for each variant, with means over the data sets: the relative `error`, the `cosine`
        and the relative `norm` of the first hypergradient, and the validation `loss` after ten
        outer steps, whose deviation is `std`. One data set has no deviation.
    """
    print(
        f"{'method':<12} {'k':>4} {'rho':>6} {'error':>9} {'cosine':>8} {'norm':>8} "
        f"{'validation loss':>20}"
    )
    records = []
    for variant in tqdm(robustness_variants(), disable=None):
        case = {
            "study": "robustness",
            "data_sets": data_sets,
            "method": variant.name,
            "k": variant.k,
            "rho": variant.rho,
        }
        record = rows.read_or_make(case, partial(measure_variant, variant, data_sets))
        records.append(record)
        deviation = "" if record["std"] is None else f" ± {record['std']:.4f}"
        rho = "" if variant.rho is None else f"{variant.rho:g}"
        print(
            f"{variant.name:<12} {variant.k:>4} {rho:>6} {record['error']:>9.1e} "
            f"{record['cosine']:>8.4f} {record['norm']:>8.3f} "
            f"{record['loss']:>11.4f}{deviation}",
            flush=True,
        )
    return records


def measure_variant(variant: Variant, data_sets: int) -> Record:
    """The means over the data sets that `study_robustness` describes."""
    seeds = range(1, data_sets + 1)
    first = [compare_with_exact(logistic(seed), variant.method, seed) for seed in seeds]
    losses = [tune(logistic(seed), variant, seed) for seed in seeds]
    return {
        **{key: mean(one[key] for one in first) for key in ("error", "cosine", "norm")},
        "loss": mean(losses),
        "std": stdev(losses) if len(losses) > 1 else None,
    }


def compare_with_exact(instance: Instance, method: Implicit, seed: int) -> dict[str, float]:
    """The `error` ‖h − h*‖/‖h*‖, the `cosine` and the `norm` ‖h‖/‖h*‖ of a hypergradient h.

    h* is that of the dense solve. `seed` is that of the sketches.
    """
    torch.manual_seed(seed)
    h = take_hypergradient(instance, method, instance.meta["decay"]).grads["decay"]
    exact = take_hypergradient(instance, Implicit(Dense()), instance.meta["decay"]).grads["decay"]
    return {
        "error": float((h - exact).norm() / exact.norm()),
        "cosine": float(F.cosine_similarity(h, exact, dim=0)),
        "norm": float(h.norm() / exact.norm()),
    }


def tune(instance: Instance, variant: Variant, seed: int, steps: int = 10) -> float:
    """The validation loss after outer steps of SGD with momentum 0.9 on decays.

    Each step leaves decays of at least 1e-8. `seed` is that of the random numbers of the method.
    """
    torch.manual_seed(seed)
    decay = instance.meta["decay"]
    velocity = torch.zeros_like(decay)
    for _ in range(steps):
        result = take_hypergradient(instance, variant.method, decay)
        velocity = 0.9 * velocity + variant.outer_lr * result.grads["decay"]
        decay = (decay - velocity).clamp(min=1e-8)
    return float(take_hypergradient(instance, variant.method, decay).outer_loss)


def take_hypergradient(instance: Instance, method: Implicit, decay: Tensor) -> Hypergradient:
    """The hypergradient of `logistic` at some decays."""
    return hypergradient(
        instance.problem,
        {"decay": decay},
        instance.data,
        inner=instance.inner,
        method=method,
    )


def study_drift(rows: RowFile) -> list[Record]:
    """Products to a residual of 1e-6 over systems that drift, beside cold solves; prints a table.

    Systems are those of `drifting_systems`. Their solvers keep what helps from system to system:
    `auto` its Ritz vectors, `nystrom-cg` its sketch, `lanczos` its solution.

    Args:
        rows: Where the records of a drift are stored. Those that it has are not measured.

    Returns:
        A record for each drift and solver: how many systems come before A turns indefinite
        (`definite`); the products of these systems over those of cold CG and cold Lanczos
        (`shares`); the same for all systems, over cold Lanczos (`all`); the largest residual of all
        systems (`worst`).
    """
    print(
        f"{'drift':>6} {'definite':>9}  {'method':<11}{'/ cold cg':>10}{'/ lanczos':>10}"
        f"{'all':>6}{'worst':>7}"
    )
    records: list[Record] = []
    for drift in (1e-4, 1e-3, 1e-2):
        case = {"study": "drift", "drift": drift}
        row = rows.read_or_make(case, partial(measure_drift, drift))
        for record in row["records"]:
            shares = record["shares"]
            print(
                f"{drift:>6g} {record['definite']:>9}  {record['method']:<11}"
                f"{shares['cg']:>10.2f}{shares['lanczos']:>10.2f}"
                f"{record['all']:>6.2f}{record['worst']:>7.0e}",
                flush=True,
            )
        records += row["records"]
    return records


def measure_drift(drift: float) -> dict[str, list[Record]]:
    """The `records` of all warm solvers at one drift."""
    systems = list(drifting_systems(drift, count=SYSTEMS))
    definite = count_definite(systems)
    cold = {
        "cg": [solve(system, CG(999), SolverState()).products for system in systems],
        "lanczos": [solve(system, Lanczos(999), SolverState()).products for system in systems],
    }
    records = []
    for name, solver in warm_solvers().items():
        products, worst = solve_in_turn(systems, solver)
        spent = sum(products[:definite])
        record = {
            "drift": drift,
            "definite": definite,
            "method": name,
            "shares": {other: spent / sum(counts[:definite]) for other, counts in cold.items()},
            "all": sum(products) / sum(cold["lanczos"]),
            "worst": worst,
        }
        records.append(record)
    return {"records": records}


def warm_solvers() -> dict[str, Solver]:
    """The solvers that keep something from system to system."""
    generator = torch.Generator().manual_seed(0)
    return {
        "auto": Auto(999, dense=0),
        "nystrom-cg": NystromCG(
            rank=100,
            max_steps=999,
            refresh=SYSTEMS,
            generator=generator,
        ),
        "lanczos": Lanczos(999),
    }


def count_definite(systems: list[Instance]) -> int:
    """The number of systems before the first whose matrix is not positive definite."""
    for i, system in enumerate(systems):
        matrix, _ = system.data
        if torch.linalg.eigvalsh(matrix)[0] <= 0:
            return i
    return len(systems)


def solve_in_turn(systems: list[Instance], solver: Solver) -> tuple[list[int], float]:
    """The products of each solve, which starts from the state of the last; the worst residual."""
    state = SolverState()
    products = []
    worst = 0.0
    for system in systems:
        report = solve(system, solver, state)
        state = report.state
        products.append(report.products)
        worst = max(worst, float(torch.as_tensor(report.residual).max()))
    return products, worst


def solve(system: Instance, solver: Solver, state: SolverState) -> Report:
    """The report of one hypergradient."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of systems that are indefinite
        return hypergradient(
            system.problem,
            system.meta,
            system.data,
            inner=system.inner,
            method=Implicit(solver),
            state=state,
        ).report
