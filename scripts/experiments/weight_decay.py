"""A decay for every weight of a logistic regression: hypergradients' directions and lengths, at several outer steps."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import problems
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

from experiments.base import Case, Experiment, Row, markdown, select, spread
from metaimplicit import Box, Tuner, hypergradient
from metaimplicit.methods import known_options, make_method
from metaimplicit.params import Params
from metaimplicit.solvers import SolverState

PAPER_STEP = (
    1.0  # the outer step of Hataya & Yamada's code, whose other numbers are the defaults below
)


@dataclass(frozen=True)
class WeightDecay(Experiment):
    """Losses and accuracy of a logistic regression whose 100 decays are tuned on validation data.

    The set-up of Hataya & Yamada's code: 500 + 500 points, 100 inner steps of 0.1 from zero, solves from zero, outer
    SGD with momentum 0.9, decays from 1 and at least 1e-8. `dense` is the exact implicit hypergradient, against which
    every method's is held on its own path. Baseline: `none`, the decays stay. Seed s is data set s + 1 of compare.py.
    """

    seeds: int = 5
    """Data sets."""
    outer_lrs: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    """Outer steps to compare; each method's best is the one of the lowest mean validation loss."""
    outer_steps: int = 10
    """How many are taken; their code's 1000 inner steps come to 9."""
    solver_steps: int = 5
    """Products of CG and Nyström-CG, terms of Neumann."""
    rank: int = 5
    """Columns of Nyström."""
    rho: float = 0.1
    """Nyström's damping."""
    scale: float = 0.1
    """Step of Neumann's series; they give it and ρ by the same option."""
    test: int = 10_000
    """Test points, which decide nothing."""

    name: ClassVar[str] = "weight-decay"
    baselines: ClassVar[tuple[str, ...]] = ("none",)
    listed: ClassVar[tuple[str, ...]] = ("outer_lrs",)
    compared: ClassVar[tuple[str, ...]] = (
        "none", "dense", "unrolled", "cg", "neumann", "nystrom", "nystrom-cg", "t1-t2",
    )  # fmt: skip

    def quickened(self) -> WeightDecay:
        lrs = self.outer_lrs[-2:]
        return replace(self, seeds=1, outer_lrs=lrs, outer_steps=2, test=100)

    def cases(self) -> list[Case]:
        for name, number in {"--outer-steps": self.outer_steps, "--test": self.test}.items():
            if number < 1:
                raise ValueError(f"{name}: got {number}, expected at least 1")
        if not min(self.outer_lrs, default=0) > 0:
            raise ValueError(f"--outer-lrs: got {self.outer_lrs}, expected some numbers > 0")
        # what stays does so at every outer step
        return [
            case | {"outer_lr": lr}
            for case in super().cases()
            for lr in ([0.0] if case["method"] == "none" else self.outer_lrs)
        ]

    def run(self, case: Case, out: Path) -> Row:
        began, found = time.perf_counter(), problems.logistic(case["seed"] + 1, self.test)
        row: Row = {"losses": [], "cosines": [], "ratios": []}
        meta = found.meta
        try:
            if case["method"] != "none":
                with warnings.catch_warnings():
                    warnings.simplefilter(
                        "ignore", RuntimeWarning
                    )  # of large residuals, which `ratios` tell
                    meta = self._tuned(found, case, row)
            last = hypergradient(found.problem, meta, found.data, inner=found.inner, method="dense")
            loss = last.outer_loss.item() if math.isfinite(last.outer_loss.item()) else None
        except FloatingPointError:
            loss = None
        row["loss"] = loss  # None, it diverged
        if loss is not None:
            x, y = (part[1000:] for part in found.data)
            scores = x @ last.params["w"]
            row["losses"].append(loss)
            row["test_loss"] = F.binary_cross_entropy_with_logits(scores, y).item()
            row["test_accuracy"] = ((scores > 0) == (y > 0)).double().mean().item()
        return row | {"seconds": time.perf_counter() - began}

    def _tuned(self, found: problems.Case, case: Case, row: Row) -> Params:
        """The decays after the outer steps; on the way, what each hypergradient is beside the exact one there."""
        method = case["method"]
        options = known_options(
            method,
            solver_steps=self.solver_steps,
            rank=self.rank,
            rho=self.rho,
            scale=self.scale if method == "neumann" else None,
        )
        tuner = Tuner(
            found.problem,
            found.meta,
            inner=found.inner,
            method=make_method(method, **options),
            optimizer=partial(torch.optim.SGD, lr=case["outer_lr"], momentum=0.9),
            domains={"decay": Box(1e-8)},
            warm_start=False,
        )
        (decay,) = tuner.optimizer.param_groups[0]["params"]
        for _ in range(self.outer_steps):
            before = {name: value.clone() for name, value in tuner.meta.items()}
            tuner.state = SolverState()  # every solve from zero
            step = tuner.step(found.data, found.data)
            exact = hypergradient(
                found.problem,
                before,
                found.data,
                inner=problems.STAY,
                method="dense",
                start=tuner.end,
            )
            cosine, ratio = compared_with(exact.grads["decay"], decay.grad)
            if not math.isfinite(cosine + ratio):
                raise FloatingPointError(
                    f"{case}: got a cosine of {cosine} and a norm ratio of {ratio}"
                )
            for key, value in {
                "losses": step.outer_loss,
                "cosines": cosine,
                "ratios": ratio,
            }.items():
                row[key].append(value)
        return tuner.meta

    def table(self, rows: Sequence[tuple[Case, Row]]) -> str:
        tried = ", ".join(f"{lr:g}" for lr in self.outer_lrs)
        best = {method: best_step(rows, method) for method in self.methods}
        fixed = {method: 0.0 if method == "none" else PAPER_STEP for method in self.methods}
        return (
            f"At the outer step of Hataya & Yamada's code, {PAPER_STEP:g}:\n\n{self._at(rows, fixed)}\n\n"
            f"At each method's best outer step of {tried}, by mean validation loss:\n\n{self._at(rows, best)}"
        )

    def _at(self, rows: Sequence[tuple[Case, Row]], steps: dict[str, float]) -> str:
        """One table, each method at its outer step."""
        lines = []
        for method, lr in steps.items():
            at = {"method": method, "outer_lr": lr}
            if lost := select(rows, "loss", **at).count(None):
                lines.append(
                    [f"`{method}`", f"{lr:g}", f"{lost} of {self.seeds} diverged", *["–"] * 4]
                )
                continue
            means = {
                key: [statistics.fmean(c) for c in select(rows, key, **at) if c]
                for key in ("cosines", "ratios")
            }
            lines.append([
                f"`{method}`",
                f"{lr:g}" if lr else "–",
                spread(select(rows, "loss", **at), 3),
                spread(select(rows, "test_loss", **at), 3),
                spread([100 * accuracy for accuracy in select(rows, "test_accuracy", **at)], 2),
                spread(means["cosines"], 4),
                spread(means["ratios"], 3),
            ])  # fmt: skip
        header = [
            "method",
            "outer step",
            "validation loss",
            "test loss",
            "test accuracy, %",
            "cosine",
            "norm ratio",
        ]
        return markdown(header, lines)

    def plot(self, rows: Sequence[tuple[Case, Row]], figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        for ax, title in (
            (left, f"outer step {PAPER_STEP:g}"),
            (right, "each method's best outer step"),
        ):
            for method in self.methods:
                lr = best_step(rows, method) if ax is right and method != "none" else PAPER_STEP
                found = select(rows, "losses", method=method, outer_lr=lr)
                if found and None not in select(rows, "loss", method=method, outer_lr=lr):
                    mean = [statistics.fmean(losses) for losses in zip(*found, strict=True)]
                    ax.plot(mean, marker="o", markersize=3, label=f"{method}, {lr:g}")
            ax.set(title=title, xlabel="outer steps")
            ax.legend(fontsize=7)
        left.set_ylabel("validation loss")


def compared_with(exact: Tensor, found: Tensor) -> tuple[float, float]:
    """cos∠(found, exact) and ‖found‖/‖exact‖ of two vectors, `[n]`."""
    a, b = exact / exact.norm(), found / exact.norm()
    return float(a @ b / b.norm()), float(b.norm())


def best_step(rows: Sequence[tuple[Case, Row]], method: str) -> float:
    """The outer step of the lowest mean validation loss, whatever the test says, at which none diverged."""

    def loss(lr: float) -> float:
        losses = select(rows, "loss", method=method, outer_lr=lr)
        return math.inf if None in losses else statistics.fmean(losses)

    steps: list[float] = sorted({case["outer_lr"] for case, _ in rows if case["method"] == method})
    return min(steps, key=loss)
