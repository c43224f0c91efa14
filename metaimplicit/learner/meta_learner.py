"""`MetaLearner`, the front door for few-shot learning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metaimplicit.compiled import Compile
from metaimplicit.functions import check_function
from metaimplicit.hypergradient import Hypergradient, hypergradient
from metaimplicit.inner import InnerLoop
from metaimplicit.learner.buffers import reject_changed_tensors, restored_attributes
from metaimplicit.learner.defaults import with_default_weights
from metaimplicit.learner.episodes import Episode, EpisodeBatch
from metaimplicit.learner.gradient_check import CheckedTaskBatches
from metaimplicit.learner.gradients import accumulate, accumulate_in_data
from metaimplicit.learner.heads import Head
from metaimplicit.learner.learnable import Learn
from metaimplicit.learner.losses import TaskLoss
from metaimplicit.learner.plan import make_plan
from metaimplicit.learner.problem import step_counts
from metaimplicit.learner.results import (
    AdaptedModel,
    Step,
    combine,
    join_reports,
    mean,
    reject_other_shapes,
)
from metaimplicit.learner.targets import Group, Metric
from metaimplicit.learner.threads import one_thread_in
from metaimplicit.learner.vectorization import choose_vectorize, preserve_random_state
from metaimplicit.lifted import Vectorize, check_chunk_size
from metaimplicit.methods import Method
from metaimplicit.params import Adapt
from metaimplicit.unchanged import notice_changed_data
from metaimplicit.unsupported import explain_unsupported
from metaimplicit.vectorization import AutoVectorize, leave_comparison_to_caller
from metaimplicit.wrappers import reject_distributed


class MetaLearner(CheckedTaskBatches):
    """Learns the initialisation φ from which an inner loop adapts a model to a task.

        min_φ mean_tasks loss(model_{θ*}(query))
        with θ* = argmin_θ loss(model_θ(support)) + λ/2 ‖θ − φ‖² (Rajeswaran et al. 2019, eq. 4).

    φ consists of the parameters of the model and of the losses that require grad, and of the
    numbers in `learn`. With λ = 0 and `method="unrolled"`, which are the defaults, this is MAML
    (Finn et al. 2017).

    Args:
        model: A module that maps inputs `[m, ...]` to outputs `[m, ...]`, or with a `head` to
            features `[m, p]`. Its batch normalisation uses the statistics of the set that it is
            called with. Layers that do not adapt may track running statistics: in training they
            see up to 120 images of all tasks at once, and predictions use the running ones.
        loss: `(outputs, targets) -> scalar`, such as `torch.nn.functional.cross_entropy`, or a
            module, whose parameters are learnt.
        query_loss: The loss of the query set. If None, it is `loss`. A convex head has its own loss
            of the support set, so that `loss` is that of the query set.
        metric: `(outputs, targets) -> numbers` of the query set of one task, whose mean is measured
            in place of the accuracy. If None, it is the accuracy for the integers that the loss
            treats as classes.
        head: A linear layer on the features, fitted to each task, of any number of classes:
            `"ridge"`, `"logistic"` or `"hinge"`, which are convex, or `"prototypes"`, which starts
            at the class means. Or a `Head` of `learner.heads`. If None, the model has its own.
        inner: The inner loop, or its flag, such as `"newton-cg"`. If None, gradient descent, or
            that of the head: `Ridge` or `Newton`, which end at its argmin, or no steps.
        method: How the meta-gradient is computed, or its flag, such as `"cg"`. If None,
            `"unrolled"`, or `"auto"` for a convex head, by the factor of its argmin. An `Implicit`
            method without a curvature gets `"gauss-newton"`, unless its `products` ask for the
            Hessian.
            `Unrolled(iterates=True)` takes the mean query loss of all iterates, or weighs them by
            its `weights` (MAML++).
        proximal: λ ≥ 0. If None, it depends on `method`: 2 for methods that see the initialisation
            only through the inner loss (their `reach` lacks `"start"`), such as all implicit ones,
            and 0 for all others.
        learn: The inner numbers that are learnt as well: `"lr"`, `"proximal"`, or both. They stay
            positive, because their logarithms are the parameters. A mapping gives `"lr"` a
            granularity: `{"lr": "scalar"}` (the default), `"per-tensor"`, or `"per-element"`
            (Meta-SGD). If the inner loop has several step sizes, each of them is learnt. A convex
            head has `"lambda"`, `"temperature"` and `"scale"`, prototypes have `"temperature"`.
        adapt: The parameters that adapt: a predicate on their names, a glob pattern, or several
            patterns. The others are learnt but do not adapt. If None, all parameters adapt, but
            with a convex head or without steps the head alone, `"head.*"`. Where one module adapts
            alone, behind all others, these run once; `Report.features` says so, or why not.
        vectorize: How tasks are batched, `"vmap"` or `"loop"`. With `"auto"`, the first call of
            `backward` times both and keeps the faster. A loop is kept where vmap is impossible, or
            differs from a loop; the two are compared at the first batch of a shape and at a few
            later ones. The report names the reason.
        chunk_size: The number of tasks that are vmapped at a time, to bound memory. If None, all.
        compile: Whether the functions of a meta-step are compiled, as for `hypergradient`. If not
            False, vmap is not timed against a loop.

    Attributes:
        method: The method, with its curvature.
        inner: The inner loop. If its step size is learnt, it reads it from φ.
        loss: The loss of the support set.
        query_loss: The loss of the query set, or None.
        metric: As given.
        head: The head. None if the model has its own.
        adapted: The names of the model's parameters that adapt.
        learnt: The logarithms of the numbers in `learn`.
        penalty: The proximal term of the inner loss. None if λ = 0.
        vectorize: As given. After the first call of `backward`, what that has chosen.
        chunk_size: As given.
        compiles: `compile`, as given.

        `adapted`, `head` and `learnt` are settled when the learner is built. All others may be
        changed between two calls.

    Raises:
        ValueError: An argument is out of range. The model has no parameter that requires grad. The
            method cannot give the gradient of a number in `learn`, or that of the initialisation
            (λ = 0 with an implicit method).

    Example:
        >>> from torch.nn.functional import cross_entropy
        >>> learner = MetaLearner(nn.Linear(2, 3), cross_entropy)  # MAML
        >>> pair = (torch.randn(4, 3, 2), torch.arange(3).expand(4, -1))  # 4 tasks of 3 classes
        >>> step = learner.backward({"support": pair, "query": pair})
        >>> step.loss.shape, learner.model.weight.grad.shape
        (torch.Size([]), torch.Size([3, 2]))
        >>> MetaLearner(nn.Linear(2, 3), cross_entropy, method="cg").penalty  # implicit MAML
        Proximal(strength=2.0, center='meta')
        >>> learner = MetaLearner(nn.Linear(2, 8), cross_entropy, head="ridge", learn=["lambda"])
        >>> learner.backward({"support": pair, "query": pair}).report.chosen
        'Factored: the inner loop left its inverse'
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        model: nn.Module,
        loss: TaskLoss,
        *,
        query_loss: TaskLoss | None = None,
        metric: Metric | None = None,
        head: str | Head | None = None,
        inner: str | InnerLoop | None = None,
        method: str | Method | None = None,
        proximal: float | None = None,
        learn: Learn = (),
        adapt: Adapt = None,
        vectorize: AutoVectorize = "auto",
        chunk_size: int | None = None,
        compile: Compile = False,
    ) -> None:
        if vectorize not in ("auto", "vmap", "loop"):
            raise ValueError(f"vectorize: got {vectorize!r}, expected 'auto', 'vmap' or 'loop'")
        check_chunk_size(chunk_size)
        reject_distributed(model)
        check_function("loss", loss, "(outputs, targets) -> scalar")
        if query_loss is not None:
            check_function("query_loss", query_loss, "(outputs, targets) -> scalar")
        if metric is not None:
            check_function("metric", metric, "(outputs, targets) -> numbers")
        plan = make_plan(
            model,
            head=head,
            inner=inner,
            method=method,
            proximal=proximal,
            learn=learn,
            adapt=adapt,
            query_loss=query_loss,
        )
        super().__init__(
            model,
            loss,
            query_loss,
            metric=metric,
            plan=plan,
            vectorize=vectorize,
            chunk_size=chunk_size,
        )
        self.compiles = compile

    @explain_unsupported()
    def backward(self, episodes: EpisodeBatch) -> Step:
        """Add the meta-gradient of the mean query loss to `.grad`.

        Hooks of the parameters are called with it. A parameter that nothing reads has a gradient of
        zero. Tensors of the episodes that require grad have one, too.

        Args:
            episodes: A batch of tasks, on the device of the model: an object with `support` and
                `query`, a dict with these keys or "train" and "test", a pair `(support, query)`,
                or a list of tasks. Each set is a pair `(inputs, targets)` of pytrees of tensors
                `[tasks, m, ...]`, or of lists with one entry for each task. Tasks of different
                sizes are computed one after another.

        Returns:
            The loss, the accuracy and the method's report, at the parameters before any step.

        Raises:
            ValueError: The episodes are malformed, or the loss refuses their targets. A forward
                pass changed a buffer or a parameter of the model or of a loss. The method cannot
                give the gradient of a parameter.

        Warns:
            RuntimeWarning: The meta-gradient is not finite, or too large to mean anything.
        """
        with torch.inference_mode(False), one_thread_in(self.model):
            groups = self._read(episodes)
            with (
                restored_attributes(self),
                notice_changed_data("episodes", groups),
                reject_changed_tensors(self, but_tracked=self._mixes_tasks),
            ):
                self._choose_vectorize(groups[0])
                results = [self._hypergradient(group.data, self._way(group)) for group in groups]
            measured = [self._measure(g, r.aux) for g, r in zip(groups, results, strict=True)]

            # There is one group, or each of them is one task.
            gradients = {name: mean([r.grads[name] for r in results]) for name in results[0].grads}
            accumulate(self.meta, gradients)
            for group, result in zip(groups, results, strict=True):
                accumulate_in_data(group.data, result.data_grads, weight=1 / len(groups))

        accuracies = combine(measured, torch.cat)
        report = join_reports([result.report for result in results])
        report = replace(report, features=self._features)
        if self._objection:
            report = replace(report, tasks_by=f"loop: {self._objection}")
        return Step(
            loss=mean([result.outer_loss for result in results]),
            accuracy=None if accuracies is None else accuracies.mean(),
            report=report,
        )

    @explain_unsupported()
    def evaluate(
        self, episodes: EpisodeBatch, steps: int | Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The query loss and accuracy of each task along the inner loop.

        Args:
            episodes: A batch of tasks, as for `backward`.
            steps: Measure after 0, 1, …, `steps` inner steps, or after each number of steps of a
                sequence. If None, measure after 0 … T steps, T being those of the inner loop. A
                loop that keeps no iterates (`LBFGS`) is measured at 0 and at the last number.

        Returns:
            The losses, `[counts, tasks]`, and the accuracies, or the `metric`, likewise. The
            accuracies are None if the loss treats no targets as classes. Neither has a graph.

        Raises:
            ValueError: A number of steps is negative, or the episodes are malformed. A forward pass
                changed a buffer or a parameter of the model or of a loss.
        """
        counts = step_counts(steps, self.inner)
        with torch.inference_mode(False), one_thread_in(self.model):
            groups = self._read(episodes)
            with (
                restored_attributes(self),
                notice_changed_data("episodes", groups),
                reject_changed_tensors(self),
            ):
                of_groups = [self._measure_path(group, counts) for group in groups]
        losses, measures = zip(*of_groups, strict=True)
        return torch.cat(losses, dim=1), combine(measures, partial(torch.cat, dim=1))

    @explain_unsupported()
    def adapt(
        self, support: Any, *, steps: int | None = None, batched: bool = False
    ) -> AdaptedModel:
        """Adapt the model to a support set, or to one support set for each task.

        Args:
            support: Inputs and targets, `[m, ...]`, or `[tasks, m, ...]` if `batched`, in any form
                that a set of `backward` has.
            steps: The number of inner steps, ≥ 0. If None, those of the inner loop.
            batched: Whether `support` carries the task axis.

        Returns:
            A callable model. It does not change the learner.

        Raises:
            ValueError: `steps` is negative, inputs and targets differ in their leading sizes, the
                loss refuses the targets, or a forward pass changed a buffer or a parameter.
        """
        if steps is not None and steps < 0:
            raise ValueError(f"steps: got {steps}, expected at least 0 inner steps")
        count = self.inner.steps if steps is None else step_counts([steps], self.inner)[0]
        with torch.inference_mode(False), one_thread_in(self.model):
            groups = self._read_support(support, batched=batched)
            with (
                restored_attributes(self),
                notice_changed_data("support", groups),
                reject_changed_tensors(self),
            ):
                ends = [self._iterates(self._lifted(group), [count])[0] for group in groups]
            reject_other_shapes(ends)
            params = {name: torch.cat([end[name].detach() for end in ends]) for name in ends[0]}
        if not batched:
            params = {name: p.squeeze(0) for name, p in params.items()}
        return AdaptedModel(self.predict, params, batched=batched)

    def _hypergradient(self, data: Episode, vectorize: Vectorize) -> Hypergradient:
        problem = self._problem(self._network, vectorize)
        leave_comparison_to_caller(problem)
        return hypergradient(
            problem,
            self.meta,
            data,
            inner=self.inner,
            method=with_default_weights(self.method, self.inner.steps),
            batched=True,
            vectorize=vectorize,
            chunk_size=self.chunk_size,
            compile=self.compiles,
        )

    def _choose_vectorize(self, group: Group) -> None:
        if group.looped:
            return
        self._check_vmap(group.data)
        if self.vectorize != "auto":
            return
        # More calls would move the running statistics, and no loop is compiled.
        if self._mixes_tasks or self.compiles is not False:
            self.vectorize = "vmap"
            return
        cuda = next(iter(self.meta.values())).is_cuda
        with preserve_random_state(self.method, cuda=cuda):
            self.vectorize = choose_vectorize(
                lambda way: self._hypergradient(group.data, way).outer_loss
            )
