"""Hypergradients you can trust: few-shot learning and bilevel optimisation in PyTorch."""

from metaimplicit.check import Check, check_hypergradient
from metaimplicit.hypergradient import Hypergradient, argmin, hypergradient
from metaimplicit.inner import GradientDescent, InnerLoop, TorchOptimizer
from metaimplicit.learner import AdaptedModel, MetaLearner, Step
from metaimplicit.metagrad import (
    METHODS,
    FirstOrder,
    Implicit,
    Method,
    MethodOptions,
    Report,
    Reptile,
    Truncated,
    Unrolled,
)
from metaimplicit.operators import KFAC, Fisher, GaussNewton, Hessian, Identity, LinearOperator
from metaimplicit.problem import BilevelProblem, Composite, FromMeta, Proximal, Stream
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
    Solution,
    Solver,
    Status,
)

__all__ = [
    "CG",
    "KFAC",
    "METHODS",
    "MINRES",
    "AdaptedModel",
    "Auto",
    "BilevelProblem",
    "Check",
    "Composite",
    "Dense",
    "Factored",
    "FirstOrder",
    "Fisher",
    "FromMeta",
    "GaussNewton",
    "GradientDescent",
    "Hessian",
    "Hypergradient",
    "Identity",
    "Implicit",
    "InnerLoop",
    "Lanczos",
    "LinearOperator",
    "MetaLearner",
    "Method",
    "MethodOptions",
    "Neumann",
    "Nystrom",
    "NystromCG",
    "Proximal",
    "Report",
    "Reptile",
    "Solution",
    "Solver",
    "Status",
    "Step",
    "Stream",
    "TorchOptimizer",
    "Truncated",
    "Unrolled",
    "argmin",
    "check_hypergradient",
    "hypergradient",
]
