"""Time and memory of one meta-step against the number of inner steps.

python scripts/benchmark.py --methods cg unrolled --inner-steps 4 16 64
python scripts/benchmark.py --towers                     # towers of optimisers instead
"""

from __future__ import annotations

import startup  # isort: skip  # noqa: F401  # before what takes time to import

import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import tower_benchmark
import tyro
from command_line import exit_on

from metaimplicit import GradientDescent, MetaLearner
from metaimplicit.learner import Episode, Pair
from metaimplicit.methods import known_options, make_method
from metaimplicit.models import ConvNet
from metaimplicit.training import peak_memory, write_json

WAYS = 5
SHOTS = 5
IMAGE = (1, 28, 28)
SOLVER_STEPS = 5  # or fewer, where a method takes at most as many as there are inner steps


@dataclass(frozen=True)
class Benchmark:
    """Measure seconds and peak memory of a meta-step on random images, and print a table."""

    methods: tuple[str, ...] = ("unrolled", "truncated", "first-order", "cg", "neumann", "nystrom")
    """Flags of the methods."""
    inner_steps: tuple[int, ...] = (4, 16, 64)
    """Numbers of inner steps."""
    filters: int = 32
    """Channels of the convolutional network."""
    tasks: int = 8
    """Tasks in a meta-step, 5-way 5-shot, 28×28 pixels."""
    repeats: int = 1
    """Meta-steps that are timed after the first, which is measured for memory. The median counts.
    With 0, the first one is timed."""
    threads: int = 1
    """CPU threads."""
    device: str = "cpu"
    """cpu or cuda."""
    out: Path | None = None
    """JSON file for the numbers."""
    towers: bool = False
    """Time training steps by towers of optimisers instead, on the CPU."""


def main(settings: Benchmark) -> None:
    """Measure everything and print a table.

    Raises:
        ValueError: A number is out of range.
    """
    for name, minimum in {"threads": 1, "filters": 1, "tasks": 1, "repeats": 0}.items():
        value = getattr(settings, name)
        if value < minimum:
            raise ValueError(f"--{name}: got {value}, expected at least {minimum}")
    result = time_towers(settings) if settings.towers else measure_methods(settings)
    if settings.out is not None:
        write_json(settings.out, result)


def time_towers(settings: Benchmark) -> list[str]:
    """Print the tables of `tower_benchmark`."""
    torch.set_num_threads(settings.threads)
    tables = [tower_benchmark.perceptron(), tower_benchmark.residual_network()]
    print(*tables, sep="\n\n")
    return tables


def measure_methods(settings: Benchmark) -> dict[str, Any]:
    """Measure each method at each number of inner steps in a fresh process."""
    # glibc then returns freed blocks at once, so that the resident size is what is in use.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    context = multiprocessing.get_context("spawn")
    rows: list[dict[str, Any]] = []
    print(f"{'method':<12} {'inner steps':>11} {'peak MiB':>9} {'growth':>7} {'seconds':>8}")
    for method in settings.methods:
        smallest = None
        for steps in settings.inner_steps:
            with context.Pool(1) as pool:
                numbers = pool.apply(measure, (settings, method, steps))
            mebibytes = numbers["mebibytes"]
            smallest = smallest or mebibytes
            growth = mebibytes / smallest
            rows.append({"method": method, "inner_steps": steps, **numbers, "growth": growth})
            print(
                f"{method:<12} {steps:>11} {mebibytes:>9.1f} {growth:>7.2f} "
                f"{numbers['seconds']:>8.3f}",
                flush=True,
            )
    return {"settings": {k: str(v) for k, v in asdict(settings).items()}, "rows": rows}


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
    with exit_on(ValueError, code=2):
        main(tyro.cli(Benchmark, args=sys.argv[1:], config=(tyro.conf.FlagCreatePairsOff,)))
