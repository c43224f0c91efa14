"""The command lines of the scripts: options, their ranges and defaults, errors, stored rows."""

from command_line.annealing import anneal_method
from command_line.apart import run_apart
from command_line.build import build_learner, build_optimizer
from command_line.defaults import default_options
from command_line.device import find_device, set_up_cpu
from command_line.errors import handle_errors
from command_line.init import load_init
from command_line.options import RunOptions
from command_line.parse import parse
from command_line.ranks import join_ranks, leave_ranks
from command_line.recipes import find_recipe
from command_line.report import leave_report
from command_line.requirements import require_package, require_writable
from command_line.rows import RowFile
from command_line.run_plan import change_way, read_plan, settle_plan
from command_line.stop import explain_stop
from command_line.testing import (
    Split,
    check_classes,
    load_own_checkpoint,
    predict_test_curves,
    require_no_ways,
    run_identity,
    run_test,
    split_family,
    summarize_test,
)
from command_line.usage import ABOUT_ERRORS, explain_usage, parse_options
from command_line.ways import MeasuredPlan, Search, Way, find_plan, undone

__all__ = [
    "ABOUT_ERRORS",
    "MeasuredPlan",
    "RowFile",
    "RunOptions",
    "Search",
    "Split",
    "Way",
    "anneal_method",
    "build_learner",
    "build_optimizer",
    "change_way",
    "check_classes",
    "default_options",
    "explain_stop",
    "explain_usage",
    "find_device",
    "find_plan",
    "find_recipe",
    "handle_errors",
    "join_ranks",
    "leave_ranks",
    "leave_report",
    "load_init",
    "load_own_checkpoint",
    "parse",
    "parse_options",
    "predict_test_curves",
    "read_plan",
    "require_no_ways",
    "require_package",
    "require_writable",
    "run_apart",
    "run_identity",
    "run_test",
    "set_up_cpu",
    "settle_plan",
    "split_family",
    "summarize_test",
    "undone",
]
