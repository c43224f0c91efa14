"""Hyperparameters as outer variables: experiments with their baselines, seeds, tables and plots, in runs/tune/.

python scripts/tune.py weight-decay
python scripts/tune.py reweighting --method none nystrom --imbalance 100 --data-root DIR
python scripts/tune.py --help                                # the experiments; EXPERIMENT --help for its options
"""

from __future__ import annotations

import sys

import tyro
from experiments import EXPERIMENTS
from experiments.runner import execute


def main(args: list[str]) -> None:
    """Run the experiment asked for and print its table."""
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
    except KeyboardInterrupt:
        sys.stderr.write("stopped; the same command goes on\n")
        sys.exit(130)
