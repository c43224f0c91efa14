"""The adjoint equation of an implicit function: (∂F/∂s)ᵀ λ = v where F(s, φ) = 0."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from metaimplicit.methods.base import Gradients, vector_jacobian_product
from metaimplicit.operators import LinearOperator
from metaimplicit.params import Params, joint_dtype
from metaimplicit.solvers import Solver


class TransposedJacobian(LinearOperator):
    """(∂F/∂s)ᵀ of functions with a graph, `[tasks, N]` with N the numbers of one task's s.

    Args:
        functions: F, tensors `[tasks, *shape]` with their graph to `variables`.
        variables: s, leaves of autograd, each of the shape of its function.

    Example:
        >>> s = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> TransposedJacobian([s.square()], [s]).matvec(torch.ones(1, 2))
        tensor([[2., 4.]])
    """

    def __init__(self, functions: Sequence[Tensor], variables: Sequence[Tensor]) -> None:
        first = variables[0]
        self.functions = list(functions)
        self.variables = list(variables)
        self.sizes = [x[0].numel() for x in variables]
        self.shape = (len(first), sum(self.sizes))
        self.dtype = joint_dtype(variables)
        self.device = first.device

    def matvec(self, vector: Tensor) -> Tensor:
        """(∂F/∂s)ᵀ λ, `[tasks, N] -> [tasks, N]`."""
        products = torch.autograd.grad(
            self.functions,
            self.variables,
            self.split_vector(vector),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return self.join(products)

    def pull_back(self, vector: Tensor, meta: Params, *, retain_graph: bool = False) -> Gradients:
        """(∂F/∂φ)ᵀ λ. It frees the graph of F, unless that is retained."""
        functions = {str(i): f for i, f in enumerate(self.functions)}
        vectors = {str(i): x for i, x in enumerate(self.split_vector(vector))}
        return vector_jacobian_product(functions, meta, vectors, retain_graph=retain_graph)

    def split_vector(self, vector: Tensor) -> list[Tensor]:
        """`[tasks, N]` in the shapes of the variables."""
        parts = vector.split(self.sizes, dim=1)
        return [part.reshape(x.shape) for part, x in zip(parts, self.variables, strict=True)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The inverse of `split_vector`."""
        return torch.cat([part.detach().reshape(len(part), -1) for part in parts], dim=1)


def check_solver(name: str, solver: Solver) -> None:
    """Raise ValueError for what is no solver, or needs a symmetric matrix, which ∂F/∂s is not."""
    if not isinstance(solver, Solver):
        raise ValueError(f"{name} solver: got {solver!r}, expected a solver, such as GMRES()")
    if not solver.takes_asymmetric:
        raise ValueError(
            f"{name} solver: got {type(solver).__name__}, which needs a symmetric matrix, "
            "expected GMRES, Neumann or Richardson"
        )
