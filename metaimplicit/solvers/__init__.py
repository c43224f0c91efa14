"""Solvers of A x = b that know A only by its products.

A new solver is one file, one export here, and one row of `metaimplicit.methods.METHODS`.
"""

from metaimplicit.solvers.auto import Auto
from metaimplicit.solvers.base import LinearSystem, Solution, Solver, SolverState
from metaimplicit.solvers.cg import CG
from metaimplicit.solvers.dense import Dense
from metaimplicit.solvers.factored import Factored
from metaimplicit.solvers.gmres import GMRES
from metaimplicit.solvers.lanczos import Lanczos
from metaimplicit.solvers.minres import MINRES
from metaimplicit.solvers.neumann import Neumann
from metaimplicit.solvers.nystrom import Nystrom, NystromCG
from metaimplicit.solvers.richardson import OneStep, Richardson
from metaimplicit.solvers.status import ADVICE, Status

__all__ = [
    "ADVICE",
    "CG",
    "GMRES",
    "MINRES",
    "Auto",
    "Dense",
    "Factored",
    "Lanczos",
    "LinearSystem",
    "Neumann",
    "Nystrom",
    "NystromCG",
    "OneStep",
    "Richardson",
    "Solution",
    "Solver",
    "SolverState",
    "Status",
]
