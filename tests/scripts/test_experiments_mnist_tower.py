"""The towers on MNIST: what is compared with what, and what a diverged run leaves."""

import math

import pytest
import torch
from experiments.base import execute
from experiments.mnist_tower import TOWERS, MnistTower

import tasks
from metaimplicit import Hyperoptimizer


@pytest.fixture
def digits(monkeypatch):
    """40 images of each class that a linear network tells apart, in MNIST's shape."""
    draws = torch.Generator().manual_seed(0)
    targets = torch.arange(10).repeat(40)
    inputs = torch.randint(40, (400, 1, 28, 28), generator=draws, dtype=torch.uint8)
    inputs[torch.arange(400), 0, targets, :10] = 255
    monkeypatch.setattr(
        tasks,
        "mnist",
        lambda root: (tasks.Examples(inputs, targets), tasks.Examples(inputs, targets)),
    )


def test_every_tower_is_compared_with_a_plain_optimiser_that_starts_alike():
    for name, tower in TOWERS.items():
        plain = TOWERS[name.split("-")[0]]
        assert plain.optimizer is None
        assert type(plain) is type(tower)
        assert plain.initial_values == tower.initial_values, name
        assert (tower.optimizer is not None) == ("-by-" in name)


def test_a_run_leaves_what_the_table_says(tmp_path, digits):
    experiment = MnistTower(
        out=tmp_path, seeds=1, epochs=2, batch=50, hidden=4, heights=(0, 1), starts=(0.01,), height_epochs=1,
        method=("sgd", "sgd-by-sgd", "sgd-per-tensor-by-sgd", "adam-by-sgd"), threads=1,
    )  # fmt: skip
    table = execute(experiment).split("\n\n")
    assert [line.split("|")[1].strip() for line in table[0].splitlines()[2:]] == [
        "`sgd`", "`sgd-by-sgd`", "`sgd-per-tensor-by-sgd`", "`adam-by-sgd`",
    ]  # fmt: skip
    assert table[1].splitlines()[0] == "| test error, %, from | 0.01 |"
    rows = {case["method"]: row for case, row in rows_of(tmp_path)}
    assert rows["sgd"]["curve"]["step"][-1] == 2 * 400 // 50
    assert rows["sgd"]["levels"] == [{}]
    assert set(rows["adam-by-sgd"]["levels"][0]) == {"lr", "beta1", "beta2"}
    per_tensor = rows["sgd-per-tensor-by-sgd"]
    assert len(per_tensor["levels"][0]["lr"]) == 4
    assert per_tensor["learnt"]["lr"] == pytest.approx(sum(per_tensor["levels"][0]["lr"]) / 4)
    assert "reused_error" in rows["sgd-by-sgd"]
    assert "reused_error" not in rows["sgd-per-tensor-by-sgd"]  # no plain optimiser has such
    # one epoch of a plain SGD at 0.01 is height 0
    again = MnistTower(
        out=tmp_path / "again", seeds=1, epochs=1, batch=50, hidden=4, heights=(), method=("sgd",)
    )
    execute(again)
    ((_, plain),) = rows_of(tmp_path / "again")
    assert plain["error"] == rows["height-0"]["error"]
    assert plain["loss"] == rows["height-0"]["loss"]


def test_a_diverged_run_says_so(tmp_path, digits, monkeypatch):
    whole = Hyperoptimizer.step

    def step(self, closure=None):
        for p in self.param_groups[0]["params"] if self.tower.optimizer is not None else ():
            p.grad.fill_(torch.nan)
        return whole(self, closure)

    monkeypatch.setattr(Hyperoptimizer, "step", step)
    experiment = MnistTower(
        out=tmp_path, seeds=1, epochs=1, batch=50, hidden=4, heights=(3,), starts=(0.01,), height_epochs=1,
        method=("sgd", "adam-by-sgd"), threads=1,
    )  # fmt: skip
    table = execute(experiment)
    assert table.count("1 diverged") == 3  # its error, its loss, and the tower of height 3
    rows = {case["method"]: row for case, row in rows_of(tmp_path)}
    for method in ("adam-by-sgd", "height-3"):
        assert rows[method]["error"] is None
        assert "got nan after 1 steps" in rows[method]["reason"]
    assert rows["sgd"]["error"] is not None


def test_the_output_is_squashed_or_not(tmp_path, digits):
    """Logits within ±1 leave each image a loss of at least log(1 + 9 e⁻²)."""
    loss = {}
    for logits in ("tanh", "linear"):
        out = tmp_path / logits
        execute(
            MnistTower(
                out=out, seeds=1, epochs=40, batch=50, heights=(), method=("adam",), logits=logits
            )
        )
        ((_, row),) = rows_of(out)
        loss[logits] = row["loss"]
    assert loss["linear"] < 0.1 < math.log1p(9 * math.exp(-2)) < loss["tanh"]


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match=r"--method: got sgd-by-none, expected some of"):
        MnistTower(method=("sgd-by-none",)).cases()
    with pytest.raises(ValueError, match=r"--method: got cg, expected some of sgd, sgd-by-sgd"):
        MnistTower(method=("cg",)).cases()
    with pytest.raises(ValueError, match="--height-epochs: got 0"):
        MnistTower(height_epochs=0).cases()
    with pytest.raises(ValueError, match=r"--heights, --starts: got \(-1,\)"):
        MnistTower(heights=(-1,)).cases()


def rows_of(folder):
    import json

    return [
        (found["case"], found["row"]) for found in json.loads((folder / "rows.json").read_text())
    ]
