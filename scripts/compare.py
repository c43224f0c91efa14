"""Inverse curvature–vector products side by side, on one problem from one state, at equal numbers of products.

python scripts/compare.py                                    # every problem; a table, JSON and plots in runs/compare
python scripts/compare.py --problems logistic digits-0.01 --products 10 30
python scripts/compare.py --conditioning | --robustness | --drift | --peers
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import studies
import torch
import tyro
from problems import Case, problems, quadratic

from metaimplicit.diagnostics.compare import Comparison, compare
from metaimplicit.training import write_atomically, write_json

Lines = dict[str, list[tuple[float, float]]]


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
    drift: bool = False
    """Instead: what warm starts, kept sketches and recycled Ritz vectors save on systems that drift."""
    peers: bool = False
    """Instead: solvers and derivatives of the public libraries that are installed, against the exact ones."""
    data_root: Path | None = None
    """Omniglot for the episodes; without it they are glyphs."""
    threads: int | None = None
    """CPU threads; by default torch's choice."""
    out: Path = Path("runs/compare")
    """Folder for JSON and plots."""


def run(case: Case, settings: Settings) -> Comparison:
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
    )


def table(name: str, found: Comparison) -> str:
    """Errors of every method at every number of products, and what they cost at the largest."""
    products = sorted({row.products for row in found.rows})
    best = {
        row.method: row.error for row in sorted(found.rows, key=lambda row: row.products)
    }  # at its last number
    methods = sorted(best, key=lambda m: best[m])
    lines = [
        f"\n{name}: n = {found.size}, {found.tasks} task(s), {found.curvature}, eigenvalues {found.smallest:.1e} … "
        f"{found.largest:.1e}, ‖∂f/∂θ‖ = {found.inner_gradient_norm:.0e}, error without a solve {found.direct:.2g}",
        f"{'relative error after':<20}"
        + "".join(f"{p:>9}" for p in products)
        + "   cosine  residual  seconds     MiB",
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
        fixed = {
            row.method: row.error
            for row in found.rows
            if row.products == p and row.method != "auto"
        }
        nearest = min(fixed, key=lambda m: fixed[m])
        if "auto" in methods and "cg" in fixed:
            auto = found.error("auto", p)
            lines.append(
                f"  {p} products: auto / {nearest}, the best, {_ratio(auto, fixed[nearest])}, auto / cg "
                f"{_ratio(auto, fixed['cg'])}"
                + ("; nothing is accurate" if fixed[nearest] > 0.1 else "")
            )
    return "\n".join(lines)


def _ratio(a: float, b: float) -> str:
    exact = 1e-12  # both are right to working precision
    return "1 (both exact)" if max(a, b) < exact else f"{a / max(b, exact):.2f}"


def compare_problems(settings: Settings) -> dict[str, Comparison]:
    """Every problem asked for; errors.png has a panel each."""
    makers = problems(settings.data_root)
    if unknown := sorted(set(settings.problems) - set(makers)):
        raise ValueError(
            f"--problems: got {', '.join(unknown)}, expected some of {', '.join(makers)}"
        )
    found = {}
    for name in settings.problems:
        found[name] = run(makers[name](), settings)
        print(table(name, found[name]), flush=True)
    panels = {name: _lines(c) for name, c in found.items()}
    _plot(settings.out / "errors.png", panels, "products", "relative error of the hypergradient")
    return found


def _lines(found: Comparison) -> Lines:
    rows = sorted(found.rows, key=lambda row: row.products)
    return {
        m: [(row.products, row.error) for row in rows if row.method == m]
        for m in {row.method for row in rows}
    }


def compare_conditioning(settings: Settings) -> dict[str, Comparison]:
    """Quadratics of 300 dimensions, eigenvalues spaced evenly in the logarithm, of condition 10 … 10⁶."""
    found = {
        f"1e{i}": run(quadratic(torch.logspace(-i, 0, 300).double()), settings) for i in range(1, 7)
    }
    panels: dict[str, Lines] = {}
    methods = sorted({row.method for c in found.values() for row in c.rows})
    for p in settings.products:
        panels[f"{p} products"] = {
            m: [
                (float(c), r.error)
                for c in found
                for r in found[c].rows
                if (r.method, r.products) == (m, p)
            ]
            for m in methods
        }
    for name, c in found.items():
        print(table(f"condition {name}", c))
    _plot(
        settings.out / "conditioning.png",
        panels,
        "condition",
        "relative error of the hypergradient",
    )
    return found


def compare_robustness(settings: Settings) -> list[dict[str, Any]]:
    """`studies.robustness`, drawn against ρ for every k."""
    rows = studies.robustness(settings.seeds)
    panels: dict[str, Lines] = {}
    for key in ("error", "loss"):
        for k in (5, 10, 20):
            at = [row for row in rows if row["k"] == k or row["method"].startswith("exact")]
            curves = {
                m: [(r["rho"], r[key]) for r in at if r["method"] == m]
                for m in ("nystrom", "neumann")
            }
            for m in (
                "cg",
                "auto",
                *(("exact ×1", "exact ×10", "exact ×100") if key == "loss" else ()),
            ):
                curves[m] = [(rho, r[key]) for r in at if r["method"] == m for rho in (0.01, 1.0)]
            panels[f"{'hypergradient error' if key == 'error' else 'validation loss'}, k = {k}"] = (
                curves
            )
    _plot(settings.out / "robustness.png", panels, "ρ (Nyström), step (Neumann)", "")
    return rows


def _plot(path: Path, panels: dict[str, Lines], x: str, y: str) -> None:
    from matplotlib.figure import Figure

    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 3 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    names = [*sorted({name for lines in panels.values() for name in lines} - {"auto"}), "auto"]
    for ax, (title, lines) in zip(axes, panels.items(), strict=False):
        lines = {
            name: [(u, v) for u, v in points if math.isfinite(v)] for name, points in lines.items()
        }
        for i, name in enumerate(names):
            if points := lines.get(name):
                style = (
                    {"linestyle": "--", "color": "k"} if name == "auto" else {"color": f"C{i % 10}"}
                )
                ax.loglog(*zip(*points, strict=True), marker="o", markersize=3, label=name, **style)
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
        if settings.threads < 1:
            raise ValueError(f"--threads: got {settings.threads}, expected at least 1")
        torch.set_num_threads(settings.threads)
    settings.out.mkdir(parents=True, exist_ok=True)
    if settings.peers:
        import peers

        found: Any = {"errors": peers.main(), "seconds": peers.race()}
        name = "peers"
    elif settings.drift:
        found, name = studies.drift(), "drift"
    elif settings.robustness:
        found, name = compare_robustness(settings), "robustness"
    elif settings.conditioning:
        found, name = (
            {k: asdict(c) for k, c in compare_conditioning(settings).items()},
            "conditioning",
        )
    else:
        found, name = {k: asdict(c) for k, c in compare_problems(settings).items()}, "problems"
    shown = {k: str(v) for k, v in asdict(settings).items()}
    write_json(settings.out / f"{name}.json", {"settings": shown, "found": found})


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except (ValueError, FileNotFoundError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
