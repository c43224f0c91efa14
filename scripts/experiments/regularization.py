"""Weight decay of logistic regression: HOAG against searches, counted in inner solves."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

import tasks
from experiments.base import Case, Experiment, Row, markdown, spread
from experiments.logistic import MOST, Judge
from experiments.tables import digits_or_cancer, newsgroups, split, svmlight
from metaimplicit import HOAG, LBFGS

Trial = tuple[float, int, int]  # log λ, gradient evaluations of the inner solve, Hessian products


@dataclass(frozen=True)
class Regularization(Experiment):
    """λ of f = mean cross-entropy + λ/2 ‖θ‖², θ = (W, b), chosen by the validation cross-entropy; float64.

    `hoag` (Pedregosa 2016) solves ever more exactly from its last solution. Baselines solve to `tol`: `grid`,
    equidistant in log λ; `grid-warm`, the same from the strongest λ down, each from the solution before; `random`,
    uniform in log λ; `tpe`, Optuna's. All solve by L-BFGS and know the range of λ.
    The loss of a row is that of an exact solve at the λ chosen.
    """

    data: tuple[str, ...] = ("breast-cancer", "digits")
    """Of scikit-learn's breast-cancer, digits; those of --libsvm and --newsgroups come on top."""
    libsvm: Path | None = None
    """A file in the format of libsvm."""
    newsgroups: Path | None = None
    """A folder of folders of texts, one a class, as that of 20 newsgroups; features are tf-idf."""
    features: int = 2000
    """Words kept of --newsgroups, the most frequent."""
    start: tuple[float, ...] = (1.0, 1e-4, 1e2)
    """λ that HOAG starts from."""
    low: float = 1e-6
    """The smallest λ."""
    high: float = 1e3
    """The largest."""
    grid: int = 60
    """Solves of the searches."""
    solves: int = 20
    """Solves of HOAG."""
    tolerance: float = 0.1
    """HOAG's solve k is to a gradient norm of tolerance/k³."""
    tol: float = 1e-6
    """Gradient norm of the searches' solves, and of the exact one."""

    name: ClassVar[str] = "regularization"
    baselines: ClassVar[tuple[str, ...]] = ("hoag", "grid", "grid-warm", "random", "tpe")
    compared: ClassVar[tuple[str, ...]] = baselines

    def quickened(self) -> Regularization:
        return replace(
            self,
            data=("breast-cancer",),
            seeds=1,
            start=(1.0,),
            low=1e-3,
            grid=6,
            solves=3,
            tol=1e-4,
        )

    @property
    def methods(self) -> tuple[str, ...]:
        """Those asked for; ValueError for an unknown one."""
        if unknown := [m for m in self.method if m not in self.baselines]:
            raise ValueError(
                f"--method: got {', '.join(unknown)}, expected some of {', '.join(self.baselines)}"
            )
        return self.method or self.compared

    def cases(self) -> list[Case]:
        if not 0 < self.low < self.high:
            raise ValueError(
                f"--low, --high: got {self.low} and {self.high}, expected 0 < low < high"
            )
        if outside := [s for s in self.start if not self.low <= s <= self.high]:
            raise ValueError(
                f"--start: got {outside[0]}, expected a number from --low {self.low} to --high {self.high}"
            )
        if self.grid < 2 or self.solves < 1:
            raise ValueError(
                f"--grid, --solves: got {self.grid} and {self.solves}, expected at least 2 and 1"
            )
        cases: list[Case] = []
        for data in self._sources():
            for seed in range(self.seeds):
                for method in self.methods:
                    plain = {"method": method, "data": data, "seed": seed}
                    cases += (
                        [{**plain, "start": s} for s in self.start] if method == "hoag" else [plain]
                    )
        return cases

    def _sources(self) -> dict[str, Path | None]:
        known = ("breast-cancer", "digits")
        if unknown := [d for d in self.data if d not in known]:
            raise ValueError(
                f"--data: got {', '.join(unknown)}, expected some of {', '.join(known)}, or --libsvm FILE"
            )
        sources: dict[str, Path | None] = dict.fromkeys(self.data)
        for flag, path in {"--libsvm": self.libsvm, "--newsgroups": self.newsgroups}.items():
            if path is None:
                continue
            if not path.exists():
                raise FileNotFoundError(
                    f"{flag}: found nothing at {path}; name a file of libsvm's, or a folder of texts"
                )
            if path.name in sources:
                raise ValueError(
                    f"{flag}: got a second set of the name {path.name!r}, expected another; rename it"
                )
            sources[path.name] = path
        return sources

    def run(self, case: Case, out: Path) -> Row:
        began = time.perf_counter()
        train, validation, test = self._data(case["data"], case["seed"])
        classes = 1 + max(int(part.targets.max()) for part in (train, validation, test))
        judge = Judge(train, validation, classes, self.low, self.high, self.tol)
        searches = {
            "grid": self._grid,
            "grid-warm": self._grid_warm,
            "random": self._random,
            "tpe": self._tpe,
        }
        if case["method"] == "hoag":
            trials = list(self._hoag(judge, case["start"]))
        else:
            trials = list(searches[case["method"]](judge, case["seed"]))
        seconds, curve, best = time.perf_counter() - began, [], 0
        for k, (point, *_) in enumerate(
            trials
        ):  # HOAG's trials are where it would stop, not where it looked
            if case["method"] == "hoag" or judge.loss(point) < judge.loss(trials[best][0]):
                best = k
            curve.append([trials[best][0], judge.loss(trials[best][0])])
        inputs, targets = test.inputs.double(), test.targets
        with torch.no_grad():
            outputs = torch.func.functional_call(
                judge.model, judge.solution(curve[-1][0]), (inputs,)
            )
        return {
            "examples": [len(part) for part in (train, validation, test)],
            "lambda": math.exp(curve[-1][0]),
            "loss": curve[-1][1],
            "curve": curve,
            "points": [point for point, *_ in trials],
            "solves": len(trials),
            "evaluations": sum(evaluations for _, evaluations, _ in trials),
            "products": sum(products for *_, products in trials),
            "test_loss": F.cross_entropy(outputs, targets).item(),
            "test_accuracy": (outputs.argmax(1) == targets).double().mean().item(),
            "seconds": seconds,
        }

    def _data(self, name: str, seed: int) -> tuple[tasks.Examples, ...]:
        path = self._sources()[name]
        if path is None:
            whole = digits_or_cancer(name)
        else:
            whole = newsgroups(path, self.features) if path == self.newsgroups else svmlight(path)
        parts = split(whole, seed, scale=path is None or path != self.newsgroups)
        return tuple(part.to(self.torch_device) for part in parts)

    def _hoag(self, judge: Judge, start: float) -> Iterator[Trial]:
        meta = {"log_decay": judge.problem.meta["log_decay"].new_tensor(math.log(start))}
        parts = tasks.Batches(judge.train, None, 0)(0), tasks.Batches(judge.validation, None, 0)(0)
        inner = LBFGS(steps=MOST)
        hoag = HOAG(
            judge.problem.problem,
            meta,
            *parts,
            inner=inner,
            tolerance=self.tolerance,
            domains=judge.problem.domains,
        )
        accepted = math.nan
        for _ in range(self.solves):
            point, step = hoag.meta["log_decay"].item(), hoag.step()
            accepted = point if step.accepted else accepted
            yield accepted, int(step.report.inner_steps), step.report.products

    def _points(self) -> list[float]:
        low, high = math.log(self.low), math.log(self.high)
        return [low + (high - low) * i / (self.grid - 1) for i in range(self.grid)]

    def _grid(self, judge: Judge, seed: int) -> Iterator[Trial]:
        for point in self._points():
            yield point, judge.solve(point), 0

    def _grid_warm(self, judge: Judge, seed: int) -> Iterator[Trial]:
        before: float | None = None
        for point in reversed(self._points()):
            yield point, judge.solve(point, before), 0
            before = point

    def _random(self, judge: Judge, seed: int) -> Iterator[Trial]:
        random = tasks.examples.random_stream(seed, "search")
        for point in random.uniform(math.log(self.low), math.log(self.high), self.grid).tolist():
            yield point, judge.solve(point), 0

    def _tpe(self, judge: Judge, seed: int) -> Iterator[Trial]:
        try:
            import optuna
        except ImportError as error:
            raise ImportError(
                f'tpe: found no optuna ({error}); pip install -e ".[tune]"'
            ) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
        for _ in range(self.grid):
            trial = study.ask()
            point = trial.suggest_float("log_decay", math.log(self.low), math.log(self.high))
            evaluations = judge.solve(point)
            study.tell(trial, judge.loss(point))
            yield point, evaluations, 0

    def table(self, rows: Sequence[tuple[Case, Row]]) -> str:
        cell = math.log(self.high / self.low) / (self.grid - 1)
        lines = []
        for group, found in _grouped(rows).items():
            method, data, start = group
            best = [_best(rows, data, case["seed"]) for case, _ in found]
            gaps = [
                (row["loss"] - g[1]) / g[1] for (_, row), g in zip(found, best, strict=True) if g
            ]
            early = [
                (row["curve"][min(self.solves, row["solves"]) - 1][1] - g[1]) / g[1]
                for (_, row), g in zip(found, best, strict=True)
                if g
            ]
            cells = [
                abs(math.log(row["lambda"]) - g[0]) / cell
                for (_, row), g in zip(found, best, strict=True)
                if g
            ]
            lines.append([
                data,
                f"`{method}`" + ("" if start is None else f" from {start:g}"),
                spread([row["loss"] for _, row in found], 4),
                f"{max(gaps):+.1e}" if gaps else "–",
                f"{max(early):+.1e}" if early else "–",
                f"{max(cells):.2f}" if cells else "–",
                str(max(row["solves"] for _, row in found)),
                f"{sum(row['evaluations'] for _, row in found) / len(found):.0f}",
                f"{sum(row['products'] for _, row in found) / len(found):.0f}",
                spread([row["test_loss"] for _, row in found], 4),
                spread([row["test_accuracy"] for _, row in found], 4),
                f"{sum(row['seconds'] for _, row in found) / len(found):.1f}",
            ])  # fmt: skip
        header = [
            "data", "method", "validation loss", "above the grid's best, at most", f"after {self.solves} solves",
            "cells from its λ, at most", "solves", "gradient evaluations", "Hessian products", "test loss",
            "test accuracy", "s",
        ]  # fmt: skip
        return markdown(header, lines)

    def plot(self, rows: Sequence[tuple[Case, Row]], figure: Figure) -> None:
        names = list(dict.fromkeys(case["data"] for case, _ in rows))
        for ax, data in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
            for (method, where, start), found in _grouped(rows).items():
                if where != data or (case_best := _best(rows, data, found[0][0]["seed"])) is None:
                    continue
                curve = found[0][1]["curve"]
                gaps = [abs(loss - case_best[1]) / case_best[1] for _, loss in curve]
                label = method if start is None else f"{method} from {start:g}"
                ax.semilogy(range(1, len(curve) + 1), gaps, label=label, linewidth=1)
            ax.set(
                title=f"{data}, seed 0",
                xlabel="inner solves",
                ylabel="|loss − grid's best| / grid's best",
            )
            ax.axhline(1e-3, color="0.7", linewidth=0.8)
        figure.axes[0].legend(fontsize=6)


def _grouped(
    rows: Sequence[tuple[Case, Row]],
) -> dict[tuple[str, str, float | None], list[tuple[Case, Row]]]:
    groups: dict[Any, list[tuple[Case, Row]]] = {}
    for case, row in rows:
        groups.setdefault((case["method"], case["data"], case.get("start")), []).append((case, row))
    return groups


def _best(rows: Sequence[tuple[Case, Row]], data: str, seed: int) -> tuple[float, float] | None:
    """log λ of the grid's best point, and the loss there."""
    for case, row in rows:
        if case["method"] in ("grid", "grid-warm") and (case["data"], case["seed"]) == (data, seed):
            return math.log(row["lambda"]), row["loss"]
    return None
