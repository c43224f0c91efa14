"""The part of a model that does not adapt, evaluated once for all inner steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from metaimplicit.functional import functional_call
from metaimplicit.graph import find_dependencies
from metaimplicit.learner.attributes import Attributes, some_examples
from metaimplicit.learner.episodes import Episode, Pair
from metaimplicit.learner.problem import call_model
from metaimplicit.lifted import LiftedProblem, Vectorize
from metaimplicit.normalization import tracked_layers
from metaimplicit.params import Params, detached, leaves
from metaimplicit.problem import BilevelProblem, StartAtMeta
from metaimplicit.random_state import RandomState

IMAGES_PER_CHUNK = 120  # that share a pass, and the statistics of layers that track them

CallBody = Callable[[Params, Any], Tensor]  # (meta, inputs of one set) -> features [m, ...]


@dataclass(frozen=True)
class Body:
    """A function of φ and the inputs that every task shares.

    A body whose layers track running statistics receives the images of all tasks in one batch, a
    task's support and query side by side, in chunks of up to 120 images. In training, the
    statistics of a layer are those of its chunk. Any other body is called on one set of one task
    at a time, under vmap or in a loop, so that it computes what it computes in the whole model.

    Args:
        model: The module whose layers it calls.
        call: `(meta, inputs) -> features`, of one set.

    Example:
        >>> body = Body(nn.Identity(), lambda meta, inputs: meta["scale"] * inputs)
        >>> pair = (torch.ones(1, 2, 3), torch.zeros(1, 2))  # a task of two examples
        >>> meta = {"scale": torch.tensor(2.0)}
        >>> body.features(meta, (pair, pair), vectorize="vmap", chunk_size=None).query.inputs
        tensor([[[2., 2., 2.],
                 [2., 2., 2.]]])
    """

    model: nn.Module
    call: CallBody

    @property
    def mixes_tasks(self) -> bool:
        """Whether a batch holds the images of several tasks."""
        return bool(tracked_layers(self.model))

    def features(
        self, meta: Params, data: Any, *, vectorize: Vectorize, chunk_size: int | None
    ) -> Episode:
        """The episodes with the features of their inputs in the place of these.

        Args:
            meta: φ.
            data: A batch of tasks: an `Episode` or any pair (support, query) of pairs.
            vectorize: How sets are batched if tasks are not mixed.
            chunk_size: The number of tasks that are vmapped at a time. If None, all.
        """
        support, query = Episode.of(*data)
        sets = [support.inputs]
        if query.inputs is not support.inputs:
            sets.append(query.inputs)
        if self.mixes_tasks:
            features = self._of_one_batch(meta, sets)
        else:
            features = [
                self._of_each_set(
                    meta,
                    inputs,
                    vectorize=vectorize,
                    chunk_size=chunk_size,
                )
                for inputs in sets
            ]
        return Episode(Pair(features[0], support.targets), Pair(features[-1], query.targets))

    def _of_one_batch(self, meta: Params, sets: list[Any]) -> list[Tensor]:
        """The features of all sets, by passes that mix the tasks."""
        by_task = tree_map(lambda *x: torch.cat(x, dim=1), *sets)
        sizes = [_leading_sizes(inputs)[1] for inputs in sets]
        tasks, images = _leading_sizes(by_task)
        chunks = -(-tasks * images // IMAGES_PER_CHUNK)  # rounded up

        outputs = []
        for index in torch.arange(tasks * images, device="cpu").tensor_split(chunks):
            start, end = int(index[0]), int(index[-1]) + 1
            chunk = tree_map(lambda x, a=start, b=end: x.flatten(0, 1)[a:b], by_task)
            outputs.append(self.call(meta, chunk))
        features = torch.cat(outputs).unflatten(0, (tasks, images))
        return list(features.split(sizes, dim=1))

    def _of_each_set(
        self, meta: Params, inputs: Any, *, vectorize: Vectorize, chunk_size: int | None
    ) -> Tensor:
        """The features of one kind of set, `[tasks, m, ...]`, by one call for each task."""
        nothing = BilevelProblem(StartAtMeta([]), lambda *_: torch.zeros(()), lambda *_: None)
        lifted = LiftedProblem(
            nothing,
            inputs,
            batched=True,
            vectorize=vectorize,
            chunk_size=chunk_size,
        )
        features: Tensor = lifted.apply(lambda _, x: self.call(meta, x), {}, inputs)
        return features


class HeadCall(NamedTuple):
    """A call of a module: its arguments and its output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass(frozen=True)
class LastModule:
    """A module of a model that adapts alone, and whose output is the model's: its head.

    Args:
        model: The model.
        name: The name of the module.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> head = LastModule(model, "2")
        >>> params = dict(model.named_parameters())
        >>> x = torch.ones(4, 2)
        >>> features = head.features(params, x)
        >>> torch.equal(head.outputs(params, params, features), model(x))
        True
    """

    model: nn.Module
    name: str

    @property
    def module(self) -> nn.Module:
        """The module itself."""
        return self.model.get_submodule(self.name)

    @cached_property
    def _tied(self) -> dict[str, str]:
        """The names in φ of the head's parameters that the model has under another name first."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        of_head = {n: names[id(p)] for n, p in self.module.named_parameters()}
        return {n: name for n, name in of_head.items() if name != f"{self.name}.{n}"}

    def features(self, meta: Params, inputs: Any) -> Tensor:
        """The input of the head, by a call of the whole model.

        Raises:
            ValueError: The head did not run once on one tensor as the last part of the model.
        """
        of_model = {n: meta[n] for n, _ in self.model.named_parameters() if n in meta}
        with _recorded_calls(self.module) as calls:
            outputs = call_model(self.model, of_model, inputs)
        objection = _objection_to(calls, outputs)
        if objection:
            raise self._later_error(f"{self.name!r} {objection}")
        features: Tensor = calls[0].args[0]
        return features

    def checked_features(
        self,
        evaluate: Callable[[Params, Episode], Episode],
        meta: Params,
        adapted: Sequence[str],
        episodes: Episode,
    ) -> Episode:
        """The episodes with their features, which must not depend on what adapts.

        Args:
            evaluate: A function of φ and episodes: those with their features.
            meta: φ.
            adapted: The names of the parameters that adapt.
            episodes: The episodes.

        Raises:
            ValueError: The features depend on a parameter that adapts.
        """
        theta = leaves({name: meta[name] for name in adapted})
        is_recorded = torch.is_grad_enabled()
        others = meta if is_recorded else detached(meta)
        with torch.enable_grad():
            evaluated = evaluate({**others, **theta}, episodes)
        if find_dependencies([pair.inputs for pair in evaluated], theta):
            raise self._later_error(self._dependence)
        if is_recorded:
            return evaluated
        return Episode(*(Pair(pair.inputs.detach(), pair.targets) for pair in evaluated))

    @property
    def _dependence(self) -> str:
        return f"the input of {self.name!r} depends on parameters that adapt"

    def _later_error(self, reason: str) -> ValueError:
        return ValueError(
            f"model: for this batch, {reason}, but not for the first one, so its input cannot be "
            "evaluated once; make a new learner if the model has changed, or let the parameters "
            "of another module adapt as well"
        )

    def outputs(self, params: Params, meta: Params, features: Tensor) -> Tensor:
        """The outputs of the head, with parameters from `params`, or else from `meta`."""
        names = [n for n, _ in self.module.named_parameters()]
        values = {n: self._tied.get(n, f"{self.name}.{n}") for n in names}
        own = {n: params.get(key, meta.get(key)) for n, key in values.items()}
        known = {n: p for n, p in own.items() if p is not None}
        outputs: Tensor = functional_call(self.module, known, (features,))
        return outputs

    def objection(self, meta: Params, adapted: list[str], inputs: Any) -> str:
        """Why the features cannot be evaluated once. Empty if they can.

        Args:
            meta: φ.
            adapted: The names of the parameters that adapt.
            inputs: The inputs of one set of one task.
        """
        theta = leaves({name: meta[name] for name in adapted})
        of_model = {n: meta[n] for n, _ in self.model.named_parameters() if n in meta}
        before = RandomState.read(next(iter(theta.values())).device)
        attributes = Attributes.read(self.model)
        with _recorded_calls(self.module) as calls, torch.enable_grad():
            outputs = call_model(self.model, {**of_model, **theta}, inputs)
        objection = _objection_to(calls, outputs)
        if objection:
            return f"{self.name!r} {objection}"
        features = calls[0].args[0]
        version = features._version
        again = self.outputs(theta, meta, features)
        if not torch.equal(again, outputs):
            return f"{self.name!r} has another output when it is called again"
        if features._version != version:
            return f"{self.name!r} writes to its input"
        # A model may read what adapts without a graph, as by detach(), so a value has to tell.
        others = {name: p.detach() + 0.5 * p.detach().abs() + 0.1 for name, p in theta.items()}
        at_theta = Attributes.read(self.model)
        before.restore()
        with _recorded_calls(self.module) as calls:
            call_model(self.model, {**of_model, **others}, inputs)
        moved = len(calls) != 1 or not torch.equal(calls[0].args[0], features)
        if moved or find_dependencies([features], theta):
            return self._dependence
        left = at_theta.different(Attributes.read(self.model))
        if left:
            return f"a forward pass leaves what depends on parameters that adapt in {left[0]!r}"
        return self._attribute_of_inputs(attributes, {**of_model, **others}, inputs)

    def _attribute_of_inputs(self, before: Attributes, params: Params, inputs: Any) -> str:
        """Which attribute may depend on the inputs, so that the head or a loss may read it there.

        Args:
            before: The attributes before the model was called.
            params: The parameters of its last call.
            inputs: The inputs of that call.
        """
        whole = Attributes.read(self.model)
        left = before.changed(whole)
        some = some_examples(inputs)
        if some is not None:
            with suppress(Exception):  # such as statistics of one example
                call_model(self.model, params, some)
                left = whole.different(Attributes.read(self.model))
        if not left:
            return ""
        return f"a forward pass leaves what depends on its inputs in {left[0]!r}"


def find_last_module(model: nn.Module, adapted: list[str]) -> LastModule | str:
    """The module that all parameters that adapt belong to, or why there is none.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> find_last_module(model, ["2.weight", "2.bias"]).name
        '2'
        >>> find_last_module(model, ["0.weight", "2.bias"])
        "several modules adapt: '0', '2'"
    """
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in adapted))
    if len(owners) > 1:
        return f"several modules adapt: {', '.join(map(repr, owners))}"
    if not owners[0]:
        return "the model itself adapts"
    return LastModule(model, owners[0])


@contextmanager
def _recorded_calls(module: nn.Module) -> Iterator[list[HeadCall]]:
    """The calls of a module within the block, with the inputs that its own hooks receive."""
    calls: list[HeadCall] = []
    inputs: list[tuple[Any, Any]] = []

    def record_inputs(_: nn.Module, args: Any, kwargs: Any) -> None:
        inputs.append((args, kwargs))

    def record(_: nn.Module, args: Any, output: Any) -> None:
        calls.append(HeadCall(*inputs.pop(), output))

    handles = [
        module.register_forward_pre_hook(record_inputs, prepend=True, with_kwargs=True),
        module.register_forward_hook(record),
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _objection_to(calls: list[HeadCall], outputs: Tensor) -> str:
    """What a head does that the last part of a model does not. Empty if it is one."""
    if len(calls) != 1:
        return "does not run as a module" if not calls else f"runs {len(calls)} times"
    call = calls[0]
    if call.kwargs or len(call.args) != 1 or not isinstance(call.args[0], Tensor):
        return "takes other inputs than one tensor"
    return "" if call.output is outputs else "has an output that is not the model's"


def _leading_sizes(inputs: Any) -> tuple[int, int]:
    """The numbers of tasks and of examples in each, with which every tensor of inputs begins.

    Raises:
        ValueError: The tensors begin with different sizes, or one has a single axis.
    """
    sizes = {tuple(x.shape[:2]) for x in torch.utils._pytree.tree_leaves(inputs)}
    if len(sizes) != 1 or len(next(iter(sizes))) != 2:
        raise ValueError(
            f"inputs: got leading sizes {sorted(sizes)}, expected [tasks, examples] of every "
            "tensor, because the layers that track running statistics see the images of all tasks"
        )
    tasks, m = sizes.pop()
    return tasks, m
