"""What an inner loop is: a loss and a starting point in, the iterates of an optimiser out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from metaimplicit.counts import check_count
from metaimplicit.graph import is_differentiated
from metaimplicit.inner.settings import numbers_in
from metaimplicit.iterate import Iterate, OptimizerState
from metaimplicit.lifted import LiftedProblem
from metaimplicit.operators import Invertible
from metaimplicit.params import Params, flatten, leaves
from metaimplicit.problem import FromMeta

StepLoss = Callable[[Params, int], Tensor]


@dataclass(frozen=True)
class Trajectory:
    """The result of an inner loop.

    Attributes:
        params: θ_T, `{name: [tasks, *shape]}`.
        steps: The number of steps that each task took, `[tasks]`, int64.
        gradient_norm: ‖∂f/∂θ‖ of each task at the last point where it was computed, `[tasks]`.
            That point is θ_{T−1} for loops of gradient steps.
        iterates: θ_0 … θ_T. Empty unless they were asked for.
        state: The state of the optimiser after the last step. Empty for loops without one.
        curvature: ∂²f/∂θ² at θ_T less σI, σ all that is known to be a multiple of the identity. It
            knows its inverse. None for loops that do not have it.

    Example:
        >>> import torch
        >>> end = Trajectory({"w": torch.ones(1, 2)}, torch.tensor([5]), torch.tensor([0.1])).end
        >>> end.params["w"]
        tensor([[1., 1.]])
    """

    params: Params
    steps: Tensor
    gradient_norm: Tensor
    iterates: tuple[Params, ...] = ()
    state: OptimizerState = field(default_factory=dict)
    curvature: Invertible | None = None

    @property
    def end(self) -> Iterate:
        """θ_T and the state of the optimiser, without a graph."""
        return Iterate(self.params, self.state).detach()


class InnerLoop(ABC):
    """An optimiser of the inner loss, θ_0 → θ_T.

    Subclasses are frozen dataclasses. They have a field `steps`, and may have a field `tol`. They
    define `run`, and for the methods that take single steps `take_step` as well.

    Attributes:
        steps: T ≥ 1, the largest number of steps.
        keeps_iterates: Whether `run` can return the iterates.
        tol: A task stops once its ‖∂f/∂θ‖ ≤ tol. If None, every task takes all steps.
        exact: Whether it ends at the argmin, wherever it starts. Such a loop serves the methods
            that differentiate an argmin; see `Method.differentiates_argmin`.
        differentiable: Whether a gradient can pass through the steps. If False, the loop serves
            implicit methods only.
        fixed_point_objection: Why the step cannot be differentiated at its fixed point. If empty,
            it can.
        replay_objection: Why a step cannot be taken again from what the loop was at before it. If
            empty, it can.
        implicit_objection: Why the loop does not end where ∂f/∂θ = 0, apart from its `decay`. If
            empty, it does.
        drift: What keeps the loop near such a point from settling there, in words. If empty,
            nothing does.
        second_derivatives: Whether a step takes second derivatives of the loss.
        optimizer_name: Whose state the loop leaves. A loop of the same name can continue with it.
            If empty, the loop has no state.

    Example:
        >>> import torch
        >>> from metaimplicit import GradientDescent
        >>> loop = GradientDescent(steps=2, lr=0.5)
        >>> start = {"w": torch.tensor([[1.0], [2.0]])}  # two tasks
        >>> def loss(params, t):
        ...     return 0.5 * params["w"].square().sum(1)
        >>> loop.run(loss, start, {}, differentiated_steps=0).params["w"]
        tensor([[0.2500],
                [0.5000]])
    """

    steps: int
    tol: float | None = None
    keeps_iterates: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    differentiable: ClassVar[bool] = True
    fixed_point_objection: str = "whose step is no function of its iterate"
    replay_objection: str = "whose steps are no function of its iterates"
    implicit_objection: str = ""
    drift: str = ""
    second_derivatives: ClassVar[bool] = False
    optimizer_name: str = ""

    @property
    def compile_objection(self) -> str:
        """Why no compiled function can take all its steps. If empty, one can."""
        return self.replay_objection

    def bound_to(self, problem: LiftedProblem) -> InnerLoop:
        """The loop as it runs on a problem. Most loops need nothing but the values of its loss."""
        return self

    @abstractmethod
    def run(
        self,
        loss: StepLoss,
        start: Params,
        meta: Params,
        *,
        differentiated_steps: int,
        keep_iterates: bool = False,
        state: OptimizerState | None = None,
    ) -> Trajectory:
        """Run the loop from `start`.

        Args:
            loss: `(params, t) -> [tasks]`, the inner loss that step t = 0 … T−1 sees.
            start: θ_0, `{name: [tasks, *shape]}`.
            meta: The meta-parameters, where `FromMeta` numbers are read.
            differentiated_steps: K. The last K steps keep their graph. The T − K steps before them
                pass a gradient to `start` as the identity, and to nothing else.
            keep_iterates: Whether the trajectory holds all iterates.
            state: The state of the optimiser after an earlier run. If None, it starts empty.

        Returns:
            θ_T with its graph, and how the loop went.

        Raises:
            ValueError: The loop cannot do what is asked: its steps are not differentiable, or it
                does not keep its iterates.
        """

    def gradient_point(self, params: Params, state: OptimizerState) -> Params:
        """Where the step from θ_{t−1} takes its gradient, by default θ_{t−1} itself.

        Args:
            params: θ_{t−1}, `{name: [tasks, *shape]}`.
            state: The state of the optimiser, empty before the first step.
        """
        return params

    def take_step(
        self,
        params: Params,
        gradients: Params,
        state: OptimizerState,
        meta: Params,
        step: int | None = None,
    ) -> tuple[Params, OptimizerState]:
        """One step s_t = Φ(s_{t−1}, φ) as a pure function, s = (θ, the state of the optimiser).

        Args:
            params: `gradient_point(θ_{t−1}, state)`, `{name: [tasks, *shape]}`.
            gradients: ∂f/∂θ at that point. A parameter that is not among them keeps its value.
            state: The state of the optimiser, empty before the first step.
            meta: The meta-parameters, where `FromMeta` numbers are read.
            step: The number t − 1 of the step in the loop, from 0. None stands for a step that
                belongs to no loop.

        Returns:
            θ_t and the new state. The arguments are left as they are.

        Raises:
            ValueError: The steps of this loop are no such function, as with a line search. Or its
                numbers differ from step to step, and there is none for this step.
        """
        name = type(self).__name__
        if self.differentiable:
            raise ValueError(
                f"inner: got {name}, which does not define take_step, the step as a function; "
                "define it, or use 'unrolled'"
            )
        raise ValueError(
            f"inner: got {name}, whose steps are not differentiable; use GradientDescent"
        )

    def initial_slots(self, names: Iterable[str], meta: Params) -> OptimizerState:
        """The slots of the optimiser before the first step that are not 0, by parameter."""
        return {}

    def decay(self, meta: Params, parameter: str) -> float | Tensor:
        """λ ≥ 0 of the penalty λ/2 ‖θ‖² that the loop adds to the loss of a parameter.

        With weight decay of this kind (L2), the loop converges to a stationary point of the
        penalised loss.

        Args:
            meta: The meta-parameters, where `FromMeta` numbers are read.
            parameter: The name of the parameter.
        """
        return 0.0

    def updated(self, **changes: Any) -> InnerLoop:
        """A copy of this loop in which some fields have other values.

        Raises:
            TypeError: The loop has no such field.
            ValueError: A value is out of range.
        """
        # Every subclass is a dataclass, which the type of this class does not say.
        instance: Any = self
        changed: InnerLoop = replace(instance, **changes)
        return changed

    def with_steps(self, steps: int) -> InnerLoop:
        """The loop with up to `steps` ≥ 1 steps. A loop that has no choice stays as it is."""
        return self.updated(steps=steps)

    def reads(self, key: str) -> bool:
        """Whether a number of this loop is read from the meta-parameter `key`.

        A loop from elsewhere may read others in `take_step`. Methods find those of its first step.
        """
        numbers = [number for _, number in self._numbers()]
        return any(isinstance(x, FromMeta) and x.reads(key) for x in numbers)

    def learns_before(self, step: int) -> bool:
        """Whether some number that only steps before `step` use is read from φ."""
        return False

    def check(self) -> None:
        """Raise ValueError if `steps` or `tol` is out of range."""
        check_count("steps", self.steps, unit=" inner step")
        if self.tol is not None and not self.tol > 0:
            raise ValueError(f"tol: got {self.tol}, expected a gradient norm > 0, or None")

    def check_captured(self) -> None:
        """Raise ValueError if a number of this loop is a tensor that requires grad.

        Its gradient would be lost, because methods differentiate with respect to `meta` only.
        """
        for name, number in self._numbers():
            if isinstance(number, Tensor) and number.requires_grad:
                raise ValueError(
                    f"{name}: got a tensor that requires grad, expected FromMeta({name!r}) and "
                    f"meta[{name!r}]"
                )

    def check_at(self, params: Params, meta: Params) -> None:
        """Raise ValueError if the options do not suit the parameters, or φ. By default, they do.

        Args:
            params: θ, of which the names are read.
            meta: φ, where `FromMeta` numbers are read.
        """
        return

    def _numbers(self) -> Iterator[tuple[str, Any]]:
        """All numbers of this loop with their names. Those of dicts, lists and tuples as well."""
        fields = dict(vars(self))
        fields |= fields.pop("options", {})
        for name, setting in fields.items():
            for number in numbers_in(setting):
                yield name, number


def gradient_norm(loss: StepLoss, params: Params) -> Tensor:
    """‖∂f/∂θ‖ of each task at a point, `[tasks]`, without a graph.

    Args:
        loss: `(params, t) -> [tasks]`. It is called with t = 0.
        params: θ, `{name: [tasks, *shape]}`.

    Example:
        >>> gradient_norm(lambda params, t: params["w"].square().sum(1), {"w": torch.ones(1, 1)})
        tensor([2.])
    """
    theta = leaves(params)
    with torch.enable_grad():
        total = loss(theta, 0).sum()
        gradients = torch.autograd.grad(
            total,
            list(theta.values()),
            allow_unused=True,
            materialize_grads=True,
        )
    norm: Tensor = flatten(dict(zip(theta, gradients, strict=True))).norm(dim=-1)
    return norm


def straight_through(params: Params, start: Params) -> Params:
    """The values of `params` with the gradient of `start`.

    The steps between the two points are pulled back as the identity on `start`, and as zero on
    everything else.

    Args:
        params: θ_T, `{name: [tasks, *shape]}`.
        start: θ_0, of the same names and shapes.

    Returns:
        θ_T. Its entries require grad where those of `start` do.

    Example:
        >>> import torch
        >>> start = {"w": torch.zeros(1, requires_grad=True)}
        >>> end = straight_through({"w": torch.tensor([3.0])}, start)["w"]
        >>> end.square().sum().backward()  # d(w²)/dw = 6 at w = 3
        >>> end.item(), start["w"].grad
        (3.0, tensor([6.]))
    """
    result = {}
    for name, p in params.items():
        result[name] = p.detach()
        initial = start[name]
        if is_differentiated(initial):
            # This difference is zero, and its derivative in θ_0 is the identity.
            result[name] = result[name] + (initial - initial.detach())
    return result
