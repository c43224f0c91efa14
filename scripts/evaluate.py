"""Evaluate a run on tasks it has never seen: accuracy or mean squared error after inner steps.

python scripts/evaluate.py runs/glyphs-ridge-0 --episodes 2000
python scripts/evaluate.py runs/glyphs-ridge-0 --ways 20 --shots 5
python scripts/evaluate.py runs/glyphs-ridge-0 --against runs/glyphs-cg-0
"""

from __future__ import annotations

import startup  # isort: skip  # noqa: F401  # before what takes time to import

import math
import sys
from collections.abc import Mapping
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
    read_plan,
    require_no_ways,
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
    Estimate,
    Evaluation,
    Progress,
    Select,
    plot_adaptation,
    read_sealed_json,
    write_json,
)

EVALUATION = "evaluation.json"
OF_TASKS = ("ways", "shots", "queries")


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a run on held-out tasks; leaves evaluation.json and .html, and adaptation.png."""

    run: tyro.conf.Positional[Path]
    """Folder of a run of scripts/train.py."""
    episodes: Annotated[int, within(2, 1_000_000)] = 600
    """Tasks."""
    ways: Annotated[int | None, within(1, 10_000)] = None
    """Classes of a task. By default those of the run's own test. A linear layer has one number."""
    shots: Annotated[int | None, within(1, 10_000)] = None
    """Support examples of each class. By default those of the run's own test."""
    queries: Annotated[int | None, within(1, 10_000)] = None
    """Query examples of each class. By default those of the run's own test."""
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
    against: Path | None = None
    """Folder of another run with such tasks. It is tested on the same ones, and the difference of
    the two has a paired interval."""
    threads: Threads = None
    """CPU threads of torch. By default those of the run."""


@handle_errors
def main(args: list[str]) -> None:
    """Evaluate a run and print a table."""
    command = parse_options(Evaluate, args)
    options = load_options(command, command.run)
    require_writable(command.run / EVALUATION)
    set_up_cpu(options.threads)
    splits = tasks.load(**options.task_arguments())
    if splits.test.kind == "regression":
        require_no_ways(options.task, ways=command.ways)
    tested = with_tasks_of(command, command.run, options)
    learner, progress = load_run(command.run, options, splits, splits.test)
    family = tested_family(split_family(splits, command.split), tested, command.split)
    rival = None if command.against is None else load_rival(command, tested, splits, family)

    seed = options.test_seed if command.seed is None else command.seed
    result = run_test(learner, family, tested, seed=seed)
    about: dict[str, Any] = {"split": command.split, "tested_meta_step": progress.step}
    about |= {name: getattr(tested, name) for name in numbers_of_tasks(family)}
    if rival is not None:
        about["against"] = measure_against(rival, result, family, seed=seed)
    summary = summarize_test(learner, result, family, tested, seed=seed) | about
    write_json(command.run / EVALUATION, summary)

    fits = predict_test_curves(learner, family, tested, command.split, seed=seed)
    title = f"{options.task}, {options.approach}"
    plot_adaptation(command.run, result, title=title, fits=fits)
    kind = f"{tested.ways}-way {tested.shots}-shot " if family.kind == "classification" else ""
    print(
        f"{command.run}: {command.split} {result.metric} of {tested.test_episodes} {kind}tasks, "
        "mean and 95 % interval"
    )
    print(table(result), flush=True)
    if rival is not None:
        print(describe_difference(about["against"]), flush=True)
    leave_report(
        command.run / "evaluation.html",
        learner,
        family,
        tested,
        evaluation=result,
        summary=summary,
        fits=fits,
    )


def tested_family(family: tasks.TaskFamily, options: RunOptions, split: Split) -> tasks.TaskFamily:
    """The tasks of a split of the run, with the numbers that the command asks for."""
    if isinstance(family, tasks.FewShot):  # the other splits may have too few classes
        return family.with_sizes(ways=options.ways, shots=options.shots, queries=options.queries)
    return split_family(tasks.load(**options.task_arguments()), split)


def numbers_of_tasks(family: tasks.TaskFamily) -> list[str]:
    """Those of `OF_TASKS` that say what tasks are. Those of regression have no classes."""
    return [name for name in OF_TASKS if name != "ways" or family.kind == "classification"]


def load_options(command: Evaluate, run: Path) -> RunOptions:
    """The options of a run, with those of the command.

    Raises:
        FileNotFoundError: The folder holds no config.json.
        ValueError: The config is not that of a run of train.py, or an option is out of range.
    """
    argument = "--against" if run == command.against else "run"
    path = run / CONFIG
    if not path.exists():
        raise FileNotFoundError(
            f"{argument}: found no {CONFIG} in {run}; give the folder of a run of scripts/train.py"
        )
    stored: dict[str, Any] = read_sealed_json(path).get("options", {})
    if "task" not in stored:
        raise ValueError(f"{argument}: {run} is no run of scripts/train.py; give the folder of one")
    options = RunOptions.load(stored)
    return replace(
        options,
        device=command.device,
        data_root=command.data_root or options.data_root,
        test_episodes=command.episodes,
        test_steps=options.test_steps if command.steps is None else command.steps,
        select=command.select or options.select,
        threads=command.threads or options.threads or _threads_of(run),
    ).completed()


def _threads_of(run: Path) -> int | None:
    """The number of CPU threads that a run has computed its steps by. None if it is not known."""
    plan = read_plan(run)
    return None if plan is None else plan.way.threads


def with_tasks_of(command: Evaluate, run: Path, options: RunOptions) -> RunOptions:
    """The options of a run, with the tasks that the command asks for.

    Raises:
        ValueError: The run's network has a linear layer for another number of classes.
    """
    if options.head == "linear" and command.ways not in (None, options.ways):
        raise ValueError(
            f"--ways: got {command.ways}, but {run} has --head linear and {options.ways} ways, "
            f"expected {options.ways}, or a run with another head; leave it out"
        )
    chosen = {name: getattr(command, name) for name in OF_TASKS}
    return replace(options, **{name: n for name, n in chosen.items() if n is not None})


def load_run(
    run: Path, options: RunOptions, splits: tasks.Splits, family: tasks.TaskFamily
) -> tuple[MetaLearner, Progress]:
    """The trained learner of a run for tasks like those of `family`, and how long it was trained.

    Raises:
        ValueError: The splits are not those of the run, or no checkpoint is whole.
    """
    check_classes(run, splits)
    learner = build_learner(options, family)
    identity = run_identity(options, splits)
    return learner, load_own_checkpoint(
        run,
        learner,
        identity,
        select=options.select,
    )


@dataclass(frozen=True)
class Rival:
    """Another run, to be tested on the same tasks."""

    run: Path
    options: RunOptions
    learner: MetaLearner
    progress: Progress


def load_rival(
    command: Evaluate, options: RunOptions, splits: tasks.Splits, family: tasks.TaskFamily
) -> Rival:
    """The run of --against, with options that draw the tasks of the run that is evaluated.

    Args:
        command: The command.
        options: Those of the run that is evaluated, with the tasks of the command.
        splits: Those of that run.
        family: The tasks to test on.

    Raises:
        ValueError: It is that run itself, or has other tasks.
    """
    run = command.against or command.run
    if run.resolve() == command.run.resolve():
        raise ValueError(f"--against: got {run}, the run itself, expected another run")
    own = load_options(command, run)
    tested = with_tasks_of(command, run, own)
    sizes = [name for name in numbers_of_tasks(family) if name != "queries"]
    for name in ("task", *sizes, "task_options"):
        theirs, ours = getattr(tested, name), getattr(options, name)
        if theirs != ours:
            raise ValueError(
                f"--against: {run} has {name} {theirs}, but {command.run} has {ours}; expected a "
                "run with the same tasks"
            )
    learner, progress = load_run(run, own, splits, family)
    # Which tasks a seed gives depends on how many are drawn at a time.
    return Rival(
        run,
        replace(tested, meta_batch=options.meta_batch),
        learner,
        progress,
    )


def measure_against(
    rival: Rival, result: Evaluation, family: tasks.TaskFamily, *, seed: int
) -> dict[str, Any]:
    """What the rival reaches on the tasks of `result`, and the difference, after the last steps."""
    other = run_test(rival.learner, family, rival.options, seed=seed)
    difference = Estimate.of_difference(result.values[-1], other.values[-1])
    return {
        "run": str(rival.run),
        "tested_meta_step": rival.progress.step,
        **{name: other.summary()[name] for name in ("mean", "interval_95", "inner_steps")},
        "difference": difference.to_dict(),
    }


def describe_difference(against: Mapping[str, Any]) -> str:
    """What `measure_against` measured, as one line."""
    difference = against["difference"]
    return (
        f"against {against['run']}: {_decimals(against, '.4f')} on the same tasks, difference "
        f"{_decimals(difference, '+.4f')} (paired)"
    )


def _decimals(estimate: Mapping[str, Any], form: str) -> str:
    """A mean in a form with its interval, of an estimate from JSON, where NaN is None."""
    mean, interval = (
        math.nan if estimate[name] is None else estimate[name] for name in ("mean", "interval_95")
    )
    return f"{mean:{form}} ± {interval:.4f}"


def table(result: Evaluation) -> str:
    """The metric after each number of inner steps."""
    lines = [f"inner steps    query {result.metric}"]
    for steps, estimate in zip(result.steps, result.curve(), strict=True):
        lines.append(f"{steps:11d}    {estimate}")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
