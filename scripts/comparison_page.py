"""The page of the studies that compare.py left in a folder: report.html."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import studies
from comparison_report import (
    Panel,
    auto_lines,
    description,
    draw_panel,
    errors_against_condition,
    errors_against_products,
    load_comparison,
    records_against_rho,
    split_panel,
)
from figures import legend_below
from matplotlib.figure import Figure

from metaimplicit.diagnostics.compare import Comparison
from metaimplicit.training import read_json
from metaimplicit.training.page import (
    Html,
    chart,
    charts,
    element,
    join,
    make_page,
    note,
    number,
    plain,
    table,
)
from metaimplicit.training.provenance_sections import options_section, sittings_table

ABOUT = (
    "Relative errors of hypergradients by implicit differentiation. On each problem, every method "
    "starts from the same solution and may take the same number of products with the curvature."
)


def make_comparison_page(folder: Path) -> str:
    """The page of every study whose JSON is in the folder."""
    paths = {study: folder / f"{study}.json" for study in SECTIONS}
    stored = {study: read_json(path) for study, path in paths.items() if path.exists()}
    sections = {}
    for study, content in stored.items():
        title, make = SECTIONS[study]
        sections[title] = make(content["found"])
    sections["Options"] = join(
        join([element("h3", SECTIONS[study][0]), options_section(content["settings"])])
        for study, content in stored.items()
    )
    sections["Provenance"] = _provenance(stored)
    return make_page(f"Comparison: {folder.name}", element("p", ABOUT), sections)


def _problems(found: Mapping[str, Any]) -> Html:
    return join(_problem(name, load_comparison(stored)) for name, stored in found.items())


def _problem(name: str, comparison: Comparison) -> Html:
    products = sorted({row.products for row in comparison.rows})
    panels = split_panel(name, errors_against_products(comparison))
    drawn = _charts(
        panels,
        x="products with the curvature",
        caption=f"Relative errors on {name}.",
    )
    lines = [element("li", line.strip()) for line in auto_lines(comparison, products)]
    return join(
        [
            element("h3", name),
            note(description(comparison)),
            drawn,
            _method_table(comparison, products),
            element("ul", *lines),
        ]
    )


def _method_table(comparison: Comparison, products: Sequence[int]) -> Html:
    """A line for each method, by its last error. Other numbers are those of its last row."""
    methods = dict.fromkeys(row.method for row in comparison.rows)
    lines = []
    for method in methods:
        rows = {row.products: row for row in comparison.rows if row.method == method}
        last = rows[max(rows)]
        errors = [f"{rows[count].error:.1e}" if count in rows else "–" for count in products]
        costs = [f"{last.residual:.1e}", number(last.seconds), f"{last.mebibytes:.1f}"]
        cells = [element("code", method), *errors, f"{last.cosine:.4f}", *costs]
        lines.append((last.error, [*cells, last.status.lower()]))
    lines.sort(key=lambda pair: pair[0])
    heads = [f"error, {count} products" for count in products]
    titles = ["method", *heads, "cosine", "residual", "seconds", "MiB", "status"]
    return table(titles, [cells for _, cells in lines])


def _conditioning(found: Mapping[str, Any]) -> Html:
    comparisons = {condition: load_comparison(stored) for condition, stored in found.items()}
    products = sorted({row.products for c in comparisons.values() for row in c.rows})
    panels = [
        panel
        for count in products
        for panel in split_panel(f"{count} products", errors_against_condition(comparisons, count))
    ]
    caption = "Relative errors on quadratics against their condition."
    return _charts(panels, x="condition", caption=caption)


def _robustness(found: Sequence[Mapping[str, Any]]) -> Html:
    panels = [
        panel
        for key, title in (("error", "hypergradient error"), ("loss", "validation loss"))
        for k in studies.COUNTS
        for panel in split_panel(f"{title}, k = {k}", records_against_rho(found, key, k))
    ]
    caption = "One logistic regression, against ρ (Nyström) or the step (Neumann)."
    return join([_charts(panels, x="ρ or step", caption=caption), _records(found)])


def _peers(found: Mapping[str, Any]) -> Html:
    seconds = found["seconds"]
    words = "The libraries to be timed are not installed."
    if seconds:
        words = f"Nyström hypergradient of a conv net, in seconds: {plain(seconds)}."
    return join([_records(found["errors"]), note(words)])


def _records(records: Iterable[Mapping[str, Any]]) -> Html:
    """A table of dictionaries. Entries that are no single numbers or words are left out."""
    rows = list(records)
    names = dict.fromkeys(
        name for row in rows for name, v in row.items() if not isinstance(v, (list, dict))
    )
    return table(list(names), [[plain(row.get(name)) for name in names] for row in rows])


def _drift(found: Sequence[Mapping[str, Any]]) -> Html:
    return _records(found)


def _charts(panels: Sequence[Panel], *, x: str, caption: str) -> Html:
    labels = sorted({label for panel in panels for label in panel.lines} - {"auto"})
    colors = {label: f"C{i % 10}" for i, label in enumerate(labels)}
    drawn = []
    for panel in panels:
        figure = Figure(figsize=(4.4, 4.0), layout="constrained")
        ax = figure.subplots()
        draw_panel(ax, panel, colors)
        ax.set(xlabel=x, ylabel="" if "loss" in panel.title else "relative error")
        legend_below(ax, columns=3)
        drawn.append(chart(figure, caption))
    return charts(drawn)


def _provenance(stored: Mapping[str, Mapping[str, Any]]) -> Html:
    """What the last call of each study ran on."""
    words = "What the last call of each study ran on. Rows that were stored before were kept."
    parts = []
    for study, content in stored.items():
        if "sitting" in content:
            parts.append(element("h3", SECTIONS[study][0]))
            parts.append(sittings_table([content["sitting"]]))
    return join([note(words), *parts]) if parts else note("It is unknown what this ran on.")


SECTIONS: dict[str, tuple[str, Callable[[Any], Html]]] = {
    "problems": ("Problems", _problems),
    "conditioning": ("Conditioning", _conditioning),
    "robustness": ("Robustness", _robustness),
    "drift": ("Drift", _drift),
    "peers": ("Other libraries", _peers),
}
