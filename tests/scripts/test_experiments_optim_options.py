"""Optimisers beside each other: their options, budgets, cases, refusals and smoke tests."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from experiments.cifar_kfac import CifarKFAC
from experiments.digits_autoencoder import DigitsAutoencoder
from experiments.runner import execute

from metaimplicit.optim import KFAC, GaussNewton, NaturalGradient

pytestmark = pytest.mark.usefixtures("noise_cifar10")
DIGITS = DigitsAutoencoder(quick=True, device="cpu", seconds=0.01, cg_seconds=0.01)
CIFAR = CifarKFAC(quick=True, device="cpu")


def test_optimisers_have_the_options_given():
    experiment = DigitsAutoencoder(damping=0.5, kl_clip=0.25, products=7)
    setting = experiment.setting(0)
    optimizers = {
        method: experiment.optimizer({"method": method, "lr": 0.125, "seed": 0}, setting)
        for method in experiment.default_methods
    }
    assert {method: type(optimizer) for method, optimizer in optimizers.items()} == {
        "sgd": torch.optim.SGD,
        "momentum": torch.optim.SGD,
        "adam": torch.optim.Adam,
        "gauss-newton": GaussNewton,
        "natural-gradient": NaturalGradient,
        "kfac": KFAC,
    }
    groups = {method: optimizer.param_groups[0] for method, optimizer in optimizers.items()}
    assert all(group["lr"] == 0.125 for group in groups.values())
    assert [groups[method]["momentum"] for method in ("sgd", "momentum")] == [0, 0.9]
    for method in ("gauss-newton", "natural-gradient", "kfac"):
        assert groups[method]["damping"] == 0.5
    for method in ("gauss-newton", "natural-gradient"):
        assert optimizers[method].solver.max_steps == 7
    for method in ("natural-gradient", "kfac"):
        assert optimizers[method].likelihood == "gaussian"
    assert groups["kfac"]["kl_clip"] == 0.25
    assert optimizers["natural-gradient"].expectation == "monte-carlo"


def test_kfac_on_cifar_has_the_loss_of_the_setting():
    small = CIFAR.smoke_test_version()
    kfac = small.optimizer({"method": "kfac", "lr": 0.125, "seed": 0}, small.setting(0))
    assert isinstance(kfac, KFAC)
    assert kfac.loss is F.cross_entropy


@pytest.mark.parametrize("method", DigitsAutoencoder.default_methods)
def test_a_run_on_digits_ends_after_the_seconds_of_its_method(method):
    experiment = DigitsAutoencoder(seconds=2.0, cg_seconds=5.0)
    by_cg = method in ("gauss-newton", "natural-gradient")
    ends = [experiment.is_finished({"method": method}, 9, seconds) for seconds in (1.9, 2.0, 5.0)]
    assert ends == [False, not by_cg, True]


def test_a_run_on_cifar_ends_after_its_steps():
    experiment = CifarKFAC(images=128, batch=64, epochs=3)
    assert experiment.steps == 60
    ends = [experiment.is_finished({"method": "adam"}, steps, 0.0) for steps in (59, 60)]
    assert ends == [False, True]


def test_evaluations_are_two_per_cent_or_half_an_epoch_apart():
    digits = DigitsAutoencoder()
    assert [digits.next_evaluation(steps) for steps in (0, 49, 50, 1000)] == [1, 50, 52, 1021]
    assert CifarKFAC(images=128, batch=64).next_evaluation(10) == 20


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        (DigitsAutoencoder(method=("adma",)), "--method: got adma"),
        (DigitsAutoencoder(method=("cg",)), "--method: got cg"),
        (DigitsAutoencoder(adam=()), r"--adam: got \(\)"),
        (DigitsAutoencoder(gauss_newton=(1.0, -1.0)), "--gauss-newton: got"),
        (DigitsAutoencoder(seconds=0.0), "--seconds: got 0"),
        (DigitsAutoencoder(cg_seconds=math.inf), "--cg-seconds: got inf"),
        (DigitsAutoencoder(images=1797), "--images: got 1797, expected from 1 to 1796"),
        (DigitsAutoencoder(batch=1001), "--batch: got 1001, expected from 1 to 1000"),
        (CifarKFAC(side=4), "--side: got 4"),
        (CifarKFAC(epochs=0), "--epochs: got 0"),
        (CifarKFAC(test=1001), "--test: got 1001"),
        (CifarKFAC(images=10, batch=101), "--batch: got 101, expected from 1 to 100"),
        (CifarKFAC(kfac=(math.nan,)), "--kfac: got"),
    ],
)
def test_an_option_out_of_range_is_refused(experiment, message):
    with pytest.raises(ValueError, match=message):
        experiment.check_options()


def test_every_step_size_is_a_case_for_one_seed_after_the_other():
    experiment = DigitsAutoencoder(method=("adam", "gauss-newton"), adam=(0.1, 0.2), seeds=2)
    assert [tuple(case.values()) for case in experiment.cases()] == [
        ("adam", 0.1, 0),
        ("adam", 0.2, 0),
        ("gauss-newton", 1.0, 0),
        ("adam", 0.1, 1),
        ("adam", 0.2, 1),
        ("gauss-newton", 1.0, 1),
    ]


@pytest.mark.pages
@pytest.mark.parametrize("experiment", [DIGITS, CIFAR], ids=lambda e: e.name)
def test_a_smoke_test_leaves_a_table_and_a_plot(experiment, tmp_path):
    experiment = replace(experiment, out=tmp_path, adam=(0.01,), momentum=(0.01,), kfac=(0.03,))
    table = execute(experiment)
    lines = [line.split("|")[1].strip() for line in table.splitlines()[2:]]
    assert lines == [f"`{method}`" for method in experiment.methods]
    assert (tmp_path / "table.md").read_text() == f"{table}\n"
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_further_step_sizes_repeat_no_run(tmp_path):
    experiment = replace(CIFAR, out=tmp_path, adam=(0.01,), momentum=(0.01,), kfac=(0.03,))
    execute(experiment)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/summary.json")}
    execute(replace(experiment, adam=(0.01, 0.02)))
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/summary.json")}
    assert before.items() <= after.items()
    assert len(after) == len(before) + 1
