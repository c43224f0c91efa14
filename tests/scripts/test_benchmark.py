"""Memory against inner steps, as resident size of fresh processes: flat for implicit methods, linear for unrolling.

And the timing of towers, step by step in turn.
"""

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import tower_benchmark
from torch import nn

from metaimplicit import Hyperoptimizer
from metaimplicit.tuning.hyperoptimizers import SGD

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident size from /proc")
def test_memory_is_flat_for_implicit_methods_and_linear_for_unrolling(tmp_path):
    options = [
        "--methods",
        "cg",
        "unrolled",
        "--inner-steps",
        "4",
        "16",
        "64",
        "--tasks",
        "4",
        "--repeats",
        "0",
    ]
    subprocess.run(
        [
            sys.executable,
            ROOT / "scripts" / "benchmark.py",
            *options,
            "--out",
            tmp_path / "memory.json",
        ],
        check=True,
        cwd=ROOT,
        capture_output=True,
    )
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    memory = {(row["method"], row["inner_steps"]): row["mebibytes"] for row in rows}
    assert memory["cg", 64] < 1.05 * memory["cg", 4]
    for more, fewer in ((16, 4), (64, 16)):
        slope = (memory["unrolled", more] - memory["unrolled", fewer]) / (more - fewer)
        assert slope == pytest.approx(
            (memory["unrolled", 64] - memory["unrolled", 4]) / 60, rel=0.2
        )
        assert slope > 0.1 * memory["cg", 4]


def test_towers_are_timed_in_turn():
    """One step of each candidate a round, and every one trains."""
    model = nn.Linear(3, 2)
    batch, before = (
        (torch.randn(4, 3), torch.zeros(4, dtype=torch.int64)),
        model.weight.detach().clone(),
    )
    calls = []

    def other():
        calls.append(model.weight.detach().clone())
        return 0.25

    optimizer = Hyperoptimizer(model.parameters(), SGD(0.1, optimizer=SGD(0.1)))
    found = tower_benchmark.in_turn(
        {"tower": tower_benchmark.stepping(model, batch, optimizer), "other": other},
        rounds=3,
        warm=2,
    )
    assert {name: len(times["whole"]) for name, times in found.items()} == {"tower": 3, "other": 3}
    assert found["other"]["optimizer"] == [0.25] * 3
    assert all(
        0 < o < w for o, w in zip(found["tower"]["optimizer"], found["tower"]["whole"], strict=True)
    )
    assert all(not torch.equal(a, b) for a, b in pairwise([before, *calls]))


def test_towers_tables():
    table = tower_benchmark.perceptron(rounds=2)
    assert all(
        name in table for name in ("forward and backward", "SGD/SGD, published", "Adam/SGD: ")
    )
    table = tower_benchmark.residual_network(rounds=1, batch_size=2)
    assert [line.split("  ")[0] for line in table.splitlines()[1:-1]] == [
        "torch SGD", "height 0", "height 1", "height 2", "height 3",
    ]  # fmt: skip
