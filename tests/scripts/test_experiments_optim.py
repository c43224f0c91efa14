"""Optimisers beside each other: networks, starts, histories, tables, refusals."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from experiments.cifar_kfac import CifarKFAC, accuracy, network
from experiments.digits_autoencoder import LAYERS, DigitsAutoencoder, autoencoder, half_squares
from experiments.optimizer_comparison import best_runs, first_at_goal, last_loss_within
from experiments.runs import Run, Runs
from experiments.timed_training import Setting, train_on_a_clock
from torch import nn

from metaimplicit.optim import GaussNewton

pytestmark = pytest.mark.usefixtures("noise_cifar10")
DIGITS = DigitsAutoencoder(quick=True, device="cpu", seconds=0.01, cg_seconds=0.01)
CIFAR = CifarKFAC(quick=True, device="cpu")
HISTORY = {
    "step": [0, 1, 2, 4, 8],
    "seconds": [0.0, 0.5, 1.0, 2.5, 4.0],
    "loss": [3.0, 1.0, 2.0, 0.5, 0.75],
}


def train_for(steps, optimizer, setting):
    return train_on_a_clock(
        optimizer,
        setting,
        is_finished=lambda taken, seconds: taken >= steps,
        next_evaluation=lambda taken: taken + 1,
    )


def test_the_autoencoder_has_the_layers_it_says():
    """64·15 + 15, three of 15·15 + 15, 15·10 + 10, and back: 3764 parameters."""
    model = autoencoder(0)
    linear = [layer for layer in model if isinstance(layer, nn.Linear)]
    assert [linear[0].in_features, *(layer.out_features for layer in linear)] == list(LAYERS)
    assert LAYERS == (64, 15, 15, 15, 15, 10, 15, 15, 15, 15, 64)
    assert sum(p.numel() for p in model.parameters()) == 3764
    for layer in linear:
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert 0.8 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()


def test_the_autoencoder_has_tanh_except_at_the_code_and_the_outputs():
    layers = [*autoencoder(0), None]
    has_tanh = [
        isinstance(following, nn.Tanh)
        for layer, following in pairwise(layers)
        if isinstance(layer, nn.Linear)
    ]
    assert has_tanh == [True] * 4 + [False] + [True] * 4 + [False]


@pytest.mark.parametrize("side", [8, 16, 32])
def test_the_convolutional_network_has_the_layers_it_says(side):
    """3·9·16 + 16, 16·9·32 + 32 and 32·9·32 + 32 numbers, then 10 outputs of side²/2 features."""
    model = network(side, 0)
    features = 32 * (side // 8) ** 2
    assert sum(p.numel() for p in model.parameters()) == 448 + 4640 + 9248 + 10 * features + 10
    assert model(torch.randn(2, 3, side, side)).shape == (2, 10)


@pytest.mark.parametrize("experiment", [DIGITS, CIFAR], ids=lambda e: e.name)
def test_the_start_depends_on_the_seed_alone(experiment):
    """Neither runs before it nor draws of random numbers change it."""
    experiment = experiment.smoke_test_version()
    first = experiment.setting(0)
    start = [p.detach().clone() for p in first.model.parameters()]
    train_for(2, experiment.optimizer({"method": "kfac", "lr": 0.1, "seed": 0}, first), first)
    assert not torch.equal(start[0], next(first.model.parameters()))
    torch.rand(3)
    again = experiment.setting(0)
    for a, b in zip(start, again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(
        (*first.batch(3), *first.train, *first.test),
        (*again.batch(3), *again.train, *again.test),
        strict=True,
    ):
        assert torch.equal(a, b)
    other = experiment.setting(1)
    assert not torch.equal(start[0], next(other.model.parameters()))
    assert not torch.equal(first.train[0], other.train[0])


def test_every_digit_is_either_for_training_or_for_test_with_pixels_in_the_unit_interval():
    from sklearn.datasets import load_digits

    setting = DigitsAutoencoder(device="cpu").setting(0)
    (train, targets), (test, _) = setting.train, setting.test
    assert train.shape == (1000, 64)
    assert test.shape == (797, 64)
    assert targets is train
    assert (train.min(), train.max()) == (0, 1)
    rows = {tuple(row) for row in torch.cat([train, test]).tolist()}
    assert rows == {tuple(row) for row in (load_digits().data / 16).astype("float32").tolist()}


def test_a_step_sees_all_digits_or_a_batch_of_them():
    whole = DigitsAutoencoder(device="cpu").setting(0)
    assert torch.equal(whole.batch(5)[0], whole.train[0])
    inputs, targets = DigitsAutoencoder(device="cpu", batch=7).setting(0).batch(5)
    assert inputs.shape == (7, 64)
    assert torch.equal(inputs, targets)


def test_losses_by_hand():
    z = torch.tensor([[1.0, 2.0], [0.0, 3.0]])
    y = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert half_squares(z, y).item() == (0.5 * 5 + 0.5 * 4) / 2
    scores = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    assert accuracy(scores, torch.tensor([0, 1, 1])).item() == 2 / 3


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
    assert first_at_goal(HISTORY, goal) == expected


def test_the_loss_within_a_budget_is_the_last_one_evaluated():
    assert last_loss_within(HISTORY, "step", 3) == 2.0
    assert last_loss_within(HISTORY, "step", 4) == 0.5
    assert last_loss_within(HISTORY, "seconds", 2.4) == 2.0
    assert last_loss_within(HISTORY, "seconds", 100.0) == 0.75


def quadratic():
    """The setting of ½ w² from w = 2, in float64, and the steps whose batches were read."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 2.0)
    pair = torch.ones(3, 1, dtype=torch.float64), torch.zeros(3, 1, dtype=torch.float64)
    read = []

    def batch(step):
        read.append(step)
        return pair

    setting = Setting(
        model=model,
        loss=half_squares,
        test_metric=half_squares,
        batch=batch,
        train=pair,
        test=pair,
    )
    return setting, read


def test_a_history_has_the_losses_at_the_evaluations_and_at_the_end():
    """w ← (1 − lr) w: the loss is ½ (2 · 0.9^k)² after k steps."""
    setting, read = quadratic()
    row = train_on_a_clock(
        torch.optim.SGD(setting.model.parameters(), 0.1),
        setting,
        is_finished=lambda steps, seconds: steps >= 6,
        next_evaluation=lambda steps: steps + 4,
    )
    history = row["history"]
    assert row["diverged"] is None
    assert history["step"] == [0, 4, 6]
    assert history["loss"] == pytest.approx([0.5 * (2 * 0.9**k) ** 2 for k in (0, 4, 6)], rel=1e-12)
    assert history["seconds"][0] == 0
    assert history["seconds"] == sorted(history["seconds"])
    assert read == list(range(6))


def test_a_second_order_step_is_taken_by_its_closure():
    setting, _ = quadratic()
    optimizer = GaussNewton(setting.model, half_squares, damping=0.0, adapt_damping=False)
    assert train_for(1, optimizer, setting)["history"]["loss"] == [2.0, 0.0]


def test_a_run_that_diverges_ends_and_says_so():
    setting, _ = quadratic()
    row = train_for(9, torch.optim.SGD(setting.model.parameters(), 1e100), setting)
    assert row["history"]["step"] == [0, 1]
    assert row["diverged"] == "the loss is inf after 2 steps"


def test_a_test_metric_that_is_not_finite_is_a_divergence(tmp_path, monkeypatch):
    """The clock may run out while the training loss is still finite and the test loss is not."""
    setting, _ = quadratic()
    infinite = replace(setting, test_metric=lambda outputs, targets: outputs.sum() * math.inf)
    monkeypatch.setattr(DigitsAutoencoder, "setting", lambda experiment, seed: infinite)
    row = DigitsAutoencoder(seconds=1e-9).run({"method": "sgd", "lr": 0.1, "seed": 0}, tmp_path)
    assert row["test_metric"] is None
    assert row["diverged"] == "the test loss is inf at the end"


def row_of(history, diverged=None):
    metric = 0.25 if diverged is None else None
    return {"history": history, "diverged": diverged, "test_metric": metric, "parameters": 1}


def test_the_table_by_hand():
    """Of two step sizes of adam the second is better; sgd reaches its lowest loss in one seed of
    two; kfac diverged."""
    slow = {"step": [0, 4], "seconds": [0.0, 2.0], "loss": [3.0, 0.75]}
    fast = {"step": [0, 2, 8], "seconds": [0.0, 1.0, 4.0], "loss": [3.0, 0.5, 0.25]}
    rival = HISTORY | {"loss": [3.0, 1.0, 2.0, 0.5, 0.6]}
    runs = Runs()
    for seed in (0, 1):
        for method, lr, row in (
            ("sgd", 1.0, row_of(slow if seed else fast)),
            ("adam", 0.1, row_of(slow)),
            ("adam", 0.2, row_of(rival)),
            ("kfac", 1.0, row_of(slow, diverged="no")),
        ):
            runs.append(Run({"method": method, "lr": lr, "seed": seed}, row))
    experiment = DigitsAutoencoder(method=("sgd", "adam", "kfac"), seeds=2)
    best = best_runs(runs)
    assert [case["lr"] for case, _ in best.where(method="adam")] == [0.2, 0.2]
    assert [experiment.goal(best, seed) for seed in (0, 1)] == [0.5, 0.5]

    header, _, *lines = experiment.table(runs).splitlines()
    assert "| training loss, 4 steps | training loss, 2 s |" in header
    assert "| steps to adam's lowest | s to adam's lowest |" in header
    assert lines == [
        "| `sgd` | 1 | 0.6250 ± 0.1768 | 0.6250 ± 0.1768 | – (1 of 2) | – (1 of 2) | 500.00 "
        "| 0.2500 ± 0.0000 |",
        "| `adam` | 0.2 | 0.5000 ± 0.0000 | 2.0000 ± 0.0000 | 4 | 2.50 | 500.00 "
        "| 0.2500 ± 0.0000 |",
        "| `kfac` | 1 | diverged | diverged | – (0 of 2) | – (0 of 2) | 500.00 | diverged |",
    ]
