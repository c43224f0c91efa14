"""Curvatures as linear operators. A new one is one file and one row of `CURVATURES`."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import Any

from metaimplicit.operators.base import (
    Identity,
    Invertible,
    LinearOperator,
    Scaled,
    Sum,
)
from metaimplicit.operators.curvature import Curvature, LossParts
from metaimplicit.operators.diagonal import Diagonal
from metaimplicit.operators.fisher import Fisher
from metaimplicit.operators.gauss_newton import GGN
from metaimplicit.operators.hessian import (
    Hessian,
    Products,
    central_difference,
)
from metaimplicit.operators.kronecker import KroneckerFactored
from metaimplicit.operators.likelihood import Expectation, Likelihood

CurvatureClass = type[Curvature] | partial[Any]  # a class, or a class with some of its options

CURVATURES: dict[str, CurvatureClass] = {
    "hessian": Hessian,
    "gauss-newton": GGN,
    "kfac": partial(KroneckerFactored, others="zero"),
    "ekfac": partial(KroneckerFactored, others="zero", corrected=True),
    "diagonal": Diagonal,
}


def find_curvature(curvature: str | CurvatureClass) -> tuple[type[Curvature], dict[str, Any]]:
    """The class of curvature and its options that a flag, a class or a `partial` of a class means.

    Args:
        curvature: A key of `CURVATURES`, a subclass of `Curvature`, or a `partial` of one.

    Raises:
        ValueError: The flag is unknown, or the object is no class of curvature.

    Example:
        >>> kind, options = find_curvature("ekfac")
        >>> kind.__name__, options
        ('KroneckerFactored', {'others': 'zero', 'corrected': True})
    """
    value: Any = curvature
    if isinstance(curvature, str):
        value = CURVATURES.get(curvature)
    options: dict[str, Any] = {}
    if isinstance(value, partial):
        options = dict(value.keywords)
        value = value.func
    if not (isinstance(value, type) and issubclass(value, Curvature)):
        known = ", ".join(CURVATURES)
        raise ValueError(
            f"curvature: got {curvature!r}, expected one of {known}, or a class of curvature"
        )
    return value, options


def as_flag(curvature: str | CurvatureClass) -> str | CurvatureClass:
    """The flag of a curvature that has one; any other as it is.

    Example:
        >>> as_flag(GGN)
        'gauss-newton'
    """
    if isinstance(curvature, str):
        return curvature
    kind, options = find_curvature(curvature)
    flags = [flag for flag, known in CURVATURES.items() if known is kind and not options]
    return flags[0] if flags else curvature


def invertible_curvatures() -> list[str]:
    """The flags of the curvatures that know their inverse, so that they can precondition.

    Example:
        >>> "diagonal" in invertible_curvatures(), "hessian" in invertible_curvatures()
        (True, False)
    """
    return [flag for flag in CURVATURES if issubclass(find_curvature(flag)[0], Invertible)]


def check_preconditioner(preconditioner: str | CurvatureClass) -> None:
    """Check that this means a curvature that knows its inverse.

    Raises:
        ValueError: It is another curvature, or none.

    Example:
        >>> check_preconditioner("diagonal")
    """
    with suppress(ValueError):
        if issubclass(find_curvature(preconditioner)[0], Invertible):
            return
    known = ", ".join(invertible_curvatures())
    raise ValueError(
        f"preconditioner: got {preconditioner!r}, expected one of {known}, or a class of curvature "
        "that knows its inverse"
    )


__all__ = [
    "CURVATURES",
    "GGN",
    "Curvature",
    "CurvatureClass",
    "Diagonal",
    "Expectation",
    "Fisher",
    "Hessian",
    "Identity",
    "Invertible",
    "KroneckerFactored",
    "Likelihood",
    "LinearOperator",
    "LossParts",
    "Products",
    "Scaled",
    "Sum",
    "as_flag",
    "central_difference",
    "check_preconditioner",
    "find_curvature",
    "invertible_curvatures",
]
