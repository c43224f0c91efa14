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
    constant,
    cosine,
    fit,
    require_new_run_folder,
)
from metaimplicit.training.metrics import Estimate, Evaluation, evaluate, peak_memory
from metaimplicit.training.options import Options, find_device
from metaimplicit.training.plots import Fits, plot_adaptation, plot_curves, predict_curves
from metaimplicit.training.tuner_run import fit_tuner

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
    "constant",
    "cosine",
    "describe",
    "evaluate",
    "find_device",
    "fit",
    "fit_tuner",
    "load_checkpoint",
    "load_learner",
    "load_tuner",
    "peak_memory",
    "plot_adaptation",
    "plot_curves",
    "predict_curves",
    "read_json",
    "read_metrics",
    "require_new_run_folder",
    "save_checkpoint",
    "save_tuner",
    "write_atomically",
    "write_json",
]
