"""The race of one contender: a clock that stands still during validation."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from command_line import set_up_cpu
from torch import Tensor

import tasks
from metaimplicit.training import Estimate, metered
from racing.contender import Contender
from racing.contenders import Entry, find_entry

BATCH = 20  # tasks that are validated and tested at a time
TEST_SEED = 1_000_000  # beyond the seeds of training
FIRST_EVERY = 15.0  # seconds between validations, at first
FIRST_UNTIL = 180.0
LATER_EVERY = 60.0
TIMED_STEPS = 3  # of each number of threads, after one that is not timed
Row = dict[str, Any]


@dataclass(frozen=True)
class Course:
    """What all contenders meet.

    Args:
        task: The flag of a few-shot family.
        data_root: As for `tasks.load`, as are the sizes of the tasks.
        ways: Classes of a validation or test task.
        shots: Its support images of each class.
        queries: Its query images of each class.
        seconds: The training time.
        validation_tasks: Their number, the same tasks at every validation of every contender.
        test_tasks: Their number.
        threads: The numbers of threads, of which the faster one is taken.
        seed: The seed of initialisations and training tasks.
    """

    task: str
    data_root: str | None
    seconds: float
    validation_tasks: int
    test_tasks: int
    threads: tuple[int, ...]
    seed: int
    ways: int = 5
    shots: int = 1
    queries: int = 15

    def load(self) -> tasks.Splits:
        """The families of tasks."""
        return tasks.load(
            self.task,
            ways=self.ways,
            shots=self.shots,
            queries=self.queries,
            data_root=self.data_root,
        )


def clock_times(seconds: float) -> list[float]:
    """The training times of the validations: every 15 s up to 3 minutes, then every minute.

    The last one is at the end.

    Example:
        >>> clock_times(40.0), clock_times(300.0)[-4:]
        ([15.0, 30.0, 40.0], [165.0, 180.0, 240.0, 300.0])
    """
    times = []
    due = FIRST_EVERY
    while due < seconds:
        times.append(due)
        due += FIRST_EVERY if due < FIRST_UNTIL else LATER_EVERY
    return [*times, seconds]


def run_race(name: str, course: Course) -> Row:
    """The race of a contender, in a process of its own. Prints a line for each validation.

    Returns:
        Its number of threads and the seconds of a meta-step with each, its normalisation, its curve
        (see `train`), and the one test, at the state with the best validation.
    """
    splits = course.load()
    entry = find_entry(name, course.task)
    threads, seconds_per_step = choose_threads(
        name,
        entry,
        splits.train,
        course=course,
    )
    set_up_cpu(threads)
    torch.manual_seed(course.seed)
    np.random.seed(course.seed)  # learn2learn initialises linear layers by scipy
    contender = entry.make(entry.sizes.resize(splits.train))
    validation = tasks.EpisodeSampler(
        splits.validation,
        tasks=BATCH,
        seed=course.seed,
    )
    curve, best = train(
        contender,
        training_sampler(entry, splits.train, course),
        lambda: (
            measure(
                contender,
                validation,
                course.validation_tasks,
                "validation",
            ).mean
        ),
        times=clock_times(course.seconds),
        name=name,
    )
    contender.module.load_state_dict(best)
    test = tasks.EpisodeSampler(
        splits.test,
        tasks=BATCH,
        seed=course.seed + TEST_SEED,
    )
    tested = measure(contender, test, course.test_tasks, "test")
    return {
        "chosen_threads": threads,
        "seconds_per_step": seconds_per_step,
        "normalization": contender.normalization,
        "curve": curve,
        "test": {"mean": tested.mean, "interval_95": tested.interval},
    }


def train(
    contender: Contender,
    sampler: tasks.EpisodeSampler,
    validate: Callable[[], float],
    *,
    times: list[float],
    name: str,
    now: Callable[[], float] = time.perf_counter,
) -> tuple[list[Row], dict[str, Tensor]]:
    """Train until the last of `times`, and validate after the step that passes each of them.

    The clock runs while tasks are drawn and a meta-step is taken. It stands during validation.

    Returns:
        The curve: "seconds" of training, meta-"steps" and "accuracy" at each validation. And the
        state of the module at the best one.
    """
    clock = 0.0
    steps = 0
    curve: list[Row] = []
    best: dict[str, Tensor] = {}
    for due in times:
        while clock < due:
            began = now()
            contender.step(sampler[steps], spent=clock / times[-1])
            clock += now() - began
            steps += 1
        accuracy = validate()
        if not curve or accuracy > max(point["accuracy"] for point in curve):
            best = copy.deepcopy(contender.module.state_dict())
        curve.append({"seconds": clock, "steps": steps, "accuracy": accuracy})
        print(f"{name}: {clock:.1f} s, {steps} meta-steps, {100 * accuracy:.2f} %", flush=True)
    return curve, best


def measure(contender: Contender, sampler: tasks.EpisodeSampler, count: int, unit: str) -> Estimate:
    """The query accuracy of the first `count` tasks of a stream."""
    batches = -(-count // BATCH)  # rounded up
    values = [contender.accuracies(sampler[i]) for i in metered(range(batches), f"{unit} batch")]
    return Estimate.of(torch.cat(values)[:count])


def choose_threads(
    name: str,
    entry: Entry,
    family: tasks.TaskFamily,
    *,
    course: Course,
    now: Callable[[], float] = time.perf_counter,
) -> tuple[int, dict[str, float]]:
    """The number of threads with the fastest meta-steps, and the median seconds with each.

    The learners that are timed are thrown away. A single number of threads is not timed.
    """
    if len(course.threads) == 1:
        return course.threads[0], {}
    seconds = {}
    for threads in course.threads:
        set_up_cpu(threads)
        contender = entry.make(entry.sizes.resize(family))
        sampler = training_sampler(entry, family, course)
        times = []
        for i in range(1 + TIMED_STEPS):
            began = now()
            contender.step(sampler[i], spent=0.0)
            times.append(now() - began)
        seconds[threads] = statistics.median(times[1:])
    fastest = min(seconds, key=lambda threads: seconds[threads])
    tried = ", ".join(f"{value:.3f} s with {threads}" for threads, value in seconds.items())
    print(f"{name}: a meta-step takes {tried} threads; it races with {fastest}", flush=True)
    return fastest, {str(threads): value for threads, value in seconds.items()}


def training_sampler(
    entry: Entry, family: tasks.TaskFamily, course: Course
) -> tasks.EpisodeSampler:
    """The training tasks of a contender."""
    resized = entry.sizes.resize(family)
    return tasks.EpisodeSampler(resized, tasks=entry.sizes.tasks, seed=course.seed)
