"""The kinds of failure that the fuzzer knows: a failure of no known kind fails the tests.

Each kind is pinned by one or two cases that must still fail, so a kind that is mended has to leave
this table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fuzz.case import Case
from fuzz.verdicts import Verdict

IMPLICIT = {"method": "implicit", "solver": "dense", "proximal": 1.0}


class Kind(NamedTuple):
    """One kind of failure.

    Attributes:
        reason: what is wrong, in plain words.
        verdict: `WRONG` or `TORCH`.
        covers: whether a case may fail in this way.
        pinned: cases that do.
        message: a part of torch's message, for the verdict `TORCH`.
    """

    reason: str
    verdict: str
    covers: Callable[[Case], bool]
    pinned: tuple[Case, ...]
    message: str = ""

    def matches(self, verdict: Verdict) -> bool:
        same = verdict.kind == self.verdict and self.message in verdict.reason
        return same and self.covers(verdict.case)


KNOWN: dict[str, Kind] = {}


def kind_of(verdict: Verdict) -> str | None:
    """The name of the first known kind that a failure matches."""
    for name, kind in KNOWN.items():
        if kind.matches(verdict):
            return name
    return None
