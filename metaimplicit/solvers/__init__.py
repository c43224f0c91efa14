"""A⁻¹b, knowing A only as an operator. A new solver is one file and one row here."""

from metaimplicit.solvers.auto import Auto
from metaimplicit.solvers.base import ADVICE, Solution, Solver, SolverState, Status
from metaimplicit.solvers.cg import CG
from metaimplicit.solvers.dense import Dense
from metaimplicit.solvers.factored import Factored
from metaimplicit.solvers.lanczos import Lanczos
from metaimplicit.solvers.minres import MINRES
from metaimplicit.solvers.neumann import Neumann
from metaimplicit.solvers.nystrom import Nystrom, NystromCG
from metaimplicit.solvers.richardson import Richardson

__all__ = [
    "ADVICE",
    "CG",
    "MINRES",
    "Auto",
    "Dense",
    "Factored",
    "Lanczos",
    "Neumann",
    "Nystrom",
    "NystromCG",
    "Richardson",
    "Solution",
    "Solver",
    "SolverState",
    "Status",
]
