"""Curvature as linear operators on `[tasks, n]`. A new operator is one file and one row of `CURVATURES`."""

from __future__ import annotations

from functools import partial
from typing import Any

from metaimplicit.operators.base import (
    Curvature,
    Identity,
    Invertible,
    LinearOperator,
    LossParts,
    Scaled,
    Sum,
)
from metaimplicit.operators.curvature import (
    GGN,
    Expectation,
    Fisher,
    Hessian,
    Likelihood,
    Products,
    central_difference,
)
from metaimplicit.operators.diagonal import Diagonal
from metaimplicit.operators.kronecker import KroneckerFactored

CurvatureClass = type[Curvature] | partial[Any]  # a class, or a class with some of its options

CURVATURES: dict[str, CurvatureClass] = {
    "hessian": Hessian,
    "gauss-newton": GGN,
    "kfac": partial(KroneckerFactored, others="zero"),
    "ekfac": partial(KroneckerFactored, others="zero", corrected=True),
    "diagonal": Diagonal,
}


def find_curvature(
    curvature: str | CurvatureClass, *, argument: str = "curvature"
) -> tuple[type[Curvature], dict[str, Any]]:
    """The class that a flag, a class or a `partial` of a class means, and its options.

    Raises:
        ValueError: an unknown flag, or an object that is no class of curvature.
    """
    made: Any = CURVATURES.get(curvature, curvature) if isinstance(curvature, str) else curvature
    options = dict(made.keywords) if isinstance(made, partial) else {}
    kind = made.func if isinstance(made, partial) else made
    if not (isinstance(kind, type) and issubclass(kind, Curvature)):
        known = ", ".join(CURVATURES)
        raise ValueError(
            f"{argument}: got {curvature!r}, expected one of {known}, or a class of curvature"
        )
    return kind, options


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
    "central_difference",
    "find_curvature",
]
