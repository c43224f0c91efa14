"""A few-shot model with its meta-parameters φ, and the bilevel problem that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import nn

from metaimplicit.inner import InnerLoop, make_inner
from metaimplicit.learner.buffers import restored_attributes
from metaimplicit.learner.defaults import with_default_curvature
from metaimplicit.learner.forms import plain_inputs
from metaimplicit.learner.learnable import LearntNumbers
from metaimplicit.learner.losses import MetaLoss, TaskLoss
from metaimplicit.learner.network import Network
from metaimplicit.learner.plan import Plan
from metaimplicit.learner.threads import one_thread_in
from metaimplicit.lifted import LiftedProblem, Vectorize
from metaimplicit.methods import Method, make_method
from metaimplicit.normalization import running_statistics
from metaimplicit.params import Params, detached
from metaimplicit.problem import BilevelProblem, FromMeta, Proximal
from metaimplicit.recomputation import mended_recomputation
from metaimplicit.task_axis import count_tasks, task_of
from metaimplicit.tensors import with_known_types
from metaimplicit.unsupported import explain_unsupported

# What is settled when a learner is built, by its name as an argument or an attribute, and what can
# be changed in its place.
SETTLED = {
    "proximal": "set learner.penalty, such as Proximal(0.5), or build a new learner",
    "compile": "set learner.compiles",
    **dict.fromkeys(("adapt", "adapted", "head", "learn", "learnt"), "build a new learner"),
}


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
        self._inner = plan.learnable.inner
        self._penalty = plan.learnable.penalty
        self.vectorize = vectorize
        self.chunk_size = chunk_size
        self._last_problem: tuple[tuple[Any, ...], BilevelProblem] | None = None
        self._checked: tuple[Any, dict[Any, Any]] = (None, {})  # of a loss, see `Composite`
        of_phi = [name for name, p in model.named_parameters() if p.requires_grad]
        self._network = Network(model, of_phi, plan.head)
        if plan.head is not None and not self.adapted:
            self._network = self._network.with_constant_model()

        of_model: Params = dict(model.named_parameters())
        of_losses = {key: p for part in self._losses() for key, p in part.parameters.items()}
        _check_loss_parameters(of_model, of_losses, self.adapted)
        self.learnt = LearntNumbers(plan.learnable.logs, taken={*of_model, *of_losses})
        self._trainable = set(self._trainable_parameters())

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, or raise AttributeError if nothing would see the change."""
        if name in SETTLED and "_trainable" in self.__dict__:  # the constructor has ended
            raise AttributeError(
                f"{name}: got another one for a learner, expected the one it was built with; "
                f"{SETTLED[name]}"
            )
        if callable(value) and not isinstance(value, nn.Module):
            self.__dict__.get("_modules", {}).pop(name, None)  # a function in its place, for torch
        super().__setattr__(name, value)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a pickle holds: all but what belongs to the objects of the original."""
        return self.__dict__ | {"_last_problem": None, "_checked": (None, {})}

    @property
    def method(self) -> Method:
        """The method. One that is set gets the curvature that the constructor gives."""
        return self._method

    @method.setter
    def method(self, method: str | Method) -> None:
        self._method = with_default_curvature(make_method(method))

    @property
    def inner(self) -> InnerLoop:
        """The inner loop. One that is set, or its flag, must read its numbers that are learnt."""
        return self._inner

    @inner.setter
    def inner(self, inner: str | InnerLoop) -> None:
        made = make_inner(inner)
        self._require_learnt("inner", self._inner.reads, made.reads)
        self._inner = made

    @property
    def penalty(self) -> Proximal | None:
        """The proximal term, or None. One that is set must read λ if that is learnt."""
        return self._penalty

    @penalty.setter
    def penalty(self, penalty: Proximal | None) -> None:
        self._require_learnt("penalty", _reader(self._penalty), _reader(penalty))
        self._penalty = penalty

    def _require_learnt(
        self, name: str, reads_now: Callable[[str], bool], would_read: Callable[[str], bool]
    ) -> None:
        """Raise ValueError if the new value of an attribute reads fewer of the learnt numbers."""
        lost = [n for n in self.learnt.names if reads_now(n) and not would_read(n)]
        if lost:
            raise ValueError(
                f"{name}: got one that does not read {lost[0]!r}, which is learnt, expected one "
                f"that does; set a changed copy of learner.{name}, or build a new learner"
            )

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
            ValueError: Since the learner was built, a parameter was frozen, unfrozen, added,
                removed or tied, or the model was replaced.
        """
        if self.model is not self._network.model:
            raise ValueError(
                "model: got another module than the learner was built with, which would still be "
                "called, expected the same; load a state_dict into it, or build a new learner"
            )
        params = self._trainable_parameters()
        changed = sorted(params.keys() ^ self._trainable)
        if changed:
            raise ValueError(
                f"model: {changed[0]!r} was frozen, unfrozen, added, removed or tied after the "
                "learner was built, expected the parameters as they were; build a new learner"
            )
        return params | self.learnt.by_name()

    @explain_unsupported()
    def predict(self, params: Params, inputs: Any, *, batched: bool = False) -> Any:
        """The outputs of the model with some parameters replaced by adapted ones.

        Args:
            params: The adapted parameters, `{name: [*shape]}`, or `[tasks, *shape]` if `batched`.
                Parameters that it does not hold are the learner's, as constants.
            inputs: `[m, ...]`, or `[tasks, m, ...]` if `batched`. Several inputs are a tuple or a
                dict, and arrays are tensors. If `batched`, a list holds the inputs of one task
                after another.
            batched: Whether both carry the task axis.

        Returns:
            `[m, ...]`, or `[tasks, m, ...]` if `batched`, or a list of the outputs of each task if
            the inputs are a list.

        Raises:
            ValueError: The inputs are those of another number of tasks than the parameters.
        """
        inputs = with_known_types(inputs)
        if batched:
            _check_tasks(params, inputs)
        outputs = self._network.outputs
        with (
            one_thread_in(self.model),
            restored_attributes(self),
            running_statistics(self.model),
            mended_recomputation,
        ):
            meta = self._detached_meta()
            if not batched:
                return outputs(params, meta, plain_inputs(inputs))
            if isinstance(inputs, list):
                return [
                    outputs(task_of(params, task), meta, plain_inputs(of_task))
                    for task, of_task in enumerate(inputs)
                ]
            lifted = self._lift(self.problem, plain_inputs(inputs), self._current_way)
            # Inputs that require grad keep their graph, as those of one task do.
            with_graph = lifted.entries.restore(lifted.entries.tensors)
            return lifted.apply(lambda p, x: outputs(p, meta, x), params, with_graph)

    @property
    def _current_way(self) -> Vectorize:
        return "loop" if self.vectorize == "loop" else "vmap"

    @property
    def _mixes_tasks(self) -> bool:
        """Whether the body receives the images of several tasks in one batch."""
        return self._network.body is not None and self._network.body.mixes_tasks

    def _problem(self, network: Network, vectorize: Vectorize) -> BilevelProblem:
        """The problem of a network, whose body is called under vmap or in a loop.

        That of the learner's own is one object for as long as its parts are, so that compiled
        functions can belong to it.
        """
        parts = (network, vectorize, self.loss, self.query_loss, self.penalty, self.chunk_size)
        if self._last_problem is not None:
            before, problem = self._last_problem
            if all(old is new for old, new in zip(before, parts, strict=True)):
                return problem
        if self._checked[0] is not self.loss:
            self._checked = (self.loss, {})
        loss, query_loss = self._losses()
        problem = network.problem(
            loss,
            query_loss,
            adapted=self.adapted,
            penalty=self.penalty,
            checked=self._checked[1],
            vectorize=vectorize,
            chunk_size=self.chunk_size,
        )
        if network is self._network:
            self._last_problem = (parts, problem)
        return problem

    def _lift(self, problem: BilevelProblem, data: Any, vectorize: Vectorize) -> LiftedProblem:
        # In evaluation mode, the kernels of cuDNN for recurrent networks have no derivative at all.
        is_recurrent = any(isinstance(module, nn.RNNBase) for module in self.model.modules())
        return LiftedProblem(
            problem,
            data,
            batched=True,
            vectorize=vectorize,
            chunk_size=self.chunk_size,
            second_derivatives=self.inner.second_derivatives or is_recurrent,
        )

    def _given_loss(self) -> TaskLoss:
        return self.loss

    def _given_query_loss(self) -> TaskLoss:
        return self.loss if self.query_loss is None else self.query_loss

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
        if self.query_loss is None:
            return loss, loss
        return loss, MetaLoss(self.query_loss, "query_loss")

    def _trainable_parameters(self) -> Params:
        params: Params = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        for loss in self._losses():
            params |= loss.parameters
        return params


def _check_tasks(params: Params, inputs: Any) -> None:
    """Raise ValueError if parameters and inputs are not those of one number of tasks."""
    expected = {len(p) for p in params.values()}
    got = len(inputs) if isinstance(inputs, list) else count_tasks(plain_inputs(inputs))
    if expected and expected != {got}:
        raise ValueError(
            f"inputs: got {got} sets of them, expected {max(expected)}, one for each adapted "
            "model; take the models of some tasks by an index or a slice"
        )


def _reader(penalty: Proximal | None) -> Callable[[str], bool]:
    """Whether the strength of a penalty is read from the meta-parameter of a name."""
    strength = None if penalty is None else penalty.strength
    return strength.reads if isinstance(strength, FromMeta) else lambda name: False


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
