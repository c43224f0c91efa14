"""The fastest way to compute the meta-steps of a run, found by the clock before the first one."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from metaimplicit import MetaLearner
from metaimplicit.learner.vectorization import preserve_random_state

GAIN = 0.9  # of the time of the best way, which another one has to stay below
SPREAD = 1.2  # between two times of a way, above which both it and its rival are timed again
ROUNDS = 3  # in which they are timed at most
SHARE = 0.05  # of the run, in which ways may be timed
TOLERANCE = 1e-2  # the relative change of the meta-gradient that round-off explains at a kink
PAYS_FROM = 180.0  # seconds of a run, from which on it may pay to compile
LAUNCHES_DOMINATE_BELOW = 0.05  # seconds of a meta-step; arithmetic is as fast without compilation


@dataclass(frozen=True)
class Way:
    """A way to compute a meta-step. All ways have the same result, up to round-off.

    Attributes:
        vectorize: How the tasks are batched.
        chunk_size: The number of tasks that are vmapped at a time. None stands for all.
        channels_last: Whether the weights of convolutions are in this memory format.
        compile: Whether the functions of a meta-step are compiled.
        threads: The number of CPU threads.
    """

    vectorize: Literal["vmap", "loop"]
    chunk_size: int | None
    channels_last: bool
    compile: bool
    threads: int

    @classmethod
    def of(cls, learner: MetaLearner) -> Way:
        """The way in which a learner computes now."""
        return cls(
            vectorize="loop" if learner.vectorize == "loop" else "vmap",
            chunk_size=learner.chunk_size,
            channels_last=any(not p.is_contiguous() for p in _kernels(learner)),
            compile=learner.compiles is not False,
            threads=torch.get_num_threads(),
        )

    def apply(self, learner: MetaLearner) -> None:
        """Let a learner compute in this way."""
        learner.vectorize = self.vectorize
        learner.chunk_size = self.chunk_size
        learner.compiles = self.compile
        if self.channels_last != Way.of(learner).channels_last:
            last, first = torch.channels_last, torch.contiguous_format
            learner.model.to(memory_format=last if self.channels_last else first)
        torch.set_num_threads(self.threads)

    def __str__(self) -> str:
        parts = [self.vectorize if self.chunk_size is None else f"vmap by {self.chunk_size}"]
        parts.append("1 thread" if self.threads == 1 else f"{self.threads} threads")
        parts += ["channels last"] if self.channels_last else []
        parts += ["compiled"] if self.compile else []
        return ", ".join(parts)


@dataclass
class Trial:
    """A way that was timed.

    Attributes:
        way: The way.
        first: The seconds of its first call, which may compile and warms caches.
        seconds: Those of the later calls.
        objection: Why it cannot be used. Empty if it can.
    """

    way: Way
    first: float = 0.0
    seconds: list[float] = field(default_factory=list)
    objection: str = ""

    @property
    def best(self) -> float:
        """The shortest time, in seconds."""
        return min(self.seconds, default=self.first)

    @property
    def is_noisy(self) -> bool:
        """Whether two of its times differ by more than a fifth."""
        return max(self.seconds, default=0.0) > SPREAD * self.best


@dataclass(frozen=True)
class Plan:
    """The way that was kept, and what it was compared with.

    Attributes:
        way: The way.
        trials: All ways that were timed, in their order.
        load: The load average of the machine at that time. None where it has none.
    """

    way: Way
    trials: list[Trial] = field(default_factory=list)
    load: float | None = None

    def dump(self) -> dict[str, Any]:
        """The plan for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """One line."""
        kept = self._trial(self.way)
        taken = f": a meta-step takes {kept.best:.3g} s" if kept else ""
        return f"plan: {self.way}{taken}"

    def table(self) -> str:
        """All ways with their milliseconds."""
        load = "" if self.load is None else f", at a load average of {self.load:.1f}"
        lines = [f"plan: the shortest time of a meta-step in ms{load}"]
        for trial in self.trials:
            note = "kept" if trial.way == self.way else trial.objection
            lines.append(f"  {trial.way!s:<40} {1e3 * trial.best:>9.3g}  {note}".rstrip())
        return "\n".join(lines + self._break_even())

    def _break_even(self) -> list[str]:
        """After how many meta-steps compilation has paid for itself."""
        compiled = next((t for t in self.trials if t.way.compile and not t.objection), None)
        eager = compiled and self._trial(replace(compiled.way, compile=False))
        if not compiled or not eager:
            return []
        saved = eager.best - compiled.best
        pays = f"{compiled.first / saved:,.0f} meta-steps pay that back" if saved > 0 else "no gain"
        return [f"  compilation took {compiled.first:.0f} s: {pays}"]

    def _trial(self, way: Way) -> Trial | None:
        return next((trial for trial in self.trials if trial.way == way), None)


class Search:
    """The search for the fastest way, which changes one thing after the other.

    The gradients, the buffers and the random state are left as they were.

    Args:
        learner: The learner.
        step: One meta-step of it, which adds to `.grad` and returns the loss.
        seconds: The length of the run from its number of steps and the seconds of one.

    Attributes:
        learner: The learner.
        best: The fastest way so far.
        trials: All ways that were timed.
    """

    def __init__(
        self,
        learner: MetaLearner,
        step: Callable[[], Tensor],
        seconds: Callable[[float], float],
    ) -> None:
        self.learner = learner
        self._step = step
        self._run_seconds = seconds
        self._began = time.perf_counter()
        self._gradient: list[Tensor] = []
        self.best = Trial(Way.of(learner))
        self.trials = [self.best]
        self._time(self.best)

    @property
    def has_time(self) -> bool:
        """Whether the search may go on. It takes a small share of the run."""
        spent = time.perf_counter() - self._began
        return spent < SHARE * self._run_seconds(self.best.best)

    @property
    def may_pay_to_compile(self) -> bool:
        """Whether the run is long enough, and its meta-steps consist of many short operations."""
        seconds = self.best.best
        return self._run_seconds(seconds) > PAYS_FROM and seconds < LAUNCHES_DOMINATE_BELOW

    def consider(self, **changes: Any) -> None:
        """Time the best way with these changes, and keep it if that saves a tenth of the time."""
        if not self.has_time:
            return
        trial = Trial(replace(self.best.way, **changes))
        self.trials.append(trial)
        self._time(trial)
        for _ in range(ROUNDS - 1):
            if trial.objection or not (trial.is_noisy or self.best.is_noisy):
                break
            self._time(trial)
            self._time(self.best)
        if not trial.objection and trial.best < GAIN * self.best.best:
            self.best = trial
        self.best.way.apply(self.learner)

    def _time(self, trial: Trial) -> None:
        """Call it once, and twice more unless it is far slower than the best way."""
        trial.way.apply(self.learner)
        with undone(self.learner), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                seconds = self._call()
                if not trial.first:
                    trial.first = seconds
                    trial.objection = self._objection(caught)
                is_slow = not trial.way.compile and seconds > 2 * self.best.best > 0
                if trial.objection or is_slow:
                    return
                trial.seconds += [self._call() for _ in range(2)]
            except RuntimeError as error:
                trial.objection = str(error).splitlines()[0]

    def _call(self) -> float:
        self.learner.zero_grad()
        start = time.perf_counter()
        with preserve_random_state(self.learner.method, cuda=torch.cuda.is_available()):
            float(self._step())  # reading a number waits for the device
        return time.perf_counter() - start

    def _objection(self, caught: list[warnings.WarningMessage]) -> str:
        """Why the way that was just called cannot be used."""
        said = [str(w.message) for w in caught if str(w.message).startswith("compile:")]
        if said:
            return said[0]
        gradient = [p.grad.clone() for p in self.learner.parameters() if p.grad is not None]
        if not self._gradient:
            self._gradient = gradient
        change = _norm([new - old for new, old in zip(gradient, self._gradient, strict=True)])
        is_same = change <= TOLERANCE * _norm(self._gradient)
        return "" if is_same else "it has another meta-gradient, as where tasks draw numbers"


def find_plan(search: Search, *, tasks: int, threads: int, fixed: set[str]) -> Plan:
    """The fastest way that a search finds.

    Args:
        search: The search.
        tasks: The number of tasks of a meta-step.
        threads: The largest number of CPU threads.
        fixed: The attributes of `Way` that may not change.
    """
    if "threads" not in fixed and threads > search.best.way.threads:
        search.consider(threads=threads)
    if "vectorize" not in fixed and tasks > 1:
        search.consider(vectorize="loop" if search.best.way.vectorize == "vmap" else "vmap")
    if "chunk_size" not in fixed and tasks > 3 and search.best.way.vectorize == "vmap":
        search.consider(chunk_size=(tasks + 1) // 2)
    if "channels_last" not in fixed and _kernels(search.learner):
        search.consider(channels_last=not search.best.way.channels_last)
    if "compile" not in fixed and search.may_pay_to_compile:
        search.consider(compile=True)
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return Plan(search.best.way, search.trials, load)


@contextmanager
def undone(learner: MetaLearner) -> Iterator[None]:
    """Put the buffers back at the end, such as running statistics, and drop the gradients."""
    buffers = {name: buffer.clone() for name, buffer in learner.named_buffers()}
    try:
        yield
    finally:
        learner.load_state_dict(buffers, strict=False)
        learner.zero_grad()


def _kernels(learner: MetaLearner) -> list[Tensor]:
    """The weights of two-dimensional convolutions, which have a memory format."""
    return [p for p in learner.model.parameters() if p.dim() == 4]


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm(tensors))
