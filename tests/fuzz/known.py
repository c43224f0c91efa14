"""The kinds of failure that the fuzzer knows: a failure of no known kind fails the tests.

Each kind is pinned by one or two cases that must still fail, so a kind that is mended has to leave
this table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from fuzz.case import KRONECKER, Case
from fuzz.verdicts import TORCH, WRONG, Verdict

LIKELIHOODS = ("fisher", *KRONECKER)
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


def _ignores_or_weighs(case: Case) -> bool:
    return case.classes and case.variant in ("ignore", "ignore-class", "weights")


def _vmapped(case: Case) -> bool:
    return case.vectorize != "loop"


KNOWN: dict[str, Kind] = {
    "log-softmax under Gauss–Newton": Kind(
        "The loss is linear in log-probabilities, so the curvature is zero and A = λI.",
        WRONG,
        lambda case: (
            case.implicit and case.log_softmax and case.matrix in ("gauss-newton", "diagonal")
        ),
        (
            Case(loss="nll", log_softmax=True, **IMPLICIT),
            Case(loss="nll", log_softmax=True, curvature="diagonal", **IMPLICIT),
        ),
    ),
    "softmax for any loss": Kind(
        "Fisher, kfac and ekfac take the softmax likelihood, whatever the loss is.",
        WRONG,
        lambda case: case.matrix in LIKELIHOODS and not case.classes,
        (
            Case(loss="mse", outputs=1, curvature="kfac", **IMPLICIT),
            Case(loss="bce", outputs=2, curvature="fisher", **IMPLICIT),
        ),
    ),
    "softmax over the last axis": Kind(
        "Fisher takes the last axis for the classes; cross-entropy's classes are on axis 1.",
        WRONG,
        lambda case: case.matrix == "fisher" and case.model == "tagger" and case.classes,
        (Case(model="tagger", curvature="fisher", **IMPLICIT),),
    ),
    "examples that do not count": Kind(
        "Fisher, kfac and ekfac count ignored examples, and leave class weights out.",
        WRONG,
        lambda case: case.matrix in LIKELIHOODS and _ignores_or_weighs(case),
        (
            Case(variant="ignore-class", curvature="kfac", **IMPLICIT),
            Case(variant="weights", curvature="fisher", **IMPLICIT),
        ),
    ),
    "summed losses": Kind(
        "Fisher, kfac and ekfac divide by the number of examples; the loss is a sum.",
        WRONG,
        lambda case: case.matrix in LIKELIHOODS and case.classes and case.variant == "sum",
        (Case(variant="sum", curvature="fisher", **IMPLICIT),),
    ),
    "tied weights under K-FAC": Kind(
        "K-FAC sees the first of the layers that share a weight, and none of the others.",
        WRONG,
        lambda case: case.matrix in KRONECKER and case.model == "tied",
        (Case(model="tied", curvature="kfac", **IMPLICIT),),
    ),
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
    "K-FAC of a loop that diverged": Kind(
        "The eigenvalues of factors that are not finite end in torch's error, not in NON_FINITE.",
        TORCH,
        lambda case: case.matrix in KRONECKER and case.steps > 10,
        (Case(model="linear", loss="mse", steps=100, lr=1e4, curvature="kfac", **IMPLICIT),),
        "linalg.eigh",
    ),
    "K-FAC without a layer": Kind(
        "Where no adapted weight belongs to a layer that K-FAC knows, it differentiates nothing.",
        TORCH,
        lambda case: case.matrix in KRONECKER or case.preconditioner == "kfac",
        (Case(model="linear", frozen=True, curvature="kfac", **IMPLICIT),),
        "`inputs` argument to `grad()` cannot be empty",
    ),
}


def kind_of(verdict: Verdict) -> str | None:
    """The name of the first known kind that a failure matches."""
    for name, kind in KNOWN.items():
        if kind.matches(verdict):
            return name
    return None
