"""Hyperparameters as outer variables: K inner steps, one hypergradient step, and on from there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from metaimplicit.hypergradient import hypergradient
from metaimplicit.inner import InnerLoop
from metaimplicit.iterate import Iterate
from metaimplicit.methods import Implicit, Method, Report, make_method
from metaimplicit.methods.base import UNSET
from metaimplicit.params import Params
from metaimplicit.problem import BilevelProblem, Composite, Stream
from metaimplicit.solvers import SolverState
from metaimplicit.tuning.domains import Domain, FreeMeta, norm

Source = Callable[[int], Any] | Iterable[Any]  # of batches: pure in their number, or a loader
Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class TunerStep:
    """What one outer step did.

    Attributes:
        outer_loss: g(θ_T, φ) on the validation batch, before φ moved.
        norm: ‖dg/dφ‖ in the free coordinates.
        report: of the inner loop and the solve.
        applied: False where the hypergradient was not finite and the step was skipped.
        metric: what `fit` measured after it, if it was due.
    """

    outer_loss: float
    norm: float
    report: Report
    applied: bool
    metric: float | None = None


class Tuner:
    """Alternate K steps of the inner loop with one hypergradient step in φ.

    θ and the inner optimiser's state go on from outer step to outer step, and so does the solver (its solution, sketch
    or Ritz vectors): K = 1 with `soba` is the single loop of Dagréou et al. (2022), with `sama` that of Choe et al.
    (2023), with `real-time` that of Franceschi et al. (2017); K large and `warm_start=False` is the double loop.

    Args:
        problem: its inner loss is given training batches, its outer loss validation batches, as data.
        meta: φ, `{name: tensor}`, the values to start from.
        inner: the inner loop; its `steps` are K.
        method: how the hypergradient is taken, a `Method` or its flag. An implicit method takes its
            curvature from a training batch of its own, Gauss–Newton unless said where the inner loss is a network's.
        optimizer: the outer one, given the free coordinates of φ: `partial(torch.optim.SGD, lr=1.0, momentum=0.9)`.
        domains: where entries of `meta` may lie; any real number unless said.
        warm_start: go on from the last θ; False, start at `problem.init` every time.
        schedule: outer step -> factor on the inner step size, which must be a number of the inner loop then.
        on_nonfinite: "raise" FloatingPointError, or "skip" the outer step, where a hypergradient has a NaN or an Inf.
            Either way it is never applied, and the next step starts from the θ before it.

    Raises:
        ValueError: a hyperparameter outside its domain, a domain of none; whatever `hypergradient` refuses.
    """

    def __init__(
        self,
        problem: BilevelProblem,
        meta: Params,
        *,
        inner: InnerLoop,
        method: str | Method = "cg",
        optimizer: Optimizer = lambda free: torch.optim.Adam(free, lr=0.01),
        domains: Mapping[str, Domain] | None = None,
        warm_start: bool = True,
        schedule: Callable[[int], float] | None = None,
        on_nonfinite: Literal["raise", "skip"] = "raise",
    ) -> None:
        if on_nonfinite not in ("raise", "skip"):
            raise ValueError(f"on_nonfinite: got {on_nonfinite!r}, expected 'raise' or 'skip'")
        if schedule is not None and not isinstance(getattr(inner, "lr", None), (float, int)):
            raise ValueError(
                f"schedule: got one for {inner}, expected an inner loop whose lr is a number"
            )
        self.problem, self.inner, self.method = (
            problem,
            inner,
            _on_network(make_method(method), problem),
        )
        self.warm_start, self.schedule, self.on_nonfinite = warm_start, schedule, on_nonfinite
        self._free = FreeMeta(meta, domains)
        self.optimizer = optimizer(list(self._free.tensors.values()))
        self.end: Iterate | None = None
        self.state = SolverState()
        self.steps = 0
        self._best, self._waited = math.inf, 0  # of early stopping, as is what it goes back to
        self._kept: dict[str, Any] = {}

    @property
    def meta(self) -> Params:
        """φ as it stands, detached."""
        return self._free.values()

    @property
    def params(self) -> Params:
        """θ as the last step left it, `{name: [*shape]}`; ValueError before the first."""
        if self.end is None:
            raise ValueError("params: there are none before the first step")
        return self.end.single

    def step(self, train: Any, validation: Any) -> TunerStep:
        """K inner steps and one outer step.

        Args:
            train: a list of K + 1 batches, one for each inner step and one for the curvature; anything else serves all.
            validation: the batch of the outer loss.

        Raises:
            FloatingPointError: a hypergradient with a NaN or an Inf, under "raise".
            ValueError: too few batches.
        """
        k = self.inner.steps
        if isinstance(train, list) and len(train) != k + 1:
            raise ValueError(
                f"train: got a list of {len(train)} batches, expected {k + 1}, one more than inner steps"
            )
        batches = train if isinstance(train, list) else [train] * (k + 1)
        inner = self.inner
        if self.schedule is not None:
            inner = inner.updated(lr=inner.lr * self.schedule(self.steps))  # type: ignore[attr-defined]
        found = hypergradient(
            self.problem,
            self.meta,
            Stream(lambda t: batches[t] if t < k else validation),
            inner=inner,
            method=_on(self.method, batches[k]),
            state=self.state,
            start=self.end if self.warm_start else None,
        )
        slopes = self._free.pull_back(found.grads)
        length = norm(slopes)
        finite = math.isfinite(length) and math.isfinite(found.outer_loss.item())
        if finite:
            for name, free in self._free.tensors.items():
                free.grad = slopes[name]
            self.optimizer.step()
            self._free.project()
            self.end, self.state = found.end, found.report.state
        elif self.on_nonfinite == "raise":
            raise FloatingPointError(
                f"outer step {self.steps}: got a hypergradient of norm {length} at outer loss {found.outer_loss}, "
                "expected finite numbers; nothing was changed. Lower a step size, or use on_nonfinite='skip'"
            )
        self.steps += 1
        return TunerStep(found.outer_loss.item(), length, found.report, finite)

    def fit(
        self,
        train: Source,
        validation: Source,
        *,
        steps: int,
        metric: Callable[[Params, Params], float] | None = None,
        every: int = 1,
        patience: int | None = None,
        callback: Callable[[TunerStep], None] | None = None,
    ) -> float | None:
        """Take outer steps until there are `steps` of them, over all calls.

        Args:
            train: batches of training data, K + 1 of them an outer step: a function of their number, which resumes
                exactly, or any iterable (a loader), which is begun again when it ends.
            validation: the same for the outer loss, one an outer step.
            steps: the outer steps to come to.
            metric: `(params, meta) -> float`, lower is better, on data that neither loss has seen.
            every: outer steps between its measurements.
            patience: stop when so many measurements in turn have not improved on the best; φ and θ go back to it.
            callback: called after every step and its measurement.

        Returns:
            The best measurement of all calls, or None without a metric.
        """
        if patience is not None and metric is None:
            raise ValueError(f"patience: got {patience} without a metric, expected both or neither")
        for name, number in {"every": every, "patience": patience}.items():
            if number is not None and number < 1:
                raise ValueError(f"{name}: got {number}, expected at least 1")
        first, k = self.steps, self.inner.steps
        draw, judge = _reader(train, first * (k + 1)), _reader(validation, first)
        while self.steps < steps and not (patience is not None and self._waited >= patience):
            result = self.step([next(draw) for _ in range(k + 1)], next(judge))
            if metric is not None and self.steps % every == 0 and self.end is not None:
                result = replace(result, metric=self._measure(metric))
            if callback is not None:
                callback(result)
        if patience is not None and self._kept:
            self._load(self._kept)
        return None if metric is None else self._best

    def _measure(self, metric: Callable[[Params, Params], float]) -> float:
        value = metric(self.params, self.meta)
        self._waited += 1
        if value < self._best:
            self._best, self._waited, self._kept = value, 0, self._dump()
        return value

    def state_dict(self) -> dict[str, Any]:
        """φ, θ, both optimisers and the solver: all that a run needs to go on to the same bits, but the batches, and
        torch's random state, from which a sketch without a `generator` is drawn.
        """
        stopping = {"best": self._best, "waited": self._waited, "kept": self._kept}
        return self._dump() | {"steps": self.steps, "stopping": stopping}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where `state_dict` was taken; ValueError where it is another problem's."""
        self._load(state)
        self.steps, stopping = state["steps"], state["stopping"]
        self._best, self._waited, self._kept = (
            stopping["best"],
            stopping["waited"],
            stopping["kept"],
        )

    def _dump(self) -> dict[str, Any]:
        state = {
            "free": {name: free.detach() for name, free in self._free.tensors.items()},
            "optimizer": self.optimizer.state_dict(),
            "end": None if self.end is None else self.end.to_dict(),
            "state": self.state.to_dict(),
        }
        return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, state)  # type: ignore[no-any-return]

    def _load(self, state: dict[str, Any]) -> None:
        self._free.load(state["free"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.end = None if state["end"] is None else Iterate.from_dict(state["end"])
        self.state = SolverState.from_dict(state["state"])


def _on_network(method: Method, problem: BilevelProblem) -> Method:
    """Gauss–Newton for a network's loss, whose Hessian is indefinite."""
    f = problem.inner_loss
    network = isinstance(f, Composite) and f.module is not None
    free = (
        isinstance(method, Implicit)
        and method.curvature is None
        and method.products == "double-backward"
    )
    return replace(method, curvature="gauss-newton") if network and free else method  # type: ignore[type-var]


def _on(method: Method, batch: Any) -> Method:
    """The method with its curvature on a training batch, where it has one and none was named."""
    takes = any(f.name == "batch" for f in fields(method))  # type: ignore[arg-type]
    return replace(method, batch=batch) if takes and method.batch is UNSET else method  # type: ignore[attr-defined,type-var]


def _reader(source: Source, first: int) -> Iterator[Any]:
    if callable(source):
        while True:
            yield source(first)
            first += 1
    empty = True
    while True:
        for batch in source:
            empty = False
            yield batch
        if empty:
            raise ValueError(
                "batches: got an iterable without any, or one that is used up, expected a loader"
            )
        empty = True
