"""The decay of a logistic regression: HOAG against searches, counted in inner solves."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from command_line import require_package
from command_line.ranges import Count, Number, Numbers, within
from figures import legend_below
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import tasks
from experiments.base import Experiment
from experiments.logistic import LogisticRegression
from experiments.runs import Case, Cell, Row, Run, Runs, case_value, markdown_table, mean, median
from experiments.searches import (
    Trial,
    descend_by_hoag,
    search_at_random,
    search_by_tpe,
    search_grid,
    search_grid_warm,
)
from experiments.tabular_data import (
    SCIKIT_LEARN_SETS,
    digest_of_files,
    newsgroups,
    scikit_learn_set,
    split,
    svmlight,
)


@dataclass(frozen=True)
class Regularization(Experiment):
    """Choice of λ in f = mean cross-entropy + λ/2 ‖θ‖², θ = (W, b), by the validation loss.

    The method `hoag` (Pedregosa 2016) starts each solve from the last solution, and solves more
    exactly every time. Searches solve to the gradient norm `tol`: `grid` at equidistant values of
    log λ, `grid-warm` at the same values from the strongest λ down, each from the solution before,
    and `random` at uniform values; `tpe` is Optuna's. All solve by L-BFGS in float64, and know the
    range of λ. Losses are those of an exact solve at the chosen λ.
    """

    data: tuple[str, ...] = ("breast-cancer", "digits")
    """Sets of scikit-learn: breast-cancer, digits. Those of --libsvm and --newsgroups are added."""
    libsvm: Path | None = None
    """File in the format of libsvm."""
    newsgroups: Path | None = None
    """Folder with a folder of texts for each class, such as 20 newsgroups. Features are tf-idf."""
    features: Count = 2000
    """Number of words of --newsgroups, the most frequent, that are features."""
    start: Numbers = (1.0, 1e-4, 1e2)
    """Values of λ that HOAG starts from."""
    low: Number = 1e-6
    """Smallest λ."""
    high: Number = 1e3
    """Largest λ."""
    grid: Annotated[int, within(2, 10_000)] = 60
    """Number of solves of each search."""
    solves: Annotated[int, within(1, 10_000)] = 20
    """Number of solves of HOAG."""
    tolerance: Number = 0.1
    """HOAG's solve k is to a gradient norm of tolerance/k³."""
    tol: Number = 1e-6
    """Gradient norm of the searches' solves, and of the exact solve."""

    name = "regularization"
    default_methods = ("hoag", "grid", "grid-warm", "random", "tpe")
    case_options = ("data", "start")
    quick_options: ClassVar[dict[str, Any]] = {
        "data": ("breast-cancer",),
        "start": (1.0,),
        "low": 1e-3,
        "grid": 6,
        "solves": 3,
        "tol": 1e-4,
    }

    def check_options(self) -> None:
        """Raise ValueError for an option out of range, FileNotFoundError for a missing set."""
        super().check_options()
        if not 0 < self.low < self.high:
            raise ValueError(
                f"--low, --high: got {self.low} and {self.high}, expected 0 < low < high"
            )
        for start in self.start:
            if not self.low <= start <= self.high:
                raise ValueError(
                    f"--start: got {start}, expected a number from --low {self.low} to --high "
                    f"{self.high}"
                )
        require_package("sklearn", purpose=self.name, extra="tune")
        if "tpe" in self.methods:
            require_package("optuna", purpose="tpe", extra="tune")
        self.sources()

    def cases(self) -> list[Case]:
        """Every method on every set for every seed; HOAG from every start."""
        cases: list[Case] = []
        for data in self.sources():
            for seed in range(self.seeds):
                for method in self.methods:
                    case = {"method": method, "data": data, "seed": seed}
                    starts = (
                        [{"start": start} for start in self.start] if method == "hoag" else [{}]
                    )
                    cases += [case | start for start in starts]
        return cases

    def data_of(self, case: Case) -> dict[str, str]:
        """The digest of the file or folder of the case's set."""
        return {name: x for name, x in self.data_digests.items() if name == case["data"]}

    @cached_property
    def data_digests(self) -> dict[str, str]:
        """Digests of the files of --libsvm and --newsgroups, by the names of the sets."""
        return {name: digest_of_files(path) for name, path in self.sources().items() if path}

    def sources(self) -> dict[str, Path | None]:
        """The sets by name, each with its file or folder; None for those of scikit-learn."""
        unknown = [name for name in self.data if name not in SCIKIT_LEARN_SETS]
        if unknown:
            raise ValueError(
                f"--data: got {', '.join(unknown)}, expected some of "
                f"{', '.join(SCIKIT_LEARN_SETS)}, or --libsvm FILE"
            )
        sources: dict[str, Path | None] = dict.fromkeys(self.data)
        for flag, path in {"--libsvm": self.libsvm, "--newsgroups": self.newsgroups}.items():
            if path is None:
                continue
            if not path.exists():
                raise FileNotFoundError(f"{flag}: found nothing at {path}; name what there is")
            if path.name in sources:
                raise ValueError(
                    f"{flag}: got a second set of the name {path.name!r}, expected another name; "
                    "rename it"
                )
            sources[path.name] = path
        return sources

    def run(self, case: Case, out: Path) -> Row:
        """Choose λ on one split of one set.

        The row's `curve` has, for each inner solve, the best log λ so far and its validation loss,
        both of exact solves. Its `seconds` are those of the search alone.
        """
        train, validation, test = self.split_data(case["data"], case["seed"])
        regression = self.regression(train, validation, test)
        began = time.perf_counter()
        trials = list(self.trials(regression, case))
        seconds = time.perf_counter() - began

        curve = []
        best = trials[0].log_decay
        for trial in trials:
            # HOAG decides by itself where it stands: a trial is where it would stop.
            loss = regression.validation_loss(trial.log_decay)
            if case["method"] == "hoag" or loss < regression.validation_loss(best):
                best = trial.log_decay
            curve.append([best, regression.validation_loss(best)])
        with torch.no_grad():
            logits = torch.func.functional_call(
                regression.model,
                regression.solution(best),
                (test.inputs.double(),),
            )
        return {
            "examples": [len(part) for part in (train, validation, test)],
            "lambda": math.exp(best),
            "loss": regression.validation_loss(best),
            "curve": curve,
            "points": [trial.log_decay for trial in trials],
            "solves": len(trials),
            "evaluations": sum(trial.evaluations for trial in trials),
            "products": sum(trial.products for trial in trials),
            "test_loss": F.cross_entropy(logits, test.targets).item(),
            "test_accuracy": (logits.argmax(1) == test.targets).double().mean().item(),
            "seconds": seconds,
        }

    def split_data(self, name: str, seed: int) -> tuple[tasks.Examples, ...]:
        """Training, validation and test examples of a set, standardised unless they are texts."""
        path = self.sources()[name]
        is_text = path is not None and path == self.newsgroups
        if path is None:
            whole = scikit_learn_set(name)
        elif is_text:
            whole = newsgroups(path, self.features)
        else:
            whole = svmlight(path)
        return tuple(part.to(self.torch_device) for part in split(whole, seed, scale=not is_text))

    def regression(self, *parts: tasks.Examples) -> LogisticRegression:
        """The regression on a training and a validation set, with the classes of all parts."""
        train, validation, *_ = parts
        return LogisticRegression(
            train,
            validation,
            classes=1 + max(int(part.targets.max()) for part in parts),
            low=self.low,
            high=self.high,
            tol=self.tol,
        )

    def trials(self, regression: LogisticRegression, case: Case) -> Iterator[Trial]:
        """The inner solves of a method."""
        seed = case["seed"]
        match case["method"]:
            case "hoag":
                return descend_by_hoag(
                    regression,
                    self.solves,
                    start=case["start"],
                    tolerance=self.tolerance,
                )
            case "grid":
                return search_grid(regression, self.grid)
            case "grid-warm":
                return search_grid_warm(regression, self.grid)
            case "random":
                return search_at_random(regression, self.grid, seed)
        return search_by_tpe(regression, self.grid, seed)

    def table(self, runs: Runs) -> str:
        """A line for each set, method and start, beside the best point of the grid."""
        columns = {
            "data": case_value("data"),
            "method": lambda group: f"`{group[0].case['method']}`{start_of(group[0].case)}",
            "validation loss": mean("loss", 4),
            "above the grid's best, at most": largest("gap", "{:+.1e}"),
            f"after {self.solves} solves": largest("early_gap", "{:+.1e}"),
            "cells from its λ, at most": largest("cells", "{:.2f}"),
            "solves": largest("solves", "{}"),
            "gradient evaluations": mean("evaluations", 0),
            "Hessian products": mean("products", 0),
            "test loss": mean("test_loss", 4),
            "test accuracy": mean("test_accuracy", 4),
            "s": median("seconds", 1),
        }
        lines = Runs(Run(case, row | self.beside_grid(runs, case, row)) for case, row in runs)
        return markdown_table(columns, lines.groups("method", "data", "start"))

    def beside_grid(self, runs: Runs, case: Case, row: Row) -> Row:
        """How a row compares with the grid's best point on the same split, if the grid ran.

        `gap` is (loss − grid's best)/(grid's best), `early_gap` the same after as many solves as
        HOAG takes, and `cells` is the distance in log λ, in cells of the grid.
        """
        best = best_of_grid(runs, case)
        if best is None:
            return {}
        early = row["curve"][min(self.solves, row["solves"]) - 1][1]
        cell = math.log(self.high / self.low) / (self.grid - 1)
        return {
            "gap": (row["loss"] - best["loss"]) / best["loss"],
            "early_gap": (early - best["loss"]) / best["loss"],
            "cells": abs(math.log(row["lambda"]) - math.log(best["lambda"])) / cell,
        }

    def plot(self, runs: Runs, figure: Figure) -> None:
        """The distance from the grid's best loss against inner solves, of seed 0, for each set."""
        first = runs.where(seed=0)
        sets = first.groups("data")
        figure.set_size_inches(4.5 * len(sets), 4.5)
        axes = figure.subplots(1, len(sets), squeeze=False)[0]
        for ax, (case, group) in zip(axes, sets, strict=True):
            plot_gaps(ax, group)
            ax.set(title=f"{case['data']}, seed 0", xlabel="inner solves", yscale="log")
        axes[0].set_ylabel("|loss − grid's best| / grid's best")


def plot_gaps(ax: Axes, runs: Runs) -> None:
    """The curves of the runs on one split. There are none unless the grid ran."""
    for case, row in runs:
        best = best_of_grid(runs, case)
        if best is not None:
            gaps = [abs(loss - best["loss"]) / best["loss"] for _, loss in row["curve"]]
            label = case["method"] + start_of(case)
            ax.plot(range(1, len(gaps) + 1), gaps, label=label, linewidth=1)
    ax.axhline(1e-3, color="0.7", linewidth=0.8)
    legend_below(ax)


def best_of_grid(runs: Runs, case: Case) -> Row | None:
    """The row of the grid on the split of a case, that of the warm grid, or None."""
    for method in ("grid", "grid-warm"):
        of_grid = runs.where(method=method, data=case["data"], seed=case["seed"])
        if of_grid:
            return of_grid[0].row
    return None


def start_of(case: Case) -> str:
    """The start of HOAG in words, nothing for the searches."""
    return f" from {case['start']:g}" if "start" in case else ""


def largest(key: str, pattern: str) -> Cell:
    """A cell with the largest row[key] of the rows that have it, or a dash."""

    def cell(runs: Runs) -> str:
        values = runs.values(key)
        return pattern.format(max(values)) if values else "–"

    return cell
