"""θ* as a function of φ that autograd differentiates by what a method knows of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from metaimplicit.graph import is_differentiated
from metaimplicit.methods.base import Adaptation, Method, Stationarity
from metaimplicit.methods.equation import Equation, Rule, Tensors
from metaimplicit.methods.shared import warn_if_inaccurate
from metaimplicit.params import Params
from metaimplicit.tensors import tensors_in


def attach_pullback(
    adaptation: Adaptation,
    method: Method,
    meta: Params,
    *,
    data: Any,
    name: str = "argmin",
) -> Params:
    """θ* as a function of φ, which autograd differentiates by the adaptation's pullback.

    Where the adaptation has its stationarity, tangents pass in forward mode. If A is the Hessian,
    derivatives of every order exist.

    Args:
        adaptation: θ* and its pullback.
        method: The method that made it.
        meta: φ. Gradients flow to the entries that require grad, and tangents flow from those that
            have one.
        data: The data, which the backward pass reads again.
        name: The function that warnings name, `"argmin"` or `"root"`.

    Returns:
        θ*, `{name: [tasks, *shape]}`. Its backward pass raises ValueError for a gradient that the
        method cannot give, and RuntimeError if an entry of φ or a tensor of the data was changed in
        place. A further derivative raises RuntimeError if it does not exist.
    """
    phi = {name: m for name, m in meta.items() if is_differentiated(m)}
    rule = _MethodRule(adaptation, method, tuple(phi), name=name)
    rule.constants = [x for x in _held_tensors(data) if not x.is_inference()]
    values = rule.attach(list(adaptation.params.values()), list(phi.values()))
    return dict(zip(adaptation.params, values, strict=True))


def _held_tensors(data: Any) -> list[Tensor]:
    """The tensors of a pytree, and those that its objects of other types have as attributes."""
    objects = [x for x in tree_leaves(data) if not isinstance(x, Tensor) and hasattr(x, "__dict__")]
    return tensors_in([data, *(vars(x) for x in objects)])


def forward_mode_error(method: str, *, name: str = "argmin") -> RuntimeError:
    """The error for tangents that do not pass through a method.

    Args:
        method: The method, or the solver of `root`.
        name: The function that was called, `"argmin"` or `"root"`.

    Example:
        >>> print(forward_mode_error("sama"))
        argmin has no derivative in forward mode under sama; use 'unrolled', an implicit method \
without finite differences, or reverse mode
    """
    others = "'unrolled', an implicit method without finite differences, or "
    return RuntimeError(
        f"{name} has no derivative in forward mode under {method}; use "
        f"{others if name == 'argmin' else ''}reverse mode"
    )


class _MethodRule(Rule):
    """The derivatives of θ* in some entries of φ, by a method."""

    def __init__(
        self, adaptation: Adaptation, method: Method, names: tuple[str, ...], *, name: str
    ) -> None:
        self.adaptation = adaptation
        self.method = method
        self.names = names
        self.name = name
        stationarity = adaptation.stationarity
        self.equation = None if stationarity is None else self._equation(stationarity)
        self.is_exact = stationarity is not None and stationarity.is_exact

    def _equation(self, stationarity: Stationarity) -> Equation:
        parameters = tuple(self.adaptation.params)

        def residual(x: Tensors, p: Tensors) -> Tensors:
            theta = dict(zip(parameters, x, strict=True))
            phi = dict(zip(self.names, p, strict=True))
            return list(stationarity.residual(theta, phi).values())

        def solve(v: Tensors) -> Tensors:
            return list(stationarity.solve(dict(zip(parameters, v, strict=True))).values())

        return Equation(residual, solve)

    def pull_back(
        self, x: Tensors, p: Tensors, v: Tensors, *, again: bool
    ) -> Sequence[Tensor | None]:
        """(dθ*/dφ)ᵀ v. It raises ValueError for a gradient that the method cannot give."""
        gradients: Sequence[Tensor | None]
        if again and self.equation is not None and self.is_exact:
            gradients = self.equation.pull_back(x, p, v, again=True)
        else:
            gradients = self._pull_numbers_back(p, v)
            if again:
                gradients = [g if g is None else self._once(g, [*p, *v]) for g in gradients]
        for name, gradient in zip(self.names, gradients, strict=True):
            if gradient is None:
                self.method.check_reach(name, self.adaptation.dependencies)
        return gradients

    def push_forward(self, x: Tensors, p: Tensors, tangents: Tensors) -> Tensors:
        """(dθ*/dφ) φ̇."""
        if self.equation is None:
            raise forward_mode_error(self.adaptation.report.method, name=self.name)
        if self.is_exact:
            return self.equation.push_forward(x, p, tangents)
        at = [tensor.detach() for tensor in p]
        numbers = self.equation.push_forward([part.detach() for part in x], at, tangents)
        return [self._once(part.detach(), [*p, *tangents]) for part in numbers]

    def _pull_numbers_back(self, p: Tensors, v: Tensors) -> list[Tensor | None]:
        vectors = {
            name: part.detach() for name, part in zip(self.adaptation.params, v, strict=True)
        }
        phi = dict(zip(self.names, p, strict=True))
        gradients, report = self.adaptation.pull_back(vectors, phi)
        warn_if_inaccurate(self.name, report.judged())
        return [gradients[name] for name in self.names]

    def _once(self, derivative: Tensor, arguments: Sequence[Tensor]) -> Tensor:
        """The derivative, whose own derivative in any of the arguments is an error."""
        message = f"{self.name} is differentiable once under {self.adaptation.report.method}"
        if self.name == "argmin":
            message += (
                "; for higher derivatives use an implicit method on the Hessian, without damping "
                "or finite differences, or 'unrolled'"
            )
        attached: Tensor = _DifferentiableOnce.apply(derivative, message, *arguments)
        return attached


class _DifferentiableOnce(torch.autograd.Function):
    """The identity on a derivative. To differentiate it is an error."""

    @staticmethod
    def forward(ctx: Any, derivative: Tensor, message: str, *_: Tensor) -> Tensor:
        ctx.message = message
        return derivative.clone()

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError(ctx.message)

    jvp = backward
