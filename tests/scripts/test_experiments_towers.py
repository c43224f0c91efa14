"""Towers: the ResNet, schedules and curves by hand, the same steps as torch's, divergence."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from experiments.char_lstm import CharLSTM
from experiments.char_tower import CharTower
from experiments.cifar_tower import Block, CifarTower, resnet20
from experiments.runner import execute
from experiments.runs import Run, Runs
from experiments.small_cifar import shrink
from experiments.towers import STEPS_PER_POINT, step_decay, train_with_curve
from scripts.running import draw_nothing
from torch import nn

import tasks
from metaimplicit import Hyperoptimizer
from metaimplicit.tuning import Positive, Real
from metaimplicit.tuning.hyperoptimizers import SGD, Adam

CIFAR = CifarTower(quick=True, device="cpu")
CHAR = CharTower(quick=True, device="cpu")
START = {"lr": 0.1, "momentum": 0.9, "seed": 0}


def test_resnet20_is_that_of_he_et_al():
    """It has 19 convolutions and a linear layer, 269,722 parameters, and shortcuts without any."""
    model = resnet20(0)
    assert sum(p.numel() for p in model.parameters()) == 269_722
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(layers) == 20

    sizes = []
    for module in model:
        if isinstance(module, Block):
            module.register_forward_hook(
                lambda module, inputs, output: sizes.append(tuple(output.shape[1:]))
            )
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3


def test_the_initialisation_of_resnet20_depends_on_the_seed():
    first, again, other = (resnet20(seed)[0].weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("width", [4, 8])
def test_shortcuts_take_every_other_pixel_and_pad_with_zeros(width):
    block = Block(4, width).double()
    nn.init.zeros_(block.body[-1].weight)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    stride = width // 4
    output = block(x)
    assert torch.equal(output[:, :4], F.relu(x)[:, :, ::stride, ::stride])
    assert not output[:, 4:].any()


def test_squares_of_pixels_are_averaged():
    image = torch.tensor(
        [[0, 10, 1, 1], [20, 30, 2, 3], [9, 9, 255, 255], [9, 9, 255, 255]],
        dtype=torch.uint8,
    )
    examples = tasks.Examples(image.expand(1, 3, 4, 4), torch.zeros(1))
    assert shrink(examples, 2).inputs.tolist() == [[[[15, 2], [9, 255]]] * 3]  # 7/4 rounds to 2


def test_step_decay_is_at_half_and_at_three_quarters():
    factors = [step_decay(step, 8) for step in range(8)]
    assert factors == pytest.approx([1] * 4 + [0.1] * 2 + [0.01] * 2)
    factors = [step_decay(step, 5) for step in range(5)]
    assert factors == pytest.approx([1, 1, 1, 0.1, 0.01])


def test_a_schedule_multiplies_the_step_size():
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    row = train_with_curve(
        torch.optim.SGD([p], 0.5),
        lambda step: p.sum(),
        steps=40,
        last=1,
        schedule=lambda step: step_decay(step, 40),
    )
    assert row["curve"]["step"] == [10, 20, 30, 40]
    assert row["curve"]["lr"] == pytest.approx([0.5, 0.5, 0.05, 0.005])
    assert p.item() == pytest.approx(-0.5 * (20 + 10 * 0.1 + 10 * 0.01))


def test_a_curve_has_the_means_of_losses():
    p = nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([p], 0.0)
    row = train_with_curve(sgd, lambda step: 0 * p.sum() + step**2, steps=25, last=3)
    squares = [step**2 for step in range(25)]
    parts = [squares[first : first + STEPS_PER_POINT] for first in (0, 10, 20)]
    assert row["curve"]["loss"] == pytest.approx([sum(part) / len(part) for part in parts])
    assert row["loss"] == pytest.approx((22**2 + 23**2 + 24**2) / 3)
    assert row["diverged"] is None


def test_a_loss_that_is_not_finite_ends_the_run_at_its_step():
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    row = train_with_curve(
        torch.optim.SGD([p], 0.1),
        lambda step: p.sum() * (math.nan if step == 13 else 1),
        steps=40,
        last=1,
    )
    assert row["diverged"] == 13
    assert row["loss"] is None
    assert row["curve"]["step"] == [10]
    assert row["learnt"] == {"lr": pytest.approx(0.1), "momentum": 0}


def test_a_negative_step_size_ends_the_run_at_its_step():
    """lr ← 0.1 − (−1), as successive gradients are opposite."""
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    tower = SGD(0.1, optimizer=SGD(1.0), domains={"lr": Real()})
    optimizer = Hyperoptimizer([p], tower)
    row = train_with_curve(optimizer, lambda step: p.sum() * (-1) ** step, steps=40, last=1)
    assert row["diverged"] == 1
    assert row["loss"] is None
    assert "SGD lr: got -0.9" in row["reason"]
    json.dumps(row, allow_nan=False)


def cifar_loss(model):
    def loss(step):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64)
        return F.cross_entropy(model(inputs), torch.arange(8))

    return loss


def char_loss(model):
    text = torch.randint(5, (3, 40), generator=torch.Generator().manual_seed(0))
    return lambda step: model.loss(text, 4 * step, 4, state=None)[0]


@pytest.mark.parametrize(
    ("experiment", "network", "loss", "level"),
    [
        (CIFAR, lambda: resnet20(0), cifar_loss, SGD(0.1, momentum=0.9, weight_decay=1e-4)),
        (CHAR, lambda: CharLSTM(5, 3, 4, 1), char_loss, Adam(0.1)),
    ],
    ids=["cifar", "char"],
)
def test_a_tower_of_one_level_is_the_plain_optimiser(experiment, network, loss, level):
    """In float64, after five steps, to 1e-9 of each tensor; losses are noted in float32."""
    builders = (
        lambda params: experiment.optimizer(START | {"method": "plain"}, params),
        lambda params: Hyperoptimizer(params, level),
    )
    params, losses = [], []
    for build in builders:
        torch.manual_seed(0)
        model = network().double()
        row = train_with_curve(build(model.parameters()), loss(model), steps=5, last=2)
        params.append(list(model.parameters()))
        losses.append([row["loss"], *row["curve"]["loss"]])
    torch.testing.assert_close(params[1], params[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)


def test_the_optimisers_of_the_methods():
    params = [torch.ones(3, requires_grad=True)]
    optimizers = {
        method: CIFAR.optimizer(START | {"method": method}, params)
        for method in CIFAR.default_methods
    }
    assert type(optimizers["plain"]) is type(optimizers["step-decay"]) is torch.optim.SGD
    assert optimizers["plain"].defaults["weight_decay"] == CIFAR.decay
    assert optimizers["tower"].tower == SGD(
        0.1,
        momentum=0.9,
        weight_decay=1e-4,
        optimizer=SGD(CIFAR.outer_sgd),
        domains={"lr": Positive()},
    )
    assert set(optimizers["tower"].tower.granularity) == {"lr", "momentum"}
    assert optimizers["tower-adam"].tower.optimizer == Adam(CIFAR.outer_adam)
    assert optimizers["tower-adam"].tower.domain("lr") == Positive()
    tower = CHAR.optimizer(START | {"method": "tower"}, params).tower
    assert tower == Adam(0.1, optimizer=SGD(CHAR.outer_sgd))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": ("cg",)}, "--method: got cg, expected some of plain, step-decay, tower"),
        ({"epochs": 0}, "--epochs: got 0, expected from 1 to 1000000000"),
        ({"side": 12}, "--side: got 12, expected one of 4, 8, 16, 32"),
        ({"batch": 5001}, "--batch: got 5001, expected from 1 to 5000"),
        ({"images": 0}, "--images: got 0"),
        ({"start": ((0.1, 1.0),)}, "--start: got momentum 1.0, expected a positive number"),
        ({"outer_sgd": -1.0}, "--outer-sgd: got -1.0, expected from 0"),
        ({"start": ()}, "--start: got none"),
    ],
)
def test_an_option_out_of_range_is_refused_before_any_run(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        execute(CifarTower(out=tmp_path / "out", device="cpu", **options))
    assert not (tmp_path / "out").exists()


def test_diverged_runs_are_counted_in_the_table():
    experiment = CharTower(start=(0.1,), method=("plain", "tower"))
    finished = {
        "diverged": None,
        "bits": 2.0,
        "perplexity": 4.0,
        "loss": 1.0,
        "learnt": {"lr": 0.1},
        "ms": 7.0,
    }
    diverged = finished | {"diverged": 13, "bits": None, "perplexity": None, "loss": None}
    rows = {"plain": (diverged, diverged), "tower": (finished, diverged)}
    runs = Runs(
        Run({"method": method, "seed": seed, "lr": 0.1}, row)
        for method, by_seed in rows.items()
        for seed, row in enumerate(by_seed)
    )
    plain, tower = experiment.table(runs).splitlines()[2:]
    assert plain == "| 0.1 | `plain` | diverged | diverged | diverged | – | 7 |"
    note = "(1 of 2 diverged)"
    assert tower == f"| 0.1 | `tower` | 2.000 {note} | 4.00 {note} | 1.000 {note} | 0.1 | 7 |"


@pytest.mark.pages
@pytest.mark.slow
@pytest.mark.usefixtures("noise_cifar10")
@pytest.mark.parametrize(
    "experiment",
    [replace(CIFAR, epochs=1), replace(CHAR, text=Path(__file__), window=16)],
    ids=lambda experiment: experiment.name,
)
def test_a_smoke_test_leaves_rows_and_plots(tmp_path, monkeypatch, experiment):
    small = replace(experiment, out=tmp_path).smoke_test_version()
    table = execute(small)
    assert len(table.splitlines()) == 2 + len(small.default_methods) * len(small.starts)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    rows = [entry["row"] for entry in json.loads((tmp_path / "rows.json").read_text())]
    for case, row in zip(small.cases(), rows, strict=True):
        assert row["diverged"] is None
        assert row["learnt"]["lr"] == row["curve"]["lr"][-1]
        if case["method"].startswith("tower"):
            tower = small.optimizer(case, [torch.ones(1, requires_grad=True)]).tower
            assert row["levels"][0] == row["learnt"]
            assert set(row["learnt"]) == set(tower.granularity)
            assert row["learnt"]["lr"] != pytest.approx(case["lr"])
    draw_nothing(monkeypatch)
    assert execute(small) == table  # from the rows that are there
