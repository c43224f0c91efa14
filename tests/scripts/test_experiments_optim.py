"""Optimisers against each other: the networks by hand, one start for all, what a history says, tables, refusals."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from experiments.base import execute
from experiments.cifar_kfac import CifarKFAC, accuracy, network
from experiments.digits_autoencoder import LAYERS, DigitsAutoencoder, autoencoder, half_squares
from experiments.optimizer_comparison import Setting, before, descend, reach
from torch import nn

import tasks
from metaimplicit.optim import KFAC, GaussNewton, NaturalGradient

DIGITS = DigitsAutoencoder(quick=True, device="cpu", seconds=0.01, longer=0.01)
CIFAR = CifarKFAC(quick=True, device="cpu")
HISTORY = {
    "step": [0, 1, 2, 4, 8],
    "seconds": [0.0, 0.5, 1.0, 2.5, 4.0],
    "loss": [3.0, 1.0, 2.0, 0.5, 0.75],
}


@pytest.fixture(autouse=True)
def images(monkeypatch):
    """Noise in CIFAR-10's place, 20 images a class to train on and 11 to test."""
    draws = torch.Generator().manual_seed(0)

    def draw(each):
        inputs = torch.randint(0, 256, (10 * each, 3, 32, 32), generator=draws).to(torch.uint8)
        return tasks.Examples(inputs, torch.arange(10).repeat(each))

    both = draw(20), draw(11)
    monkeypatch.setattr(tasks, "cifar10", lambda data_root=None: both)


def test_the_autoencoder_has_the_layers_it_says():
    """64·15 + 15, three of 15·15 + 15, 15·10 + 10, and back: 3764 parameters; tanh but at the code and the outputs."""
    model = autoencoder(0)
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    assert [linear[0].in_features, *(layer.out_features for layer in linear)] == list(LAYERS)
    assert LAYERS == (64, 15, 15, 15, 15, 10, 15, 15, 15, 15, 64)
    assert sum(p.numel() for p in model.parameters()) == 3764
    follows = [
        isinstance(b, nn.Tanh)
        for a, b in zip(model, [*model[1:], None], strict=True)
        if a in linear
    ]
    assert follows == [True] * 4 + [False] + [True] * 4 + [False]
    for layer in linear:
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert 0.8 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()


def test_the_convolutional_network_has_the_layers_it_says():
    """3·9·16 + 16, 16·9·32 + 32, 32·9·32 + 32 weights and biases, then 10 outputs of 32 channels of side/8 squared."""
    for side in (8, 16, 32):
        model = network(side, 0)
        features = 32 * (side // 8) ** 2
        assert sum(p.numel() for p in model.parameters()) == 448 + 4640 + 9248 + 10 * features + 10
        assert model(torch.randn(2, 3, side, side)).shape == (2, 10)


@pytest.mark.parametrize("experiment", [DIGITS, CIFAR], ids=lambda e: e.name)
def test_the_start_depends_on_the_seed_alone(experiment):
    """Whatever ran before, and whatever random numbers it drew."""
    experiment = experiment.quickened()
    first = experiment.setting(0)
    start = [p.detach().clone() for p in first.model.parameters()]
    optimizer = experiment.optimizer({"method": "kfac", "lr": 0.1, "seed": 0}, first)
    descend(optimizer, first, lambda steps, seconds: steps >= 2, lambda steps: steps + 1)
    torch.rand(3)
    again, other = experiment.setting(0), experiment.setting(1)
    assert not torch.equal(start[0], next(first.model.parameters()))
    for a, b in zip(start, again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    both = zip(
        (*first.batch(3), *first.train, *first.test),
        (*again.batch(3), *again.train, *again.test),
        strict=True,
    )
    assert all(torch.equal(a, b) for a, b in both)
    assert not torch.equal(start[0], next(other.model.parameters()))
    assert not torch.equal(first.train[0], other.train[0])


def test_digits_are_pixels_in_the_unit_interval_and_every_image_is_on_one_side():
    setting = replace(DIGITS, quick=False).setting(0)
    (train, targets), (test, _) = setting.train, setting.test
    assert train.shape == (1000, 64)
    assert test.shape == (797, 64)
    assert targets is train
    assert train.min() == 0
    assert train.max() == 1
    whole = torch.cat([train, test])
    from sklearn.datasets import load_digits

    rows = {tuple(row) for row in (load_digits().data / 16).astype("float32").tolist()}
    assert {tuple(row) for row in whole.tolist()} == rows
    assert torch.equal(setting.batch(5)[0], train)
    small = replace(DIGITS, batch=7).setting(0).batch(5)
    assert small[0].shape == (7, 64)
    assert torch.equal(*small)


def test_losses_by_hand():
    z, y = torch.tensor([[1.0, 2.0], [0.0, 3.0]]), torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert half_squares(z, y).item() == (0.5 * 5 + 0.5 * 4) / 2
    assert (
        accuracy(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1, 1])).item()
        == 2 / 3
    )


@pytest.mark.parametrize(
    ("goal", "expected"),
    [
        (1.0, (1, 0.5)),
        (0.9, (4, 2.5)),
        (0.5, (4, 2.5)),
        (5.0, (0, 0.0)),
        (0.4, (math.inf, math.inf)),
    ],
)
def test_steps_and_seconds_to_a_loss(goal, expected):
    assert reach(HISTORY, goal) == expected


def test_the_loss_within_a_budget_is_the_last_found_there():
    assert before(HISTORY, "step", 3) == 2.0
    assert before(HISTORY, "step", 4) == 0.5
    assert before(HISTORY, "seconds", 2.4) == 2.0
    assert before(HISTORY, "seconds", 100.0) == 0.75


def quadratic():
    """½ w² from w = 2, in float64, and the steps whose batches were read."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 2.0)
    pair = torch.ones(3, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    read = []

    def batch(step):
        read.append(step)
        return pair

    return Setting(model, half_squares, half_squares, batch, pair, pair), read


def test_a_history_is_of_the_losses_after_the_steps_marked():
    """w ← (1 − lr) w: loss ½ (2 · 0.9^k)² after k steps, evaluated where told to and at the end."""
    setting, read = quadratic()
    optimizer = torch.optim.SGD(setting.model.parameters(), 0.1)
    row = descend(optimizer, setting, lambda steps, seconds: steps >= 6, lambda steps: steps + 4)
    history = row["history"]
    assert row["diverged"] is None
    assert history["step"] == [0, 4, 6]
    assert history["loss"] == pytest.approx([0.5 * (2 * 0.9**k) ** 2 for k in (0, 4, 6)], rel=1e-12)
    assert history["seconds"][0] == 0
    assert history["seconds"] == sorted(history["seconds"])
    assert read == list(range(6))


def test_a_second_order_step_is_taken_by_its_own_closure():
    setting, _ = quadratic()
    optimizer = GaussNewton(setting.model, half_squares, damping=0.0, adapt_damping=False)
    row = descend(optimizer, setting, lambda steps, seconds: steps >= 1, lambda steps: steps + 1)
    assert row["history"]["loss"] == [2.0, 0.0]


def test_a_run_that_diverges_ends_and_says_so():
    setting, _ = quadratic()
    optimizer = torch.optim.SGD(setting.model.parameters(), 1e100)
    row = descend(optimizer, setting, lambda steps, seconds: steps >= 9, lambda steps: steps + 1)
    assert row["history"]["step"] == [0, 1]
    assert row["diverged"] == "the loss is inf after 2 steps"


def made(history, diverged=None, judged=0.25):
    return {"history": history, "diverged": diverged, "judged": judged, "parameters": 1}


def test_the_table_by_hand():
    """Two step sizes of adam, the second better; sgd reaches its lowest loss in one seed of two; kfac diverged."""
    slow = {"step": [0, 4], "seconds": [0.0, 2.0], "loss": [3.0, 0.75]}
    fast = {"step": [0, 2, 8], "seconds": [0.0, 1.0, 4.0], "loss": [3.0, 0.5, 0.25]}
    rows = [({"method": "adam", "lr": lr, "seed": seed}, made(h)) for seed in (0, 1)
            for lr, h in ((0.1, slow), (0.2, HISTORY))]  # fmt: skip
    rows = [
        (case, row | {"history": row["history"] | {"loss": [*row["history"]["loss"][:-1], 0.6]}})
        if case["lr"] == 0.2 else (case, row) for case, row in rows
    ]  # fmt: skip
    rows += [
        ({"method": "sgd", "lr": 1.0, "seed": seed}, made(h)) for seed, h in ((0, fast), (1, slow))
    ]
    rows += [
        ({"method": "kfac", "lr": 1.0, "seed": seed}, made(slow, "no", None)) for seed in (0, 1)
    ]
    experiment = DigitsAutoencoder(method=("sgd", "adam", "kfac"), seeds=2)
    assert [experiment.goal(experiment.best(rows), seed) for seed in (0, 1)] == [0.5, 0.5]
    header, _, sgd, adam, kfac = experiment.table(rows).splitlines()
    assert (
        "training loss, 4 steps | training loss, 2 s | steps to adam's lowest | s to adam's lowest"
        in header
    )
    assert (
        sgd
        == "| `sgd` | 1 | 0.6250 ± 0.1768 | 0.6250 ± 0.1768 | – (1 of 2) | – (1 of 2) | 500.00 | 0.2500 ± 0.0000 |"
    )
    assert (
        adam
        == "| `adam` | 0.2 | 0.5000 ± 0.0000 | 2.0000 ± 0.0000 | 4 | 2.50 | 500.00 | 0.2500 ± 0.0000 |"
    )
    assert kfac == "| `kfac` | 1 (2 of 2 diverged) | – | – | – (0 of 2) | – (0 of 2) | 500.00 | – |"


def test_optimisers_have_the_options_given():
    experiment = DigitsAutoencoder(damping=0.5, kl_clip=0.25, products=7)
    setting = experiment.setting(0)
    found = {
        m: experiment.optimizer({"method": m, "lr": 0.125, "seed": 0}, setting)
        for m in experiment.compared
    }
    assert {m: type(o) for m, o in found.items()} == {
        "sgd": torch.optim.SGD, "momentum": torch.optim.SGD, "adam": torch.optim.Adam, "gauss-newton": GaussNewton,
        "natural-gradient": NaturalGradient, "kfac": KFAC,
    }  # fmt: skip
    assert all(o.param_groups[0]["lr"] == 0.125 for o in found.values())
    assert [found[m].param_groups[0]["momentum"] for m in ("sgd", "momentum")] == [0, 0.9]
    assert all(
        found[m].param_groups[0]["damping"] == 0.5
        for m in ("gauss-newton", "natural-gradient", "kfac")
    )
    assert found["kfac"].param_groups[0]["kl_clip"] == 0.25
    assert found["gauss-newton"].solver.max_steps == found["natural-gradient"].solver.max_steps == 7
    assert found["kfac"].likelihood == found["natural-gradient"].likelihood == "gaussian"
    assert found["natural-gradient"].expectation == "monte-carlo"
    small = CIFAR.quickened()
    kfac = small.optimizer({"method": "kfac", "lr": 0.125, "seed": 0}, small.setting(0))
    assert isinstance(kfac, KFAC)
    assert kfac.loss is F.cross_entropy


def test_budgets_and_marks():
    experiment = DigitsAutoencoder(seconds=2.0, longer=5.0)
    ends = {m: (experiment.ended({"method": m}, 9, 1.9), experiment.ended({"method": m}, 9, 2.0),
                experiment.ended({"method": m}, 9, 5.0)) for m in experiment.compared}  # fmt: skip
    assert {m for m, end in ends.items() if end == (False, False, True)} == {
        "gauss-newton",
        "natural-gradient",
    }
    assert all(
        end == (False, True, True)
        for m, end in ends.items()
        if m not in ("gauss-newton", "natural-gradient")
    )
    assert [experiment.mark(k) for k in (0, 49, 50, 1000)] == [1, 50, 52, 1021]
    cifar = CifarKFAC(images=128, batch=64, epochs=3)
    assert cifar.steps == 60
    assert [cifar.ended({"method": "adam"}, k, 0.0) for k in (59, 60)] == [False, True]
    assert cifar.mark(10) == 20


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        (DigitsAutoencoder(method=("adma",)), "--method: got adma"),
        (DigitsAutoencoder(method=("cg",)), "--method: got cg"),
        (DigitsAutoencoder(adam=()), r"--adam: got \(\)"),
        (DigitsAutoencoder(gauss_newton=(1.0, -1.0)), "--gauss-newton: got"),
        (DigitsAutoencoder(seconds=0.0), "--seconds: got 0"),
        (DigitsAutoencoder(longer=math.inf), "--longer: got inf"),
        (DigitsAutoencoder(images=1797), "--images: got 1797, expected from 1 to 1796"),
        (DigitsAutoencoder(batch=1001), "--batch: got 1001, expected from 1 to 1000"),
        (CifarKFAC(side=4), "--side: got 4"),
        (CifarKFAC(epochs=0), "--epochs: got 0"),
        (CifarKFAC(test=1001), "--test: got 1001"),
        (CifarKFAC(images=10, batch=101), "--batch: got 101, expected from 1 to 100"),
        (CifarKFAC(kfac=(math.nan,)), "--kfac: got"),
    ],
)
def test_refusals_before_any_run(experiment, message):
    with pytest.raises(ValueError, match=message):
        experiment.cases()


def test_every_step_size_is_a_case_and_seeds_come_one_after_the_other():
    cases = DigitsAutoencoder(method=("adam", "gauss-newton"), adam=(0.1, 0.2), seeds=2).cases()
    assert [tuple(case.values()) for case in cases] == [
        (m, lr, seed)
        for seed in (0, 1)
        for m, lr in (("adam", 0.1), ("adam", 0.2), ("gauss-newton", 1.0))
    ]


@pytest.mark.parametrize("experiment", [DIGITS, CIFAR], ids=lambda e: e.name)
def test_quick_leaves_table_and_plot(experiment, tmp_path):
    """And a second call, of other step sizes as well, repeats nothing."""
    experiment = replace(experiment, out=tmp_path, adam=(0.01,), momentum=(0.01,), kfac=(0.03,))
    table = execute(experiment)
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == [
        f"`{m}`" for m in experiment.compared
    ]
    assert (tmp_path / "table.md").read_text().strip() == table
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/summary.json")}
    again = execute(replace(experiment, adam=(0.01, 0.02)))
    assert again.splitlines()[0].count("|") == table.splitlines()[0].count("|")
    assert all(path.stat().st_mtime_ns == then for path, then in made.items())
    assert len(list(tmp_path.glob("*/summary.json"))) == len(made) + 1
