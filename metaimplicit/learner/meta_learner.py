"""`MetaLearner`, the front door for few-shot learning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from metaimplicit.hypergradient import Hypergradient, hypergradient
from metaimplicit.inner import InnerLoop, make_inner
from metaimplicit.learner.buffers import reject_changed_buffers
from metaimplicit.learner.episodes import (
    Episode,
    EpisodeBatch,
    Pair,
    accuracy,
    check_classes,
    check_pair,
)
from metaimplicit.learner.learnable import Learn, LearntNumbers, make_learnable
from metaimplicit.learner.problem import call_model, few_shot_problem, inner_iterates
from metaimplicit.learner.results import AdaptedModel, Step
from metaimplicit.learner.vectorization import choose_vectorize, preserve_random_state
from metaimplicit.learner.wrappers import reject_distributed
from metaimplicit.lifted import LiftedProblem, Vectorize
from metaimplicit.methods import Implicit, Method, make_method
from metaimplicit.normalization import reject_running_statistics
from metaimplicit.params import Adapt, Params, select
from metaimplicit.problem import BilevelProblem
from metaimplicit.unsupported import explain_unsupported
from metaimplicit.vectorization import AutoVectorize, VmapRecords, explain_objection


class MetaLearner(nn.Module):
    """Learns the initialisation φ from which an inner loop adapts a model to a task.

        min_φ mean_tasks loss(model_{θ*}(query))
        with θ* = argmin_θ loss(model_θ(support)) + λ/2 ‖θ − φ‖² (Rajeswaran et al. 2019, eq. 4).

    φ consists of the model's parameters that require grad, and of the numbers in `learn`. With
    λ = 0 and `method="unrolled"`, which are the defaults, this is MAML (Finn et al. 2017).

    Args:
        model: A module that maps inputs `[m, ...]` to outputs `[m, ...]`. Its batch normalisation,
            if any, uses the statistics of the set that it is called with, so it must not track
            running statistics in training mode.
        loss: `(outputs, targets) -> scalar`, such as `torch.nn.functional.cross_entropy`.
        inner: The inner loop, or its flag, such as `"newton-cg"`.
        method: How the meta-gradient is computed, or its flag, such as `"cg"`. An `Implicit` method
            without a curvature gets `"gauss-newton"`, unless its `products` ask for the Hessian.
        proximal: λ ≥ 0. If None, it depends on `method`: 2 for methods that see the initialisation
            only through the inner loss (their `reach` lacks `"start"`), such as all implicit ones,
            and 0 for all others.
        learn: The inner numbers that are learnt as well: `"lr"`, `"proximal"`, or both. They stay
            positive, because their logarithms are the parameters. A mapping gives `"lr"` a
            granularity: `{"lr": "scalar"}` (the default), `"per-tensor"`, or `"per-element"`
            (Meta-SGD).
        adapt: The parameters that adapt: a predicate on their names, a glob pattern, or several
            patterns. The others are learnt but do not adapt. If None, all parameters adapt.
        vectorize: How tasks are batched, `"vmap"` or `"loop"`. With `"auto"`, the first call of
            `backward` times both and keeps the faster. A loop is kept where vmap is impossible, or
            differs from a loop; the two are compared at the first batch of a shape and at a few
            later ones. The report names the reason.
        chunk_size: The number of tasks that are vmapped at a time, to bound memory. If None, all.

    Attributes:
        method: The method, with its curvature.
        inner: The inner loop. If its step size is learnt, it reads it from φ.
        adapted: The names of the parameters that adapt.
        learnt: The logarithms of the numbers in `learn`.
        penalty: The proximal term of the inner loss. None if λ = 0.

    Raises:
        ValueError: An argument is out of range. The model has no parameter that requires grad. The
            method cannot give the gradient of a number in `learn`, or that of the initialisation
            (λ = 0 with an implicit method).

    Example:
        >>> from torch.nn.functional import cross_entropy
        >>> learner = MetaLearner(nn.Linear(2, 3), cross_entropy)  # MAML
        >>> pair = Pair(torch.randn(4, 3, 2), torch.arange(3).expand(4, -1))  # 4 tasks of 3 classes
        >>> step = learner.backward(Episode(support=pair, query=pair))
        >>> step.loss.shape, learner.model.weight.grad.shape
        (torch.Size([]), torch.Size([3, 2]))
        >>> MetaLearner(nn.Linear(2, 3), cross_entropy, method="cg").penalty  # implicit MAML
        Proximal(strength=2.0, center='meta')
    """

    vectorize: AutoVectorize

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        inner: str | InnerLoop = "gradient-descent",
        method: str | Method = "unrolled",
        proximal: float | None = None,
        learn: Learn = (),
        adapt: Adapt = None,
        vectorize: AutoVectorize = "auto",
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        if vectorize not in ("auto", "vmap", "loop"):
            raise ValueError(f"vectorize: got {vectorize!r}, expected 'auto', 'vmap' or 'loop'")
        reject_distributed(model)
        trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trainable:
            raise ValueError(
                "model: got no parameter that requires grad, expected some; "
                "call model.requires_grad_()"
            )
        self.model = model
        self.loss = loss
        self.method = _with_default_curvature(make_method(method))
        self.adapted = select(trainable, adapt)
        self.vectorize = vectorize
        self.chunk_size = chunk_size
        self._vmap_records = VmapRecords() if vectorize == "auto" else None
        self._objection = ""  # why vmap is not used
        self._trainable = set(trainable)
        self._classes: int | None = None  # the width of the model's outputs, once it is needed

        self.inner, self.penalty, logs = make_learnable(
            learn,
            make_inner(inner),
            proximal,
            method=self.method,
            params={name: trainable[name] for name in self.adapted},
        )
        self.learnt = LearntNumbers(logs, taken=dict(model.named_parameters()))

    @property
    def problem(self) -> BilevelProblem:
        """The bilevel problem of one task, for `hypergradient`.

        Its data is an `Episode`, or any pair (support, query) of (inputs, targets) pairs. Its
        meta-parameters are `meta`.
        """
        return few_shot_problem(
            self._call,
            self.loss,
            adapted=self.adapted,
            penalty=self.penalty,
            model=self.model,
        )

    @property
    def meta(self) -> Params:
        """φ by name: the model's parameters that require grad, and the learnt logarithms.

        Raises:
            ValueError: A parameter was frozen or unfrozen since the learner was built.
        """
        params = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        changed = sorted(params.keys() ^ self._trainable)
        if changed:
            raise ValueError(
                f"model: {changed[0]!r} was frozen or unfrozen after the learner was built, "
                "expected the parameters as they were; build a new learner"
            )
        return params | self.learnt.by_name()

    @explain_unsupported()
    def backward(self, episodes: EpisodeBatch) -> Step:
        """Add the meta-gradient of the mean query loss to `.grad`, as `loss.backward()` would.

        Args:
            episodes: A batch of tasks, on the device of the model.

        Returns:
            The loss, the accuracy and the method's report, at the parameters before any step.

        Raises:
            ValueError: The episodes are malformed, have labels out of range, or query classes
                without support. A forward pass changed a buffer of the model. The method cannot
                give the gradient of a parameter.
        """
        data = self._check(episodes)
        with reject_changed_buffers(self.model):
            self._check_vmap(data)
            if self.vectorize == "auto":
                self.vectorize = self._choose_vectorize(data)
            result = self._hypergradient(data, self.vectorize)
        for name, p in self.meta.items():
            if p.requires_grad:
                gradient = result.grads[name]
                p.grad = gradient if p.grad is None else p.grad + gradient
        accuracies = accuracy(result.aux, data.query.targets)
        mean = None if accuracies is None else accuracies.mean()
        report = result.report
        if self._objection:
            report = replace(report, tasks_by=f"loop: {self._objection}")
        return Step(result.outer_loss, mean, report)

    @explain_unsupported()
    def evaluate(
        self, episodes: EpisodeBatch, steps: int | Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The query loss and accuracy of each task along the inner loop.

        Args:
            episodes: A batch of tasks, on the device of the model.
            steps: Measure after 0, 1, …, `steps` inner steps, or after each number of steps of a
                sequence. If None, measure after 0 … T steps, T being those of the inner loop.

        Returns:
            The losses, `[counts, tasks]`, and the accuracies, likewise. The accuracies are None
            for regression. Neither has a graph.

        Raises:
            ValueError: A number of steps is negative, or the episodes are malformed.
        """
        if isinstance(steps, Sequence):
            counts = list(steps)
        else:
            counts = list(range((self.inner.steps if steps is None else steps) + 1))
        if not counts or min(counts) < 0:
            raise ValueError(f"steps: got {steps}, expected at least 0 inner steps")
        data = self._check(episodes)
        iterates = self._iterates(data.support, max(counts))
        lifted = self._lift(data)
        meta = self._detached_meta()

        losses = []
        accuracies = []
        with torch.no_grad():
            for count in counts:
                loss, outputs = lifted.outer(iterates[count], meta, data)
                losses.append(loss)
                correct = accuracy(outputs, data.query.targets)
                if correct is not None:
                    accuracies.append(correct)
        return torch.stack(losses), torch.stack(accuracies) if accuracies else None

    @explain_unsupported()
    def adapt(
        self, support: tuple[Tensor, Tensor], *, steps: int | None = None, batched: bool = False
    ) -> AdaptedModel:
        """Adapt the model to a support set, or to one support set for each task.

        Args:
            support: Inputs and targets, `[m, ...]`, or `[tasks, m, ...]` if `batched`.
            steps: The number of inner steps, ≥ 0. If None, those of the inner loop.
            batched: Whether `support` carries the task axis.

        Returns:
            A callable model. It does not change the learner.

        Raises:
            ValueError: `steps` is negative, or inputs and targets differ in their leading sizes.
        """
        if steps is not None and steps < 0:
            raise ValueError(f"steps: got {steps}, expected at least 0 inner steps")
        pair = Pair(*support)
        if not batched:
            pair = Pair(pair.inputs.unsqueeze(0), pair.targets.unsqueeze(0))
        check_pair("support", pair)
        end = self._iterates(pair, self.inner.steps if steps is None else steps)[-1]
        params = {name: p.detach() for name, p in end.items()}
        if not batched:
            params = {name: p.squeeze(0) for name, p in params.items()}
        return AdaptedModel(self.predict, params, batched=batched)

    @explain_unsupported()
    def predict(self, params: Params, inputs: Tensor, *, batched: bool = False) -> Tensor:
        """The outputs of the model with some parameters replaced by adapted ones.

        Args:
            params: The adapted parameters, `{name: [*shape]}`, or `[tasks, *shape]` if `batched`.
                Parameters that it does not hold are the learner's, as constants.
            inputs: `[m, ...]`, or `[tasks, m, ...]` if `batched`.
            batched: Whether both carry the task axis.

        Returns:
            `[m, ...]`, or `[tasks, m, ...]` if `batched`.
        """
        meta = self._detached_meta()
        if not batched:
            return self._call(params, meta, inputs)
        outputs: Tensor = self._lift(inputs).apply(lambda p, x: self._call(p, meta, x), params)
        return outputs

    def _call(self, params: Params, meta: Params, inputs: Tensor) -> Tensor:
        """The model at `params`, and at `meta` where `params` has no entry."""
        weights = {name: m for name, m in meta.items() if name not in self.learnt.names}
        return call_model(self.model, weights | params, inputs)

    def _detached_meta(self) -> Params:
        return {name: m.detach() for name, m in self.meta.items()}

    def _check(self, episodes: EpisodeBatch) -> Episode:
        """The episodes with named parts; ValueError if something is wrong with them."""
        data = Episode.of(episodes.support, episodes.query)
        reject_running_statistics(self.model)
        check_pair("episodes.support", data.support)
        check_pair("episodes.query", data.query)
        if not data.support.targets.is_floating_point():
            if self._classes is None:
                first_task = data.support.inputs[0]
                with torch.no_grad():
                    outputs = self._call({}, self._detached_meta(), first_task)
                self._classes = outputs.shape[1]
            check_classes(data.support.targets, data.query.targets, self._classes)
        return data

    def _hypergradient(self, data: Episode, vectorize: Vectorize) -> Hypergradient:
        return hypergradient(
            self.problem,
            self.meta,
            data,
            inner=self.inner,
            method=self.method,
            batched=True,
            vectorize=vectorize,
            chunk_size=self.chunk_size,
        )

    def _choose_vectorize(self, data: Episode) -> Vectorize:
        with preserve_random_state(self.method, cuda=data.support.inputs.is_cuda):
            return choose_vectorize(lambda way: self._hypergradient(data, way).outer_loss)

    def _check_vmap(self, data: Episode) -> None:
        """Keep the loop from now on if the choice is free, and vmap is wrong or impossible."""
        if self._vmap_records is None or self.vectorize == "loop":
            return
        if self._vmap_records.next_call(data).is_due:
            self._objection = explain_objection(
                self.problem, self.meta, data, inner=self.inner, method=self.method
            )
        if self._objection:
            self.vectorize = "loop"

    def _lift(self, data: Any) -> LiftedProblem:
        return LiftedProblem(
            self.problem,
            data,
            batched=True,
            vectorize="loop" if self.vectorize == "loop" else "vmap",
            chunk_size=self.chunk_size,
            second_derivatives=self.inner.second_derivatives,
        )

    def _iterates(self, support: Pair, steps: int) -> tuple[Params, ...]:
        """θ_0 … θ_steps, `{name: [tasks, *shape]}`."""
        reject_running_statistics(self.model)
        data = Episode(support, support)
        self._check_vmap(data)
        return inner_iterates(self._lift(data), self.inner, self._detached_meta(), steps)


def _with_default_curvature(method: Method) -> Method:
    # The Hessian of a few-shot support loss is indefinite; Gauss–Newton is semi-definite. But other
    # products than double-backward are an option of the Hessian.
    if not isinstance(method, Implicit) or method.curvature is not None:
        return method
    if method.products != "double-backward":
        return method
    return replace(method, curvature="gauss-newton")
