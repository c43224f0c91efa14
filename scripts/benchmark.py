"""Time and memory of one meta-step against the number of inner steps, each measurement in a fresh process.

python scripts/benchmark.py --methods cg unrolled --inner-steps 4 16 64
python scripts/benchmark.py --towers                         # a level of a tower of optimisers, instead
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import tower_benchmark
import tyro

from metaimplicit import GradientDescent, MetaLearner
from metaimplicit.methods import known_options, make_method
from metaimplicit.models import ConvNet
from metaimplicit.training import peak_memory, write_json


@dataclass(frozen=True)
class Benchmark:
    """Measure seconds and peak memory of a meta-step on random images; prints a table."""

    methods: tuple[str, ...] = ("unrolled", "truncated", "first-order", "cg", "neumann", "nystrom")
    """Flags of the methods."""
    inner_steps: tuple[int, ...] = (4, 16, 64)
    """Numbers of inner steps."""
    filters: int = 32
    """Channels of the conv net."""
    tasks: int = 8
    """Tasks in a meta-step, 5-way 5-shot, 28×28."""
    repeats: int = 1
    """Meta-steps timed after the first, which is measured for memory; the median is reported (0: the first one's)."""
    threads: int = 1
    """CPU threads."""
    device: str = "cpu"
    """cpu or cuda."""
    out: Path | None = None
    """JSON file for the numbers."""
    towers: bool = False
    """Time training steps by towers of optimisers instead, on the CPU."""


@dataclass(frozen=True)
class Images:
    """Random images with labels."""

    support: tuple[torch.Tensor, torch.Tensor]
    query: tuple[torch.Tensor, torch.Tensor]


def measure(settings: Benchmark, method: str, inner_steps: int) -> dict[str, float]:
    """One method at one number of inner steps: MiB above the level before the call, and seconds of a later call."""
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    device = torch.device(settings.device)
    labels = torch.arange(5).repeat(5).expand(settings.tasks, -1).to(device)
    pair = (torch.rand(settings.tasks, 25, 1, 28, 28, device=device), labels)
    learner = MetaLearner(
        ConvNet((1, 28, 28), 5, filters=settings.filters).to(device),
        F.cross_entropy,
        inner=GradientDescent(steps=inner_steps, lr=0.01),
        method=make_method(method, **known_options(method, solver_steps=min(5, inner_steps))),
        proximal=0.1,
        vectorize="vmap",
    )
    before, first = _resident(device), _seconds(learner, Images(pair, pair))
    mebibytes = peak_memory(device) - before
    later = [_seconds(learner, Images(pair, pair)) for _ in range(settings.repeats)]
    return {"mebibytes": mebibytes, "seconds": statistics.median(later or [first])}


def _seconds(learner: MetaLearner, images: Images) -> float:
    began = time.perf_counter()
    float(learner.backward(images).loss)  # reading a number waits for the device
    return time.perf_counter() - began


def _resident(device: torch.device) -> float:
    """What is held now, in MiB."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 2**20
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def main(settings: Benchmark) -> list[dict[str, object]]:
    """Measure everything, each in a process of its own."""
    for name, least in {"threads": 1, "filters": 1, "tasks": 1, "repeats": 0}.items():
        if (value := getattr(settings, name)) < least:
            raise ValueError(f"--{name}: got {value}, expected at least {least}")
    if settings.towers:
        torch.set_num_threads(settings.threads)
        tables = [tower_benchmark.perceptron(), tower_benchmark.residual_network()]
        print(*tables, sep="\n\n")
        if settings.out is not None:
            write_json(settings.out, tables)
        return []
    # glibc: hand freed blocks back at once, so that the resident size is what lives and not what once did
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    rows: list[dict[str, object]] = []
    context = multiprocessing.get_context("spawn")
    print(f"{'method':<12} {'inner steps':>11} {'peak MiB':>9} {'growth':>7} {'seconds':>8}")
    for method in settings.methods:
        first = None
        for steps in settings.inner_steps:
            with context.Pool(1) as pool:
                found = pool.apply(measure, (settings, method, steps))
            first = first or found["mebibytes"]
            growth = found["mebibytes"] / first
            rows.append({"method": method, "inner_steps": steps, **found, "growth": growth})
            print(
                f"{method:<12} {steps:>11} {found['mebibytes']:>9.1f} {growth:>7.2f} {found['seconds']:>8.3f}",
                flush=True,
            )
    if settings.out is not None:
        write_json(
            settings.out,
            {"settings": {k: str(v) for k, v in asdict(settings).items()}, "rows": rows},
        )
    return rows


if __name__ == "__main__":
    try:
        main(tyro.cli(Benchmark, config=(tyro.conf.FlagCreatePairsOff,)))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
