"""Batches of tasks on their way through a few-shot model: read, checked, adapted to, measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metaimplicit.learner.batch_checks import BatchChecks
from metaimplicit.learner.body import LastModule, find_last_module
from metaimplicit.learner.body_check import body_objection
from metaimplicit.learner.buffers import reject_changed_tensors
from metaimplicit.learner.episodes import Episode, EpisodeBatch
from metaimplicit.learner.few_shot_model import FewShotModel
from metaimplicit.learner.forms import may_be_batches, read_episodes, read_support
from metaimplicit.learner.head_targets import split_by_classes
from metaimplicit.learner.heads import Head
from metaimplicit.learner.losses import TaskLoss
from metaimplicit.learner.network import Network
from metaimplicit.learner.plan import Plan
from metaimplicit.learner.problem import inner_iterates
from metaimplicit.learner.results import combine
from metaimplicit.learner.targets import Group, Metric, measure
from metaimplicit.lifted import LiftedProblem, Vectorize
from metaimplicit.methods import Implicit, Method
from metaimplicit.normalization import (
    is_transductive,
    reject_running_statistics,
    running_statistics,
)
from metaimplicit.operators import find_curvature
from metaimplicit.params import Params, detached, floating_entry
from metaimplicit.random_state import restored_host_state, restored_random_state
from metaimplicit.task_axis import task_of
from metaimplicit.unsupported import shorten
from metaimplicit.vectorization import VmapRecords, explain_objection


class TaskBatches(FewShotModel):
    """A few-shot model that adapts to batches of tasks, without a gradient of φ.

    Args:
        model: The model.
        loss: The loss of the support set.
        query_loss: The loss of the query set. If None, it is `loss`.
        metric: As for `MetaLearner`.
        plan: What adapts, and how.
        vectorize: How tasks are batched. With `"auto"`, the choice is open, and vmap is tried.
        chunk_size: The number of tasks that are vmapped at a time. If None, all.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: TaskLoss,
        query_loss: TaskLoss | None,
        *,
        metric: Metric | None,
        plan: Plan,
        vectorize: Vectorize | Literal["auto"],
        chunk_size: int | None,
    ) -> None:
        super().__init__(
            model,
            loss,
            query_loss,
            plan=plan,
            vectorize=vectorize,
            chunk_size=chunk_size,
        )
        self.metric = metric
        self._vmap_records = VmapRecords()
        self._keeps_vmap = vectorize == "vmap"
        self._objection = ""  # why vmap is not used
        self._features = ""  # as in `Report`
        parameters = list(model.parameters())  # also those that are frozen
        adapts_all = len(self.adapted) == len(parameters)
        beside_head = plan.head is not None and bool(self.adapted)
        self._is_settled = adapts_all or beside_head
        self._checks = BatchChecks(
            self._outputs,
            self._support_loss_on_cpu,
            self._query_loss_on_cpu,
            read_support_loss=self._given_loss,
            read_query_loss=self._given_query_loss,
            head_type=None if plan.head is None else self._type_of_model,
        )

    def _read(self, episodes: EpisodeBatch) -> list[Group]:
        """The tasks in groups of one shape, if nothing is wrong with them."""
        batches = read_episodes(episodes)
        try:
            with reject_changed_tensors(self, but_tracked=True):
                return self._check(batches)
        except (ValueError, RuntimeError) as error:
            if not may_be_batches(episodes, batches[0]):
                raise
            raise ValueError(
                "episodes: got a list of tasks whose inputs and targets begin with the same two "
                "sizes; if they are batches of tasks, call it for each of them. "
                f"{shorten(error)}"
            ) from error

    @restored_host_state()
    def _check(self, batches: list[Episode]) -> list[Group]:
        """The groups of these batches, each of which has one shape."""
        if self.head is not None:
            batches = _read_for_head(self.head, batches)
        self._settle(batches[0])
        groups = []
        for data in batches:
            classes = self._checks.check_episodes(data)
            groups.append(Group(data, classes, looped=len(batches) > 1))
        return groups

    @restored_host_state()
    def _read_support(self, support: Any, *, batched: bool) -> list[Group]:
        """Support sets, likewise. They stand for the query sets as well."""
        pairs = read_support(support, batched=batched)
        if self.head is not None:
            parts = _read_for_head(self.head, [Episode(pair, pair) for pair in pairs])
            pairs = [part.support for part in parts]
        with reject_changed_tensors(self, but_tracked=True):
            self._settle(Episode(pairs[0], pairs[0]))
            for pair in pairs:
                self._checks.check_support("support", pair)
        return [Group(Episode(pair, pair), None, looped=len(pairs) > 1) for pair in pairs]

    def _settle(self, data: Episode) -> None:
        """Settle at the first batch what is evaluated once, and reject statistics that mix tasks.

        Layers of what does not adapt may track running statistics.
        """
        self._settle_features(data)
        if self._mixes_tasks and is_transductive(self.model):
            raise ValueError(
                "model: got layers that track running statistics beside others that use those of "
                "their inputs, expected one kind, because a body with the former sees several "
                "tasks in one batch"
            )
        if self._network.body is None:
            reject_running_statistics(self.model)
        elif self._network.last is not None:
            reject_running_statistics(self._network.last.module)

    def _settle_features(self, data: Episode) -> None:
        """Find out at the first batch whether what does not adapt can be evaluated once."""
        if self._is_settled:
            return
        self._is_settled = True
        network = self._network
        if network.body is None:
            last = find_last_module(self.model, self.adapted)
            self._features = last if isinstance(last, str) else self._last_objection(last, data)
            if isinstance(last, str) or self._features:
                return
            network = network.with_last(last)
        objection = self._body_objection(network, data)
        self._features = objection or "once"
        self._network = network.without_body() if objection else network

    def _last_objection(self, last: LastModule, data: Episode) -> str:
        """Why a last module does not allow that all before it is evaluated once."""
        if _looks_into_layers(self.method):
            return "the method looks into the layers of the model"
        meta = self._detached_meta()
        device = next(iter(meta.values())).device
        sets = [data.support.inputs]
        if data.query.inputs is not data.support.inputs:
            sets.append(data.query.inputs)
        for inputs in (task_of(x, 0) for x in sets):
            with restored_random_state(device), running_statistics(self.model):
                objection = last.objection(meta, self.adapted, inputs)
            if objection:
                return objection
        return ""

    def _body_objection(self, network: Network, data: Episode) -> str:
        """What a body that is evaluated once changes, unless its tasks are mixed."""
        assert network.body is not None
        if network.body.mixes_tasks:
            return ""
        meta = self._detached_meta()
        device = next(iter(meta.values())).device
        once, whole = (self._problem(n, "loop") for n in (network, network.without_body()))
        with restored_random_state(device), running_statistics(self.model):
            return body_objection(once, whole, meta, data)

    def _lifted(self, group: Group) -> LiftedProblem:
        """The problem of a group, at the features of its episodes."""
        if not group.looped:
            self._check_vmap(group.data)
        way = self._way(group)
        problem = self._problem(self._network, way)
        if problem.features is None:
            return self._lift(problem, group.data, way)
        with torch.no_grad(), running_statistics(self.model):
            features = problem.features(self._detached_meta(), group.data)
        return self._lift(replace(problem, features=None), features, way)

    def _iterates(self, lifted: LiftedProblem, counts: Sequence[int]) -> list[Params]:
        """θ after each of these numbers of steps, `{name: [tasks, *shape]}`."""
        meta = self.meta
        return inner_iterates(
            lifted,
            self.inner,
            detached(meta),
            counts,
            originals={name: meta[name] for name in self.adapted},
        )

    def _check_vmap(self, data: Episode) -> None:
        """Keep the loop from now on if the choice is free, and vmap is wrong or impossible.

        Where vmap was asked for, a warning is given if it is wrong for the first batch of a shape.
        """
        if self.vectorize == "loop" or self._mixes_tasks:
            return
        in_training = tuple(module.training for module in self.model.modules())
        record = self._vmap_records.next_call(data, in_training)
        if record.calls == 1 if self._keeps_vmap else record.is_due:
            # Here the losses call the body, as they call all else.
            in_losses = self._problem(self._network.without_body(), "vmap")
            reason = explain_objection(
                in_losses,
                self.meta,
                data,
                inner=self.inner,
                method=self.method,
                keeps_vmap=self._keeps_vmap,
            )
            self._objection = "" if self._keeps_vmap else reason
        if self._objection:
            self.vectorize = "loop"

    def _way(self, group: Group) -> Vectorize:
        return "loop" if group.looped else self._current_way

    def _type_of_model(self) -> torch.dtype:
        """The type that the model computes in, which is that of its parameters."""
        return floating_entry(dict(self.model.named_parameters())).dtype

    def _outputs(self, inputs: Any) -> Tensor:
        """The model at φ. Random numbers that it draws are drawn again later."""
        meta = self.meta
        device = next(iter(meta.values())).device
        with restored_random_state(device), running_statistics(self.model):
            return self._network.outputs({}, meta, inputs)

    def _measure_path(self, group: Group, counts: Sequence[int]) -> tuple[Tensor, Tensor | None]:
        """The query losses and measures after some numbers of steps, `[counts, tasks]` each."""
        lifted = self._lifted(group)
        iterates = self._iterates(lifted, counts)
        meta = self._detached_meta()
        losses = []
        measures = []
        with torch.no_grad():
            for iterate in iterates:
                loss, outputs = lifted.outer(iterate, meta, lifted.data)
                losses.append(loss)
                measures.append(self._measure(group, outputs))
        return torch.stack(losses), combine(measures, torch.stack)

    def _measure(self, group: Group, outputs: Tensor) -> Tensor | None:
        """The metric or the accuracy of each task, `[tasks]`. None if there is neither."""
        return measure(
            group,
            outputs,
            metric=self.metric,
            make_loss=self._query_loss,
        )


def _read_for_head(head: Head, batches: list[Episode]) -> list[Episode]:
    """The batches, each of tasks that have one number of classes.

    Raises:
        ValueError: The head cannot be fitted to their support targets.
    """
    if objection := head.target_objection(batches[0].support.targets):
        raise ValueError(objection)
    return split_by_classes(batches)


def _looks_into_layers(method: Method) -> bool:
    """Whether a method needs the layers of the model that the inner loss calls."""
    if not isinstance(method, Implicit):
        return False
    kinds = [kind for kind in (method.curvature, method.preconditioner) if kind is not None]
    return any(find_curvature(kind)[0].looks_into_layers for kind in kinds)
