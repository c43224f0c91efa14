"""One meta-gradient in plain `torch.func`, written by hand for one network: the limit of a race.

It is what contenders are compared with: nothing is checked, measured or reported. All parameters of
a task are one vector, and the tasks are the rows of a matrix. The iterates are kept, and each step
is evaluated again on the way back.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gradient_contenders import Step, Workload

PRODUCTS = 5


class Functions(NamedTuple):
    """The functions of a workload.

    Attributes:
        phi: The initialisation, `[n]`.
        split: It turns `[n]` into the parameters by name.
        step: θ − lr ∂f/∂θ, of θ `[tasks, n]`.
        pull: `(θ, v)` to (∂step/∂θ)ᵀ v.
        product: `(θ, v)` to (∂²f/∂θ²) v.
        outer_gradient: θ to the gradient of the mean query loss.
    """

    phi: Tensor
    split: Callable[[Tensor], dict[str, Tensor]]
    step: Callable[..., Any]
    pull: Callable[..., Any]
    product: Callable[..., Any]
    outer_gradient: Callable[..., Any]

    def compiled(self) -> Functions:
        """The same, compiled."""
        compile_it = partial(torch.compile, fullgraph=True, dynamic=False)
        return Functions(self.phi, self.split, *map(compile_it, self[2:]))


def make_functions(workload: Workload) -> Functions:
    """The functions of a workload, not compiled."""
    model = workload.make_model()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    phi = torch.cat([p.flatten() for p in parameters.values()])
    support, query = workload.draw()

    def split(vector: Tensor) -> dict[str, Tensor]:
        parts = vector.split([p.numel() for p in parameters.values()])
        pairs = zip(parts, parameters.items(), strict=True)
        return {name: part.view(p.shape) for part, (name, p) in pairs}

    def loss(vector: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        outputs: Tensor = torch.func.functional_call(model, split(vector), (inputs,))
        return workload.loss(outputs, targets)

    gradient = torch.vmap(torch.func.grad(loss))

    def inner_gradient(theta: Tensor) -> Tensor:
        slopes: Tensor = gradient(theta, *support)
        return slopes + workload.proximal * (theta - phi)

    def step(theta: Tensor) -> Tensor:
        return theta - workload.lr * inner_gradient(theta)

    def pull(theta: Tensor, vectors: Tensor) -> Tensor:
        pulled: Tensor = torch.func.vjp(step, theta)[1](vectors)[0]
        return pulled

    def product(theta: Tensor, vectors: Tensor) -> Tensor:
        multiplied: Tensor = torch.func.vjp(inner_gradient, theta)[1](vectors)[0]
        return multiplied

    def outer_gradient(theta: Tensor) -> Tensor:
        slopes: Tensor = gradient(theta, *query)
        return slopes / workload.tasks

    return Functions(phi, split, step, pull, product, outer_gradient)


def by_hand(workload: Workload, *, compile: bool) -> Step:
    """The meta-gradient of a workload.

    Args:
        workload: The workload.
        compile: Whether its functions are compiled.
    """
    functions = make_functions(workload)
    if compile:
        functions = functions.compiled()

    @torch.no_grad()
    def meta_gradient() -> list[Tensor]:
        theta = functions.phi.expand(workload.tasks, -1).contiguous()
        path = []
        for _ in range(workload.steps):
            path.append(theta)
            theta = functions.step(theta)
        vectors = functions.outer_gradient(theta)
        if workload.proximal:
            # dg/dφ = λ u with A u = ∂g/∂θ, because ∂²f/∂θ∂φ = −λ.
            solution = conjugate_gradients(partial(functions.product, theta), vectors)
            total = workload.proximal * solution.sum(0)
        else:
            for before in reversed(path):
                vectors = functions.pull(before, vectors)
            total = vectors.sum(0)
        return list(functions.split(total).values())

    return meta_gradient


def conjugate_gradients(product: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    """`PRODUCTS` steps of CG on A u = b from u = 0, for each row."""
    u = torch.zeros_like(b)
    residual = direction = b
    square = (b * b).sum(1, keepdim=True)
    for _ in range(PRODUCTS):
        curved = product(direction)
        length = square / (direction * curved).sum(1, keepdim=True)
        u = u + length * direction
        residual = residual - length * curved
        new_square = (residual * residual).sum(1, keepdim=True)
        direction = residual + new_square / square * direction
        square = new_square
    return u
