"""The test of a learner on tasks it has never seen, as train.py and evaluate.py make it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import tasks
from command_line.options import RunOptions
from command_line.task_options import flag_of
from metaimplicit import MetaLearner
from metaimplicit.normalization import describe_normalization, is_transductive
from metaimplicit.training import (
    CHECKPOINT,
    CONFIG,
    Evaluation,
    Fits,
    Progress,
    Select,
    evaluate,
    evaluate_one_at_a_time,
    load_learner,
    metered,
    predict_curves,
    read_sealed_json,
)

Split = Literal["test", "validation"]
Summary = dict[str, Any]
PLOTTED_TASKS = 3
PLOTTED_QUERIES = 200


def run_test(
    learner: MetaLearner, family: tasks.TaskFamily, options: RunOptions, *, seed: int
) -> Evaluation:
    """Evaluate a learner on `options.test_episodes` tasks of a family, and show how far it is.

    A line on standard error says so if a query loss is not finite.
    """
    result = evaluate(
        learner,
        _test_batches(family, options, seed),
        steps=options.test_steps,
        tasks=options.test_episodes,
    )
    lost = int((~result.losses[-1].isfinite()).sum())
    if lost:
        print(
            f"warning: the query loss of {lost} of {options.test_episodes} tasks is not finite "
            f"after {options.test_steps} inner steps; take fewer steps or a smaller step size, or "
            "clean the data",
            file=sys.stderr,
            flush=True,
        )
    return result


def summarize_test(
    learner: MetaLearner,
    result: Evaluation,
    family: tasks.TaskFamily,
    options: RunOptions,
    *,
    seed: int,
) -> Summary:
    """What `run_test` measured, on which tasks, and which images entered the normalisation."""
    transductive = is_transductive(learner.model)
    summary = result.summary() | {
        "episode_seed": seed,
        "transductive": transductive,
        "normalization": describe_normalization(learner.model),
    }
    if result.metric == "accuracy":
        alone = result.curve()[-1]
        if transductive:
            alone = evaluate_one_at_a_time(
                learner,
                _test_batches(family, options, seed),
                steps=options.test_steps,
                tasks=options.test_episodes,
            )
        summary["one_at_a_time"] = alone.to_dict()
    return summary


def predict_test_curves(
    learner: MetaLearner,
    family: tasks.TaskFamily,
    options: RunOptions,
    split: Split,
    *,
    seed: int,
) -> Fits | None:
    """Predictions for three tasks of a split, if they have one input and one output, else None."""
    if family.kind != "regression" or family.input_shape != (1,):
        return None
    arguments = options.task_arguments() | {"queries": PLOTTED_QUERIES}
    dense = split_family(tasks.load(**arguments), split)
    episodes = tasks.EpisodeSampler(dense, tasks=PLOTTED_TASKS, seed=seed)[0]
    return predict_curves(learner, episodes, options.test_steps)


def split_family(splits: tasks.Splits, split: Split) -> tasks.TaskFamily:
    """The tasks to test on, or those to validate on."""
    return splits.test if split == "test" else splits.validation


def require_no_ways(task: str, **ways: int | None) -> None:
    """Check that no number of classes is given for tasks of regression.

    Args:
        task: What the tasks are called.
        ways: An option, None if it is not given.

    Raises:
        ValueError: One is given.
    """
    for name, number in ways.items():
        if number is not None:
            raise ValueError(
                f"{flag_of(name)}: got {number} for {task}, which is regression and has no "
                "classes, expected none; leave it out"
            )


def run_identity(options: RunOptions, splits: tasks.Splits) -> dict[str, Any]:
    """What a run may not change: options, and the content of its data."""
    data = {f"{split} data": digest for split, digest in splits.content_digests.items()}
    return options.identity() | data


def load_own_checkpoint(
    folder: Path, learner: MetaLearner, identity: dict[str, Any], *, select: Select
) -> Progress:
    """Load the learner of a run, if the identity is that of its checkpoint.

    Returns:
        How far the run was when the selected checkpoint was saved.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: No checkpoint is whole and of this run.
    """
    run = read_sealed_json(folder / CONFIG).get("run")
    full_identity = {"run": run, **identity}
    return load_learner(
        folder / CHECKPOINT,
        learner,
        identity=full_identity,
        select=select,
    )


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


def _test_batches(
    family: tasks.TaskFamily, options: RunOptions, seed: int
) -> Iterator[tasks.Episodes]:
    sampler = tasks.EpisodeSampler(family, tasks=options.meta_batch, seed=seed)
    batches = range(-(-options.test_episodes // options.meta_batch))  # rounded up
    return (sampler[i] for i in metered(batches, "test batch"))
