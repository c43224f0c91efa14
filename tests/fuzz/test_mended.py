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
