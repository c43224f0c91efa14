"""The tables that compare.py prints, and the plots that it leaves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from figures import MOST_LINES, panels, shared_legend_below
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metaimplicit.diagnostics.compare import Comparison, Row
from metaimplicit.training import write_atomically

ROUNDOFF = 1e-12  # a relative error below it counts as exact
INACCURATE = 0.1  # a relative error above it is useless
RHO_ENDS = (0.01, 1.0)  # where lines that do not depend on ρ begin and end
Points = list[tuple[float, float]]
Lines = dict[str, Points]  # by label


def table(name: str, comparison: Comparison) -> str:
    """What the problem is, a line for each method, and how near auto is to the best of them.

    A line has the errors at each number of products, and the other numbers at the largest one.
    Methods are sorted by their last error.
    """
    products = sorted({row.products for row in comparison.rows})
    heads = "".join(f"{count:>9}" for count in products)
    lines = [
        f"\n{name}: {description(comparison)}",
        f"{'relative error after':<20}{heads}   cosine  residual  seconds     MiB",
        *method_lines(comparison, products),
        *auto_lines(comparison, products),
    ]
    return "\n".join(lines)


def description(comparison: Comparison) -> str:
    """The size, the spectrum and the accuracy of a problem."""
    return (
        f"n = {comparison.size}, {comparison.tasks} task(s), {comparison.curvature}, "
        f"eigenvalues {comparison.smallest:.1e} … {comparison.largest:.1e}, "
        f"‖∂f/∂θ‖ = {comparison.inner_gradient_norm:.0e}, "
        f"error without a solve {comparison.direct:.2g}"
    )


def method_lines(comparison: Comparison, products: Sequence[int]) -> list[str]:
    """A line for each method."""
    by_method: dict[str, dict[int, Any]] = {}
    for row in sorted(comparison.rows, key=lambda row: row.products):
        by_method.setdefault(row.method, {})[row.products] = row
    lines = []
    for method, rows in by_method.items():
        last = rows[max(rows)]
        errors = [
            f"{rows[count].error:>9.1e}" if count in rows else f"{'—':>9}" for count in products
        ]
        line = (
            f"{method:<20}{''.join(errors)}{last.cosine:>9.4f} {last.residual:>9.1e} "
            f"{last.seconds:>8.3f} {last.mebibytes:>7.1f}  {last.status.lower()}"
        )
        lines.append((last.error, line))
    return [line for _, line in sorted(lines, key=lambda pair: pair[0])]


def auto_lines(comparison: Comparison, products: Sequence[int]) -> list[str]:
    """For each number of products, the error of auto over those of the best method and of CG."""
    lines = []
    for count in products:
        errors = {row.method: row.error for row in comparison.rows if row.products == count}
        if "auto" not in errors or "cg" not in errors:
            continue
        auto = errors.pop("auto")
        best = min(errors, key=lambda method: errors[method])
        note = "; nothing is accurate" if errors[best] > INACCURATE else ""
        lines.append(
            f"  {count} products: auto / {best}, the best, {ratio(auto, errors[best])}, "
            f"auto / cg {ratio(auto, errors['cg'])}{note}"
        )
    return lines


def ratio(error: float, other: float) -> str:
    """One relative error over another.

    Example:
        >>> ratio(0.5, 0.25), ratio(1e-14, 1e-15)
        ('2.00', '1 (both exact)')
    """
    if max(error, other) < ROUNDOFF:
        return "1 (both exact)"
    return f"{error / max(other, ROUNDOFF):.2f}"


def load_comparison(stored: Mapping[str, Any]) -> Comparison:
    """A comparison from what `asdict` made of it."""
    rows = [Row(**entry) for entry in stored["rows"]]
    return Comparison(**{**stored, "rows": rows})


def errors_against_products(comparison: Comparison) -> Lines:
    """The points (products, error) of each method."""
    lines: Lines = {}
    for row in sorted(comparison.rows, key=lambda row: row.products):
        lines.setdefault(row.method, []).append((row.products, row.error))
    return lines


def errors_against_condition(comparisons: Mapping[str, Comparison], products: int) -> Lines:
    """The points (condition, error) of each method at one number of products."""
    lines: Lines = {}
    for condition, comparison in comparisons.items():
        for row in comparison.rows:
            if row.products == products:
                lines.setdefault(row.method, []).append((float(condition), row.error))
    return lines


def records_against_rho(records: Iterable[Mapping[str, Any]], key: str, k: int) -> Lines:
    """The points (ρ, record[key]) of the variants of `studies.study_robustness` at one k.

    Those that have no ρ are horizontal. Those of the exact hypergradient are shown for every k, but
    not their errors, which are zero.
    """
    lines: Lines = {}
    for record in records:
        method, rho = record["method"], record["rho"]
        is_exact = method.startswith("exact")
        if (is_exact and key == "error") or (not is_exact and record["k"] != k):
            continue
        ends = RHO_ENDS if rho is None else (rho,)
        lines.setdefault(method, []).extend((end, record[key]) for end in ends)
    return lines


class Panel(NamedTuple):
    """A panel of a plot: its title, its lines and the limits of its y axis."""

    title: str
    lines: Lines
    limits: tuple[float, float]


def split_panel(title: str, lines: Lines) -> list[Panel]:
    """One panel, or several with the same limits where there are too many lines for one.

    Lines are sorted. That of auto is the last line of every panel. Points that are not finite are
    left out, and the limits, which are logarithmic, are those of values above 0. A line without
    points stays, and no lines give one empty panel.
    """
    finite = {
        label: [point for point in points if math.isfinite(point[1])]
        for label, points in lines.items()
    }
    values = [y for points in finite.values() for _, y in points if y > 0] or [1.0]
    # A margin of 1.5 on either side of a range of at least a factor of 3.
    limits = (min(*values, max(values) / 3) / 1.5, max(values) * 1.5)
    auto = {"auto": finite.pop("auto")} if "auto" in finite else {}
    groups = panels(sorted(finite), most=MOST_LINES - len(auto)) or [[]]
    return [
        Panel(title, {label: finite[label] for label in group} | auto, limits) for group in groups
    ]


def draw(path: Path, plotted: Sequence[Panel], *, x: str, y: str) -> None:
    """Leave a plot of panels, with logarithmic axes and one legend below them."""
    columns = min(4 if len(plotted) > 6 else 3, len(plotted))
    rows = math.ceil(len(plotted) / columns)
    figure = Figure(figsize=(4 * columns, 3 * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    labels = sorted({label for panel in plotted for label in panel.lines} - {"auto"})
    colors = {label: f"C{i % 10}" for i, label in enumerate(labels)}
    for ax, panel in zip(axes, plotted, strict=False):
        draw_panel(ax, panel, colors)
        ax.set_xlabel(x)
    for ax in axes[len(plotted) :]:
        ax.axis("off")
    figure.supylabel(y)
    shared_legend_below(figure)
    write_atomically(path, lambda file: figure.savefig(file, dpi=120))


def draw_panel(ax: Axes, panel: Panel, colors: Mapping[str, str]) -> None:
    """The lines of a panel. That of auto is black and dashed."""
    for label, points in panel.lines.items():
        if points:
            color, linestyle = (colors[label], "-") if label in colors else ("k", "--")
            (line,) = ax.plot(*zip(*points, strict=True), label=label)
            line.set(color=color, linestyle=linestyle, marker="o", markersize=3)
    ax.set(title=panel.title, ylim=panel.limits, xscale="log", yscale="log")
    ax.grid(alpha=0.3)
