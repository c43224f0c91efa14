"""A⁻¹b, knowing A only as an operator. A new solver is one file and one row here."""

from metaimplicit.solvers.base import ADVICE, Solution, Solver, Status
from metaimplicit.solvers.cg import CG
from metaimplicit.solvers.dense import Dense
from metaimplicit.solvers.neumann import Neumann
from metaimplicit.solvers.nystrom import Nystrom

__all__ = ["ADVICE", "CG", "Dense", "Neumann", "Nystrom", "Solution", "Solver", "Status"]
