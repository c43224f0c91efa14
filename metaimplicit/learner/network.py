"""A few-shot network: a model alone, or a body with a head that adapts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from metaimplicit.learner.body import Body, LastModule
from metaimplicit.learner.episodes import Episode
from metaimplicit.learner.head_targets import with_numbers
from metaimplicit.learner.heads import Head
from metaimplicit.learner.losses import MetaLoss
from metaimplicit.learner.problem import call_model, few_shot_problem
from metaimplicit.lifted import Vectorize
from metaimplicit.params import Params
from metaimplicit.problem import BilevelProblem, Proximal


@dataclass(frozen=True)
class Network:
    """Outputs as a function of φ, θ and the inputs of one set.

    Args:
        model: The model. With a `head`, its outputs are the features `[m, p]`.
        of_model: The names of its parameters that are in φ.
        head: The layer on these features. If None, the outputs of the model count.
        body: What does not depend on θ, if that is known: the whole model before a `head`, or all
            but its `last` module.
        last: The module that adapts alone, behind the body. None with a `head`.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 3)
        >>> network = Network(model, ["weight", "bias"])
        >>> network.outputs({}, dict(model.named_parameters()), torch.ones(4, 2)).shape
        torch.Size([4, 3])
    """

    model: nn.Module
    of_model: Sequence[str]
    head: Head | None = None
    body: Body | None = None
    last: LastModule | None = None

    def outputs(self, params: Params, meta: Params, inputs: Any) -> Tensor:
        """The outputs at `params`, and at `meta` where `params` has no entry."""
        outputs = self.call_model(params, meta, inputs)
        return outputs if self.head is None else self.head.outputs(params, meta, outputs)

    def call_model(self, params: Params, meta: Params, inputs: Any) -> Tensor:
        """The outputs of the model, which are features if there is a head."""
        if self.head is not None and self.head.is_convex:
            params = {}  # the model does not adapt, though a parameter may be called as the head's
        return call_model(self.model, {n: params.get(n, meta[n]) for n in self.of_model}, inputs)

    def with_last(self, last: LastModule) -> Network:
        """The network in which all but this module are the body."""
        return replace(self, body=Body(self.model, last.features), last=last)

    def with_constant_model(self) -> Network:
        """The network in which the whole model is the body of the head."""
        return replace(self, body=Body(self.model, partial(self.call_model, {})))

    def without_body(self) -> Network:
        """The network whose losses call all of it."""
        return replace(self, body=None, last=None)

    def problem(
        self,
        loss: MetaLoss,
        query_loss: MetaLoss,
        *,
        adapted: Sequence[str],
        penalty: Proximal | None,
        checked: dict[Any, Any],
        vectorize: Vectorize,
        chunk_size: int | None,
    ) -> BilevelProblem:
        """The bilevel problem, with the features of the body if there is one.

        Args:
            loss: The loss of the support set, unless the head has its own.
            query_loss: The loss of the query set.
            adapted: The names of the model's parameters that adapt.
            penalty: The proximal term.
            checked: As in `Composite`.
            vectorize: How sets are batched in the body, if it is called on one at a time.
            chunk_size: The number of tasks that are vmapped at a time.
        """
        call = self.outputs if self.body is None else self._outputs_of_features
        problem = few_shot_problem(
            call,
            loss if self.head is None else _of_given_targets(loss),
            query_loss=query_loss,
            adapted=adapted,
            penalty=penalty,
            model=self.model,
            checked=checked,
        )
        if self.head is not None:
            init = partial(self._init_beside_head, self.head, adapted)
            inner_loss = self.head.inner_loss(self._support_features) or problem.inner_loss
            problem = replace(problem, init=init, inner_loss=inner_loss)
        elif self.body is None:
            return problem

        def features(meta: Params, data: Any) -> Episode:
            episodes = Episode.of(*data)
            if self.body is not None:
                call = partial(self.body.features, vectorize=vectorize, chunk_size=chunk_size)
                if self.last is None:
                    episodes = call(meta, episodes)
                else:
                    episodes = self.last.checked_features(call, meta, adapted, episodes)
            return episodes if self.head is None else with_numbers(episodes)

        return replace(problem, features=features)

    def _outputs_of_features(self, params: Params, meta: Params, features: Tensor) -> Tensor:
        if self.head is not None:
            return self.head.outputs(params, meta, features)
        if self.last is None:
            raise ValueError("network: got a body without a head or a last module")
        return self.last.outputs(params, meta, features)

    def _support_features(self, meta: Params, data: Any) -> Tensor:
        """X of the support set of one task, `[m, p]`.

        Raises:
            ValueError: They have another shape.
        """
        features: Tensor = Episode.of(*data).support.inputs
        if self.body is None:
            features = self.call_model({}, meta, features)
        if features.dim() != 2:
            raise ValueError(
                f"model: got features of shape {tuple(features.shape)}, expected [m, p] in front "
                "of a head; flatten them"
            )
        return features

    def _init_beside_head(
        self, head: Head, adapted: Sequence[str], meta: Params, data: Any
    ) -> Params:
        targets = Episode.of(*data).support.targets.numbers
        of_head = head.init(meta, self._support_features(meta, data), targets)
        return {name: meta[name] for name in adapted} | of_head


def _of_given_targets(loss: MetaLoss) -> Any:
    """The loss of support targets that are `HeadTargets`."""

    def of_given(meta: Params, outputs: Tensor, targets: Any) -> Tensor:
        return loss(meta, outputs, targets.given)

    return of_given
