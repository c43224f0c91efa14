"""Ways to choose the strength λ of a penalty by the validation loss, counted in inner solves."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import tasks
from experiments.logistic import MOST_EVALUATIONS, LogisticRegression
from metaimplicit import LBFGS
from metaimplicit.tuning import HOAG


class Trial(NamedTuple):
    """One inner solve: where, its gradient evaluations, and the products with the Hessian."""

    log_decay: float
    evaluations: int
    products: int = 0


def search_grid(regression: LogisticRegression, solves: int) -> Iterator[Trial]:
    """Solve at equidistant values of log λ, each time from zero."""
    for point in grid(regression, solves):
        yield Trial(point, regression.solve(point))


def search_grid_warm(regression: LogisticRegression, solves: int) -> Iterator[Trial]:
    """Solve at the same values from the strongest penalty down, from the solution before."""
    before: float | None = None
    for point in reversed(grid(regression, solves)):
        yield Trial(point, regression.solve(point, start=before))
        before = point


def search_at_random(regression: LogisticRegression, solves: int, seed: int) -> Iterator[Trial]:
    """Solve at uniform values of log λ."""
    random = tasks.examples.random_stream(seed, "search")
    for point in random.uniform(regression.low, regression.high, solves).tolist():
        yield Trial(point, regression.solve(point))


def search_by_tpe(regression: LogisticRegression, solves: int, seed: int) -> Iterator[Trial]:
    """Solve at the values of log λ that Optuna's tree-structured Parzen estimator proposes."""
    try:
        import optuna
    except ImportError as error:
        raise ImportError(f'tpe: found no optuna ({error}); pip install -e ".[tune]"') from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    for _ in range(solves):
        trial = study.ask()
        point = trial.suggest_float("log_decay", regression.low, regression.high)
        evaluations = regression.solve(point)
        study.tell(trial, regression.validation_loss(point))
        yield Trial(point, evaluations)


def grid(regression: LogisticRegression, count: int) -> list[float]:
    """`count` equidistant values of log λ from the smallest to the largest."""
    width = regression.high - regression.low
    return [regression.low + width * i / (count - 1) for i in range(count)]


def descend_by_hoag(
    regression: LogisticRegression, solves: int, *, start: float, tolerance: float
) -> Iterator[Trial]:
    """Descend from λ = `start` by HOAG (Pedregosa 2016).

    Solve k is to a gradient norm of tolerance/k³. A trial is at the last λ that was accepted: HOAG
    may look at a λ and take it back.
    """
    meta = {"log_decay": regression.problem.meta["log_decay"].new_tensor(math.log(start))}
    hoag = HOAG(
        regression.problem.problem,
        meta,
        train=tasks.Batches(regression.train, None, 0)(0),
        validation=tasks.Batches(regression.validation, None, 0)(0),
        inner=LBFGS(steps=MOST_EVALUATIONS),
        tolerance=tolerance,
        domains=regression.problem.domains,
    )
    accepted = math.nan
    for _ in range(solves):
        point = hoag.meta["log_decay"].item()
        step = hoag.step()
        if step.accepted:
            accepted = point
        yield Trial(accepted, int(step.report.inner_steps), step.report.products)
