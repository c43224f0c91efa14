"""The towers on MNIST: what is compared with what, and what a diverged run leaves."""

import json
import math

import pytest
import torch
from experiments.mnist_tower import TOWERS, MnistTower
from experiments.runner import execute

from metaimplicit import Hyperoptimizer

pytestmark = pytest.mark.usefixtures("blob_mnist")
SMALL = {
    "seeds": 1,
    "batch": 50,
    "hidden": 4,
    "height_epochs": 1,
    "threads": 1,
    "device": "cpu",
}


def rows_by_method(folder):
    entries = json.loads((folder / "rows.json").read_text())
    return {entry["case"]["method"]: entry["row"] for entry in entries}


def test_every_tower_is_compared_with_a_plain_optimiser_that_starts_alike():
    for name, tower in TOWERS.items():
        plain = TOWERS[name.split("-")[0]]
        assert plain.optimizer is None
        assert type(plain) is type(tower)
        assert plain.initial_values == tower.initial_values, name
        assert (tower.optimizer is not None) == ("-by-" in name)


def test_a_run_leaves_its_curve_and_what_it_learnt(tmp_path):
    methods = ("sgd", "sgd-by-sgd", "sgd-per-tensor-by-sgd", "adam-by-sgd")
    experiment = MnistTower(
        out=tmp_path,
        epochs=2,
        heights=(0, 1),
        starts=(0.01,),
        method=methods,
        **SMALL,
    )
    table, heights = execute(experiment).split("\n\n")
    lines = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert lines == [f"`{method}`" for method in methods]
    assert heights.splitlines()[0] == "| test error, %, from | 0.01 |"

    rows = rows_by_method(tmp_path)
    assert rows["sgd"]["curve"]["step"][-1] == 2 * 400 // 50
    assert rows["sgd"]["levels"] == [{}]
    assert set(rows["adam-by-sgd"]["levels"][0]) == {"lr", "beta1", "beta2"}
    per_tensor = rows["sgd-per-tensor-by-sgd"]
    step_sizes = per_tensor["levels"][0]["lr"]
    assert len(step_sizes) == 4
    assert per_tensor["learnt"]["lr"] == pytest.approx(sum(step_sizes) / 4)
    assert "reused_error" in rows["sgd-by-sgd"]
    assert "reused_error" not in per_tensor  # no plain optimiser has a step size for each tensor


def test_height_0_is_plain_sgd(tmp_path):
    common = {"out": tmp_path, "epochs": 1, "method": ("sgd",), **SMALL}
    execute(MnistTower(heights=(0,), starts=(0.01,), **common))
    rows = rows_by_method(tmp_path)
    for key in ("error", "loss", "curve"):
        assert rows["height-0"][key] == rows["sgd"][key]


def test_a_diverged_run_is_a_row_of_the_table(tmp_path, monkeypatch):
    plain_step = Hyperoptimizer.step

    def step_on_nan(self, closure=None):
        if self.tower.optimizer is not None:
            for p in self.param_groups[0]["params"]:
                p.grad.fill_(torch.nan)
        return plain_step(self, closure)

    monkeypatch.setattr(Hyperoptimizer, "step", step_on_nan)
    experiment = MnistTower(
        out=tmp_path,
        epochs=1,
        heights=(3,),
        starts=(0.01,),
        method=("sgd", "adam-by-sgd"),
        **SMALL,
    )
    table = execute(experiment)
    assert table.count("diverged") == 3  # its error, its loss, and the tower of height 3
    rows = rows_by_method(tmp_path)
    for method in ("adam-by-sgd", "height-3"):
        assert rows[method]["error"] is None
        assert "got nan after 1 steps" in rows[method]["reason"]
    assert rows["sgd"]["error"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("logits", ["tanh", "linear"])
def test_squashed_logits_bound_the_loss_from_below(tmp_path, logits):
    """Logits within ±1 leave each image a loss of at least log(1 + 9 e⁻²)."""
    options = SMALL | {"hidden": 128}
    common = {"out": tmp_path, "epochs": 12, "heights": (), "method": ("adam",), **options}
    execute(MnistTower(logits=logits, **common))
    loss = rows_by_method(tmp_path)["adam"]["loss"]
    bound = math.log1p(9 * math.exp(-2))
    assert loss > bound if logits == "tanh" else loss < 0.1 < bound


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": ("sgd-by-none",)}, "--method: got sgd-by-none, expected some of sgd"),
        ({"method": ("cg",)}, "--method: got cg, expected some of sgd, sgd-by-sgd"),
        ({"height_epochs": 0}, "--height-epochs: got 0"),
        ({"heights": (-1,)}, "--heights: got -1, expected from 0 to 100"),
        ({"starts": (0.0,)}, r"--starts: got \(0.0,\), expected numbers > 0"),
    ],
)
def test_an_option_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MnistTower(**options).check_options()
