"""Methods: one file per row of the table, one row per flag."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from metaimplicit.methods.base import Adaptation, Gradients, Method, Report
from metaimplicit.methods.forward import Forward
from metaimplicit.methods.implicit import Curvature, Implicit
from metaimplicit.methods.reptile import Reptile
from metaimplicit.methods.reverse import FirstOrder, Truncated, Unrolled
from metaimplicit.methods.sama import SAMA
from metaimplicit.methods.value_function import ValueFunction
from metaimplicit.solvers import (
    CG,
    MINRES,
    Auto,
    Dense,
    Factored,
    Lanczos,
    Neumann,
    Nystrom,
    NystromCG,
    Richardson,
    Solver,
)


@dataclass(frozen=True)
class MethodOptions:
    """What a command line can say of a method; each method reads what concerns it.

    Args:
        solver_steps: steps of CG, Lanczos, MINRES, AmIGO and auto, terms of Neumann, or steps that `truncated` keeps.
        rank: of Nyström's approximation.
        rho: its damping; None, 0 beside a proximal term, else 0.01.
        curvature: of implicit methods; None, the front door's choice.
        damping: added to the curvature of implicit methods.
        scale: step of Neumann, SOBA and AmIGO, and of T1–T2; None, from the curvature, and 1 for T1–T2.
        penalty: λ of F2SA.
    """

    solver_steps: int = 5
    rank: int = 10
    rho: float | None = None
    curvature: Curvature | None = None
    damping: float = 0.0
    scale: float | None = None
    penalty: float = 10.0


def _implicit(solver: Callable[[MethodOptions], Solver]) -> Callable[[MethodOptions], Method]:
    return lambda o: Implicit(solver(o), curvature=o.curvature, damping=o.damping)


METHODS: dict[str, Callable[[MethodOptions], Method]] = {
    "unrolled": lambda o: Unrolled(),
    "truncated": lambda o: Truncated(o.solver_steps),
    "forward": lambda o: Forward(),
    "real-time": lambda o: Forward(carry=True),
    "first-order": lambda o: FirstOrder(),
    "reptile": lambda o: Reptile(),
    "cg": _implicit(lambda o: CG(max_steps=o.solver_steps)),
    "neumann": _implicit(lambda o: Neumann(terms=o.solver_steps, scale=o.scale)),
    "nystrom": _implicit(lambda o: Nystrom(rank=o.rank, rho=o.rho)),
    "nystrom-cg": _implicit(lambda o: NystromCG(rank=o.rank, rho=o.rho, max_steps=o.solver_steps)),
    "lanczos": _implicit(lambda o: Lanczos(max_steps=o.solver_steps)),
    "minres": _implicit(lambda o: MINRES(max_steps=o.solver_steps)),
    "auto": _implicit(lambda o: Auto(max_steps=o.solver_steps)),
    "t1-t2": _implicit(lambda o: Richardson(scale=1.0 if o.scale is None else o.scale, warm=False)),
    "soba": _implicit(lambda o: Richardson(scale=o.scale)),
    "amigo": _implicit(lambda o: Richardson(steps=o.solver_steps, scale=o.scale)),
    "sama": lambda o: SAMA(),
    "f2sa": lambda o: ValueFunction(o.penalty),
    "dense": _implicit(lambda o: Dense()),
    "kfac": lambda o: Implicit(Factored(rho=o.rho), curvature="kfac", damping=o.damping),
    "ekfac": lambda o: Implicit(Factored(rho=o.rho), curvature="ekfac", damping=o.damping),
    "diagonal": lambda o: Implicit(Factored(rho=o.rho), curvature="diagonal", damping=o.damping),
}


def make_method(flag: str | Method, options: MethodOptions | None = None) -> Method:
    """The method a flag names; a `Method` is handed back as it is.

    Raises:
        ValueError: an unknown flag; the known ones are listed. Options beside a `Method`, which has its own.
    """
    if isinstance(flag, Method):
        if options is not None:
            raise ValueError(
                f"options: got {options} beside a {type(flag).__name__}, which they would not change"
            )
        return flag
    if flag not in METHODS:
        raise ValueError(f"method: got {flag!r}, expected one of {', '.join(METHODS)}, or a Method")
    return METHODS[flag](options or MethodOptions())


__all__ = [
    "METHODS",
    "SAMA",
    "Adaptation",
    "Curvature",
    "FirstOrder",
    "Forward",
    "Gradients",
    "Implicit",
    "Method",
    "MethodOptions",
    "Report",
    "Reptile",
    "Truncated",
    "Unrolled",
    "ValueFunction",
    "make_method",
]
