"""Hypergradients you can trust: few-shot learning and bilevel optimisation in PyTorch.

The names below are what most programs need. Everything else is in the packages `solvers`,
`operators`, `methods`, `inner`, `tuning`, `optim`, `diagnostics` and `training`.
"""

from importlib.metadata import PackageNotFoundError, version

from metaimplicit.argmin import argmin
from metaimplicit.diagnostics.check import check_hypergradient
from metaimplicit.hypergradient import hypergradient
from metaimplicit.inner import LBFGS, GradientDescent, NewtonCG, ProximalGradient, TorchOptimizer
from metaimplicit.learner import AdaptedModel, MetaLearner
from metaimplicit.methods import (
    METHODS,
    FirstOrder,
    FixedPoint,
    Forward,
    Implicit,
    Truncated,
    Unrolled,
)
from metaimplicit.problem import BilevelProblem, Composite, FromMeta, Proximal, Stream
from metaimplicit.root import root
from metaimplicit.solvers import CG, Dense, Neumann, Nystrom
from metaimplicit.tuning import Hyperoptimizer, Positive, Tuner, tuning_problem

try:
    __version__ = version("metaimplicit")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "unknown"

__all__ = [
    "CG",
    "LBFGS",
    "METHODS",
    "AdaptedModel",
    "BilevelProblem",
    "Composite",
    "Dense",
    "FirstOrder",
    "FixedPoint",
    "Forward",
    "FromMeta",
    "GradientDescent",
    "Hyperoptimizer",
    "Implicit",
    "MetaLearner",
    "Neumann",
    "NewtonCG",
    "Nystrom",
    "Positive",
    "Proximal",
    "ProximalGradient",
    "Stream",
    "TorchOptimizer",
    "Truncated",
    "Tuner",
    "Unrolled",
    "argmin",
    "check_hypergradient",
    "hypergradient",
    "root",
    "tuning_problem",
]
