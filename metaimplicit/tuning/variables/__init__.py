"""Ready-made hyperparameters of a model's training. A new one is one class, and one name here."""

from metaimplicit.tuning.batches import Batch
from metaimplicit.tuning.variables.base import Scalar, Variable
from metaimplicit.tuning.variables.data import Augmentation, SyntheticData
from metaimplicit.tuning.variables.penalties import GroupStructure, WeightDecay
from metaimplicit.tuning.variables.weights import ClassWeights, ExampleWeights, WeightNetwork

__all__ = [
    "Augmentation",
    "Batch",
    "ClassWeights",
    "ExampleWeights",
    "GroupStructure",
    "Scalar",
    "SyntheticData",
    "Variable",
    "WeightDecay",
    "WeightNetwork",
]
