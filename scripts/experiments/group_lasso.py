"""Group lasso with unknown groups, learnt from the validation error of many regressions."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from command_line import require_package
from command_line.ranges import Count, InnerSteps, Number, Products, Seeds, Steps, within
from figures import legend_below
from matplotlib.figure import Figure
from torch import Tensor, nn

from experiments.planted_groups import (
    PlantedRegressions,
    Points,
    adjusted_rand,
    plant_regressions,
    recovery,
)
from experiments.runs import METHOD, Case, Row, Runs, markdown_table, mean, median
from experiments.tuning import TuningExperiment
from metaimplicit import LBFGS, GradientDescent, Proximal, argmin, tuning_problem
from metaimplicit.training import fit_tuner, read_metrics
from metaimplicit.tuning import GroupStructure, TuningProblem


@dataclass(frozen=True)
class GroupLasso(TuningExperiment):
    """Recovery of planted groups, and test error, after Frecon, Salzo & Pontil (2018).

    The data are y_t = X_t w_t + noise, where the support of each w_t is a few whole groups. With
    the memberships s of each feature on the simplex,

        f = Σ_t ½ mean (y_t − X_t w_t)² + strength Σ_t Σ_l √(‖s_l ⊙ w_t‖² + smoothing²)
            + ½ ridge Σ_t ‖w_t‖²,

    and g = Σ_t ½ mean (y_t − X_t w_t)² on other points. The baseline `oracle` has the planted
    groups, `random` has random ones, and `lasso` has a group for each feature. Errors of every
    structure are those at the multiple of the strength that validates best.
    """

    seeds: Seeds = 5
    """Number of data sets, with one start each."""
    features: Annotated[int, within(2, 10_000)] = 40
    """Number of features P."""
    groups: Annotated[int, within(2, 10_000)] = 5
    """Number of groups L, both planted and learnt."""
    regressions: Count = 250
    """Number of regressions T."""
    points: Count = 20
    """Number of training points N of each regression."""
    validation: Count = 20
    """Number of validation points of each regression."""
    test: Count = 200
    """Number of test points of each regression."""
    active: Count = 1
    """Number of groups in the support of a regression."""
    noise: Number = 0.2
    """Standard deviation of the noise. Inputs, and weights in the support, have 1."""
    strength: Number = 0.1
    """Strength of the group penalty."""
    smoothing: Number = 1e-2
    """Smoothing ε of the norms."""
    ridge: Number = 1e-3
    """Strength of the ridge penalty on the weights."""
    inner_steps: InnerSteps = 20
    """Number of gradient steps for each outer step. They start where the last ones ended."""
    inner_lr: Number = 0.1
    """Step size of the gradient steps, which have momentum 0.9."""
    outer_steps: Steps = 80
    """Number of steps of Adam on the logits of the memberships."""
    outer_lr: Number = 0.1
    """Step size of Adam."""
    starts: Annotated[int, within(1, 1000)] = 5
    """Number of random memberships to start from. The start that validates best counts."""
    solver_steps: Products = 10
    """Number of products of CG, and of terms of Neumann's series."""
    rank: Products = 10
    """Number of columns of Nyström's sketch."""

    name = "group-lasso"
    baselines = ("oracle", "random", "lasso")
    default_methods = (*baselines, "unrolled", "cg")
    quick_options: ClassVar[dict[str, Any]] = {
        "features": 12,
        "groups": 3,
        "regressions": 10,
        "points": 6,
        "validation": 6,
        "test": 20,
        "inner_steps": 5,
        "outer_steps": 3,
        "starts": 2,
        "solver_steps": 3,
        "rank": 2,
    }

    def check_options(self) -> None:
        """Raise ValueError for sizes out of range, ImportError without scipy."""
        super().check_options()
        self.check_range("groups", low=2, high=self.features)
        self.check_range("active", high=self.groups)
        # It matches the groups that are found to those that are true.
        require_package("scipy", purpose=self.name, extra="tune")

    def method_options(self, flag: str) -> dict[str, Any]:
        """The options of the solvers."""
        return {"solver_steps": self.solver_steps, "rank": self.rank}

    def run(self, case: Case, out: Path) -> Row:
        """Judge the groups of a baseline, or the best of those learnt from several starts."""
        method, seed = case["method"], case["seed"]
        data = self.data(seed)
        if method in self.baselines:
            groups = self.baseline_groups(method, seed, data)
            return self.errors(nn.functional.one_hot(groups).T.double(), data)

        results = []
        for start in range(self.starts):
            folder = out / f"start-{start}"
            memberships, losses = self.learn(method, data, seed=1000 * start + seed, out=folder)
            groups = memberships.argmax(0)
            result = self.errors(memberships, data)
            result["losses"] = losses
            result["recovery"] = recovery(groups, data.groups)
            result["rand"] = adjusted_rand(groups, data.groups)
            result["memberships"] = memberships[:, data.groups.argsort()].tolist()
            results.append(result)
        best = min(results, key=lambda result: result["validation_error"])
        keys = ("validation_error", "recovery")
        return {"starts": [{key: result[key] for key in keys} for result in results], **best}

    def data(self, seed: int) -> PlantedRegressions:
        """The data set of a seed."""
        return plant_regressions(
            seed,
            groups=self.groups,
            features=self.features,
            regressions=self.regressions,
            active=self.active,
            points=(self.points, self.validation, self.test),
            noise=self.noise,
        )

    def baseline_groups(self, baseline: str, seed: int, data: PlantedRegressions) -> Tensor:
        """The group of each feature, `[features]`."""
        match baseline:
            case "oracle":
                return data.groups
            case "lasso":
                return torch.arange(self.features)
        generator = torch.Generator().manual_seed(seed)
        return data.groups[torch.randperm(self.features, generator=generator)]

    def problem(self, strength: float, seed: int = 0) -> TuningProblem:
        """The bilevel problem. `seed` is that of the memberships to start from."""
        structure = GroupStructure(
            "weight",
            self.groups,
            strength=strength,
            smoothing=self.smoothing,
            seed=seed,
        )
        return tuning_problem(
            Regressions(self.regressions, self.features),
            half_mean_squares,
            [structure],
            penalty=Proximal(self.ridge, center="zero"),
        )

    def learn(
        self, method: str, data: PlantedRegressions, *, seed: int, out: Path
    ) -> tuple[Tensor, list[float]]:
        """Learn the memberships from the start of a seed.

        Returns:
            The memberships, `[groups, features]`, and g divided by the number of regressions,
            before each outer step.
        """
        tuner = self.make_tuner(
            self.problem(self.strength, seed),
            method,
            inner=GradientDescent(steps=self.inner_steps, lr=self.inner_lr, momentum=0.9),
            optimizer=partial(torch.optim.Adam, lr=self.outer_lr),
        )
        fit_tuner(
            tuner,
            lambda i: data.train,
            lambda i: data.validation,
            out=out,
            steps=self.outer_steps,
            resume=True,
            identity={"seed": seed},
        )
        losses = [line["loss"] / self.regressions for line in read_metrics(out)]
        return tuner.meta["groups"], losses

    def errors(self, memberships: Tensor, data: PlantedRegressions) -> Row:
        """The errors of a structure, `[groups, features]`, at the strength that validates best."""
        tried = []
        for factor in (0.25, 0.5, 1, 2):
            strength = factor * self.strength
            validation, test = self.errors_at(strength, memberships, data)
            tried.append((validation, test, strength))
        validation, test, strength = min(tried)
        return {"validation_error": validation, "test_error": test, "strength": strength}

    def errors_at(
        self, strength: float, memberships: Tensor, data: PlantedRegressions
    ) -> tuple[float, float]:
        """Mean squared errors on validation and on test points of argmin f at one strength."""
        problem = self.problem(strength).problem
        meta = {"groups": memberships}
        weights = argmin(
            problem.inner_loss,
            problem.init,
            meta=meta,
            data=data.train,
            inner=LBFGS(steps=3000, tol=1e-4),
            method="cg",
        )

        def error(points: Points) -> float:
            # g is the sum over regressions of half the mean squared error.
            return 2 * float(problem.outer_loss(weights, meta, points)) / self.regressions

        return error(data.validation), error(data.test)

    def table(self, runs: Runs) -> str:
        """A line for each method."""
        columns = {
            "method": METHOD,
            "recovery": mean("recovery", 3),
            "by seed": lambda group: " ".join(f"{x:.3f}" for x in group.values("recovery")) or "–",
            "adjusted Rand": mean("rand", 3),
            "validation error": mean("validation_error", 3),
            "test error": mean("test_error", 3),
            "s": median("seconds"),
        }
        return markdown_table(columns, runs.groups("method"))

    def plot(self, runs: Runs, figure: Figure) -> None:
        """Mean validation error against outer steps; the memberships of the first method."""
        learnt = Runs(run for run in runs if run.case["method"] not in self.baselines)
        if not learnt:
            return
        left, right = figure.subplots(1, 2)
        for case, group in learnt.groups("method"):
            losses = zip(*group.values("losses"), strict=True)
            left.plot([statistics.fmean(seeds) for seeds in losses], label=case["method"])
        left.set(xlabel="outer steps", ylabel="½ validation error", yscale="log")
        legend_below(left)
        right.imshow(
            learnt[0].row["memberships"],
            aspect="auto",
            cmap="Greys",
            vmin=0,
            vmax=1,
            interpolation="nearest",
        )
        right.set(
            title=f"memberships by {learnt[0].case['method']}",
            xlabel="feature, sorted by planted group",
            ylabel="learnt group",
            yticks=range(self.groups),
        )


class Regressions(nn.Module):
    """Linear regressions ŷ_t = X_t w_t, all t at once, with weights that start at zero; float64.

    The weights are `[regressions, features]`. The module maps `[regressions, points, features]` to
    `[regressions, points]`.
    """

    def __init__(self, regressions: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(regressions, features, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """The predictions ŷ."""
        return torch.einsum("tnp,tp->tn", x, self.weight)


def half_mean_squares(outputs: Tensor, targets: Tensor) -> Tensor:
    """Σ_t ½ mean_n (ŷ_tn − y_tn)², both `[regressions, points]`.

    The sum, not the mean over regressions: the solution of one does not depend on their number.
    """
    return 0.5 * (outputs - targets).square().mean(-1).sum()
