"""How the scripts read command lines: what is wrong is one line, and numbers are in range."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import TypeVar

import tyro

from command_line.ranges import check_ranges

Options = TypeVar("Options")

ABOUT_ERRORS = "Errors are one line on standard error. With --debug their trace is shown as well."


def parse_options(kind: type[Options], args: list[str]) -> Options:
    """The options that a command line gives, as a dataclass.

    Raises:
        ValueError: The command line is wrong, or a number is out of range.
    """
    with explain_usage():
        options = tyro.cli(
            kind,
            args=args,
            description=f"{kind.__doc__}\n\n{ABOUT_ERRORS}",
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    check_ranges(options)
    return options


@contextlib.contextmanager
def explain_usage() -> Iterator[None]:
    """Turn what tyro prints about a wrong command line into a ValueError of one line."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            yield
    except SystemExit as stop:
        if stop.code in (None, 0):  # --help
            raise
        raise ValueError(_first_paragraph(printed.getvalue())) from None
    sys.stderr.write(printed.getvalue())


def _first_paragraph(box: str) -> str:
    """The text in a box of tyro's up to the first rule."""
    words: list[str] = []
    for line in box.splitlines():
        content = line.strip(" │╭╮╰╯")
        if content.startswith("─"):
            if words:
                break
            continue
        words += content.split()
    return f"{' '.join(words)}; --help explains the options"
