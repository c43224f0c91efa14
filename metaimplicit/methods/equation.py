"""Functions that autograd differentiates by a rule, and the rule of implicit functions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor

from metaimplicit.graph import tangent_of, without_graph
from metaimplicit.unsupported import UnsupportedOperationError

Tensors = Sequence[Tensor]


def aliases(tensors: Tensors) -> list[Tensor]:
    """The same tensors as other nodes of the graph, which require grad.

    The derivative in an alias is partial: it leaves out the other ways to the tensor itself.

    Example:
        >>> x = torch.tensor(2.0, requires_grad=True)
        >>> (alias,) = aliases([x])
        >>> torch.autograd.grad(x * alias, [x, alias])  # d(x²)/dx, and x
        (tensor(4.), tensor(2.))
    """
    views = [tensor.view_as(tensor) for tensor in tensors]
    return [view if view.requires_grad else view.requires_grad_() for view in views]


class Rule(ABC):
    """How autograd differentiates x as a function of p, both sequences of tensors.

    Attributes:
        constants: Further tensors that the rule reads. As with p, autograd raises an error if one
            was changed in place before it differentiates x.

    Example:
        x = 3p, by a rule that holds at every order.

        >>> class Triple(Rule):
        ...     def pull_back(self, x, p, v, *, again):
        ...         return [3 * v[0]]
        ...     def push_forward(self, x, p, tangents):
        ...         return [3 * tangents[0]]
        >>> p = torch.tensor(2.0, requires_grad=True)
        >>> (x,) = Triple().attach([torch.tensor(6.0)], [p])
        >>> x.backward()
        >>> p.grad
        tensor(3.)
    """

    constants: Tensors = ()

    @abstractmethod
    def pull_back(
        self, x: Tensors, p: Tensors, v: Tensors, *, again: bool
    ) -> Sequence[Tensor | None]:
        """(dx/dp)ᵀ v. None is zero.

        Args:
            x: The values, with their graph to p if `again`.
            p: The arguments, with the graph that they have.
            v: A vector for each of the values.
            again: Whether the result is differentiated, so that it needs its graph to x, p and v.
        """

    @abstractmethod
    def push_forward(self, x: Tensors, p: Tensors, tangents: Tensors) -> Tensors:
        """(dx/dp) ṗ, with its graph to x, p and ṗ."""

    def attach(self, x: Tensors, p: Tensors) -> tuple[Tensor, ...]:
        """The numbers x as a function of p, which autograd differentiates by this rule."""
        values: tuple[Tensor, ...] = _Attached.apply(tuple(x), self, *p)
        return values


@dataclass(frozen=True)
class Equation(Rule):
    """F(x, p) = 0 with a symmetric A = ∂F/∂x, which makes x a function of p.

    For vectors v at x and tangents ṗ at p,

        (dx/dp)ᵀ v = −(∂F/∂p)ᵀ A⁻¹ v    and    (dx/dp) ṗ = −A⁻¹ (∂F/∂p) ṗ.

    Both are differentiable, since u = A⁻¹ v is itself the root of A(x, p) u − v = 0, whose matrix
    is A again: derivatives of every order are solves with it.

    Attributes:
        residual: F, `(x, p) -> tensors`, with its graph to x and p.
        solve: v ↦ A⁻¹ v at the root, numbers without a graph.

    Example:
        x² = p, so that x = √p, and A = 2x is 6 at p = 9.

        >>> p = torch.tensor(9.0, requires_grad=True)
        >>> equation = Equation(
        ...     residual=lambda x, p: [x[0].square() - p[0]],
        ...     solve=lambda v: [v[0] / 6],
        ... )
        >>> (x,) = equation.attach([torch.tensor(3.0)], [p])
        >>> (slope,) = torch.autograd.grad(x, p, create_graph=True)
        >>> slope.backward()
        >>> round(slope.item(), 4), round(p.grad.item(), 6)  # 1/(2√p) and −1/(4p√p)
        (0.1667, -0.009259)
    """

    residual: Callable[[Tensors, Tensors], Tensors]
    solve: Callable[[Tensors], Tensors]

    def pull_back(
        self, x: Tensors, p: Tensors, v: Tensors, *, again: bool
    ) -> Sequence[Tensor | None]:
        """(dx/dp)ᵀ v = −(∂F/∂p)ᵀ u with A u = v."""
        u = self._solve(x, p, v)
        at = aliases(p)
        return _vjp(self.residual(x, at), at, [-part for part in u])

    def push_forward(self, x: Tensors, p: Tensors, tangents: Tensors) -> Tensors:
        """(dx/dp) ṗ = −u with A u = (∂F/∂p) ṗ."""
        at = aliases(p)
        values = self.residual(x, at)

        # h = (∂F/∂p)ᵀ w is linear in w, so (∂h/∂w)ᵀ ṗ = (∂F/∂p) ṗ.
        w = [torch.zeros_like(value).requires_grad_() for value in values]
        h = _vjp(values, at, w)
        pairs = [(part, t) for part, t in zip(h, tangents, strict=True) if part is not None]
        moved = _vjp([part for part, _ in pairs], w, [t for _, t in pairs])

        right = [torch.zeros_like(z) if m is None else m for m, z in zip(moved, w, strict=True)]
        return [-part for part in self._solve(x, p, right)]

    def _solve(self, x: Tensors, p: Tensors, v: Tensors) -> tuple[Tensor, ...]:
        """The solution of A u = v as a function of x, p and v: the root of A(x, p) u − v = 0.

        `self.solve` gives its numbers, and that equation its derivatives.
        """

        def residual(u: Tensors, arguments: Tensors) -> Tensors:
            at = aliases(arguments[: len(x)])
            rest = arguments[len(x) : len(x) + len(p)]
            products = _vjp(self.residual(at, rest), at, u)
            right = arguments[len(x) + len(p) :]
            return [
                -v if product is None else product - v
                for product, v in zip(products, right, strict=True)
            ]

        system = Equation(residual, self.solve)
        return system.attach(self.solve([part.detach() for part in v]), [*x, *p, *v])


class _Attached(torch.autograd.Function):
    """Given values as a function of inputs, differentiated by a `Rule`."""

    @staticmethod
    def forward(ctx: Any, values: tuple[Tensor, ...], rule: Rule, *inputs: Tensor) -> Any:
        ctx.rule = rule
        ctx.values = values
        ctx.count = len(inputs)
        ctx.save_for_backward(*inputs, *rule.constants)
        ctx.save_for_forward(*inputs)
        return tuple(value.clone() for value in values)

    @staticmethod
    def backward(ctx: Any, *vectors: Tensor) -> Any:
        _reject_legacy_batches(vectors)
        inputs = ctx.saved_tensors[: ctx.count]  # raises an error if one was changed in place
        # In forward mode, the gradient needs its tangent as well.
        tangents = [tangent_of(tensor) for tensor in (*inputs, *vectors)]
        again = torch.is_grad_enabled() or any(tangent is not None for tangent in tangents)
        with torch.enable_grad():
            values = ctx.rule.attach(ctx.values, inputs) if again else ctx.values
            gradients = ctx.rule.pull_back(values, inputs, vectors, again=again)
        if not torch.is_grad_enabled():
            gradients = [None if g is None else without_graph(g) for g in gradients]
        return None, None, *gradients

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, *tangents: Tensor | None) -> Any:
        _reject_legacy_batches([t for t in tangents if t is not None])
        inputs = ctx.saved_tensors[: ctx.count]
        pairs = zip(inputs, tangents, strict=True)
        known = [torch.zeros_like(x) if t is None else t for x, t in pairs]
        with torch.enable_grad():
            values = ctx.rule.attach(ctx.values, inputs)
            pushed = ctx.rule.push_forward(values, inputs, known)
        is_variable = any(tensor.requires_grad for tensor in (*inputs, *known))
        if not torch.is_grad_enabled() or not is_variable:
            pushed = [part.detach() for part in pushed]
        return tuple(pushed)


def _reject_legacy_batches(vectors: Iterable[Tensor]) -> None:
    """Raise an error for vectors that torch's own functions have batched."""
    if any(is_legacy_batchedtensor(v) for v in vectors):
        raise UnsupportedOperationError(
            "Batching rule not implemented for argmin and root: got a batch of vectors or "
            "tangents, expected one at a time; leave out is_grads_batched=True, or "
            "vectorize=True of torch.autograd.functional"
        )


def _vjp(outputs: Tensors, inputs: Tensors, vectors: Tensors) -> list[Tensor | None]:
    """(∂outputs/∂inputs)ᵀ vectors with its graph. None where no path leads to an input."""
    pairs = [(out, v) for out, v in zip(outputs, vectors, strict=True) if out.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    return list(
        torch.autograd.grad(
            [out for out, _ in pairs],
            inputs,
            [v for _, v in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )
