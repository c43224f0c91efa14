"""The home folder in a command line."""

from __future__ import annotations

import os
from collections.abc import Sequence


def expand_home(args: Sequence[str]) -> list[str]:
    """The arguments with `~` after the equals sign of an option replaced by the home folder.

    Shells replace it in `--out ~/runs`, but leave `--out=~/runs`, which names a folder called `~`.

    Example:
        >>> expand_home(["--seed=1", "--out", "a~"])
        ['--seed=1', '--out', 'a~']
    """
    return [_expanded(arg) for arg in args]


def _expanded(arg: str) -> str:
    option, equals, value = arg.partition("=")
    is_home = option.startswith("--") and (value == "~" or value.startswith("~/"))
    return option + equals + os.path.expanduser(value) if is_home else arg
