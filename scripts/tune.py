"""Run an experiment: methods beside baselines, over seeds, with a table, a plot and report.html.

python scripts/tune.py weight-decay
python scripts/tune.py reweighting --method none nystrom --imbalance 100 --data-root DIR
python scripts/tune.py --help                   # lists the experiments
python scripts/tune.py EXPERIMENT --help        # explains the options of one

Runs that are done are kept: the same command again makes those that are missing.
"""

from __future__ import annotations

import startup  # isort: skip  # noqa: F401  # before what takes time to import

import sys

import tyro
from command_line import (
    ABOUT_ERRORS,
    explain_usage,
    handle_errors,
)
from experiments import EXPERIMENTS
from experiments.base import Experiment
from experiments.runner import execute


@handle_errors
def main(args: list[str]) -> None:
    """Run the experiment that the arguments name, and print its table."""
    print(execute(parse_experiment(args)))


def parse_experiment(args: list[str]) -> Experiment:
    """The experiment that a command line names, with its options.

    Raises:
        ValueError: The command line is wrong.
    """
    with explain_usage():
        experiment: Experiment = tyro.extras.subcommand_cli_from_dict(
            EXPERIMENTS,
            args=args,
            description=ABOUT_ERRORS,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    return experiment


if __name__ == "__main__":
    main(sys.argv[1:])
