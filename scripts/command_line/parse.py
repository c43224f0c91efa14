"""From the command line of train.py to the options of a run."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from command_line.defaults import default_options
from command_line.flags import (
    describe_other_methods,
    inner_flags,
    method_flags,
    reject_flags_of_others,
)
from command_line.options import RunOptions, default_folder
from command_line.usage import ABOUT_ERRORS, explain_usage
from metaimplicit.training import CONFIG, read_sealed_json, require_new_run_folder
from tasks import family_summaries

DESCRIPTION = (
    "{summary}\n\n"
    "Tasks:\n"
    "{tasks}\n\n"
    "The defaults below are those of --task {task} with --method {method}. "
    "The options of {method} itself, if it has any, are in the second box. "
    "Those of the other methods are:\n\n"
    "{flags}\n\n"
    f"{ABOUT_ERRORS}"
)


def parse(args: list[str]) -> RunOptions:
    """The options that a command line gives.

    What it does not give has the defaults of its task and its method, or with --resume the values
    of the run that is resumed.

    Raises:
        ValueError: An option is unknown or out of range, or differs from the resumed run's.
        FileExistsError: The folder holds a run, and --resume is not given.
        FileNotFoundError: The folder holds no run to resume.
    """
    choice = _read_choice(args)
    if choice.resume and not choice.help:
        return _parse_resumed(args, choice)
    defaults = default_options(
        choice.task,
        method=choice.method,
        inner_optimizer=choice.inner_optimizer,
        head=choice.head or "linear",
        network=choice.network,
    )
    options = _parse_over(args, defaults).completed()
    require_new_run_folder(options.folder, resume=False)
    return options


def _parse_resumed(args: list[str], choice: argparse.Namespace) -> RunOptions:
    method = choice.method or default_options(choice.task).method
    approach = method if choice.head in (None, "linear") else choice.head
    folder = choice.out or default_folder(choice.task, approach, choice.seed)
    path = folder / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"--resume: found no {path}; name the folder of a run with --out")
    stored = RunOptions.load(read_sealed_json(path).get("options", {}))

    defaults = replace(
        stored,
        out=folder,
        method=choice.method or stored.method,
        inner_optimizer=choice.inner_optimizer or stored.inner_optimizer,
    )
    options = _parse_over(args, defaults).completed()
    changed = options.differences(stored)
    if changed:
        raise ValueError(
            f"--resume: {', '.join(changed)} differ from the run's; leave them out, or start a "
            "new run"
        )
    return options


def _read_choice(args: list[str]) -> argparse.Namespace:
    """The options on which the defaults of the others depend, and the folder of the run."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--task", default="glyphs")
    parser.add_argument("--method")
    parser.add_argument("--inner-optimizer", "--inner_optimizer")
    parser.add_argument("--head")
    parser.add_argument("--network")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    try:
        choice, _ = parser.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    return choice


def _parse_over(args: list[str], defaults: RunOptions) -> RunOptions:
    """The command line over defaults that have the chosen method and inner optimiser."""
    method = method_flags(defaults.method)
    inner = inner_flags(defaults.inner_optimizer)
    reject_flags_of_others(args, defaults.method, defaults.inner_optimizer)
    sequence: Any = tuple
    run = Annotated[RunOptions, tyro.conf.arg(name="")]
    description = DESCRIPTION.format(
        summary=RunOptions.__doc__,
        tasks="\n".join(f"- {name}: {line}" for name, line in family_summaries().items()),
        task=defaults.task,
        method=defaults.method,
        flags=describe_other_methods(defaults.method),
    )
    with explain_usage():
        options, method_values, inner_values = tyro.cli(
            sequence[run, method.parsed_type, inner.parsed_type],
            args=args,
            default=(
                defaults,
                method.defaults(defaults.method_options),
                inner.defaults(defaults.inner_options),
            ),
            description=description,
            config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes),
        )
    parsed: RunOptions = options
    return replace(
        parsed,
        method_options=method.given(method_values),
        inner_options=inner.given(inner_values),
    )
