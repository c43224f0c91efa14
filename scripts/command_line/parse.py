"""From the command line of train.py to the options of a run."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from command_line.defaults import EXACT, default_options
from command_line.flags import (
    describe_other_methods,
    inner_flags,
    method_flags,
    reject_flags_of_others,
)
from command_line.options import RunOptions
from command_line.recipes import RECIPES, find_recipe
from command_line.task_options import flag_of
from command_line.usage import ABOUT_ERRORS, explain_usage
from metaimplicit.training import CONFIG, read_sealed_json, require_new_run_folder
from tasks import family_summaries

DESCRIPTION = (
    "{summary}\n\n"
    "Tasks:\n"
    "{tasks}\n\n"
    "Recipes: {recipes}.\n\n"
    "The defaults below are those of --task {task}, --head {head} and --method "
    "{method}. "
    "The options of {method} itself, if it has any, are in the second box. "
    "Those of the other methods are:\n\n"
    "{flags}\n\n"
    f"{ABOUT_ERRORS}"
)


OF_STEPS = {"inner_steps", "inner_lr"}  # what an exact inner loop does not have
OF_LINEAR = OF_STEPS | {"adapt", "proximal"}  # what asks for a linear layer, if no head is given


def parse(args: list[str]) -> RunOptions:
    """The options that a command line gives.

    What it does not give has the defaults of its task and its method, or with --resume the values
    of the run that is resumed.

    Raises:
        ValueError: An option is unknown or out of range, names something twice, or differs from the
            resumed run's.
        FileExistsError: The folder holds a run, and --resume is not given.
        FileNotFoundError: The folder holds no run to resume.
    """
    choice = _read_choice(args)
    if choice.resume and not choice.help:
        return _parse_resumed(args, choice)
    options = _parse_over(args, _defaults(choice), tyro.conf.FlagCreatePairsOff).completed()
    _require_once("learn", options.learn)
    _require_once("task_options", options.task_options)
    require_new_run_folder(options.folder, resume=False)
    return options


def _require_once(option: str, items: tuple[str, ...]) -> None:
    """Check that no two of the items, NAME or NAME=VALUE, have one name.

    Raises:
        ValueError: Two have.
    """
    names = [item.partition("=")[0] for item in items]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"{flag_of(option)}: got {name} {names.count(name)} times, expected it once"
            )


def _parse_resumed(args: list[str], choice: argparse.Namespace) -> RunOptions:
    folder = choice.out or replace(_defaults(choice), seed=choice.seed).folder
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
    # A stored --augment is a default, and may be given again.
    options = _parse_over(args, defaults).completed()
    changed = options.differences(stored)
    if changed:
        raise ValueError(
            f"--resume: got another {', another '.join(changed)} than the run's; leave that out, "
            "or start a new run"
        )
    return options


def _defaults(choice: argparse.Namespace) -> RunOptions:
    """The defaults of a task, a method and a head, or of a recipe, which has them already.

    Raises:
        ValueError: A name is unknown, or is not that of the recipe. Or a number of steps or a step
            size is given to a loop that is exact.
    """
    given = {name for name in OF_LINEAR if getattr(choice, name) is not None}
    if choice.recipe is None:
        head = choice.head
        if given and head is None:
            head = "linear"
        options = default_options(
            choice.task or "glyphs",
            method=choice.method,
            inner_optimizer=choice.inner_optimizer,
            head=head,
            network=choice.network,
        )
    else:
        options = _recipe_options(choice)
    of_steps = given & OF_STEPS
    if of_steps and options.inner_optimizer in EXACT:
        raise ValueError(
            f"{flag_of(min(of_steps))}: got one with --inner-optimizer {options.inner_optimizer}, "
            "which takes no steps of a size, expected none; leave it out, or give --head linear"
        )
    return options


def _recipe_options(choice: argparse.Namespace) -> RunOptions:
    options = find_recipe(choice.recipe).options(choice.recipe)
    for name in ("task", "method", "inner_optimizer", "head", "network"):
        given = getattr(choice, name)
        of_recipe = getattr(options, name)
        if given not in (None, of_recipe):
            raise ValueError(
                f"{flag_of(name)}: got {given}, but --recipe {choice.recipe} has {of_recipe}; "
                "leave one out"
            )
    return options


def _read_choice(args: list[str]) -> argparse.Namespace:
    """The options on which the defaults of the others depend, and the folder of the run."""
    parser = argparse.ArgumentParser(
        add_help=False,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("--recipe")
    parser.add_argument("--task")
    parser.add_argument("--method")
    parser.add_argument("--inner-optimizer", "--inner_optimizer")
    parser.add_argument("--head")
    parser.add_argument("--network")
    for name in OF_LINEAR:
        parser.add_argument(flag_of(name), f"--{name}")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--help", "-h", action="store_true")
    try:
        choice, _ = parser.parse_known_args(args)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from error
    return choice


def _parse_over(args: list[str], defaults: RunOptions, *config: Any) -> RunOptions:
    """The command line over defaults that have the chosen method and inner optimiser.

    Args:
        args: The command line.
        defaults: The defaults.
        config: More of tyro's settings.
    """
    method = method_flags(defaults.method)
    inner = inner_flags(defaults.inner_optimizer)
    reject_flags_of_others(args, defaults.method, defaults.inner_optimizer)
    sequence: Any = tuple
    run = Annotated[RunOptions, tyro.conf.arg(name="")]
    description = DESCRIPTION.format(
        summary=RunOptions.__doc__,
        tasks="\n".join(f"- {name}: {line}" for name, line in family_summaries().items()),
        recipes=", ".join(RECIPES),
        task=defaults.task,
        head=defaults.head,
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
            config=(tyro.conf.OmitArgPrefixes, *config),
        )
    parsed: RunOptions = options
    return replace(
        parsed,
        method_options=method.given(method_values),
        inner_options=inner.given(inner_values),
    )
