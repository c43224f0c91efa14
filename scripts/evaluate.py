"""Evaluate a run on tasks it has never seen: accuracy or mean squared error after inner steps.

python scripts/evaluate.py runs/glyphs-ridge-0 --episodes 2000
"""

from __future__ import annotations

import startup  # isort: skip  # noqa: F401  # before what takes time to import

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from command_line import (
    RunOptions,
    Split,
    build_learner,
    check_classes,
    handle_errors,
    leave_report,
    load_own_checkpoint,
    parse_options,
    predict_test_curves,
    require_writable,
    run_identity,
    run_test,
    set_up_cpu,
    split_family,
    summarize_test,
)
from command_line.ranges import Threads, within

import tasks
from metaimplicit import MetaLearner
from metaimplicit.training import (
    CONFIG,
    Evaluation,
    Progress,
    Select,
    plot_adaptation,
    read_sealed_json,
    write_json,
)

EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a run on held-out tasks; leaves evaluation.json and .html, and adaptation.png."""

    run: tyro.conf.Positional[Path]
    """Folder of a run of scripts/train.py."""
    episodes: Annotated[int, within(2, 1_000_000)] = 600
    """Tasks."""
    steps: Annotated[int | None, within(0, 100_000)] = None
    """Inner steps. By default those of the run's own test."""
    seed: Annotated[int | None, within(0, 2**32 - 1)] = None
    """Seed of the tasks. By default that of the run's own test, which gives the same tasks."""
    split: Split = "test"
    """Whose classes the tasks have, test or validation: never those of training."""
    select: Select | None = None
    """The checkpoint: best (by validation) or last. By default that of the run's own test."""
    device: str = "auto"
    """auto (CUDA if there is any), cpu, cuda, cuda:1 …"""
    data_root: Path | None = None
    """Where the data is, if it has moved since."""
    threads: Threads = None
    """CPU threads of torch. By default torch's own choice."""


@handle_errors
def main(args: list[str]) -> None:
    """Evaluate a run and print a table."""
    command = parse_options(Evaluate, args)
    options = load_options(command)
    require_writable(command.run / EVALUATION)
    family, learner, progress = load_run(command, options)
    seed = options.test_seed if command.seed is None else command.seed
    result = run_test(learner, family, options, seed=seed)

    about = {"split": command.split, "tested_meta_step": progress.step}
    summary = summarize_test(learner, result, family, options, seed=seed) | about
    write_json(command.run / EVALUATION, summary)
    fits = predict_test_curves(learner, options, command.split, seed=seed)
    title = f"{options.task}, {options.approach}"
    plot_adaptation(command.run, result, title=title, fits=fits)
    print(
        f"{command.run}: {command.split} {result.metric} of {options.test_episodes} tasks, "
        "mean and 95 % interval"
    )
    print(table(result), flush=True)
    leave_report(
        command.run / "evaluation.html",
        learner,
        family,
        options,
        evaluation=result,
        summary=summary,
        fits=fits,
    )


def load_options(command: Evaluate) -> RunOptions:
    """The options of the run, with those of the command.

    Raises:
        FileNotFoundError: The folder holds no config.json.
        ValueError: The config is not that of a run of train.py, or an option is out of range.
    """
    path = command.run / CONFIG
    if not path.exists():
        raise FileNotFoundError(
            f"run: found no {CONFIG} in {command.run}; give the folder of a run of scripts/train.py"
        )
    stored: dict[str, Any] = read_sealed_json(path).get("options", {})
    if "task" not in stored:
        raise ValueError(
            f"run: {command.run} is no run of scripts/train.py; give the folder of one"
        )
    options = RunOptions.load(stored)
    return replace(
        options,
        device=command.device,
        data_root=command.data_root or options.data_root,
        test_episodes=command.episodes,
        test_steps=options.test_steps if command.steps is None else command.steps,
        select=command.select or options.select,
        threads=command.threads,
    ).completed()


def load_run(
    command: Evaluate, options: RunOptions
) -> tuple[tasks.TaskFamily, MetaLearner, Progress]:
    """The tasks to evaluate on, the trained learner, and how long it was trained."""
    set_up_cpu(options.threads)
    splits = tasks.load(**options.task_arguments())
    check_classes(command.run, splits)
    family = split_family(splits, command.split)
    learner = build_learner(options, family)
    identity = run_identity(options, splits)
    progress = load_own_checkpoint(command.run, learner, identity, select=options.select)
    return family, learner, progress


def table(result: Evaluation) -> str:
    """The metric after each number of inner steps."""
    lines = [f"inner steps    query {result.metric}"]
    for steps, estimate in zip(result.steps, result.curve(), strict=True):
        lines.append(f"{steps:11d}    {estimate}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
