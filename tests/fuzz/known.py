"""The kinds of failure that the fuzzer knows: a failure of no known kind fails the tests.

Each kind is pinned by one or two cases that must still fail, so a kind that is mended has to leave
this table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from fuzz.case import KRONECKER, Case
from fuzz.verdicts import TORCH, WRONG, Verdict

LIKELIHOODS = ("fisher", *KRONECKER)
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


def _ignores_or_weighs(case: Case) -> bool:
    return case.classes and case.variant in ("ignore", "ignore-class", "weights")


KNOWN: dict[str, Kind] = {
    "coupled weight decay": Kind(
        "The inner optimiser's weight decay moves θ*; implicit methods differentiate without it.",
        WRONG,
        lambda case: case.implicit and case.coupled_decay > 0 and case.inner != "ASGD",
        (
            Case(inner="SGD", options=(("weight_decay", 0.3),), **IMPLICIT),
            Case(inner="Adam", options=(("weight_decay", 0.3),), lr=0.05, **IMPLICIT),
        ),
    ),
    "averaged SGD's decay": Kind(
        "ASGD decays the parameters by lambd (default 1e-4), which implicit methods leave out.",
        WRONG,
        lambda case: case.implicit and case.inner == "ASGD",
        (Case(inner="ASGD", **IMPLICIT), Case(inner="ASGD", options=(("lambd", 0.2),), **IMPLICIT)),
    ),
    "decoupled weight decay": Kind(
        "AdamW settles where decay and gradient balance; implicit methods want no gradient.",
        WRONG,
        lambda case: case.implicit and case.decoupled_decay > 0,
        (
            Case(
                inner="AdamW",
                options=(("weight_decay", 0.6),),
                lr=0.05,
                steps=200,
                tasks=1,
                **IMPLICIT,
            ),
        ),
    ),
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
    "labels of eight bits": Kind(
        "Cross-entropy takes uint8 labels; the learner's check and forward mode do not.",
        TORCH,
        lambda case: case.labels == "uint8",
        (Case(labels="uint8"), Case(labels="uint8", method="forward", door="hypergradient")),
        "Expected dtype int32/int64 for index",
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
