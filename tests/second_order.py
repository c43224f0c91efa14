"""Models, data, optimisers and dense matrices that the tests of second-order optimisers share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from oracles import randn
from torch import Tensor, nn

from metaimplicit.optim import KFAC, GaussNewton, NaturalGradient, Newton
from metaimplicit.solvers import CG

EXAMPLES = 12
INPUTS = 3
CLASSES = 4
X = randn(EXAMPLES, INPUTS, seed=1)
LABELS = torch.arange(EXAMPLES).remainder(CLASSES)
TARGETS = randn(EXAMPLES, CLASSES, seed=2)

# Conjugate gradients to round-off, for comparison with dense matrices.
EXACT = CG(max_steps=400, tol=1e-14)


def half_square(z: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (z - y).square().sum(-1).mean()


def network(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    """Two linear layers with others between them."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(INPUTS, 4), *layers, nn.Linear(4, CLASSES)).double()


def tanh_network(seed: int = 0) -> nn.Sequential:
    return network(nn.Tanh(), seed=seed)


class Point(nn.Module):
    """A vector to be minimised over."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.x = nn.Parameter(start.clone())


def vector(model: nn.Module) -> Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradient_vector(loss: Tensor, model: nn.Module) -> Tensor:
    """The gradient of a scalar, whose graph is retained, as one vector."""
    gradients = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    return torch.cat([g.flatten() for g in gradients])


def per_example_gradients(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """The gradients of the cross-entropy of each example, as rows."""
    rows = [
        gradient_vector(F.cross_entropy(model(x[None]), y[None]), model)
        for x, y in zip(inputs, labels, strict=True)
    ]
    return torch.stack(rows)


def outputs_of_vector(model: nn.Module, inputs: Tensor) -> Callable[[Tensor], Tensor]:
    """The outputs as a function of the parameters as one vector."""
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def outputs(flat: Tensor) -> Tensor:
        parts = torch.split(flat, [shape.numel() for shape in shapes.values()])
        params = {
            name: part.reshape(shape)
            for part, (name, shape) in zip(parts, shapes.items(), strict=True)
        }
        return torch.func.functional_call(model, params, (inputs,))

    return outputs


def softmax_fisher(z: Tensor) -> Tensor:
    """The Fisher matrix of the mean log-likelihood in its outputs `[m, d]`, `[m d, m d]`."""
    blocks = [torch.diag(p) - torch.outer(p, p) for p in z.softmax(-1)]
    return torch.block_diag(*blocks) / len(z)


def gaussian_fisher(z: Tensor) -> Tensor:
    return torch.eye(z.numel()).to(z) / len(z)


def dense_curvature(
    model: nn.Module, loss: Callable[..., Tensor], targets: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    """(g, C) at the model's parameters by autograd on the flat vector.

    C is the matrix of `kind`: `"hessian"`, `"gauss-newton"`, `"softmax"` or `"gaussian"`, the last
    two being Fisher matrices.
    """
    outputs = outputs_of_vector(model, X)
    at = vector(model)
    g = torch.func.grad(lambda v: loss(outputs(v), targets))(at)
    if kind == "hessian":
        return g, torch.func.hessian(lambda v: loss(outputs(v), targets))(at)
    jacobian = torch.func.jacrev(outputs)(at).flatten(0, -2)
    z = outputs(at)
    if kind == "gauss-newton":

        def output_loss(flat: Tensor) -> Tensor:
            return loss(flat.reshape(z.shape), targets)

        inner = torch.func.hessian(output_loss)(z.flatten())
    else:
        inner = softmax_fisher(z) if kind == "softmax" else gaussian_fisher(z)
    return g, jacobian.T @ inner @ jacobian


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "newton": Newton,
    "newton-cg": lambda model: Newton(model, solver=CG(max_steps=8)),
    "gauss-newton": lambda model: GaussNewton(model, F.cross_entropy),
    "natural": lambda model: NaturalGradient(
        model, F.cross_entropy, expectation="monte-carlo", seed=3
    ),
    "kfac": lambda model: KFAC(
        model,
        F.cross_entropy,
        lr=0.01,
        update_every=2,
        invert_every=4,
        kl_clip=None,
        adapt_every=3,
        seed=3,
    ),
}


def closure_for(
    name: str,
    model: nn.Module,
    x: Tensor = X,
    y: Tensor = LABELS,
) -> Callable[[], Any]:
    """The closure that the optimiser `name` of `OPTIMIZERS` expects."""
    if name.startswith("newton"):
        return lambda: F.cross_entropy(model(x), y)
    return lambda: (model(x), y)
