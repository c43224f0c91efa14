"""The outer problem of a run: its optimiser, its loss, and where its network starts."""

import pytest
import torch
from command_line import build_learner, build_optimizer, parse

import tasks

LR = 0.1
DECAY = 0.5
FAMILY = tasks.load("sinusoid").train


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def sgd_by_hand(p, gradients, decay):
    """Nesterov (1983), as Sutskever et al. (2013) have it and torch writes it."""
    momentum = torch.zeros_like(p)
    for g in gradients:
        g = g + decay * p
        momentum = 0.9 * momentum + g
        p = p - LR * (g + 0.9 * momentum)
    return p


def adam_by_hand(p, gradients, decay, decoupled=False):
    """Kingma and Ba (2015), and decoupled Loshchilov and Hutter (2019)."""
    first = torch.zeros_like(p)
    second = torch.zeros_like(p)
    for t, g in enumerate(gradients, start=1):
        if decoupled:
            p = p - LR * decay * p
        else:
            g = g + decay * p
        first = 0.9 * first + 0.1 * g
        second = 0.999 * second + 0.001 * g**2
        scale = (second / (1 - 0.999**t)).sqrt() + 1e-8
        p = p - LR * first / (1 - 0.9**t) / scale
    return p


def adamw_by_hand(p, gradients, decay):
    return adam_by_hand(p, gradients, decay, decoupled=True)


@pytest.mark.parametrize("decay", [0.0, DECAY])
@pytest.mark.parametrize(
    ("name", "by_hand"), [("sgd", sgd_by_hand), ("adam", adam_by_hand), ("adamw", adamw_by_hand)]
)
def test_the_outer_optimiser_takes_its_published_steps(name, by_hand, decay):
    options = parse(
        [
            f"--outer-optimizer={name}",
            f"--outer-lr={LR}",
            f"--outer-weight-decay={decay}",
            "--task=sinusoid",
            "--learn=lr",
            "--device=cpu",
        ]
    )
    learner = build_learner(options, FAMILY).double()
    optimizer = build_optimizer(options, learner)
    named = dict(learner.named_parameters())
    gradients = {key: torch.randn(3, *p.shape, dtype=p.dtype) for key, p in named.items()}
    expected = {}
    for key, p in named.items():
        decays = decay if key.startswith("model.") else 0.0  # the logarithm of lr does not
        expected[key] = by_hand(p.detach(), gradients[key], decays)
    assert any(key.startswith("learnt.") for key in named)

    for t in range(3):
        for key, p in named.items():
            p.grad = gradients[key][t].clone()
        optimizer.step()
    for key, p in named.items():
        assert (p - expected[key]).abs().max() <= 1e-12


def test_without_decay_the_optimiser_has_one_group_as_in_stored_runs():
    options = parse(["--task=sinusoid", "--learn=lr", "--device=cpu"])
    learner = build_learner(options, FAMILY)
    (group,) = build_optimizer(options, learner).param_groups
    assert len(group["params"]) == len(list(learner.parameters()))
