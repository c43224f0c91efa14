"""The memory that benchmark.py measures, and the tables of tower_benchmark.py."""

import json
import multiprocessing
import sys
from dataclasses import replace
from itertools import pairwise

import benchmark
import pytest
import torch
import tower_benchmark
from benchmark import Benchmark
from rank_group import forked_context
from torch import nn

from metaimplicit import Hyperoptimizer
from metaimplicit.tuning.hyperoptimizers import SGD


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident size from /proc")
def test_memory_is_flat_in_the_inner_steps_for_cg_and_linear_for_unrolled(tmp_path, monkeypatch):
    """As resident sizes of fresh processes, forked from one that has imported torch."""
    monkeypatch.setattr(multiprocessing, "get_context", lambda name: forked_context())
    small = Benchmark(tasks=4, filters=8, repeats=0, out=tmp_path / "memory.json")
    for method, steps in (("cg", (4, 32)), ("unrolled", (4, 12, 32))):
        benchmark.main(replace(small, methods=(method,), inner_steps=steps))
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    memory = {(row["method"], row["inner_steps"]): row["mebibytes"] for row in rows}
    assert memory["cg", 32] < 1.05 * memory["cg", 4]
    whole_slope = (memory["unrolled", 32] - memory["unrolled", 4]) / 28
    for fewer, more in ((4, 12), (12, 32)):
        slope = (memory["unrolled", more] - memory["unrolled", fewer]) / (more - fewer)
        assert slope == pytest.approx(whole_slope, rel=0.2)
    assert memory["unrolled", 32] > 3 * memory["cg", 32]


def test_every_candidate_takes_one_step_a_round_in_turn():
    model = nn.Linear(3, 2)
    batch = (torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))
    weights = [model.weight.detach().clone()]

    def watch():
        weights.append(model.weight.detach().clone())
        return 0.25

    optimizer = Hyperoptimizer(model.parameters(), SGD(0.1, optimizer=SGD(0.1)))
    tower = tower_benchmark.training_step(model, batch, optimizer)
    candidates = {"tower": tower, "watch": watch}
    times = tower_benchmark.time_in_turn(candidates, rounds=3, warm_up_rounds=2)
    assert [len(candidate.whole) for candidate in times.values()] == [3, 3]
    assert times["watch"].optimizer == [0.25] * 3
    for optimizer_time, whole in zip(times["tower"].optimizer, times["tower"].whole, strict=True):
        assert 0 < optimizer_time < whole
    assert len(weights) == 6
    assert all(not torch.equal(before, after) for before, after in pairwise(weights))


@pytest.mark.slow
def test_the_tables_of_towers_have_a_line_for_each_candidate(monkeypatch):
    time_in_turn = tower_benchmark.time_in_turn

    def without_warm_up(candidates, rounds, **_):
        return time_in_turn(candidates, rounds, warm_up_rounds=0)

    monkeypatch.setattr(tower_benchmark, "time_in_turn", without_warm_up)
    table = tower_benchmark.perceptron(rounds=2)
    for name in ("forward and backward", "SGD/SGD, published", "Adam/SGD: "):
        assert name in table
    table = tower_benchmark.residual_network(rounds=1, batch_size=2)
    names = [line.split("  ")[0] for line in table.splitlines()[1:-1]]
    assert names == ["torch SGD", "height 0", "height 1", "height 2", "height 3"]
