"""Inverse curvature–vector products side by side, at equal numbers of products.

Every method starts from the same solution of the same problem. Tables are printed; JSON, plots and
report.html are left in runs/compare. What is done is kept in rows.json there: the same command
again only measures what is missing.

python scripts/compare.py                           # every problem
python scripts/compare.py --problems logistic digits-0.01 --products 10 30
python scripts/compare.py --conditioning            # or --robustness, --drift, --peers
"""

from __future__ import annotations

import startup  # isort: skip  # noqa: F401  # before what takes time to import

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import peers
import studies
import torch
from command_line import RowFile, handle_errors, parse_options, set_up_cpu
from command_line.ranges import Seeds, Threads, check_ranges, within
from comparison_page import make_comparison_page
from comparison_report import (
    draw,
    errors_against_condition,
    errors_against_products,
    load_comparison,
    records_against_rho,
    split_panel,
    table,
)
from problems import Instance, named_problems, quadratic

from metaimplicit.diagnostics.compare import Comparison, compare
from metaimplicit.training import describe_sitting, leave_page, write_json


@dataclass(frozen=True)
class Settings:
    """Relative errors of hypergradients against products. A flag chooses another study."""

    problems: tuple[str, ...] = tuple(named_problems(None))
    """Problems to compare the methods on."""
    products: Annotated[tuple[int, ...], within(1, 10_000)] = (10, 30, 100)
    """Numbers of products with the curvature."""
    seeds: Seeds = 5
    """Number of sketches, of which the median counts. For --robustness, number of data sets."""
    conditioning: bool = False
    """Study the error against the condition of a quadratic."""
    robustness: bool = False
    """Study the knobs of Nyström, Neumann and CG on one logistic regression."""
    drift: bool = False
    """Study what solvers save that keep something from system to system, on systems that drift."""
    peers: bool = False
    """Compare the public libraries that are installed with exact values."""
    data_root: Path | None = None
    """Folder with Omniglot for the episodes. If it is not given, they are glyphs."""
    threads: Threads = None
    """Number of CPU threads. If it is not given, torch chooses."""
    out: Path = Path("runs/compare")
    """Folder for JSON and plots."""


@handle_errors
def run_command(args: list[str]) -> None:
    """Run `main` with the settings that a command line gives."""
    main(parse_options(Settings, args))


def main(settings: Settings) -> None:
    """Run the study that the settings choose, store what it returns, and leave a page."""
    study = choose_study(settings)
    set_up_cpu(settings.threads)
    results = STUDIES[study](settings, RowFile(settings.out / "rows.json"))
    options = {n: str(v) if isinstance(v, Path) else v for n, v in asdict(settings).items()}
    sitting = describe_sitting(torch.device("cpu"))
    content = {"settings": options, "sitting": sitting, "found": results}
    write_json(settings.out / f"{study}.json", content)
    leave_page(settings.out / "report.html", lambda: make_comparison_page(settings.out))


def choose_study(settings: Settings) -> str:
    """The key of `STUDIES` that the settings choose.

    Raises:
        ValueError: A setting is out of range, or chooses a second study.
    """
    check_ranges(settings)
    makers = named_problems(settings.data_root)
    unknown = sorted(set(settings.problems) - set(makers))
    if unknown:
        known = ", ".join(makers)
        raise ValueError(f"--problems: got {', '.join(unknown)}, expected some of {known}")
    for name in ("problems", "products"):
        if not getattr(settings, name):
            raise ValueError(f"--{name}: got none, expected at least one")
    flags = {
        "conditioning": settings.conditioning,
        "robustness": settings.robustness,
        "drift": settings.drift,
        "peers": settings.peers,
    }
    chosen = [study for study, flag in flags.items() if flag]
    if len(chosen) > 1:
        raise ValueError(f"--{chosen[0]}, --{chosen[1]}: got several studies, expected one")
    return chosen[0] if chosen else "problems"


def study_problems(settings: Settings, rows: RowFile) -> dict[str, Any]:
    """The errors on every problem, against products."""
    makers = named_problems(settings.data_root)
    comparisons = {}
    plotted = []
    for name in settings.problems:
        comparison = read_or_run(name, makers[name], settings, rows)
        comparisons[name] = asdict(comparison)
        plotted += split_panel(name, errors_against_products(comparison))
        print(table(name, comparison), flush=True)
    draw(
        settings.out / "errors.png",
        plotted,
        x="products",
        y="relative error of hypergradients",
    )
    return comparisons


def study_conditioning(settings: Settings, rows: RowFile) -> dict[str, Any]:
    """The errors on quadratics of condition 10 … 10⁶, against the condition.

    They have 300 unknowns. Their eigenvalues are equidistant in the logarithm.
    """
    comparisons = {}
    for exponent in range(1, 7):
        spectrum = torch.logspace(-exponent, 0, 300).double()
        condition = f"1e{exponent}"
        comparisons[condition] = read_or_run(
            f"condition {condition}",
            partial(quadratic, spectrum),
            settings,
            rows,
        )
    plotted = []
    for products in settings.products:
        lines = errors_against_condition(comparisons, products)
        plotted += split_panel(f"{products} products", lines)
    for condition, comparison in comparisons.items():
        print(table(f"condition {condition}", comparison))
    path = settings.out / "conditioning.png"
    draw(path, plotted, x="condition", y="relative error of hypergradients")
    return {condition: asdict(comparison) for condition, comparison in comparisons.items()}


def study_robustness(settings: Settings, rows: RowFile) -> list[dict[str, Any]]:
    """The errors and the validation losses of `studies.study_robustness`, against ρ."""
    records = studies.study_robustness(settings.seeds, rows)
    plotted = []
    for key, title in (("error", "hypergradient error"), ("loss", "validation loss")):
        for k in studies.COUNTS:
            lines = records_against_rho(records, key, k)
            plotted += split_panel(f"{title}, k = {k}", lines)
    draw(
        settings.out / "robustness.png",
        plotted,
        x="ρ (Nyström), step (Neumann)",
        y="",
    )
    return records


def study_drift(settings: Settings, rows: RowFile) -> list[dict[str, Any]]:
    """The products of `studies.study_drift`."""
    return studies.study_drift(rows)


def study_peers(settings: Settings, rows: RowFile) -> dict[str, Any]:
    """The errors and the seconds of other libraries, from `peers`.

    They are always measured: it takes seconds, and a library may have been installed since.
    """
    return {"errors": peers.compare_errors(), "seconds": peers.compare_seconds()}


STUDIES: dict[str, Callable[[Settings, RowFile], Any]] = {
    "problems": study_problems,
    "conditioning": study_conditioning,
    "robustness": study_robustness,
    "drift": study_drift,
    "peers": study_peers,
}


def read_or_run(
    name: str, make: Callable[[], Instance], settings: Settings, rows: RowFile
) -> Comparison:
    """All methods on one problem, from the stored rows if they are there."""
    case = {
        "problem": name,
        "products": list(settings.products),
        "seeds": settings.seeds,
        "data_root": None if settings.data_root is None else str(settings.data_root),
    }
    row = rows.read_or_make(case, lambda: {"comparison": asdict(run(make(), settings))})
    return load_comparison(row["comparison"])


def run(instance: Instance, settings: Settings) -> Comparison:
    """All methods on one problem."""
    return compare(
        instance.problem,
        instance.meta,
        instance.data,
        inner=instance.inner,
        curvature=instance.curvature,
        batched=instance.batched,
        products=settings.products,
        seeds=settings.seeds,
    )


if __name__ == "__main__":
    run_command(sys.argv[1:])
