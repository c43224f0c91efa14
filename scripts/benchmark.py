"""Time and memory of one meta-step against the number of inner steps.

python scripts/benchmark.py --methods cg unrolled --inner-steps 4 16 64
python scripts/benchmark.py --towers                     # towers of optimisers instead
python scripts/benchmark.py --race                       # one meta-gradient by other libraries, too

With --out, every row is stored when it is done: the same command again only measures what is
missing.
"""

from __future__ import annotations

import startup  # isort: skip  # noqa: F401  # before what takes time to import

import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from command_line import (
    RowFile,
    find_device,
    handle_errors,
    parse_options,
    require_package,
    run_apart,
)
from command_line.ranges import MOST_THREADS, check_ranges, within
from gradient_contenders import WORKLOADS

from metaimplicit import GradientDescent, MetaLearner
from metaimplicit.learner import Episode, Pair
from metaimplicit.methods import known_options, make_method
from metaimplicit.models import ConvNet
from metaimplicit.training import peak_memory

WAYS = 5
SHOTS = 5
IMAGE = (1, 28, 28)
# A process that begins with these returns freed blocks at once: its resident size is in use.
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
SOLVER_STEPS = 5  # or fewer, where a method takes at most as many as there are inner steps


@dataclass(frozen=True)
class Benchmark:
    """Measure seconds and peak memory of a meta-step on random images, and print a table."""

    methods: tuple[str, ...] = ("unrolled", "truncated", "first-order", "cg", "neumann", "nystrom")
    """Flags of the methods."""
    inner_steps: Annotated[tuple[int, ...], within(1, 10_000)] = (4, 16, 64)
    """Numbers of inner steps."""
    filters: Annotated[int, within(1, 4096)] = 32
    """Channels of the convolutional network."""
    tasks: Annotated[int, within(1, 10_000)] = 8
    """Tasks in a meta-step, 5-way 5-shot, 28×28 pixels."""
    repeats: Annotated[int, within(0, 10_000)] = 1
    """Meta-steps that are timed after the first, which is measured for memory. The median counts.
    With 0, the first one is timed."""
    threads: Annotated[int, within(1, MOST_THREADS)] = 1
    """CPU threads."""
    device: str = "cpu"
    """cpu or cuda."""
    out: Path | None = None
    """JSON file for the rows. Those that it has are not measured."""
    towers: bool = False
    """Time training steps by towers of optimisers instead, on the CPU."""
    race: bool = False
    """Time one meta-gradient by this library and by others that are installed instead, with one
    and with two threads, on the CPU."""
    workloads: tuple[str, ...] = tuple(WORKLOADS)
    """What --race differentiates."""


@handle_errors
def run_command(args: list[str]) -> None:
    """Run `main` with the settings that a command line gives."""
    main(parse_options(Benchmark, args))


def main(settings: Benchmark) -> None:
    """Measure the methods, with --towers towers or with --race a race, and print tables.

    Raises:
        ImportError: --towers compares with a package that is not installed.
        OSError: The file of --out cannot be written.
        RuntimeError: A process that measured a row ended before it was done.
        ValueError: A setting is out of range or unknown, or the file of --out holds no rows.
    """
    check_settings(settings)
    rows = RowFile(settings.out)
    if settings.towers:
        time_towers(settings, rows)
    elif settings.race:
        run_race(settings, rows)
    else:
        measure_methods(settings, rows)


def check_settings(settings: Benchmark) -> None:
    """Check the settings before any work.

    Raises:
        ImportError: --towers compares with a package that is not installed.
        ValueError: A number is out of range, a method or the device is unknown, or a setting does
            not fit --race.
    """
    check_ranges(settings)
    find_device(settings.device)
    for method in settings.methods:
        make_method(method)
    if settings.race:
        check_race(settings)
    if settings.towers:
        require_package(
            "gradient_descent_the_ultimate_optimizer",
            purpose="--towers",
            extra="dev",
        )


def check_race(settings: Benchmark) -> None:
    """Check the settings of a race.

    Raises:
        ValueError: A workload is unknown, nothing is timed, the device is not the CPU, or towers
            are asked for, too.
    """
    for name in settings.workloads:
        if name not in WORKLOADS:
            raise ValueError(f"--workloads: got {name!r}, expected some of {list(WORKLOADS)}")
    if settings.repeats < 1 or settings.device != "cpu" or settings.towers:
        raise ValueError(
            f"--race: got --repeats {settings.repeats}, --device {settings.device} and --towers "
            f"{settings.towers}, expected at least one repeat on the CPU, and no towers"
        )


def time_towers(settings: Benchmark, rows: RowFile) -> None:
    """Print the tables of `tower_benchmark`."""
    import tower_benchmark  # here, so that the processes of the other rows start in half the time

    torch.set_num_threads(settings.threads)
    for network in (tower_benchmark.perceptron, tower_benchmark.residual_network):
        case = {"towers": network.__name__, "threads": settings.threads}
        row = rows.read_or_make(case, partial(make_table, network))
        print(row["table"], end="\n\n")


def run_race(settings: Benchmark, rows: RowFile) -> None:
    """Print the tables of `gradient_race`."""
    import gradient_race

    for name in settings.workloads:
        case = {"race": name, "repeats": settings.repeats}
        row = rows.read_or_make(case, partial(make_race, name, settings.repeats))
        print(gradient_race.describe(name, row["rows"]), end="\n\n", flush=True)


def make_race(name: str, repeats: int) -> dict[str, Any]:
    """The row of a workload."""
    import gradient_race

    return {"rows": gradient_race.race(name, threads=(1, 2), rounds=repeats)}


def make_table(network: Callable[[], str]) -> dict[str, str]:
    """The row of a table."""
    return {"table": network()}


def measure_methods(settings: Benchmark, rows: RowFile) -> None:
    """Measure each method at each number of inner steps, and print a line for each."""
    print(f"{'method':<12} {'inner steps':>11} {'peak MiB':>9} {'growth':>7} {'seconds':>8}")
    for method in settings.methods:
        smallest = None
        for steps in settings.inner_steps:
            case = {
                "method": method,
                "inner_steps": steps,
                "filters": settings.filters,
                "tasks": settings.tasks,
                "repeats": settings.repeats,
                "threads": settings.threads,
                "device": settings.device,
            }
            row = rows.read_or_make(
                case,
                partial(
                    measure_apart,
                    settings,
                    method,
                    steps,
                ),
            )
            mebibytes = row["mebibytes"]
            smallest = smallest or mebibytes
            print(
                f"{method:<12} {steps:>11} {mebibytes:>9.1f} {mebibytes / smallest:>7.2f} "
                f"{row['seconds']:>8.3f}",
                flush=True,
            )


def measure_apart(settings: Benchmark, method: str, inner_steps: int) -> dict[str, float]:
    """What `measure` returns in a fresh process.

    Raises:
        RuntimeError: The process was killed.
    """
    os.environ |= RETURN_FREED_MEMORY
    name = f"{method}, {inner_steps} inner steps"
    return run_apart(measure, settings, method, inner_steps, name=name)


def measure(settings: Benchmark, method: str, inner_steps: int) -> dict[str, float]:
    """One method at one number of inner steps, in a fresh process.

    Returns:
        "mebibytes": the peak memory above that before the first meta-step. "seconds": the median
        time of the later meta-steps.
    """
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    device = torch.device(settings.device)
    labels = torch.arange(WAYS).repeat(SHOTS).expand(settings.tasks, -1).to(device)
    images = Pair(torch.rand(*labels.shape, *IMAGE, device=device), labels)
    episode = Episode(support=images, query=images)
    options = known_options(method, solver_steps=min(SOLVER_STEPS, inner_steps))
    learner = MetaLearner(
        ConvNet(IMAGE, WAYS, filters=settings.filters).to(device),
        F.cross_entropy,
        inner=GradientDescent(steps=inner_steps, lr=0.01),
        method=make_method(method, **options),
        proximal=0.1,
        vectorize="vmap",
    )

    before = memory_in_use(device)
    first = time_step(learner, episode)
    mebibytes = peak_memory(device) - before
    later = [time_step(learner, episode) for _ in range(settings.repeats)]
    return {"mebibytes": mebibytes, "seconds": statistics.median(later or [first])}


def time_step(learner: MetaLearner, episode: Episode) -> float:
    """The seconds that one meta-step takes."""
    start = time.perf_counter()
    float(learner.backward(episode).loss)  # reading a number waits for the device
    return time.perf_counter() - start


def memory_in_use(device: torch.device) -> float:
    """The memory that is in use now, in MiB: torch's on CUDA, else the process's resident size."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return resident_pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    run_command(sys.argv[1:])
