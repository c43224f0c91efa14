"""The experiments of tune.py, one module each."""

from collections.abc import Callable

from experiments.base import Experiment
from experiments.char_tower import CharTower
from experiments.cifar_kfac import CifarKFAC
from experiments.cifar_tower import CifarTower
from experiments.digits_autoencoder import DigitsAutoencoder
from experiments.distillation import Distillation
from experiments.group_lasso import GroupLasso
from experiments.hyper_cleaning import HyperCleaning
from experiments.mnist_tower import MnistTower
from experiments.regularization import Regularization
from experiments.reweighting import Reweighting
from experiments.step_size import StepSize
from experiments.weight_decay import WeightDecay

EXPERIMENTS: dict[str, Callable[..., Experiment]] = {
    experiment.name: experiment
    for experiment in (
        Reweighting,
        HyperCleaning,
        Distillation,
        Regularization,
        StepSize,
        WeightDecay,
        GroupLasso,
        MnistTower,
        CifarTower,
        CharTower,
        DigitsAutoencoder,
        CifarKFAC,
    )
}
