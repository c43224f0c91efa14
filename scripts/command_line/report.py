"""The page that a test of a learner leaves."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tasks
from command_line.options import RunOptions
from metaimplicit import MetaLearner
from metaimplicit.training import (
    Evaluation,
    Fits,
    Predictions,
    leave_page,
    make_run_page,
    predict_classes,
)

PREDICTED_TASKS = 100  # of those of the test, in whose predictions the page looks for confusions


def leave_report(
    path: Path,
    learner: MetaLearner,
    family: tasks.TaskFamily,
    options: RunOptions,
    *,
    evaluation: Evaluation,
    summary: Mapping[str, Any],
    fits: Fits | None,
) -> None:
    """Leave the page of a test in the folder of a run. A failure is a warning.

    Args:
        path: The page.
        learner: The learner.
        family: The tasks that it was tested on.
        options: Those of the run, with those of the test.
        evaluation: The test.
        summary: What stands in its JSON file.
        fits: As for `make_run_page`.
    """

    def make() -> str:
        predictions = None
        if family.kind == "classification":
            predictions = predict_test_classes(
                learner,
                family,
                options,
                summary["episode_seed"],
            )
        return make_run_page(
            path.parent,
            title=f"{options.task}, {options.approach}",
            summary=summary,
            evaluation=evaluation,
            predictions=predictions,
            fits=fits,
        )

    leave_page(path, make)


def predict_test_classes(
    learner: MetaLearner, family: tasks.TaskFamily, options: RunOptions, seed: int
) -> Predictions:
    """The predictions for the first tasks of a test."""
    pool = getattr(family, "pool", None)
    names = {}
    if isinstance(pool, tasks.ImagePool):
        names = dict(zip(pool.ids.tolist(), map(str, pool.names), strict=True))
    return predict_classes(
        learner,
        tasks.EpisodeSampler(family, tasks=options.meta_batch, seed=seed),
        steps=options.test_steps,
        tasks=min(options.test_episodes, PREDICTED_TASKS),
        names=names,
    )
