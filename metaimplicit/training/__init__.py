"""Training: the loop, checkpoints, metrics and pictures. It knows episodes only by their shape, not where they are from."""

from metaimplicit.training.checkpoint import Progress, load_checkpoint, load_learner, save_checkpoint
from metaimplicit.training.files import read_json, write_atomically, write_json
from metaimplicit.training.log import read_metrics
from metaimplicit.training.loop import Budget, NonFiniteError, check_free, constant, cosine, fit
from metaimplicit.training.metrics import Estimate, Evaluation, evaluate, peak_memory
from metaimplicit.training.options import Options, build_learner, describe
from metaimplicit.training.report import Fits, fit_curves, plot_adaptation, plot_curves

__all__ = [
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
    "fit",
    "fit_curves",
    "load_checkpoint",
    "load_learner",
    "peak_memory",
    "plot_adaptation",
    "plot_curves",
    "read_json",
    "read_metrics",
    "save_checkpoint",
    "write_atomically",
    "write_json",
]
