"""The option --task-options."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Sequence
from typing import Any


def read_task_options(items: Sequence[str], *, taken: Iterable[str]) -> dict[str, Any]:
    """The further options of a task, each given as name=value.

    The values are Python literals, true, false, none, or strings.

    Args:
        items: What --task-options was given.
        taken: The arguments of `tasks.load` that have a flag.

    Raises:
        ValueError: An option is not of the form name=value, or has a flag.
    """
    flags = {name: flag_of(name) for name in taken} | {"name": "--task"}
    options = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not (name and equals):
            raise ValueError(f"--task-options: got {item!r}, expected name=value")
        if name in flags:
            raise ValueError(
                f"--task-options: got {item!r}, expected a further option; use {flags[name]}"
            )
        options[name] = _literal(text)
    return options


def flag_of(name: str) -> str:
    """The flag of an option."""
    return f"--{name.replace('_', '-')}"


def _literal(text: str) -> Any:
    if text in ("true", "false", "none"):
        text = text.capitalize()
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
