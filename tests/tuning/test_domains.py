"""Domains, the free coordinates of meta-parameters, and bounds while tuning."""

import math
from functools import partial

import pytest
import torch
from oracles import relative_error
from weighted_logistic import META, POINT, PROBLEM

from metaimplicit import FromMeta, GradientDescent, Positive, Tuner, hypergradient
from metaimplicit.tuning import Box, Domain, Interval, Real, Simplex
from metaimplicit.tuning.free_meta import FreeMeta

CASES = [
    (Positive(), [0.5, 2.0], [-1.0, 1.0], "got -1, expected numbers > 0"),
    (Interval(-1, 3), [0.5, 2.0], [3.0], "got 3, expected numbers between -1 and 3"),
    (Box(0.0, 1.0), [0.0, 0.5], [1.5], "got 1.5, expected numbers from 0.0 to 1.0"),
    (Simplex(), [0.3, 0.7], [0.5, 0.6], "got 0.5, expected numbers > 0 that sum to 1"),
]


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize(
    ("domain", "inside", "outside", "message"),
    CASES,
    ids=lambda x: type(x).__name__,
)
def test_a_domain_inverts_its_map_differentiates_it_and_refuses_what_is_outside(
    domain, inside, outside, message
):
    value = double(*inside)
    free = domain.free(value)
    assert relative_error(domain.value(free), value) < 1e-14

    gradient = double(2.0, -3.0)
    pulled = domain.pull_back_gradient(free, domain.value(free), gradient)
    by_autograd = Domain.pull_back_gradient(domain, free, value, gradient)
    assert relative_error(pulled, by_autograd) < 1e-14

    with pytest.raises(ValueError, match=message):
        domain.free(torch.tensor(outside))


@pytest.mark.parametrize("domain", [case[0] for case in CASES], ids=lambda x: type(x).__name__)
def test_projected_coordinates_have_values_that_can_be_inverted(domain):
    far = domain.project(double(40.0, -40.0))
    assert domain.value(far).isfinite().all()
    if not isinstance(domain, Simplex):  # whose value rounds to 0 there
        domain.free(domain.value(far))


def test_bad_intervals_are_refused():
    with pytest.raises(ValueError, match="Box high: got Tensor, expected a float for all"):
        Box(0.0, torch.ones(3))
    with pytest.raises(ValueError, match="Box low: got NoneType, expected a float for all"):
        Box(None, 1.0)
    with pytest.raises(ValueError, match="Interval: got low 1 and high 0"):
        Interval(1, 0)
    with pytest.raises(ValueError, match="expected finite bounds; use Positive or Box"):
        Interval(0, math.inf)


@pytest.mark.parametrize(
    "interval",
    [
        Interval(0, 1),
        Interval(0, 0.5),
        Interval(0.9, 0.999),
        Interval(100, 101),
        Interval(-7, -6.9),
    ],
    ids=str,
)
def test_an_interval_in_float32_has_its_derivative_and_no_bounds(interval):
    """x − low has lost its digits there, so its product with sigmoid(−z) is no derivative."""
    z = torch.tensor([-99.0, -15.0, -12.0, -3.0, 0.0, 4.0, 13.0, 99.0])
    ends = interval.value(interval.project(z.clone()))
    assert ends.min() > interval.low
    assert ends.max() < interval.high
    exact = z.double()[1:-1].requires_grad_()
    [expected] = torch.autograd.grad(interval.value(exact).sum(), exact)
    x = interval.value(z[1:-1])
    slope = interval.pull_back_gradient(z[1:-1], x, torch.ones(6))
    torch.testing.assert_close(slope.double(), expected, rtol=1e-5, atol=0.0)


def test_values_are_copies():
    """Changing them changes neither coordinates that are values themselves, nor constants."""
    start = {"a": torch.tensor(0.2), "b": torch.tensor(3), "c": torch.tensor(0.5)}
    free = FreeMeta(start, {"c": Interval(0, 1)})
    for x in free.values().values():
        x.zero_()
    values = {name: x.item() for name, x in free.values().items()}
    assert values == pytest.approx({"a": 0.2, "b": 3, "c": 0.5})


class Capped(Real):
    """A user's domain, whose projection returns a new tensor."""

    def project(self, free):
        return free.clamp(max=0.5)


def test_a_projection_may_return_a_new_tensor():
    free = FreeMeta({"a": torch.tensor(0.2)}, {"a": Capped()})
    with torch.no_grad():
        free.tensors["a"].add_(3)
    free.project()
    assert free.values()["a"] == 0.5


def test_hyperparameters_stay_in_their_domains_under_long_steps():
    """And the first step follows the chain rule through exp."""
    meta = {name: META[name] for name in ("eta", "mu", "decay")}
    meta["weights"] = torch.ones_like(META["weights"])
    domains = {
        "eta": Positive(),
        "mu": Interval(0, 1),
        "decay": Box(0.25, 0.5),
        "weights": Box(0.9, 1.1),
    }
    inner = GradientDescent(
        steps=5,
        lr=FromMeta("eta"),
        momentum=FromMeta("mu"),
    )
    tuner = Tuner(
        PROBLEM,
        meta,
        inner=inner,
        method="unrolled",
        optimizer=partial(torch.optim.SGD, lr=100.0),
        domains=domains,
    )
    tuner.step(POINT, POINT)
    assert tuner.meta["eta"] > 0
    assert 0 <= tuner.meta["mu"] <= 1
    assert tuner.meta["decay"] == 0.5
    assert set(tuner.meta["weights"].tolist()) == {0.9, 1.1}
    grads = hypergradient(
        PROBLEM,
        meta,
        POINT,
        inner=inner,
        method="unrolled",
    ).grads
    expected = (META["eta"].log() - 100 * META["eta"] * grads["eta"]).exp()
    assert relative_error(tuner.meta["eta"], expected) < 1e-12
