"""Run an experiment: methods beside baselines, over seeds, with a table and a plot in runs/tune/.

python scripts/tune.py weight-decay
python scripts/tune.py reweighting --method none nystrom --imbalance 100 --data-root DIR
python scripts/tune.py --help                   # lists the experiments
python scripts/tune.py EXPERIMENT --help        # explains the options of one
"""

from __future__ import annotations

import startup  # isort: skip  # noqa: F401  # before what takes time to import

import sys

import tyro
from command_line import exit_on_signals, require_out_name
from experiments import EXPERIMENTS
from experiments.runner import execute


@exit_on_signals()
def main(args: list[str]) -> None:
    """Run the experiment that the arguments name, and print its table."""
    require_out_name(args)
    config = (tyro.conf.FlagCreatePairsOff,)
    experiment = tyro.extras.subcommand_cli_from_dict(EXPERIMENTS, args=args, config=config)
    print(execute(experiment))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError, FileExistsError, ImportError) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except FloatingPointError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
