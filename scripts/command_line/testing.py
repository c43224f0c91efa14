"""The test of a learner on tasks it has never seen, as train.py and evaluate.py make it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import tasks
from command_line.options import RunOptions
from metaimplicit import MetaLearner
from metaimplicit.training import (
    CHECKPOINT,
    CONFIG,
    Evaluation,
    Fits,
    Progress,
    evaluate,
    load_learner,
    metered,
    predict_curves,
    read_sealed_json,
)

Split = Literal["test", "validation"]
PLOTTED_TASKS = 3
PLOTTED_QUERIES = 200


def run_test(
    learner: MetaLearner, family: tasks.TaskFamily, options: RunOptions, *, seed: int
) -> Evaluation:
    """Evaluate a learner on `options.test_episodes` tasks of a family, and show how far it is."""
    sampler = tasks.EpisodeSampler(family, tasks=options.meta_batch, seed=seed)
    batches = range(-(-options.test_episodes // options.meta_batch))  # rounded up
    return evaluate(
        learner,
        (sampler[i] for i in metered(batches, "test batch")),
        steps=options.test_steps,
        tasks=options.test_episodes,
    )


def predict_test_curves(
    learner: MetaLearner, options: RunOptions, split: Split, *, seed: int
) -> Fits | None:
    """Predictions for three tasks of a split, if they have one input and one output, else None."""
    family = split_family(tasks.load(**options.task_arguments()), split)
    if family.kind != "regression" or family.input_shape != (1,):
        return None
    arguments = options.task_arguments() | {"queries": PLOTTED_QUERIES}
    dense = split_family(tasks.load(**arguments), split)
    episodes = tasks.EpisodeSampler(dense, tasks=PLOTTED_TASKS, seed=seed)[0]
    return predict_curves(learner, episodes, options.test_steps)


def split_family(splits: tasks.Splits, split: Split) -> tasks.TaskFamily:
    """The tasks to test on, or those to validate on."""
    return splits.test if split == "test" else splits.validation


def run_identity(options: RunOptions, splits: tasks.Splits) -> dict[str, Any]:
    """What a run may not change: options, and the content of its data."""
    data = {f"{split} data": digest for split, digest in splits.content_digests.items()}
    return options.identity() | data


def load_own_checkpoint(folder: Path, learner: MetaLearner, identity: dict[str, Any]) -> Progress:
    """Load the learner of a run, if the identity is that of its checkpoint.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: No checkpoint is whole and of this run.
    """
    run = read_sealed_json(folder / CONFIG).get("run")
    return load_learner(folder / CHECKPOINT, learner, identity={"run": run, **identity})


def check_classes(run: Path, splits: tasks.Splits) -> None:
    """Check that splits have the classes that a run was started with.

    Raises:
        ValueError: The classes of a split differ.
    """
    before = read_sealed_json(run / CONFIG).get("classes", splits.digests)
    for split, digest in splits.digests.items():
        if before[split] != digest:
            raise ValueError(
                f"task: the {split} classes are not those that {run} was started with, so it may "
                "have been trained on what it would be tested on; give it the data as it was"
            )
