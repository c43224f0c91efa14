"""A few-shot model with its meta-parameters φ, and the bilevel problem that they belong to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor, nn

from metaimplicit.learner.episodes import Episode
from metaimplicit.learner.forms import plain_inputs
from metaimplicit.learner.learnable import Learnable, LearntNumbers
from metaimplicit.learner.losses import MetaLoss, TaskLoss
from metaimplicit.learner.problem import call_model, few_shot_problem, inner_iterates
from metaimplicit.learner.targets import Group
from metaimplicit.lifted import LiftedProblem, Vectorize
from metaimplicit.methods import Method
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
        adapted: The names of the parameters that adapt.
        learnable: The inner loop and the penalty, with the numbers that they read from φ.
        vectorize: How tasks are batched. With `"auto"`, the choice is open, and vmap is tried.
        chunk_size: The number of tasks that are vmapped at a time. If None, all.

    Raises:
        ValueError: Two meta-parameters have one name, or a loss has a parameter that adapts.

    Example:
        >>> import torch
        >>> from metaimplicit.inner import GradientDescent
        >>> learnable = Learnable(GradientDescent(), None, {"log_lr": torch.tensor(-2.0)})
        >>> model = FewShotModel(
        ...     nn.Linear(2, 1),
        ...     nn.MSELoss(),
        ...     None,
        ...     adapted=["weight"],
        ...     learnable=learnable,
        ...     vectorize="vmap",
        ...     chunk_size=None,
        ... )
        >>> list(model.meta)
        ['weight', 'bias', 'log_lr']
    """

    vectorize: Vectorize | Literal["auto"]
    method: Method

    def __init__(
        self,
        model: nn.Module,
        loss: TaskLoss,
        query_loss: TaskLoss | None,
        *,
        adapted: Sequence[str],
        learnable: Learnable,
        vectorize: Vectorize | Literal["auto"],
        chunk_size: int | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.query_loss = query_loss
        self.adapted = list(adapted)
        self.inner = learnable.inner
        self.penalty = learnable.penalty
        self.vectorize = vectorize
        self.chunk_size = chunk_size
        self._checked: dict[int, dict[Any, Any]] = {}  # by loss, see `Composite`
        self._vmap_records = VmapRecords() if vectorize == "auto" else None
        self._objection = ""  # why vmap is not used
        self._of_model = [name for name, p in model.named_parameters() if p.requires_grad]

        of_model: Params = dict(model.named_parameters())
        of_losses = {key: p for part in self._losses() for key, p in part.parameters.items()}
        _check_loss_parameters(of_model, of_losses, self.adapted)
        self.learnt = LearntNumbers(learnable.logs, taken={*of_model, *of_losses})
        self._trainable = set(self._trainable_parameters())

    @property
    def problem(self) -> BilevelProblem:
        """The bilevel problem of one task, for `hypergradient`.

        Its data is an `Episode`, or any pair (support, query) of (inputs, targets) pairs. Its
        meta-parameters are `meta`.
        """
        loss, query_loss = self._losses()
        return few_shot_problem(
            self._call,
            loss,
            query_loss=query_loss,
            adapted=self.adapted,
            penalty=self.penalty,
            model=self.model,
            checked=self._checked.setdefault(id(self.loss), {}),
        )

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
        if not batched:
            return self._call(params, meta, plain_inputs(inputs))
        if isinstance(inputs, list):
            return [
                self._call(task_of(params, task), meta, plain_inputs(of_task))
                for task, of_task in enumerate(inputs)
            ]
        way: Vectorize = "loop" if self.vectorize == "loop" else "vmap"
        lifted = self._lift(plain_inputs(inputs), way)
        return lifted.apply(lambda p, x: self._call(p, meta, x), params)

    def _way(self, group: Group) -> Vectorize:
        return "loop" if group.looped or self.vectorize == "loop" else "vmap"

    def _iterates(self, group: Group, steps: int) -> tuple[Params, ...]:
        """θ_0 … θ_steps, `{name: [tasks, *shape]}`."""
        if not group.looped:
            self._check_vmap(group.data)
        lifted = self._lift(group.data, self._way(group))
        return inner_iterates(lifted, self.inner, self._detached_meta(), steps)

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

    def _lift(self, data: Any, vectorize: Vectorize) -> LiftedProblem:
        return LiftedProblem(
            self.problem,
            data,
            batched=True,
            vectorize=vectorize,
            chunk_size=self.chunk_size,
            second_derivatives=self.inner.second_derivatives,
        )

    def _call(self, params: Params, meta: Params, inputs: Any) -> Tensor:
        """The model at `params`, and at `meta` where `params` has no entry."""
        return call_model(self.model, {n: meta[n] for n in self._of_model} | params, inputs)

    def _outputs(self, inputs: Any) -> Tensor:
        """The model at φ, as a constant. Random numbers that it draws are drawn again later."""
        meta = self._detached_meta()
        with restored_random_state(next(iter(meta.values())).device):
            return self._call({}, meta, inputs)

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
