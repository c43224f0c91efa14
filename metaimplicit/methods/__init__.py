"""Methods that compute (dθ*/dφ)ᵀ v. A new method is one file and one row of `METHODS`."""

from __future__ import annotations

from typing import Any

from metaimplicit.methods.base import Adaptation, Gradients, Method
from metaimplicit.methods.fixed_point import FixedPoint
from metaimplicit.methods.forward import Forward
from metaimplicit.methods.implicit import Curvature, Implicit
from metaimplicit.methods.report import Report
from metaimplicit.methods.reptile import Reptile
from metaimplicit.methods.reverse import FirstOrder, Truncated, Unrolled
from metaimplicit.methods.sama import SAMA
from metaimplicit.methods.value_function import ValueFunction
from metaimplicit.options import Option, options_of, with_options
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
    OneStep,
    Richardson,
)

METHODS: dict[str, Method] = {
    "unrolled": Unrolled(),
    "truncated": Truncated(),
    "forward": Forward(),
    "real-time": Forward(carry=True),
    "first-order": FirstOrder(),
    "reptile": Reptile(),
    "cg": Implicit(CG()),
    "auto": Implicit(Auto()),
    "neumann": Implicit(Neumann()),
    "nystrom": Implicit(Nystrom()),
    "nystrom-gaussian": Implicit(Nystrom(sketch="gaussian")),
    "nystrom-cg": Implicit(NystromCG()),
    "lanczos": Implicit(Lanczos()),
    "minres": Implicit(MINRES()),
    "dense": Implicit(Dense()),
    "kfac": Implicit(Factored(), curvature="kfac"),
    "ekfac": Implicit(Factored(), curvature="ekfac"),
    "diagonal": Implicit(Factored(), curvature="diagonal"),
    "t1-t2": Implicit(OneStep(scale=1.0, warm=False)),
    "soba": Implicit(OneStep()),
    "amigo": Implicit(Richardson(steps=5)),
    "fixed-point": FixedPoint(),
    "sama": SAMA(),
    "f2sa": ValueFunction(),
}


def make_method(method: str | Method, **options: Any) -> Method:
    """The method that a flag names, with some of its options set. A `Method` is returned as it is.

    Raises:
        ValueError: The flag is unknown, or the method does not have an option. The message lists
            the flags, or the methods that have the option.

    Example:
        >>> make_method("nystrom", rank=20).solver.rank
        20
    """
    if isinstance(method, str) and method not in METHODS:
        known = ", ".join(METHODS)
        raise ValueError(f"method: got {method!r}, expected one of {known}, or a Method")
    value = METHODS[method] if isinstance(method, str) else method
    if not isinstance(value, Method):
        raise ValueError(f"method: got {method!r}, expected a flag or a Method")
    check_options(method if isinstance(method, str) else value.flag, options)
    return with_options(value, options)


def check_options(flag: str, options: dict[str, Any]) -> None:
    """Raise ValueError for an option that the method of a flag does not have.

    An unknown flag has no options.

    Example:
        >>> check_options("nystrom", {"rank": 20})
    """
    if not options:
        return
    known = options_of(METHODS[flag]) if flag in METHODS else {}
    for name in options:
        if name not in known:
            having = methods_with(name)
            what = f"these methods have it: {', '.join(having)}" if having else "no method has it"
            raise ValueError(
                f"method {flag!r}: got option {name!r}, which it does not have; {what}"
            )


def known_options(flag: str, **values: Any) -> dict[str, Any]:
    """Those of the values that are options of a flag's method, without those that are None.

    Example:
        >>> known_options("nystrom", rank=20, solver_steps=5)
        {'rank': 20}
    """
    known = options_of(METHODS[flag]) if flag in METHODS else {}
    return {name: value for name, value in values.items() if name in known and value is not None}


def methods_with(option: str) -> list[str]:
    """The flags of the methods that have an option.

    Example:
        >>> methods_with("penalty")
        ['f2sa']
    """
    return [flag for flag, method in METHODS.items() if option in options_of(method)]


__all__ = [
    "METHODS",
    "SAMA",
    "Adaptation",
    "Curvature",
    "FirstOrder",
    "FixedPoint",
    "Forward",
    "Gradients",
    "Implicit",
    "Method",
    "Option",
    "Report",
    "Reptile",
    "Truncated",
    "Unrolled",
    "ValueFunction",
    "check_options",
    "known_options",
    "make_method",
    "methods_with",
    "options_of",
    "with_options",
]
