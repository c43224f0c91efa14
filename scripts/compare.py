"""Inverse curvature–vector products side by side, on one problem from one state, at equal numbers of products.

python scripts/compare.py                                    # every problem; a table, JSON and plots in runs/compare
python scripts/compare.py --problems logistic digits-0.01 --products 10 30
python scripts/compare.py --conditioning | --robustness | --peers
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import tyro
from problems import Case, logistic, problems, quadratic
from tqdm import tqdm

from metaimplicit import Dense, Implicit, Neumann, Nystrom, hypergradient
from metaimplicit.compare import SOLVERS, Comparison, compare
from metaimplicit.training import write_json


@dataclass(frozen=True)
class Settings:
    """Relative error of every method's hypergradient against products, conditioning, or the methods' own knobs."""

    problems: tuple[str, ...] = tuple(problems(None))
    """Which problems."""
    products: tuple[int, ...] = (10, 30, 100)
    """Numbers of products with the curvature."""
    seeds: int = 5
    """Sketches of which the median counts; data sets of the robustness study."""
    conditioning: bool = False
    """Instead: error after the products given against the condition of a quadratic."""
    robustness: bool = False
    """Instead: Nyström's ρ and k, Neumann's step and terms, and CG's steps on Hataya & Yamada's logistic regression."""
    peers: bool = False
    """Instead: solvers and derivatives of the public libraries that are installed, against the exact ones."""
    data_root: Path | None = None
    """Omniglot for the episodes; without it they are glyphs."""
    threads: int | None = None
    """CPU threads; by default torch's choice."""
    out: Path = Path("runs/compare")
    """Folder for JSON and plots."""


def run(case: Case, settings: Settings, **options: Any) -> Comparison:
    """`compare` on a case."""
    return compare(
        case.problem,
        case.meta,
        case.data,
        inner=case.inner,
        curvature=case.curvature,
        batched=case.batched,
        products=settings.products,
        seeds=settings.seeds,
        **options,
    )


def table(name: str, found: Comparison) -> str:
    """Errors of every method at every number of products, and what they cost at the largest."""
    products = sorted({row.products for row in found.rows})
    best = {row.method: row.error for row in sorted(found.rows, key=lambda row: row.products)}  # at its last number
    methods = sorted(best, key=lambda m: best[m])
    lines = [
        f"\n{name}: n = {found.size}, {found.tasks} task(s), {found.curvature}, eigenvalues {found.smallest:.1e} … "
        f"{found.largest:.1e}, ‖∂f/∂θ‖ = {found.inner_gradient_norm:.0e}, error without a solve {found.direct:.2g}",
        f"{'relative error after':<20}" + "".join(f"{p:>9}" for p in products) + "   cosine  residual  seconds     MiB",
    ]
    for method in methods:
        own = {row.products: row for row in found.rows if row.method == method}
        errors = "".join(f"{own[p].error:>9.1e}" if p in own else f"{'—':>9}" for p in products)
        last = own[max(own)]
        lines.append(
            f"{method:<20}{errors}{last.cosine:>9.4f} {last.residual:>9.1e} {last.seconds:>8.3f} {last.mebibytes:>7.1f}"
            f"  {last.status.lower()}"
        )
    for p in products:
        fixed = {row.method: row.error for row in found.rows if row.products == p and row.method != "auto"}
        nearest = min(fixed, key=lambda m: fixed[m])
        if "auto" in methods and "cg" in fixed:
            auto = found.error("auto", p)
            lines.append(
                f"  {p} products: auto / {nearest}, the best, {_ratio(auto, fixed[nearest])}, auto / cg "
                f"{_ratio(auto, fixed['cg'])}" + ("; nothing is accurate" if fixed[nearest] > 0.1 else "")
            )
    return "\n".join(lines)


def _ratio(a: float, b: float) -> str:
    exact = 1e-12  # both are right to working precision
    return "1 (both exact)" if max(a, b) < exact else f"{a / max(b, exact):.2f}"


def compare_problems(settings: Settings) -> dict[str, Comparison]:
    """Every problem asked for; errors.png has a panel each."""
    makers = problems(settings.data_root)
    if unknown := sorted(set(settings.problems) - set(makers)):
        raise ValueError(f"--problems: got {', '.join(unknown)}, expected some of {', '.join(makers)}")
    found = {}
    for name in settings.problems:
        found[name] = run(makers[name](), settings)
        print(table(name, found[name]), flush=True)
    panels = {name: _lines(c, sorted({row.products for row in c.rows})) for name, c in found.items()}
    _plot(settings.out / "errors.png", panels, "products", "relative error of the hypergradient")
    return found


def _lines(found: Comparison, products: Sequence[int]) -> dict[str, list[tuple[float, float]]]:
    methods = dict.fromkeys(row.method for row in found.rows)
    return {m: [(row.products, row.error) for p in products for row in found.rows
                if (row.method, row.products) == (m, p)] for m in methods}  # fmt: skip


def compare_conditioning(settings: Settings) -> dict[str, Comparison]:
    """Quadratics of 300 dimensions, eigenvalues spaced evenly in the logarithm, of condition 10 … 10⁶."""
    found = {f"1e{i}": run(quadratic(torch.logspace(-i, 0, 300).double()), settings) for i in range(1, 7)}
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for p in settings.products:
        panels[f"{p} products"] = {
            m: [(float(c), r.error) for c in found for r in found[c].rows if (r.method, r.products) == (m, p)]
            for m in SOLVERS
        }
    for name, c in found.items():
        print(table(f"condition {name}", c))
    _plot(settings.out / "conditioning.png", panels, "condition", "relative error of the hypergradient")
    return found


def compare_robustness(settings: Settings) -> list[dict[str, Any]]:
    """Error of the first hypergradient, and validation loss after ten outer steps, at every (k, ρ) and data set."""
    grid = [(k, rho) for k in (5, 10, 20) for rho in (0.01, 0.1, 1.0)]
    exact = Implicit(Dense())
    cells: list[tuple[str, int, float | None, Implicit]] = [(f"exact ×{s:g}", 100, None, exact) for s in (1, 10, 100)]
    cells += [("cg", k, None, Implicit(SOLVERS["cg"](k))) for k in (5, 10, 20)]
    cells += [("auto", k, None, Implicit(SOLVERS["auto"](k))) for k in (5, 10, 20)]
    cells += [("nystrom", k, rho, Implicit(Nystrom(k, rho))) for k, rho in grid]
    cells += [("neumann", k, rho, Implicit(Neumann(k, scale=rho))) for k, rho in grid]
    rows = []
    print(f"{'method':<12} {'k':>4} {'rho':>6} {'error':>9} {'cosine':>8} {'norm':>8} {'validation loss':>20}")
    for method, k, rho, how in tqdm(cells, disable=None):
        first = [_first(logistic(seed), how, seed) for seed in range(1, settings.seeds + 1)]
        step = float(method.partition("×")[2] or 1)
        losses = [_tune(logistic(seed), how, seed, step) for seed in range(1, settings.seeds + 1)]
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
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for key in ("error", "loss"):
        for k in (5, 10, 20):
            at = [row for row in rows if row["k"] == k or row["method"].startswith("exact")]
            curves = {m: [(r["rho"], r[key]) for r in at if r["method"] == m] for m in ("nystrom", "neumann")}
            for m in ("cg", "auto", *(("exact ×1", "exact ×10", "exact ×100") if key == "loss" else ())):
                curves[m] = [(rho, r[key]) for r in at if r["method"] == m for rho in (0.01, 1.0)]
            panels[f"{'hypergradient error' if key == 'error' else 'validation loss'}, k = {k}"] = curves
    _plot(settings.out / "robustness.png", panels, "ρ (Nyström), step (Neumann)", "")
    return rows


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
        found = hypergradient(case.problem, {"decay": decay}, case.data, inner=case.inner, method=method)
        velocity = 0.9 * velocity + size * found.grads["decay"]
        decay = (decay - velocity).clamp(min=1e-8)
    last = hypergradient(case.problem, {"decay": decay}, case.data, inner=case.inner, method=method)
    return float(last.outer_loss)


def _plot(path: Path, panels: dict[str, dict[str, list[tuple[float, float]]]], x: str, y: str) -> None:
    from matplotlib.figure import Figure

    from metaimplicit.training import write_atomically

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    names = [*sorted({name for lines in panels.values() for name in lines} - {"auto"}), "auto"]
    for ax, (title, lines) in zip(axes, panels.items(), strict=False):
        for i, name in enumerate(names):
            if points := lines.get(name):
                style = {"linestyle": "--", "color": "k"} if name == "auto" else {"color": f"C{i % 10}"}
                ax.loglog(*zip(*points, strict=True), marker="o", markersize=3, label=name, **style)
        lines = {name: [(u, v) for u, v in points if math.isfinite(v)] for name, points in lines.items()}
        shown = [v for points in lines.values() for _, v in points] or [1.0]
        ax.set(title=title, xlabel=x, ylim=(min(*shown, max(shown) / 3) / 1.5, max(shown) * 1.5))
        ax.grid(alpha=0.3)
    for ax in axes[len(panels) :]:
        ax.axis("off")
    handles = {line.get_label(): line for ax in axes for line in ax.get_lines()}
    figure.supylabel(y)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6)
    write_atomically(path, lambda target: figure.savefig(target, dpi=120))


def main(settings: Settings) -> None:
    """The study asked for."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    settings.out.mkdir(parents=True, exist_ok=True)
    if settings.peers:
        import peers

        found: Any = peers.main()
        name = "peers"
    elif settings.robustness:
        found, name = compare_robustness(settings), "robustness"
    elif settings.conditioning:
        found, name = {k: asdict(c) for k, c in compare_conditioning(settings).items()}, "conditioning"
    else:
        found, name = {k: asdict(c) for k, c in compare_problems(settings).items()}, "problems"
    shown = {k: str(v) for k, v in asdict(replace(settings)).items()}
    write_json(settings.out / f"{name}.json", {"settings": shown, "found": found})


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
