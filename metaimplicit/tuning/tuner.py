"""Hyperparameters that are tuned while the model trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from metaimplicit.buffers import load_buffers, stored_buffers
from metaimplicit.counts import check_count
from metaimplicit.functions import needs_closure
from metaimplicit.hypergradient import Hypergradient, hypergradient
from metaimplicit.inner import InnerLoop, make_inner
from metaimplicit.iterate import Iterate
from metaimplicit.lifted import SeveralOutputsError
from metaimplicit.methods import Method, make_method
from metaimplicit.optimizer_state import load_optimizer_state, optimizer_state
from metaimplicit.params import Params
from metaimplicit.problem import BilevelProblem, Stream, check_problem
from metaimplicit.solvers import SolverState
from metaimplicit.tensors import copied_tensors
from metaimplicit.tuning.batches import (
    Source,
    check_source,
    holds_tensors_directly,
    read_batches,
    take_batches,
)
from metaimplicit.tuning.curvature import bind_curvature_batch, default_to_gauss_newton
from metaimplicit.tuning.domains import Domain
from metaimplicit.tuning.early_stopping import EarlyStopping
from metaimplicit.tuning.free_meta import FreeMeta, total_norm
from metaimplicit.tuning.problem import ModelProblem
from metaimplicit.tuning.results import TunerStep
from metaimplicit.tuning.stored_end import check_optimizer, model_of, read_buffers, read_end
from metaimplicit.unchanged import notice_changed_data
from metaimplicit.wrappers import AVERAGE_HYPERGRADIENTS, reject_distributed

Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]
Metric = Callable[[Params, Params], float]


class Tuner:
    """Alternates K steps of the inner loop with one hypergradient step in φ.

    Each outer step continues from the last θ, with the inner optimiser's state, and warm-starts the
    solver with its last solution, sketch or Ritz vectors. With K = 1 this is the single loop of
    Dagréou et al. (2022) for `"soba"`, of Choe et al. (2023) for `"sama"`, and of Franceschi et al.
    (2017) for `"real-time"`. A large K with `warm_start=False` is the double loop.

    Args:
        problem: Its inner loss receives training batches, its outer loss validation batches.
        meta: φ to start from, `{name: tensor}`.
        inner: The inner loop, or its flag. Its `steps` are K.
        method: How the hypergradient is taken, a `Method` or its flag. If it is implicit and names
            no batch, it takes its curvature on an additional training batch. If it names no
            curvature and the inner loss is that of a network, it uses Gauss–Newton, or the Hessian
            where the loss takes several outputs of the model. The report names the curvature.
        optimizer: Makes the outer optimiser from the list of free coordinates of φ, such as
            `partial(torch.optim.SGD, lr=1.0, momentum=0.9)`.
        domains: The domain of each entry of `meta`, by name. An entry without one is `Real`.
        warm_start: If False, θ starts every outer step at `problem.init`.
        schedule: Maps the number of the outer step to a factor of the inner step size `inner.lr`,
            which must be a number.
        on_nonfinite: What to do about a hypergradient with a NaN or an Inf, which is never applied:
            `"raise"` FloatingPointError, or `"skip"` the outer step. Both keep θ and the buffers of
            the model as they were before it.

    Attributes:
        optimizer: The outer optimiser.
        end: Where the last inner loop ended. None before the first step.
        state: Where the last solve ended.
        steps: The number of outer steps, skipped ones included.
        stopping: The best measurement of `fit`, over all calls.

    Raises:
        ValueError: An option or a value is out of range, a domain names no entry of `meta`, no
            entry is a floating-point tensor, the inner loop takes no stream of batches, the
            optimiser needs a closure, or the model is wrapped in DistributedDataParallel.

    Example:
        The argmin of f = (w − φ)² is w = φ, so g = (w − 1)² is minimal at φ = 1.

        >>> from metaimplicit.inner import GradientDescent
        >>> problem = BilevelProblem(
        ...     init=lambda meta, data: {"w": torch.zeros(())},
        ...     inner_loss=lambda params, meta, data: (params["w"] - meta["phi"]).square(),
        ...     outer_loss=lambda params, meta, data: (params["w"] - data).square(),
        ... )
        >>> tuner = Tuner(
        ...     problem,
        ...     {"phi": torch.tensor(0.0)},
        ...     inner=GradientDescent(steps=5, lr=0.3),
        ...     optimizer=lambda free: torch.optim.SGD(free, lr=0.1),
        ... )
        >>> steps = [tuner.step(None, torch.tensor(1.0)) for _ in range(50)]
        >>> round(tuner.meta["phi"].item(), 3)
        1.0
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        problem: BilevelProblem,
        meta: Params,
        *,
        inner: str | InnerLoop,
        method: str | Method = "cg",
        optimizer: Optimizer = lambda free: torch.optim.Adam(free, lr=0.01),
        domains: Mapping[str, Domain] | None = None,
        warm_start: bool = True,
        schedule: Callable[[int], float] | None = None,
        on_nonfinite: Literal["raise", "skip"] = "raise",
    ) -> None:
        check_problem(problem)
        if on_nonfinite not in ("raise", "skip"):
            raise ValueError(f"on_nonfinite: got {on_nonfinite!r}, expected 'raise' or 'skip'")
        self.end: Iterate | None = None
        self.inner = inner
        if schedule is not None:
            _step_size(self.inner)  # raises unless it is a number
        self._model = model_of(problem)
        reject_distributed(self._model, AVERAGE_HYPERGRADIENTS)
        self.problem = problem
        self.method = method
        self.warm_start = warm_start
        self.schedule = schedule
        self.on_nonfinite = on_nonfinite
        self._free = FreeMeta(meta, domains).require_coordinates()
        if not callable(optimizer):
            raise ValueError(
                f"optimizer: got {type(optimizer).__name__}, expected a function of the "
                "coordinates of φ, such as partial(torch.optim.Adam, lr=0.01)"
            )
        self.optimizer = optimizer(list(self._free.tensors.values()))
        if needs_closure(self.optimizer):
            raise ValueError(
                f"optimizer: got {type(self.optimizer).__name__}, which evaluates the outer loss "
                "several times a step, expected one that steps by a gradient, such as "
                "torch.optim.Adam; HOAG searches along a line"
            )
        self.state = SolverState()
        self.steps = 0
        self.stopping = EarlyStopping()

    @property
    def meta(self) -> Params:
        """φ at present, detached."""
        return self._free.values()

    @property
    def params(self) -> Params:
        """A copy of θ after the last step, `{name: [*shape]}`.

        Raises:
            ValueError: No step has been taken.
        """
        if self.end is None:
            raise ValueError("params: there are none before the first step")
        return self.end.single

    @torch.inference_mode(False)
    def step(self, train: Any, validation: Any) -> TunerStep:
        """Take K inner steps and one outer step.

        Args:
            train: A list of K + 1 batches, one for each inner step and one for the curvature.
                Anything but a list is a batch that serves them all, and so is a list of tensors,
                `[inputs, targets]`, if the problem is one of `tuning_problem`.
            validation: The batch of the outer loss.

        Raises:
            FloatingPointError: The outer loss or the hypergradient is not finite, under `"raise"`.
            ValueError: `train` is a list of another length; or see `hypergradient`.
        """
        k = self.inner.steps
        is_one = isinstance(self.problem, ModelProblem) and holds_tensors_directly(train)
        batches = [train] * (k + 1) if is_one or not isinstance(train, list) else train
        if len(batches) != k + 1:
            raise ValueError(
                f"train: got a list of {len(batches)} batches, expected {k + 1}, one more than "
                "inner steps; a batch that serves them all is a tuple or a mapping"
            )
        inner = self.inner
        if self.schedule is not None:
            inner = inner.updated(lr=_step_size(inner) * self.schedule(self.steps))

        def evaluate() -> Hypergradient:
            return hypergradient(
                self.problem,
                self.meta,
                Stream(lambda t: batches[t] if t < k else validation),
                inner=inner,
                method=bind_curvature_batch(self.method, batches[k]),
                state=self.state,
                start=self.end if self.warm_start else None,
            )

        buffers = copied_tensors(dict(self._model.named_buffers()))
        with notice_changed_data("train", self._read_again(batches, validation)):
            try:
                result = evaluate()
            except SeveralOutputsError:
                if self.method is self._method_as_given:
                    raise
                self._method = self._method_as_given  # takes the Hessian
                result = evaluate()
        loss = result.outer_loss.item()
        gradients = self._free.pull_back(result.grads)
        norm = total_norm(gradients)

        finite = math.isfinite(norm + loss)
        if finite:
            for name, free in self._free.tensors.items():
                free.grad = gradients[name]
            self.optimizer.step()
            self._free.project()
            self.end = result.end
            self.state = result.report.state
        else:
            load_buffers(self._model, buffers)
            if self.on_nonfinite == "raise":
                raise FloatingPointError(
                    f"outer step {self.steps}: got a hypergradient of norm {norm} at outer loss "
                    f"{loss}, expected finite numbers; nothing was changed. Lower a step size, or "
                    "use on_nonfinite='skip'"
                )
        self.steps += 1
        return TunerStep(outer_loss=loss, norm=norm, report=result.report, applied=finite)

    def fit(
        self,
        train: Source,
        validation: Source,
        *,
        steps: int,
        metric: Metric | None = None,
        every: int = 1,
        patience: int | None = None,
        callback: Callable[[TunerStep], None] | None = None,
    ) -> float | None:
        """Take outer steps until there are `steps` of them, counted over all calls.

        Args:
            train: Training batches, K + 1 for each outer step: a loader, or a function of a batch's
                number, with which a resumed run is exact. See `read_batches`.
            validation: Validation batches in the same form, one for each outer step.
            steps: The number of outer steps at which to stop.
            metric: `(params, meta) -> float`, of which lower is better, on data that neither loss
                has seen.
            every: The metric is measured when the number of outer steps is divisible by `every`.
            patience: Stop after this many measurements in a row without a new best. Then, or when
                the steps are done, φ and θ return to the best measurement.
            callback: Called after every step, and after its measurement.

        Returns:
            The best measurement of all calls, infinite if there was none. None without a metric.

        Raises:
            ValueError: `patience` without a metric, a number below 1, a loader without batches, or
                one batch in the place of a loader.
        """
        if patience is not None and metric is None:
            raise ValueError(f"patience: got {patience} without a metric, expected both or neither")
        for name, number in {"every": every, "patience": patience}.items():
            if number is not None:
                check_count(name, number)
        check_source("train", train)
        check_source("validation", validation)
        per_step = self.inner.steps + 1
        train_batches = read_batches(train, first=self.steps * per_step)
        validation_batches = read_batches(validation, first=self.steps)

        while self.steps < steps and not self.stopping.is_over(patience):
            batches = take_batches(train_batches, per_step)
            result = self.step(batches, next(validation_batches))
            if metric is not None and self.steps % every == 0 and self.end is not None:
                value = _read_metric(metric(self.params, self.meta))
                self.stopping.update(value, self._position)
                result = replace(result, metric=value)
            if callback is not None:
                callback(result)
        if patience is not None and self.stopping.snapshot:
            self._return_to(self.stopping.snapshot)
        return None if metric is None else self.stopping.best

    @property
    def inner(self) -> InnerLoop:
        """The inner loop. One that is set, or its flag, must take a batch for each step.

        If its optimiser is another one, it continues from θ, and its state starts empty.
        """
        return self._inner

    @inner.setter
    def inner(self, inner: str | InnerLoop) -> None:
        made = make_inner(inner)
        if made.exact:
            raise ValueError(
                f"inner: got {type(made).__name__}, which takes one batch for all its steps, "
                "expected a loop of steps, each of which has its own batch, such as "
                "GradientDescent; or call hypergradient with a method for this loop"
            )
        self._inner = made
        if self.end is not None:
            self.end = self.end.for_optimizer(made.optimizer_name)

    @property
    def method(self) -> Method:
        """The method. One that is set gets the curvature that the constructor gives."""
        return self._method

    @method.setter
    def method(self, method: str | Method) -> None:
        self._method_as_given = make_method(method)
        self._method = default_to_gauss_newton(self._method_as_given, self.problem)

    def state_dict(self) -> dict[str, Any]:
        """All that a run needs to resume to the same bits.

        These are φ, θ, the buffers of the model, both optimisers and the solver. Batches are not
        among them, nor are the states of random generators, from which sketches are drawn: neither
        torch's own nor that of a solver's `generator`. `training.save_tuner` holds both.
        """
        return self._position() | {"steps": self.steps, "stopping": self.stopping.to_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to where `state_dict` was taken. θ goes to the device of the model.

        Raises:
            ValueError: The state has hyperparameters of other names or shapes, parameters or
                buffers other than those of the model, or is that of another inner or outer
                optimiser. Nothing changes.
        """
        end = state["end"]
        check_optimizer(None if end is None else Iterate.from_dict(end), self.inner)
        self._return_to(state)
        self.steps = state["steps"]
        self.stopping = EarlyStopping.from_dict(state["stopping"])

    def _read_again(self, batches: list[Any], validation: Any) -> Any:
        """The batches that are evaluated more than once. Of K + 1 different ones, few are."""
        rereads = self.method.rereads
        if rereads == "all":
            return [*batches, validation]
        if len({id(batch) for batch in batches}) == 1:
            return batches[0]
        return batches[-1] if rereads == "last" else None

    def _position(self) -> dict[str, Any]:
        """A copy of φ, θ, the buffers of the model, both optimisers and the solver."""
        position = {
            "free": {name: free.detach() for name, free in self._free.tensors.items()},
            "optimizer": optimizer_state(self.optimizer),
            "end": None if self.end is None else self.end.to_dict(),
            "state": self.state.to_dict(),
            "buffers": stored_buffers(self._model),
        }
        return copied_tensors(position)

    @torch.inference_mode(False)
    def _return_to(self, position: dict[str, Any]) -> None:
        # Optimisers of torch change in place the state that they have loaded.
        position = copied_tensors(position)
        self._free.check(position["free"])
        end = read_end(position["end"], self.problem, self.meta)
        state = SolverState.from_dict(position["state"])
        buffers = read_buffers(position.get("buffers"), self._model)
        load_optimizer_state(self.optimizer, position["optimizer"])
        self._free.load(position["free"])
        self.end = None if end is None else end.for_optimizer(self.inner.optimizer_name)
        self.state = state
        load_buffers(self._model, buffers)


def _step_size(inner: InnerLoop) -> float:
    lr = getattr(inner, "lr", None)
    if isinstance(lr, (float, int)):
        return lr
    raise ValueError(f"schedule: got one for {inner}, expected an inner loop whose lr is a number")


def _read_metric(value: Any) -> float:
    """What a metric returned, as a number that a checkpoint can hold."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"metric: got {type(value).__name__}, expected one number, of which lower is better"
        ) from error
