"""A race for one meta-gradient: this library beside others, and beside plain torch.func.

Every contender computes the same meta-gradient of the same network on the same tasks, in a process
of its own for each number of threads. All of them are measured in turn, so that drifts of speed
affect all alike, and the better number of threads counts.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
import warnings
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from gradient_contenders import CONTENDERS, WORKLOADS, Step

from metaimplicit.training import keep_freed_memory, peak_memory

SHORTEST = 0.05  # seconds that one measurement takes at least


def race(name: str, *, threads: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    """The rows of one workload, one a contender, by its better number of threads.

    Args:
        name: One of `WORKLOADS`.
        threads: The numbers of threads to try.
        rounds: The number of measurements of each.

    Returns:
        "milliseconds": the median. "fastest", "slowest": the extremes. "threads". "mebibytes": the
        peak of the process's resident size. "error": the distance of the meta-gradient from that of
        the first contender, relative to its norm.
    """
    workload = WORKLOADS[name]
    runners = [
        Runner(name, contender, count)
        for contender, entry in CONTENDERS.items()
        for count in threads
        if find_spec(entry.package) is not None and entry.implicit in (None, workload.proximal > 0)
    ]
    try:
        gradients = [runner.ask("gradient") for runner in runners]
        times: list[list[float]] = [[] for _ in runners]
        for _ in range(rounds):
            for runner, seconds in zip(runners, times, strict=True):
                seconds.append(runner.ask("time"))
        memory = [runner.ask("memory") for runner in runners]
    finally:
        for runner in runners:
            runner.stop()
    rows: dict[str, dict[str, Any]] = {}
    for i, runner in enumerate(runners):
        error = np.linalg.norm(gradients[i] - gradients[0]) / np.linalg.norm(gradients[0])
        row = {
            "contender": runner.contender,
            "milliseconds": 1000 * statistics.median(times[i]),
            "fastest": 1000 * min(times[i]),
            "slowest": 1000 * max(times[i]),
            "threads": runner.threads,
            "mebibytes": memory[i],
            "error": float(error),
        }
        best = rows.get(runner.contender)
        if best is None or row["milliseconds"] < best["milliseconds"]:
            rows[runner.contender] = row
    return list(rows.values())


class Runner:
    """A process that computes the meta-gradient of one contender when it is asked to."""

    def __init__(self, workload: str, contender: str, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.contender = contender
        self.threads = threads
        self._pipe, other = context.Pipe()
        arguments = (other, workload, contender, threads)
        self._process = context.Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        other.close()

    def ask(self, what: str) -> Any:
        """The answer of the process.

        Raises:
            RuntimeError: The contender failed, or was killed.
        """
        self._pipe.send(what)
        try:
            answer = self._pipe.recv()
        except EOFError:
            answer = "it was killed"
        if isinstance(answer, str):
            raise RuntimeError(f"{self.contender}, {self.threads} threads: {answer}")
        return answer

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()


def serve(pipe: Connection, workload: str, contender: str, threads: int) -> None:
    """Answer what `Runner.ask` asks. Errors are sent as text."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    warnings.simplefilter("ignore")
    try:
        step = CONTENDERS[contender].make(WORKLOADS[workload])
        while True:
            what = pipe.recv()
            if what == "gradient":
                parts = [g.detach().flatten() for g in (step(), step())[1]]
                pipe.send(torch.cat(parts).numpy())
            elif what == "time":
                pipe.send(_seconds(step))
            else:
                pipe.send(peak_memory(torch.device("cpu")))
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


def _seconds(step: Step) -> float:
    """The mean time of a step, over as many as take `SHORTEST` seconds."""
    count = 0
    start = time.perf_counter()
    while True:
        step()
        count += 1
        seconds = time.perf_counter() - start
        if seconds >= SHORTEST:
            return seconds / count


def describe(name: str, rows: list[dict[str, Any]]) -> str:
    """The rows of a workload as a table. The ratio is that to the fastest row."""
    best = min(row["milliseconds"] for row in rows)
    lines = [f"{name:<26} {'ms':>8} {'(range)':>17} {'ratio':>6} threads {'MiB':>6} {'error':>8}"]
    for row in rows:
        extremes = f"({row['fastest']:.4g} to {row['slowest']:.4g})"
        lines.append(
            f"  {row['contender']:<24} {row['milliseconds']:>8.4g} {extremes:>17} "
            f"{row['milliseconds'] / best:>6.2f} {row['threads']:>7} {row['mebibytes']:>6.0f} "
            f"{row['error']:>8.0e}"
        )
    return "\n".join(lines)
