"""Cases that the fuzzer found and that are mended: every oracle agrees."""

import pytest

from fuzz.case import Case
from fuzz.verdicts import RIGHT, judge

IMPLICIT = {"method": "implicit", "solver": "dense", "proximal": 1.0}
WORDS = {"model": "embedding", "padding": True}
DENSE_TANGENTS = {
    "index": 1,
    "door": "hypergradient",
    "tasks": 1,
    "curvature": "hessian",
    **WORDS,
    **IMPLICIT,
}
CASES = {
    "weight decay": Case(inner="SGD", options=(("weight_decay", 0.3),), **IMPLICIT),
    "weight decay of Adam": Case(
        inner="Adam", options=(("weight_decay", 0.3),), lr=0.05, **IMPLICIT
    ),
    "decay of averaged SGD": Case(inner="ASGD", options=(("lambd", 0.2),), **IMPLICIT),
    "log-softmax": Case(loss="nll", log_softmax=True, **IMPLICIT),
    "log-softmax and a diagonal": Case(
        loss="nll", log_softmax=True, curvature="diagonal", **IMPLICIT
    ),
    "K-FAC of squared errors": Case(loss="mse", outputs=1, curvature="kfac", **IMPLICIT),
    "Fisher of binary cross-entropy": Case(loss="bce", outputs=2, curvature="fisher", **IMPLICIT),
    "Fisher with classes on axis 1": Case(model="tagger", curvature="fisher", **IMPLICIT),
    "K-FAC with ignored examples": Case(variant="ignore-class", curvature="kfac", **IMPLICIT),
    "Fisher with class weights": Case(variant="weights", curvature="fisher", **IMPLICIT),
    "Fisher of a sum": Case(variant="sum", curvature="fisher", **IMPLICIT),
    "labels of eight bits": Case(labels="uint8"),
    "padding under vmap": Case(vectorize="vmap", **WORDS),
    "padding under vmap, implicit": Case(vectorize="vmap", **WORDS, **IMPLICIT),
    "padding in forward mode": Case(method="forward", **WORDS),
    "padding and tangents": Case(products="forward-over-reverse", **DENSE_TANGENTS),
    "padding and differences": Case(products="finite-differences", **DENSE_TANGENTS),
    "attention": Case(model="attention"),
    "attention, implicit": Case(model="encoder", **IMPLICIT),
    "attention in forward mode": Case(model="dot-product", method="forward", vectorize="vmap"),
    "a recurrent layer and tangents of mse": Case(
        model="gru", method="forward", loss="mse", outputs=1
    ),
    "dropout in forward mode": Case(door="hypergradient", dropout=True, method="forward", tasks=1),
}


@pytest.mark.parametrize("name", CASES)
def test_a_mended_case_is_right(name):
    verdict = judge(CASES[name])
    assert verdict.kind == RIGHT, verdict
