"""The race for one meta-gradient."""

import pytest
import torch
from gradient_contenders import CONTENDERS, WORKLOADS
from gradient_race import describe, race

ROW = {"slowest": 3.0, "threads": 1, "mebibytes": 100.0, "error": 1e-7}


@pytest.mark.parametrize("name", ["sinusoid, 5 steps", "iMAML perceptron, 16 steps"])
def test_all_contenders_compute_the_same_meta_gradient(name):
    workload = WORKLOADS[name]
    gradients = {}
    for contender in ("metaimplicit", "torch.func", "higher"):
        if CONTENDERS[contender].implicit in (None, workload.proximal > 0):
            gradients[contender] = CONTENDERS[contender].make(workload)()
    expected = gradients.pop("metaimplicit")
    for parts in gradients.values():
        for part, own in zip(parts, expected, strict=True):
            assert (part - own).norm() <= 1e-5 * own.norm()
    assert all(part.norm() > 0 for part in expected)


@pytest.mark.slow
def test_a_race_has_a_row_for_each_contender(monkeypatch):
    import gradient_race

    few = {name: CONTENDERS[name] for name in ("metaimplicit", "torch.func")}
    monkeypatch.setattr(gradient_race, "CONTENDERS", few)
    rows = race("sinusoid, 1 steps", threads=(1,), rounds=1)
    assert [row["contender"] for row in rows] == list(few)
    assert all(row["milliseconds"] > 0 and row["error"] < 1e-4 for row in rows)
    assert torch.get_num_threads() >= 1


def test_a_table_has_ratios_to_the_fastest():
    rows = [
        {"contender": "a", "milliseconds": 2.0, "fastest": 1.0, **ROW},
        {"contender": "b", "milliseconds": 1.0, "fastest": 0.5, **ROW},
    ]
    lines = describe("sinusoid", rows).splitlines()
    assert [line.split()[0] for line in lines] == ["sinusoid", "a", "b"]
    assert ["2.00" in lines[1], "1.00" in lines[2]] == [True, True]
