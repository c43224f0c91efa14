"""A few-shot model with its meta-parameters φ, and the bilevel problem that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from metaimplicit.learner.body import find_last_module
from metaimplicit.learner.episodes import Episode
from metaimplicit.learner.forms import plain_inputs
from metaimplicit.learner.learnable import LearntNumbers
from metaimplicit.learner.losses import MetaLoss, TaskLoss
from metaimplicit.learner.network import Network
from metaimplicit.learner.plan import Plan
from metaimplicit.learner.problem import inner_iterates
from metaimplicit.learner.targets import Group
from metaimplicit.lifted import LiftedProblem, Vectorize
from metaimplicit.methods import Implicit, Method
from metaimplicit.normalization import running_statistics
from metaimplicit.params import Params, detached
from metaimplicit.problem import BilevelProblem
from metaimplicit.random_state import restored_random_state
from metaimplicit.task_axis import task_of
from metaimplicit.unsupported import explain_unsupported
from metaimplicit.vectorization import VmapRecords, explain_objection


class FewShotModel(nn.Module):
    """A model, its losses, and the numbers of its inner problem that are learnt.

    Args:
        model: The model.
        loss: The loss of the support set.
        query_loss: The loss of the query set. If None, it is `loss`.
        plan: What adapts, and how.
        vectorize: How tasks are batched. With `"auto"`, the choice is open, and vmap is tried.
        chunk_size: The number of tasks that are vmapped at a time. If None, all.

    Raises:
        ValueError: Two meta-parameters have one name, or a loss has a parameter that adapts.

    Example:
        >>> import torch
        >>> from metaimplicit.inner import GradientDescent
        >>> from metaimplicit.learner.learnable import Learnable
        >>> from metaimplicit.methods import Unrolled
        >>> learnable = Learnable(GradientDescent(), None, {"log_lr": torch.tensor(-2.0)})
        >>> model = FewShotModel(
        ...     nn.Linear(2, 1),
        ...     nn.MSELoss(),
        ...     None,
        ...     plan=Plan(Unrolled(), ["weight"], learnable, head=None),
        ...     vectorize="vmap",
        ...     chunk_size=None,
        ... )
        >>> list(model.meta)
        ['weight', 'bias', 'log_lr']
    """

    vectorize: Vectorize | Literal["auto"]

    def __init__(
        self,
        model: nn.Module,
        loss: TaskLoss,
        query_loss: TaskLoss | None,
        *,
        plan: Plan,
        vectorize: Vectorize | Literal["auto"],
        chunk_size: int | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.query_loss = query_loss
        self.method = plan.method
        self.adapted = plan.adapted
        self.head = plan.head
        self.inner = plan.learnable.inner
        self.penalty = plan.learnable.penalty
        self.vectorize = vectorize
        self.chunk_size = chunk_size
        self._checked: dict[int, dict[Any, Any]] = {}  # by loss, see `Composite`
        self._vmap_records = VmapRecords() if vectorize == "auto" else None
        self._objection = ""  # why vmap is not used
        of_phi = [name for name, p in model.named_parameters() if p.requires_grad]
        self._network = Network(model, of_phi, plan.head)
        self._features = ""  # as in `Report`
        if plan.head is not None and not self.adapted:
            self._network = self._network.with_constant_model()
            self._features = "once"
        self._is_settled = plan.head is not None or len(self.adapted) == len(of_phi)

        of_model: Params = dict(model.named_parameters())
        of_losses = {key: p for part in self._losses() for key, p in part.parameters.items()}
        _check_loss_parameters(of_model, of_losses, self.adapted)
        self.learnt = LearntNumbers(plan.learnable.logs, taken={*of_model, *of_losses})
        self._trainable = set(self._trainable_parameters())

    @property
    def problem(self) -> BilevelProblem:
        """The bilevel problem of one task, for `hypergradient`.

        Its data is an `Episode`, or any pair (support, query) of (inputs, targets) pairs. Its
        meta-parameters are `meta`.
        """
        return self._problem(self._network, self._current_way)

    @property
    def meta(self) -> Params:
        """φ by name: the parameters of model and losses that require grad, and the logarithms.

        Raises:
            ValueError: A parameter was frozen or unfrozen since the learner was built.
        """
        params = self._trainable_parameters()
        changed = sorted(params.keys() ^ self._trainable)
        if changed:
            raise ValueError(
                f"model: {changed[0]!r} was frozen or unfrozen after the learner was built, "
                "expected the parameters as they were; build a new learner"
            )
        return params | self.learnt.by_name()

    @explain_unsupported()
    def predict(self, params: Params, inputs: Any, *, batched: bool = False) -> Any:
        """The outputs of the model with some parameters replaced by adapted ones.

        Args:
            params: The adapted parameters, `{name: [*shape]}`, or `[tasks, *shape]` if `batched`.
                Parameters that it does not hold are the learner's, as constants.
            inputs: `[m, ...]`, or `[tasks, m, ...]` if `batched`. Several inputs are a tuple or a
                dict. If `batched`, a list holds the inputs of one task after another.
            batched: Whether both carry the task axis.

        Returns:
            `[m, ...]`, or `[tasks, m, ...]` if `batched`, or a list of the outputs of each task if
            the inputs are a list.
        """
        meta = self._detached_meta()
        outputs = self._network.outputs
        with running_statistics(self.model):
            if not batched:
                return outputs(params, meta, plain_inputs(inputs))
            if isinstance(inputs, list):
                return [
                    outputs(task_of(params, task), meta, plain_inputs(of_task))
                    for task, of_task in enumerate(inputs)
                ]
            lifted = self._lift(self.problem, plain_inputs(inputs), self._current_way)
            return lifted.apply(lambda p, x: outputs(p, meta, x), params)

    @property
    def _current_way(self) -> Vectorize:
        return "loop" if self.vectorize == "loop" else "vmap"

    def _way(self, group: Group) -> Vectorize:
        return "loop" if group.looped else self._current_way

    @property
    def _mixes_tasks(self) -> bool:
        """Whether the body receives the images of several tasks in one batch."""
        return self._network.body is not None and self._network.body.mixes_tasks

    def _problem(self, network: Network, vectorize: Vectorize) -> BilevelProblem:
        """The problem of a network, whose body is called under vmap or in a loop."""
        loss, query_loss = self._losses()
        return network.problem(
            loss,
            query_loss,
            adapted=self.adapted,
            penalty=self.penalty,
            checked=self._checked.setdefault(id(self.loss), {}),
            vectorize=vectorize,
            chunk_size=self.chunk_size,
        )

    def _settle_features(self, data: Episode) -> None:
        """Find out at the first batch whether what does not adapt can be evaluated once."""
        if self._is_settled:
            return
        self._is_settled = True
        last = find_last_module(self.model, self.adapted)
        if isinstance(last, str):
            self._features = last
            return
        if _looks_into_layers(self.method):
            self._features = "the method looks into the layers of the model"
            return
        meta = self._detached_meta()
        inputs = task_of(data.support.inputs, 0)
        device = next(iter(meta.values())).device
        with restored_random_state(device), running_statistics(self.model):
            self._features = last.objection(meta, self.adapted, inputs) or "once"
        if self._features == "once":
            self._network = self._network.with_last(last)

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

    def _iterates(self, lifted: LiftedProblem, steps: int) -> tuple[Params, ...]:
        """θ_0 … θ_steps, `{name: [tasks, *shape]}`."""
        return inner_iterates(lifted, self.inner, self._detached_meta(), steps)

    def _check_vmap(self, data: Episode) -> None:
        """Keep the loop from now on if the choice is free, and vmap is wrong or impossible."""
        if self._vmap_records is None or self.vectorize == "loop" or self._mixes_tasks:
            return
        if self._vmap_records.next_call(data).is_due:
            # Here the losses call the body, as they call all else.
            in_losses = self._problem(self._network.without_body(), "vmap")
            self._objection = explain_objection(
                in_losses, self.meta, data, inner=self.inner, method=self.method
            )
        if self._objection:
            self.vectorize = "loop"

    def _lift(self, problem: BilevelProblem, data: Any, vectorize: Vectorize) -> LiftedProblem:
        return LiftedProblem(
            problem,
            data,
            batched=True,
            vectorize=vectorize,
            chunk_size=self.chunk_size,
            second_derivatives=self.inner.second_derivatives,
        )

    def _outputs(self, inputs: Any) -> Tensor:
        """The model at φ, as a constant. Random numbers that it draws are drawn again later."""
        meta = self._detached_meta()
        device = next(iter(meta.values())).device
        with restored_random_state(device), running_statistics(self.model):
            return self._network.outputs({}, meta, inputs)

    def _query_loss(self) -> TaskLoss:
        """The loss of the query set at φ, as a constant."""
        return self._losses()[1].at(self._detached_meta())

    def _support_loss_on_cpu(self) -> TaskLoss:
        return self._losses()[0].on_cpu(self._detached_meta())

    def _query_loss_on_cpu(self) -> TaskLoss:
        return self._losses()[1].on_cpu(self._detached_meta())

    def _detached_meta(self) -> Params:
        return detached(self.meta)

    def _losses(self) -> tuple[MetaLoss, MetaLoss]:
        """The losses of the support set and of the query set."""
        loss = MetaLoss(self.loss, "loss")
        return loss, loss if self.query_loss is None else MetaLoss(self.query_loss, "query_loss")

    def _trainable_parameters(self) -> Params:
        params: Params = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        for loss in self._losses():
            params |= loss.parameters
        return params


def _looks_into_layers(method: Method) -> bool:
    """Whether a method needs the layers of the model that the inner loss calls."""
    if not isinstance(method, Implicit):
        return False
    kinds = {method.curvature, method.preconditioner}
    return not kinds <= {None, "hessian", "gauss-newton", "diagonal"}


def _check_loss_parameters(of_model: Params, of_losses: Params, adapted: Sequence[str]) -> None:
    """Raise ValueError if a loss has a parameter that adapts, or one of a name that is taken."""
    for key, parameter in of_losses.items():
        if key in of_model:
            raise ValueError(
                f"loss: the model has a parameter {key!r} already, expected that name to be free "
                "for the parameter of the loss; rename the module of the model"
            )
        shared = [name for name in adapted if of_model[name] is parameter]
        if shared:
            raise ValueError(
                f"loss: got one with the parameter {shared[0]!r} of the model, which would stay "
                "as it is in the loss while it adapts in the model, expected parameters of its "
                "own; return what the loss needs from the model, or use proximal as a penalty"
            )
