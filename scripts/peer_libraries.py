"""A small problem, its exact values, and its hypergradients by public libraries."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

SIZE = 8
STEPS = 8  # of CG and of Neumann's series
SCALE = 0.1  # step of Neumann's series
RHO = 0.1  # damping of Nyström
ADAM_STEPS = 5
IDENTITY = torch.eye(SIZE, dtype=torch.float64)

# H has the eigenvalues 1 … 8 and random eigenvectors.
_draw = torch.Generator().manual_seed(0)
_basis = torch.linalg.qr(
    torch.randn(
        SIZE,
        SIZE,
        generator=_draw,
        dtype=torch.float64,
    )
).Q
H = _basis @ torch.diag(torch.arange(1.0, SIZE + 1, dtype=torch.float64)) @ _basis.T
V = torch.randn(SIZE, generator=_draw, dtype=torch.float64)
# The Hessian of a network with a dead unit has a row and a column of zeros.
DEAD_UNIT_H = H.clone()
DEAD_UNIT_H[:, -1] = 0.0
DEAD_UNIT_H[-1] = 0.0


def inner_loss(theta: Tensor, phi: Tensor, h: Tensor = H) -> Tensor:
    """The inner loss f = ½θᵀHθ − φᵀθ. With the outer loss g = vᵀθ the hypergradient is H⁻¹v."""
    return 0.5 * (h @ theta).dot(theta) - phi.dot(theta)


def neumann_polynomial(terms: int) -> Tensor:
    """The polynomial s Σ_k (I − sH)ᵏ v for k = 0 … terms − 1, with the step s = `SCALE`."""
    step = IDENTITY - SCALE * H
    total = torch.zeros_like(V)
    for k in range(terms):
        total = total + torch.linalg.matrix_power(step, k) @ V
    return SCALE * total


def hypergrad(name: str, h: Tensor = H, **options: Any) -> Tensor:
    """The hypergradient of the package hypergrad, by its function of a name."""
    solve = getattr(import_module("hypergrad.approx_hypergrad"), name)
    zero = torch.zeros(SIZE, dtype=torch.float64)
    gradients = solve(
        lambda theta, phi: inner_loss(theta[0], phi[0], h),
        lambda theta, phi: V @ theta[0] + 0 * phi[0].sum(),
        (zero,),
        (zero,),
        **options,
    )
    gradient: Tensor = gradients[0]
    return gradient


def betty(name: str, **options: Any) -> Tensor:
    """The hypergradient of the package betty, by its function of a name."""
    solve = getattr(import_module(f"betty.hypergradient.{name}"), name)
    theta = torch.zeros(SIZE, dtype=torch.float64, requires_grad=True)
    phi = torch.zeros(SIZE, dtype=torch.float64, requires_grad=True)
    lower = SimpleNamespace(
        paths=[],
        config=SimpleNamespace(**options),
        cur_batch=None,
        training_step_exec=lambda batch: inner_loss(theta, phi),
        trainable_parameters=lambda: [theta],
        parameters=lambda: [theta],
    )
    upper = SimpleNamespace(trainable_parameters=lambda: [phi])
    gradient: Tensor = solve([V], lower, upper)[0]
    return gradient


def torchopt(name: str, **options: Any) -> Tensor:
    """H⁻¹v by the package torchopt, by its function of a name."""
    solve = getattr(import_module("torchopt.linalg"), name)
    solution: Tensor = solve(lambda x: H @ x, V, **options)
    return solution


def adam_end(beta: Tensor) -> Tensor:
    """vᵀθ after steps of torch's Adam with β₂ = `beta`."""
    theta = torch.ones(SIZE, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=0.1, betas=(0.9, float(beta)))
    for _ in range(ADAM_STEPS):
        optimizer.zero_grad()
        inner_loss(theta, V).backward()
        optimizer.step()
    return V @ theta.detach()


def adam_slope(beta: Tensor, step: float = 1e-4) -> Tensor:
    """The derivative of `adam_end` by central differences, extrapolated to order h⁴."""

    def slope(h: float) -> Tensor:
        return (adam_end(beta + h) - adam_end(beta - h)) / (2 * h)

    # Richardson: the errors of order h² cancel.
    return (4 * slope(step / 2) - slope(step)) / 3


def higher_adam_slope(beta: Tensor) -> Tensor:
    """The derivative of `adam_end` by the package higher alone."""
    higher = import_module("higher")
    theta = torch.ones(SIZE, dtype=torch.float64, requires_grad=True)
    beta = beta.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.1)
    override = {"betas": [(0.9, beta)]}
    differentiable = higher.get_diff_optim(optimizer, [theta], override=override)
    current = theta
    for _ in range(ADAM_STEPS):
        (current,) = differentiable.step(inner_loss(current, V), params=[current])
    return torch.autograd.grad(V @ current, beta)[0]
