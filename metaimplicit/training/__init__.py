"""Training loops, checkpoints, metrics and plots, for episodes and data from anywhere."""

from metaimplicit.training.allocator import keep_freed_memory
from metaimplicit.training.checkpoint import (
    load_checkpoint,
    load_learner,
    load_tuner,
    save_checkpoint,
    save_tuner,
)
from metaimplicit.training.files import read_json, write_atomically, write_json
from metaimplicit.training.fits import Fits, predict_curves
from metaimplicit.training.lock import only_writer
from metaimplicit.training.log import CONFIG, read_metrics
from metaimplicit.training.loop import fit
from metaimplicit.training.meta_step import NonFiniteError
from metaimplicit.training.meter import metered
from metaimplicit.training.metrics import (
    Estimate,
    Evaluation,
    evaluate,
    peak_memory,
    to_device,
)
from metaimplicit.training.one_at_a_time import evaluate_one_at_a_time
from metaimplicit.training.page import leave_page
from metaimplicit.training.plots import plot_adaptation, plot_curves
from metaimplicit.training.predictions import Predictions, predict_classes
from metaimplicit.training.pretrained import Pretrained, load_pretrained
from metaimplicit.training.progress import Budget, Progress, constant, cosine
from metaimplicit.training.provenance import describe, describe_sitting
from metaimplicit.training.rotation import Select, has_taken_steps
from metaimplicit.training.run_folder import CHECKPOINT, remove_unsaved_run, require_new_run_folder
from metaimplicit.training.run_page import make_run_page
from metaimplicit.training.sealed import DamagedFileError, read_sealed_json, write_sealed_json
from metaimplicit.training.signals import STOP_SIGNALS, DeferredSignals
from metaimplicit.training.tuner_run import fit_tuner
from metaimplicit.training.unsettled import describe_unsettled

__all__ = [
    "CHECKPOINT",
    "CONFIG",
    "STOP_SIGNALS",
    "Budget",
    "DamagedFileError",
    "DeferredSignals",
    "Estimate",
    "Evaluation",
    "Fits",
    "NonFiniteError",
    "Predictions",
    "Pretrained",
    "Progress",
    "Select",
    "constant",
    "cosine",
    "describe",
    "describe_sitting",
    "describe_unsettled",
    "evaluate",
    "evaluate_one_at_a_time",
    "fit",
    "fit_tuner",
    "has_taken_steps",
    "keep_freed_memory",
    "leave_page",
    "load_checkpoint",
    "load_learner",
    "load_pretrained",
    "load_tuner",
    "make_run_page",
    "metered",
    "only_writer",
    "peak_memory",
    "plot_adaptation",
    "plot_curves",
    "predict_classes",
    "predict_curves",
    "read_json",
    "read_metrics",
    "read_sealed_json",
    "remove_unsaved_run",
    "require_new_run_folder",
    "save_checkpoint",
    "save_tuner",
    "to_device",
    "write_atomically",
    "write_json",
    "write_sealed_json",
]
