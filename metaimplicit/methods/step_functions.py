"""The inner step s_{t+1} = Φ_t(s_t, φ) and its pull, of which the methods that replay are made."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from metaimplicit.graph import check_differentiable, check_twice_differentiable
from metaimplicit.inner import InnerLoop
from metaimplicit.iterate import Iterate
from metaimplicit.lifted import LiftedProblem
from metaimplicit.methods.base import Dependencies, Gradients
from metaimplicit.methods.shared import dependencies_of_loss
from metaimplicit.params import Params, detached, flatten, leaves
from metaimplicit.problem import Stream

# A tensor of s: a parameter and one of its slots, or "" for the parameter itself.
Slot = tuple[str, str]
# λ, by the tensors of s. None is zero.
Cotangents = Mapping[Slot, Tensor | None]


class StepFunctions(ABC):
    """The step and its pull, where s = (θ, the state of the optimiser).

    No graph outlives a call: the pull linearises the step again.

    Attributes:
        inner: The inner loop.
        meta: φ, leaves of autograd.
        dependencies: What θ depends on, as far as the steps that were taken have shown.
    """

    inner: InnerLoop
    meta: Params
    dependencies: Dependencies

    @abstractmethod
    def step(self, at: Iterate, t: int) -> tuple[Iterate, Tensor]:
        """s_{t+1} = Φ_t(s_t, φ), and ‖∂f/∂θ(θ_t)‖ as `[tasks]`, both without a graph."""

    @abstractmethod
    def pull(self, at: Iterate, t: int, cotangents: Cotangents) -> tuple[Cotangents, Gradients]:
        """λ_t = (∂Φ_t/∂s)ᵀ λ_{t+1}, and (∂Φ_t/∂φ)ᵀ λ_{t+1}.

        Args:
            at: s_t.
            t: The number of the step.
            cotangents: λ_{t+1}. It may lack tensors of s_{t+1} for which it is zero.

        Returns:
            λ_t, and a gradient for each entry of φ. None where no path leads to it.
        """

    def start(self, at: Iterate) -> Iterate:
        """The start of the loop as the functions expect it."""
        return at

    def finish(self, end: Iterate) -> Iterate:
        """The end of the loop as other loops expect it."""
        return end

    def warn_if_replay_differed(self) -> None:
        """Warn if a step differed when it was taken again, where the functions notice."""
        return


class EagerSteps(StepFunctions):
    """The step and its pull, by autograd.

    Args:
        problem: The problem, lifted over the task axis.
        inner: The inner loop.
        meta: φ, leaves of autograd.
        dependencies: To be completed by what the inner loss depends on.

    Example:
        One step of size ¼ on f = w² takes w to w/2.

        >>> from metaimplicit import BilevelProblem, GradientDescent
        >>> problem = BilevelProblem(
        ...     init=lambda meta, data: {"w": torch.ones(())},
        ...     inner_loss=lambda params, meta, data: params["w"].square(),
        ...     outer_loss=lambda params, meta, data: params["w"],
        ... )
        >>> inner = GradientDescent(steps=1, lr=0.25)
        >>> lifted = LiftedProblem(problem, data=None, batched=False)
        >>> functions = EagerSteps(lifted, inner, {}, Dependencies(inner))
        >>> start = Iterate({"w": torch.tensor([3.0])})
        >>> functions.step(start, 0)[0].params
        {'w': tensor([1.5000])}
        >>> functions.pull(start, 0, {("w", ""): torch.tensor([1.0])})[0]
        {('w', ''): tensor([0.5000])}
    """

    def __init__(
        self,
        problem: LiftedProblem,
        inner: InnerLoop,
        meta: Params,
        dependencies: Dependencies,
    ) -> None:
        self.problem = problem
        self.inner = inner
        self.meta = meta
        self.dependencies = dependencies
        self._constants = detached(meta)
        self._norms: dict[int, Tensor] = {}  # ‖∂f/∂θ‖ at each step, `[tasks]`
        self._norms_again: dict[int, Tensor] = {}  # when it was taken again
        self._is_checked = False

    def step(self, at: Iterate, t: int) -> tuple[Iterate, Tensor]:
        """Take the step."""
        theta = leaves(at.params)
        losses = self.problem.inner(theta, self.meta, self.problem.at(t))
        self._note_dependencies(losses, theta, t)
        gradients = inner_gradients(losses, theta)
        with torch.no_grad():
            params, state = self.inner.take_step(
                at.params, gradients, at.state, self._constants, step=t
            )
        norm = flatten(gradients).norm(dim=-1)
        self._norms[t] = norm
        return Iterate(params, state), norm

    def pull(self, at: Iterate, t: int, cotangents: Cotangents) -> tuple[Cotangents, Gradients]:
        """Pull λ back through the step."""
        point = {slot: x.detach().requires_grad_() for slot, x in slot_tensors(at).items()}
        data = self.problem.at(t)

        def loss(theta: Params) -> Tensor:
            losses = self.problem.inner(theta, self.meta, data)
            if not self._is_checked:
                check_twice_differentiable([losses], theta.values(), ends=self.meta.values())
            return losses

        end, gradients = differentiable_step(
            loss,
            self.inner,
            with_slot_tensors(at, point),
            self.meta,
            number=t,
        )
        if not self._is_checked:
            check_differentiable(gradients.values())
            self._is_checked = True
        if gradients:
            self._norms_again[t] = flatten(detached(gradients)).norm(dim=-1)

        ends = slot_tensors(end)
        known = {slot: v for slot, v in cotangents.items() if v is not None}
        read = [slot for slot in known if ends[slot].requires_grad]
        phi = {name: m for name, m in self.meta.items() if m.requires_grad}
        products = torch.autograd.grad(
            [ends[slot] for slot in read],
            [*point.values(), *phi.values()],
            [known[slot] for slot in read],
            allow_unused=True,
        )
        of_state = dict(zip(point, products[: len(point)], strict=True))
        of_meta: Gradients = dict.fromkeys(self.meta)
        of_meta |= dict(zip(phi, products[len(point) :], strict=True))
        return of_state, of_meta

    def warn_if_replay_differed(self) -> None:
        """Warn if a step had another ∂f/∂θ when it was taken again, beyond round-off."""
        again = self._norms_again
        if not again:
            return
        first = torch.stack([self._norms[t] for t in again])
        change = (torch.stack(list(again.values())) - first).abs()
        allowed = torch.finfo(first.dtype).eps ** 0.5 * first.nan_to_num().max()
        has_changed = (change > allowed).any(dim=1).tolist()
        for t, changed in zip(again, has_changed, strict=True):
            if changed:
                warnings.warn(
                    f"memory='replay': inner step {t} has another gradient when it is taken again, "
                    "so the hypergradient is wrong. The inner loss reads what changes from call to "
                    "call, such as a buffer that a forward pass writes to; use memory='graph'",
                    RuntimeWarning,
                    stacklevel=2,
                )
                return

    def _note_dependencies(self, losses: Tensor, theta: Params, t: int) -> None:
        if t > 0 and not isinstance(self.problem.data, Stream):
            return
        in_loss, unread = dependencies_of_loss(
            self.problem,
            losses,
            theta,
            meta=self.meta,
        )
        self.dependencies.loss.update(in_loss)
        if t == 0:
            self.dependencies.idle.update(unread)


def differentiable_step(
    loss: Callable[[Params], Tensor],
    inner: InnerLoop,
    point: Iterate,
    meta: Params,
    *,
    number: int | None = None,
) -> tuple[Iterate, Params]:
    """s_{t+1} = Φ(s_t, φ) with its graph to s_t and φ, and ∂f/∂θ by the parameters that f reads.

    Args:
        loss: `{name: [tasks, *shape]} -> [tasks]`, the inner loss, with its graph to φ.
        inner: The inner loop.
        point: s_t, whose tensors are leaves of autograd.
        meta: φ, likewise.
        number: t. None stands for a step that belongs to no loop.
    """
    gradients = inner_gradients(loss(point.params), point.params, create_graph=True)
    params, state = inner.take_step(
        point.params,
        gradients,
        point.state,
        meta,
        step=number,
    )
    return Iterate(params, state), gradients


def inner_gradients(losses: Tensor, params: Params, *, create_graph: bool = False) -> Params:
    """∂f/∂θ, `{name: [tasks, *shape]}`, of the parameters that the losses read."""
    if not losses.requires_grad:
        return {}
    gradients = torch.autograd.grad(
        losses.sum(),
        list(params.values()),
        create_graph=create_graph,
        allow_unused=True,
    )
    pairs = zip(params, gradients, strict=True)
    return {name: g for name, g in pairs if g is not None}


def slot_tensors(at: Iterate) -> dict[Slot, Tensor]:
    """The tensors of s, without plain numbers such as a count of steps.

    Example:
        >>> list(slot_tensors(Iterate({"w": torch.ones(1)}, {"w": {"step": 1}})))
        [('w', '')]
    """
    tensors = {(name, ""): p for name, p in at.params.items()}
    for name, slots in at.state.items():
        tensors |= {(name, key): x for key, x in slots.items() if isinstance(x, Tensor)}
    return tensors


def with_slot_tensors(at: Iterate, tensors: dict[Slot, Tensor]) -> Iterate:
    """The same s = (θ, optimiser state) with other tensors in the places of its own.

    Args:
        at: s. What else it carries is left out.
        tensors: The tensors by slot, as `slot_tensors` returns them. All of θ is there. A slot that
            is missing keeps what it has.
    """
    params = {name: tensors[name, ""] for name in at.params}
    state = {
        name: {key: tensors.get((name, key), x) for key, x in slots.items()}
        for name, slots in at.state.items()
    }
    return Iterate(params, state)
