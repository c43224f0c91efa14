"""The command lines of train.py and evaluate.py: options, defaults, and what is built from them."""

from command_line.build import build_learner
from command_line.defaults import default_options
from command_line.device import find_device
from command_line.errors import BAD_INPUT, exit_on
from command_line.options import RunOptions
from command_line.out import require_out_name
from command_line.parse import parse
from command_line.stop import exit_on_signals, explain_stop
from command_line.testing import (
    Split,
    check_classes,
    load_own_checkpoint,
    predict_test_curves,
    run_identity,
    run_test,
    split_family,
)

__all__ = [
    "BAD_INPUT",
    "RunOptions",
    "Split",
    "build_learner",
    "check_classes",
    "default_options",
    "exit_on",
    "exit_on_signals",
    "explain_stop",
    "find_device",
    "load_own_checkpoint",
    "parse",
    "predict_test_curves",
    "require_out_name",
    "run_identity",
    "run_test",
    "split_family",
]
