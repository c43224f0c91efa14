"""Training loops, checkpoints, metrics and plots, for episodes and data from anywhere."""

from metaimplicit.training.checkpoint import (
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
    NonFiniteError,
    fit,
    require_new_run_folder,
)
from metaimplicit.training.metrics import Estimate, Evaluation, evaluate, peak_memory
from metaimplicit.training.plots import Fits, plot_adaptation, plot_curves, predict_curves
from metaimplicit.training.progress import Budget, Progress, constant, cosine
from metaimplicit.training.provenance import describe
from metaimplicit.training.tuner_run import fit_tuner

__all__ = [
    "CHECKPOINT",
    "CONFIG",
    "Budget",
    "Estimate",
    "Evaluation",
    "Fits",
    "NonFiniteError",
    "Progress",
    "constant",
    "cosine",
    "describe",
    "evaluate",
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
