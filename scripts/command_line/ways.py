"""The fastest way to compute the meta-steps of a run, found by the clock before the first one."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from metaimplicit import MetaLearner
from metaimplicit.learner.vectorization import preserve_random_state

KEPT_BELOW = 0.9  # of the time of the best way: another one is kept if it takes less
FAR_SLOWER = 2.0  # times the best way, from which on a way is not timed further
SPREAD = 1.2  # of two times of a way, the longer over the shorter: above it, it is timed again
ROUNDS = 3  # in which a way and the best one are timed at most
SEARCH_SHARE = 0.05  # of the run, after which no way is begun
TOLERANCE = 1e-3  # largest relative difference of the meta-gradients of two ways
PAYS_FROM = 300.0  # seconds of a run, from which on it may pay to compile
LAUNCHES_DOMINATE_BELOW = 0.05  # seconds of a meta-step; compilation does not speed up arithmetic


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
        learner.compiles = "auto" if self.compile else False
        if self.channels_last != Way.of(learner).channels_last:
            last, first = torch.channels_last, torch.contiguous_format
            learner.model.to(memory_format=last if self.channels_last else first)
        torch.set_num_threads(self.threads)

    def __str__(self) -> str:
        by_chunks = self.vectorize == "vmap" and self.chunk_size is not None
        parts = [f"vmap by {self.chunk_size}" if by_chunks else self.vectorize]
        parts.append("1 thread" if self.threads == 1 else f"{self.threads} threads")
        parts += ["channels last"] if self.channels_last else []
        parts += ["compiled"] if self.compile else []
        return ", ".join(parts)


@dataclass
class Trial:
    """A way that was timed.

    Attributes:
        way: The way.
        first_seconds: The time of its first call, which may compile and warms caches.
        seconds: The times of later calls.
        objection: Why it cannot be used. Empty if it can.
    """

    way: Way
    first_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    objection: str = ""

    @property
    def shortest(self) -> float:
        """The shortest time of a later call, in seconds. Infinite if there is none."""
        return min(self.seconds, default=math.inf)

    @property
    def is_noisy(self) -> bool:
        """Whether its last two times differ by more than a fifth."""
        return max(self.seconds[-2:], default=0.0) > SPREAD * self.shortest


@dataclass(frozen=True)
class MeasuredPlan:
    """The way that was kept, and what it was compared with.

    Attributes:
        way: The way.
        device: The kind of device that it was found on.
        trials: All ways that were timed, in their order.
        load: The load average of the machine at that time. None where it has none.
    """

    way: Way
    device: str = "cpu"
    trials: list[Trial] = field(default_factory=list)
    load: float | None = None

    @classmethod
    def load_from(cls, stored: Mapping[str, Any]) -> MeasuredPlan:
        """The inverse of `dump`."""
        trials = [Trial(**trial | {"way": Way(**trial["way"])}) for trial in stored["trials"]]
        return cls(**{**stored, "way": Way(**stored["way"]), "trials": trials})

    def dump(self) -> dict[str, Any]:
        """The plan for JSON."""
        return asdict(self)

    def summary(self) -> str:
        """One line."""
        kept = self._trial(self.way)
        taken = f": a meta-step takes {kept.shortest:.3g} s" if kept else ""
        return f"plan: {self.way}{taken}"

    def table(self) -> str:
        """All ways with their milliseconds."""
        load = "" if self.load is None else f", at a load average of {self.load:.1f}"
        lines = [f"plan: the shortest time of a meta-step in ms{load}"]
        for trial in self.trials:
            shortest = f"{1e3 * trial.shortest:.3g}" if trial.seconds else "–"
            note = "kept" if trial.way == self.way else trial.objection
            lines.append(f"  {trial.way!s:<40} {shortest:>9}  {note}".rstrip())
        return "\n".join(lines + self._break_even())

    def _break_even(self) -> list[str]:
        """After how many meta-steps compilation has paid off."""
        compiled = next((t for t in self.trials if t.way.compile and not t.objection), None)
        eager = compiled and self._trial(replace(compiled.way, compile=False))
        if not compiled or not eager:
            return []
        saved = eager.shortest - compiled.shortest
        taken = f"  compilation took {compiled.first_seconds:.0f} s"
        if saved <= 0:
            return [taken]
        return [f"{taken}, and has paid off after {compiled.first_seconds / saved:,.0f} meta-steps"]

    def _trial(self, way: Way) -> Trial | None:
        return next((trial for trial in self.trials if trial.way == way), None)


class Search:
    """The search for the fastest way, which changes one thing after the other.

    Parameters, buffers and the random state keep their values. Gradients are dropped.

    Args:
        learner: The learner.
        step: One meta-step of it, which adds to `.grad` and returns the loss.
        run_seconds: It turns the seconds of one meta-step into those of the run.

    Attributes:
        learner: The learner.
        fastest: The fastest way so far.
        trials: All ways that were timed.

    Raises:
        RuntimeError: The learner cannot take a step.
    """

    def __init__(
        self,
        learner: MetaLearner,
        step: Callable[[], Tensor],
        run_seconds: Callable[[float], float],
    ) -> None:
        self.learner = learner
        self._step = step
        self._run_seconds = run_seconds
        self._on_cuda = next(learner.parameters()).is_cuda
        self._began = time.perf_counter()
        self.fastest = Trial(Way.of(learner))
        self.trials = [self.fastest]
        with undone(learner):
            self.fastest.first_seconds = self._call()
            self._gradient = self._read_gradient()
            self.fastest.seconds += [self._call(), self._call()]

    @property
    def has_time(self) -> bool:
        """Whether another way may be timed. The search takes a small share of the run."""
        spent = time.perf_counter() - self._began
        return spent < SEARCH_SHARE * self._run_seconds(self.fastest.shortest)

    @property
    def may_pay_to_compile(self) -> bool:
        """Whether the run is long enough, and its meta-steps consist of many short operations."""
        seconds = self.fastest.shortest
        return self._run_seconds(seconds) > PAYS_FROM and seconds < LAUNCHES_DOMINATE_BELOW

    def consider(self, **changes: Any) -> None:
        """Time the fastest way with these changes, and keep them if they save a tenth of it."""
        if not self.has_time or not math.isfinite(_norm(self._gradient)):
            return
        trial = Trial(replace(self.fastest.way, **changes))
        self.trials.append(trial)
        self._begin(trial)
        self._time(trial)
        for _ in range(ROUNDS - 1):
            is_noisy = trial.is_noisy or self.fastest.is_noisy
            if not is_noisy or self._is_out(trial) or not self.has_time:
                break
            self._time(self.fastest)
            self._time(trial)
        if not trial.objection and trial.shortest < KEPT_BELOW * self.fastest.shortest:
            self.fastest = trial
        self.fastest.way.apply(self.learner)

    def _is_out(self, trial: Trial) -> bool:
        """Whether a way cannot be used, or is far slower than the fastest."""
        return bool(trial.objection) or trial.shortest > FAR_SLOWER * self.fastest.shortest

    def _begin(self, trial: Trial) -> None:
        """Take the first step in a way, and find out whether the way can be used."""
        trial.way.apply(self.learner)
        with undone(self.learner), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                trial.first_seconds = self._call()
            except RuntimeError as error:
                trial.objection = str(error).partition("\n")[0] or type(error).__name__
                return
            said = [str(w.message) for w in caught if str(w.message).startswith("compile:")]
            trial.objection = said[0] if said else self._compare_gradient()

    def _time(self, trial: Trial) -> None:
        """Time two steps in a way, or one if that takes far longer than in the fastest."""
        if trial.objection:
            return
        trial.way.apply(self.learner)
        with undone(self.learner), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if len(trial.seconds) > 1:
                self._call()  # it warms the caches
            for _ in range(2):
                trial.seconds.append(self._call())
                if self._is_out(trial):
                    break

    def _call(self) -> float:
        self.learner.zero_grad()
        with preserve_random_state(self.learner.method, cuda=self._on_cuda):
            start = time.perf_counter()
            float(self._step())  # reading a number waits for the device
            return time.perf_counter() - start

    def _compare_gradient(self) -> str:
        """How the gradient of the last step differs from the first one. Empty if it does not."""
        pairs = zip(self._read_gradient(), self._gradient, strict=True)
        change = _norm([new - old for new, old in pairs])
        norm = _norm(self._gradient)
        if change <= TOLERANCE * norm:
            return ""
        share = change / norm if norm > 0 else math.inf
        return f"its meta-gradient differs by {share:.2g} of its norm"

    def _read_gradient(self) -> list[Tensor]:
        return [p.grad.clone() for p in self.learner.parameters() if p.grad is not None]


def find_plan(search: Search, *, tasks: int, threads: int, fixed: set[str]) -> MeasuredPlan:
    """The fastest way that a search finds.

    Args:
        search: The search.
        tasks: The number of tasks of a meta-step.
        threads: The largest number of CPU threads.
        fixed: The attributes of `Way` that may not change.
    """
    if "threads" not in fixed and threads > search.fastest.way.threads:
        search.consider(threads=threads)
    if "vectorize" not in fixed and tasks > 1:
        search.consider(vectorize="loop" if search.fastest.way.vectorize == "vmap" else "vmap")
    if "chunk_size" not in fixed and tasks > 3 and search.fastest.way.vectorize == "vmap":
        search.consider(chunk_size=(tasks + 1) // 2)
    if "channels_last" not in fixed and _kernels(search.learner):
        search.consider(channels_last=not search.fastest.way.channels_last)
    if "compile" not in fixed and search.may_pay_to_compile:
        search.consider(compile=True)
    device = next(search.learner.parameters()).device.type
    return MeasuredPlan(search.fastest.way, device, search.trials, _load_average())


@contextmanager
def undone(learner: MetaLearner) -> Iterator[None]:
    """Put the buffers back at the end, such as running statistics, and drop the gradients."""
    before = {name: buffer.clone() for name, buffer in learner.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in learner.named_buffers():
                buffer.copy_(before[name])
        learner.zero_grad()


def _kernels(learner: MetaLearner) -> list[Tensor]:
    """The parameters of four axes, as of convolutions, which have a memory format."""
    return [p for p in learner.model.parameters() if p.dim() == 4]


def _load_average() -> float | None:
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # this system has none
        return None


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.nn.utils.get_total_norm(tensors))
