"""Few-shot learners race: accuracy on validation classes against minutes of training.

Each contender has a process of its own, one after the other, so leave the machine alone meanwhile.
What is done is kept in rows.json: the same command again only races those that are missing.

python scripts/race.py --data-root DIR                             # 25 minutes each, on Omniglot
python scripts/race.py --task glyphs --minutes 1 --contenders ridge higher
"""

from __future__ import annotations

import startup  # isort: skip  # noqa: F401  # before what takes time to import

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from command_line import RowFile, handle_errors, parse_options, run_apart
from command_line.ranges import MOST_THREADS, Seed, check_ranges, within
from racing import (
    CONTENDERS,
    LEVELS,
    Course,
    draw_race,
    fastest_line,
    find_missing,
    race_table,
    run_race,
)

from metaimplicit.training import describe_sitting, write_json


@dataclass(frozen=True)
class Race:
    """Race few-shot learners on 5-way 1-shot tasks, and test each once, on test classes.

    Ours are heads (ridge, logistic, prototypes) over features that are evaluated once, at the
    options of the recipes, and methods with which all parameters adapt (cg, unrolled, first-order),
    at the defaults of train.py. Peers have the settings of their own examples.
    """

    contenders: tuple[str, ...] = CONTENDERS
    """Who takes part."""
    task: Literal["omniglot", "glyphs"] = "omniglot"
    """Where tasks come from."""
    data_root: Path | None = None
    """Folder with Omniglot. It is downloaded without it."""
    minutes: Annotated[float, within(1e-6, 10_000)] = 25.0
    """Minutes of training. The clock stands during validation."""
    validation_tasks: Annotated[int, within(2, 100_000)] = 400
    """Validation tasks, with 15 queries of each class, the same for all at every validation."""
    test_tasks: Annotated[int, within(2, 100_000)] = 1000
    """Test tasks, with 15 queries of each class."""
    threads: Annotated[tuple[int, ...], within(1, MOST_THREADS)] = (1, 2)
    """Numbers of CPU threads. A few meta-steps with each are timed, and the faster one is kept."""
    seed: Seed = 0
    """Seed of initialisations and training tasks."""
    out: Path = Path("runs/race")
    """Folder for rows, table and plot."""


@handle_errors
def run_command(args: list[str]) -> None:
    """Run `main` with the settings that a command line gives."""
    main(parse_options(Race, args))


def main(settings: Race) -> None:
    """Run the race, print the table, and leave it with race.json and race.png."""
    check_settings(settings)
    missing = find_missing(settings.contenders)
    for name, reason in missing.items():
        print(f"{name} is left out: {reason}")
    names = [name for name in settings.contenders if name not in missing]
    if not names:
        raise ImportError("--contenders: none of them is installed, expected at least one")
    course = make_course(settings)
    splits = course.load()
    if splits.source:
        print(f"{settings.task}: {splits.source}", flush=True)

    stored = RowFile(settings.out / "rows.json")
    data = splits.content_digests
    rows = []
    for name in names:
        case = describe_case(name, course, data)
        row = stored.read_or_make(
            case,
            partial(
                run_apart,
                run_race,
                name,
                course,
                name=name,
            ),
        )
        rows.append(row)
    leave_results(settings, rows, missing)


def check_settings(settings: Race) -> None:
    """Check the settings before any work.

    Raises:
        ValueError: A contender is unknown, a number is out of range, or nothing is asked for.
    """
    check_ranges(settings)
    unknown = sorted(set(settings.contenders) - set(CONTENDERS))
    if unknown:
        known = ", ".join(CONTENDERS)
        raise ValueError(f"--contenders: got {', '.join(unknown)}, expected some of {known}")
    for name in ("contenders", "threads"):
        if not getattr(settings, name):
            raise ValueError(f"--{name}: got none, expected at least one")


def make_course(settings: Race) -> Course:
    """What all contenders meet."""
    return Course(
        task=settings.task,
        data_root=None if settings.data_root is None else str(settings.data_root),
        seconds=60 * settings.minutes,
        validation_tasks=settings.validation_tasks,
        test_tasks=settings.test_tasks,
        threads=settings.threads,
        seed=settings.seed,
    )


def describe_case(name: str, course: Course, data: dict[str, str]) -> dict[str, Any]:
    """What a stored row was asked for."""
    return {
        "contender": name,
        "task": course.task,
        "data": data,
        "seconds": course.seconds,
        "validation_tasks": course.validation_tasks,
        "test_tasks": course.test_tasks,
        "threads": list(course.threads),
        "seed": course.seed,
    }


def leave_results(settings: Race, rows: list[dict[str, Any]], missing: dict[str, str]) -> None:
    """Print the table, and leave race.json and race.png."""
    table = race_table(rows, settings.minutes)
    fastest = [fastest_line(rows, level, settings.minutes) for level in LEVELS]
    text = "\n".join(["", table, "", *fastest])
    print(text, flush=True)
    sitting = describe_sitting(torch.device("cpu"))
    content = {"rows": rows, "left_out": missing, "sitting": sitting}
    write_json(settings.out / "race.json", content)
    draw_race(settings.out / "race.png", rows)


if __name__ == "__main__":
    run_command(sys.argv[1:])
