"""All solvers, taken from the table of methods, and operators for them."""

import torch
from oracles import randn, symmetric

from metaimplicit.methods import METHODS, Implicit
from metaimplicit.operators import Invertible
from metaimplicit.solvers import Factored

# By name: the solvers of the methods, each of them once.
SOLVERS = {str(m.solver): m.solver for m in METHODS.values() if isinstance(m, Implicit)}

# The methods whose curvature knows its inverse. They need a loss whose outputs are visible.
FACTORED_METHODS = {
    flag
    for flag, method in METHODS.items()
    if isinstance(method, Implicit) and isinstance(method.solver, Factored)
}

SPECTRA = [
    torch.linspace(1, 10, 12),
    torch.logspace(-1, 1, 12),
    torch.cat([torch.full((6,), 2.0), torch.full((6,), 7.0)]),
]


class DiagonalMatrix(Invertible):
    """A diagonal matrix for each task, `[tasks, n]`, that knows its inverse and counts products."""

    def __init__(self, values):
        self.values = values
        self.products = 0
        self.shape = tuple(values.shape)
        self.dtype = values.dtype
        self.device = values.device

    def matvec(self, vector):
        self.products += 1
        return self.values * vector

    def inverse(self, vector, shift):
        return vector / (self.values + shift)


def positive_systems():
    """Three matrices `[3, 12, 12]` of prescribed spectra, right-hand sides, and the solutions."""
    matrix = symmetric(torch.stack(SPECTRA))
    scale = torch.tensor([[1.0], [1e6], [1e-9]], dtype=torch.float64)
    b = scale * randn(3, 12, seed=9)
    return matrix, b, torch.linalg.solve(matrix, b)
