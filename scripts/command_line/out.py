"""The option --out."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def require_out_name(args: Sequence[str]) -> None:
    """Check that a command line does not give --out an empty name, the current folder in effect.

    Raises:
        ValueError: It does.
    """
    if "--out=" in args or ("--out", "") in pairwise(args):
        raise ValueError("--out: got an empty name, expected that of a folder for the results")
