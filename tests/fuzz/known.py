"""The kinds of failure that the fuzzer knows: a failure of no known kind fails the tests.

Each kind is pinned by one or two cases that must still fail, so a kind that is mended has to leave
this table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from fuzz.case import Case
from fuzz.verdicts import TORCH, WRONG, Verdict

IMPLICIT = {"method": "implicit", "solver": "dense", "proximal": 1.0}
WORDS = {"model": "embedding", "padding": True}
_TANGENTS = Case(
    index=1,
    door="hypergradient",
    tasks=1,
    curvature="hessian",
    products="forward-over-reverse",
    **WORDS,
    **IMPLICIT,
)


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


def _vmapped(case: Case) -> bool:
    return case.vectorize != "loop"


KNOWN: dict[str, Kind] = {
    "padding under vmap": Kind(
        "Torch's batching rule trains the padding row of every task but the first.",
        WRONG,
        lambda case: case.padding and _vmapped(case) and case.tasks > 1 and not case.chunk,
        (Case(vectorize="vmap", **WORDS), Case(vectorize="vmap", **WORDS, **IMPLICIT)),
    ),
    "padding in forward mode": Kind(
        "Torch's tangents let the padding row move; its reverse mode does not.",
        WRONG,
        lambda case: case.padding and case.method == "forward",
        (Case(method="forward", **WORDS),),
    ),
    "padding under a dense solve of tangents": Kind(
        "Tangents and differences of gradients see the padding row, so A is not symmetric.",
        WRONG,
        lambda case: (
            case.padding and case.products != "double-backward" and case.solver in ("dense", "auto")
        ),
        (_TANGENTS, replace(_TANGENTS, products="finite-differences")),
    ),
    "attention has no second derivative": Kind(
        "Torch's fused attention has none on the CPU; its 'math' kernel has.",
        TORCH,
        lambda case: case.model in ("attention", "encoder", "dot-product"),
        (Case(model="attention"), Case(model="encoder", **IMPLICIT)),
        "_scaled_dot_product_flash_attention_for_cpu",
    ),
    "recurrent layers under vmap": Kind(
        "Torch has no batching rule for LSTM and GRU; a loop over the tasks works.",
        TORCH,
        lambda case: case.model in ("lstm", "gru") and case.vectorize == "vmap",
        (Case(model="lstm", vectorize="vmap"), Case(model="gru", vectorize="vmap", **IMPLICIT)),
        "Batching rule not implemented for aten::",
    ),
    "recurrent layers and tangents of mse": Kind(
        "Torch has the tangent of mse_loss only under vmap, where recurrent layers have no rule.",
        TORCH,
        lambda case: (
            case.model in ("lstm", "gru")
            and case.loss in ("mse", "smooth-l1")
            and (case.method == "forward" or case.products == "forward-over-reverse")
        ),
        (Case(model="gru", method="forward", loss="mse", outputs=1),),
        "Batching rule not implemented for aten::",
    ),
    "dropout in forward mode": Kind(
        "Forward mode pushes tangents through vmap, which wants to know about random draws.",
        TORCH,
        lambda case: case.dropout and case.method == "forward",
        (Case(dropout=True, method="forward", tasks=1),),
        "randomness error mode",
    ),
}


def kind_of(verdict: Verdict) -> str | None:
    """The name of the first known kind that a failure matches."""
    for name, kind in KNOWN.items():
        if kind.matches(verdict):
            return name
    return None
