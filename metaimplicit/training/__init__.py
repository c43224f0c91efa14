"""Training: the loop, checkpoints, metrics, pictures. Where episodes come from is none of its business."""

from metaimplicit.training.build import build_learner, describe
from metaimplicit.training.checkpoint import (
    Progress,
    load_checkpoint,
    load_learner,
    load_tuner,
    save_checkpoint,
    save_tuner,
)
from metaimplicit.training.files import read_json, write_atomically, write_json
from metaimplicit.training.log import read_metrics
from metaimplicit.training.loop import (
    CHECKPOINT,
    CONFIG,
    Budget,
    NonFiniteError,
    check_free,
    constant,
    cosine,
    fit,
)
from metaimplicit.training.metrics import Estimate, Evaluation, evaluate, peak_memory
from metaimplicit.training.options import Options, find_device
from metaimplicit.training.report import Fits, fit_curves, plot_adaptation, plot_curves
from metaimplicit.training.tune import fit_tuner

__all__ = [
    "CHECKPOINT",
    "CONFIG",
    "Budget",
    "Estimate",
    "Evaluation",
    "Fits",
    "NonFiniteError",
    "Options",
    "Progress",
    "build_learner",
    "check_free",
    "constant",
    "cosine",
    "describe",
    "evaluate",
    "find_device",
    "fit",
    "fit_curves",
    "fit_tuner",
    "load_checkpoint",
    "load_learner",
    "load_tuner",
    "peak_memory",
    "plot_adaptation",
    "plot_curves",
    "read_json",
    "read_metrics",
    "save_checkpoint",
    "save_tuner",
    "write_atomically",
    "write_json",
]
