"""Tuning: hyperparameters are the meta-parameters of a bilevel problem, or learnt by optimisers."""

from metaimplicit.tuning.domains import Box, Domain, Interval, Positive, Real, Simplex
from metaimplicit.tuning.hoag import HOAG
from metaimplicit.tuning.hyperoptimizers import Hyperoptimizer
from metaimplicit.tuning.problem import TuningProblem, tuning_problem
from metaimplicit.tuning.results import HOAGStep, TunerStep
from metaimplicit.tuning.tuner import Tuner
from metaimplicit.tuning.variables import (
    Augmentation,
    ClassWeights,
    ExampleWeights,
    GroupStructure,
    Scalar,
    SyntheticData,
    Variable,
    WeightDecay,
    WeightNetwork,
)

__all__ = [
    "HOAG",
    "Augmentation",
    "Box",
    "ClassWeights",
    "Domain",
    "ExampleWeights",
    "GroupStructure",
    "HOAGStep",
    "Hyperoptimizer",
    "Interval",
    "Positive",
    "Real",
    "Scalar",
    "Simplex",
    "SyntheticData",
    "Tuner",
    "TunerStep",
    "TuningProblem",
    "Variable",
    "WeightDecay",
    "WeightNetwork",
    "tuning_problem",
]
