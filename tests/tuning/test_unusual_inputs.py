"""Tuners without data, in mixed precision and over several calls; an index out of range."""

import pytest
import torch
import torch.nn.functional as F
from small_problems import number, scalar_problem
from torch import nn

from metaimplicit import GradientDescent, Tuner, tuning_problem
from metaimplicit.tuning import HOAG, ExampleWeights, WeightDecay

RIDGE = scalar_problem(
    lambda w, m: (w - 1).square() + m["a"].exp() * w.square(), lambda w, m: (w - 0.5).square()
)


@pytest.mark.parametrize("method", ["cg", "sama", "f2sa", "soba"])
def test_a_tuner_needs_no_data_where_the_losses_hold_their_own(method):
    inner = GradientDescent(steps=20, lr=0.1)
    tuner = Tuner(RIDGE, {"a": number(-1.0)}, inner=inner, method=method)
    assert tuner.step(None, None).norm > 0


def test_hoag_needs_no_data_where_the_losses_hold_their_own():
    """w = 1/(1 + eᵃ) is ½ at a = 0."""
    hoag = HOAG(RIDGE, {"a": number(-1.0)}, None, None)
    for _ in range(12):
        hoag.step()
    assert hoag.meta["a"].item() == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forward_mode_keeps_the_precision_of_each_entry(dtype):
    """Torch makes products with a scalar decay double. The parameters are in single precision."""
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    problem, meta, domains = tuning_problem(model, F.cross_entropy, [WeightDecay()])
    meta = {name: m.to(dtype) for name, m in meta.items()}
    batch = {"inputs": torch.randn(6, 3), "targets": torch.randint(4, (6,))}
    inner = GradientDescent(steps=3, lr=0.1)
    tuner = Tuner(problem, meta, domains=domains, inner=inner, method="forward")
    assert tuner.step(batch, batch).applied
    assert all(m.dtype == dtype for m in tuner.meta.values())


def test_patience_returns_to_the_best_of_all_calls_of_fit():
    problem = scalar_problem(lambda w, m: (w - m["a"]).square(), lambda w, m: -w)
    inner = GradientDescent(steps=20, lr=0.3)
    tuner = Tuner(problem, {"a": number(0.0)}, inner=inner, method="cg")
    measured = {}  # by a

    def distance(params, meta):
        a = meta["a"].item()
        measured[a] = abs(a - 0.03)
        return measured[a]

    tuner.fit(lambda i: None, lambda i: None, steps=6, metric=distance)
    tuner.fit(lambda i: None, lambda i: None, steps=60, metric=distance, patience=2)
    assert tuner.meta["a"].item() == min(measured, key=measured.get)
    assert len(measured) < 60


def test_a_negative_index_of_an_example_is_refused():
    weights = ExampleWeights(3)
    meta = weights.meta({"w": torch.zeros(1)})
    with pytest.raises(IndexError):
        weights.weights(meta, torch.zeros(2), {"index": torch.tensor([0, -1])})
