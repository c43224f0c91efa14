"""Group lasso whose groups are not known: learnt from the validation error of regressions that share them."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from experiments.base import Case, Experiment, Row, markdown, select, spread
from metaimplicit import LBFGS, GradientDescent, Proximal, Tuner, argmin, tuning_problem
from metaimplicit.methods import known_options, make_method
from metaimplicit.training import fit_tuner, read_metrics
from metaimplicit.tuning import GroupStructure, TuningProblem

Points = tuple[Tensor, Tensor]  # X [regressions, points, features] and y [regressions, points]


@dataclass(frozen=True)
class GroupLasso(Experiment):
    """Recovery of planted groups, and test error, after Frecon, Salzo & Pontil (2018).

    y_t = X_t w_t + noise, each w_t supported on a few whole groups; f = Σ_t ½ mean (y_t − X_t w_t)² + strength
    Σ_t Σ_l √(‖s_l ⊙ w_t‖² + smoothing²) + ½ ridge ‖w_t‖², g = Σ_t ½ mean (y_t − X_t w_t)² on other points, each
    feature's memberships s on the simplex. Baselines: `oracle`, the planted groups; `random` ones; `lasso`, a group for
    each feature. Every structure is judged at the multiple of the strength that validates best.
    """

    seeds: int = 5
    """Data sets, with a start each."""
    features: int = 40
    """P."""
    groups: int = 5
    """L, planted, and learnt."""
    regressions: int = 250
    """T."""
    points: int = 20
    """N, of each regression."""
    validation: int = 20
    """Validation points of each."""
    test: int = 200
    """Test points of each."""
    active: int = 1
    """Groups in the support of a regression."""
    noise: float = 0.2
    """Standard deviation; inputs and the weights of the support have 1."""
    strength: float = 0.1
    """Of the penalty."""
    smoothing: float = 1e-2
    """ε of the norms."""
    ridge: float = 1e-3
    """Of the weights."""
    inner_steps: int = 20
    """Gradient steps for each hypergradient, from where the last ended."""
    inner_lr: float = 0.1
    """Their size, with momentum 0.9."""
    outer_steps: int = 80
    """Steps of Adam on the logits of the memberships."""
    outer_lr: float = 0.1
    """Their size."""
    starts: int = 5
    """Random memberships to start from, of which the one that validates best counts."""
    solver_steps: int = 10
    """Products of CG and its like, terms of Neumann."""
    rank: int = 10
    """Columns of Nyström."""

    name: ClassVar[str] = "group-lasso"
    baselines: ClassVar[tuple[str, ...]] = ("oracle", "random", "lasso")
    compared: ClassVar[tuple[str, ...]] = ("oracle", "random", "lasso", "unrolled", "cg")

    def quickened(self) -> GroupLasso:
        return replace(
            self, seeds=1, features=12, groups=3, regressions=10, points=6, validation=6, test=20, inner_steps=5,
            outer_steps=3, starts=2, solver_steps=3, rank=2,
        )  # fmt: skip

    def cases(self) -> list[Case]:
        if not 2 <= self.groups <= self.features:
            raise ValueError(
                f"--groups: got {self.groups}, expected from 2 to {self.features}, the features"
            )
        if not 1 <= self.active <= self.groups:
            raise ValueError(
                f"--active: got {self.active}, expected from 1 to {self.groups}, the groups"
            )
        counts = (
            "starts",
            "regressions",
            "points",
            "validation",
            "test",
            "inner_steps",
            "outer_steps",
        )
        for name, number in {name: getattr(self, name) for name in counts}.items():
            if number < 1:
                raise ValueError(f"--{name.replace('_', '-')}: got {number}, expected at least 1")
        if importlib.util.find_spec("scipy") is None:
            raise ImportError(
                f'{self.name}: found no scipy, which matches groups; pip install -e ".[tune]"'
            )
        return super().cases()

    def run(self, case: Case, out: Path) -> Row:
        began, method, seed = time.perf_counter(), case["method"], case["seed"]
        data = planted(self, seed)
        row: Row = {}
        if method in self.baselines:
            other = torch.randperm(self.features, generator=torch.Generator().manual_seed(seed))
            groups = {
                "oracle": data.groups,
                "random": data.groups[other],
                "lasso": torch.arange(self.features),
            }
            found = self._judged(nn.functional.one_hot(groups[method]).T.double(), data)
        else:
            tried = []
            for start in range(self.starts):
                memberships, losses = self._learnt(
                    method, 1000 * start + seed, data, out / f"start-{start}"
                )
                chosen, judged = memberships.argmax(0), self._judged(memberships, data)
                tried.append(judged | {
                    "losses": losses,
                    "recovery": recovery(chosen, data.groups),
                    "rand": adjusted_rand(chosen, data.groups),
                    "memberships": memberships[:, data.groups.argsort()].tolist(),
                })  # fmt: skip
            found = min(tried, key=lambda each: each["validation_error"])
            row["starts"] = [
                {key: each[key] for key in ("validation_error", "recovery")} for each in tried
            ]
        return row | found | {"seconds": time.perf_counter() - began}

    def _judged(self, memberships: Tensor, data: Planted) -> Row:
        """Errors of a structure at the strength that validates best."""
        found = [
            self._fitted(memberships, factor * self.strength, data) for factor in (0.25, 0.5, 1, 2)
        ]
        return dict(zip(("validation_error", "test_error", "strength"), min(found), strict=True))

    def _problem(self, strength: float, seed: int = 0) -> TuningProblem:
        structure = GroupStructure("weight", self.groups, strength, self.smoothing, seed)
        model = Regressions(self.regressions, self.features)
        return tuning_problem(
            model, squares, [structure], penalty=Proximal(self.ridge, center="zero")
        )

    def _learnt(
        self, method: str, seed: int, data: Planted, out: Path
    ) -> tuple[Tensor, list[float]]:
        """The memberships, `[groups, features]`, and g on the way to them."""
        problem = self._problem(self.strength, seed)
        tuner = Tuner(
            problem.problem,
            problem.meta,
            inner=GradientDescent(steps=self.inner_steps, lr=self.inner_lr, momentum=0.9),
            method=make_method(
                method, **known_options(method, solver_steps=self.solver_steps, rank=self.rank)
            ),
            optimizer=partial(torch.optim.Adam, lr=self.outer_lr),
            domains=problem.domains,
        )
        parts = (lambda i: data.train), (lambda i: data.validation)
        fit_tuner(tuner, *parts, out=out, steps=self.outer_steps, resume=True)
        return tuner.meta["groups"], [line["loss"] / self.regressions for line in read_metrics(out)]

    def _fitted(
        self, memberships: Tensor, strength: float, data: Planted
    ) -> tuple[float, float, float]:
        """Mean squared errors on validation and test points of the argmin under this structure, and the strength."""
        problem, meta = self._problem(strength).problem, {"groups": memberships}
        solved = LBFGS(steps=3000, tol=1e-4)
        w = argmin(problem.inner_loss, problem.init, meta, data.train, inner=solved, method="cg")
        errors = [
            2 * float(problem.outer_loss(w, meta, part)) / self.regressions
            for part in (data.validation, data.test)
        ]
        return errors[0], errors[1], strength

    def table(self, rows: Sequence[tuple[Case, Row]]) -> str:
        lines = []
        for method in self.methods:
            learnt = method not in self.baselines
            scores = {
                key: select(rows, key, method=method) if learnt else []
                for key in ("recovery", "rand")
            }
            lines.append([
                f"`{method}`",
                spread(scores["recovery"], 3),
                " ".join(f"{score:.3f}" for score in scores["recovery"]) or "–",
                spread(scores["rand"], 3),
                spread(select(rows, "validation_error", method=method), 3),
                spread(select(rows, "test_error", method=method), 3),
                f"{statistics.median(select(rows, 'seconds', method=method)):.0f}",
            ])  # fmt: skip
        header = [
            "method",
            "recovery",
            "by seed",
            "adjusted Rand",
            "validation error",
            "test error",
            "s",
        ]
        return markdown(header, lines)

    def plot(self, rows: Sequence[tuple[Case, Row]], figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        shown = None
        for method in self.methods:
            if method in self.baselines or not (found := select(rows, "losses", method=method)):
                continue
            left.plot(
                [statistics.fmean(losses) for losses in zip(*found, strict=True)], label=method
            )
            shown = shown or (method, select(rows, "memberships", method=method)[0])
        if shown is None:
            return
        left.set(xlabel="outer steps", ylabel="½ validation error of each regression", yscale="log")
        left.legend(fontsize=7)
        right.imshow(shown[1], aspect="auto", cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        right.set(
            title=f"memberships by {shown[0]}",
            xlabel="feature, by planted group",
            ylabel="learnt group",
        )


class Regressions(nn.Module):
    """ŷ_t = X_t w_t, all t at once: [regressions, points, features] -> [regressions, points]; float64, from zero."""

    def __init__(self, regressions: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(regressions, features, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("tnp,tp->tn", x, self.weight)


def squares(outputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
    """Σ_t ½ mean_n (ŷ − y)², the regressions independent of how many there are."""
    return 0.5 * (outputs - targets).square().mean(-1).sum()


@dataclass(frozen=True)
class Planted:
    """Regressions and the groups that they share, `[features]`."""

    groups: Tensor
    train: Points
    validation: Points
    test: Points


def planted(sizes: GroupLasso, seed: int) -> Planted:
    """Draw them: groups of equal size (within one), `active` of them, uniformly, in each regression's support."""
    draw = torch.Generator().manual_seed(seed)
    t, p, groups = sizes.regressions, sizes.features, sizes.groups
    belongs = (torch.arange(p) % groups)[torch.randperm(p, generator=draw)]
    active = torch.rand(t, groups, generator=draw).argsort(1)[:, : sizes.active]
    support = torch.zeros(t, groups, dtype=torch.float64).scatter_(1, active, 1.0)[:, belongs]
    w = support * torch.randn(t, p, generator=draw, dtype=torch.float64)

    def points(n: int) -> Points:
        x = torch.randn(t, n, p, generator=draw, dtype=torch.float64)
        noise = sizes.noise * torch.randn(t, n, generator=draw, dtype=torch.float64)
        return x, torch.einsum("tnp,tp->tn", x, w) + noise

    return Planted(belongs, points(sizes.points), points(sizes.validation), points(sizes.test))


def recovery(found: Tensor, true: Tensor) -> float:
    """The share of features in the right group, groups matched one to one as is best; both `[features]`."""
    from scipy.optimize import linear_sum_assignment

    table = _contingency(found, true)
    rows, columns = linear_sum_assignment(table.numpy(), maximize=True)
    return float(table[rows, columns].sum() / len(true))


def adjusted_rand(found: Tensor, true: Tensor) -> float:
    """The adjusted Rand index (Hubert & Arabie 1985): 1, the same partition; 0, what chance would give."""

    def pairs(counts: Tensor) -> float:
        return float((counts * (counts - 1) / 2).sum())

    table = _contingency(found, true)
    both, a, b = pairs(table), pairs(table.sum(0)), pairs(table.sum(1))
    chance, most = a * b / pairs(table.sum()), (a + b) / 2
    return 1.0 if most == chance else (both - chance) / (most - chance)


def _contingency(found: Tensor, true: Tensor) -> Tensor:
    table = torch.zeros(int(found.max()) + 1, int(true.max()) + 1, dtype=torch.float64)
    return table.index_put_(
        (found, true), torch.ones(len(true), dtype=torch.float64), accumulate=True
    )
