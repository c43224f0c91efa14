"""The ratio of actual to predicted reduction, and the damping that follows it."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracles import randn, relative_error, symmetric
from second_order import LABELS, Point, X
from torch import nn

from metaimplicit.optim import KFAC, GaussNewton, NaturalGradient, Newton
from metaimplicit.optim.damping import MeasuredLoss, levenberg_marquardt
from metaimplicit.solvers.trust_region import reduction_ratio

EPS = torch.finfo(torch.float64).eps


def ratio(*losses):
    return reduction_ratio(*torch.tensor(losses, dtype=torch.float64), eps=EPS).item()


def test_the_ratio_at_a_minimum_is_one():
    assert ratio(0.0, 0.0, 0.0) == 1.0
    assert ratio(0.0, 1e-9, 0.0) == -math.inf
    assert ratio(1.0, 1.0 + EPS, EPS) == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize(
    ("losses", "roundoff", "expected"),
    [
        ((0.0, 0.0, 1e-8), 1e-7, 0.5),
        ((0.0, 0.0, 1e-8), 1e-9, 0.0),  # the loss would have shown it
        ((0.0, 1e-9, 1e-8), 1e-7, -0.1),  # and so it does here
        ((1.0, 1.0, -1e-8), 1e-7, -math.inf),
    ],
)
def test_a_reduction_below_the_roundoff_of_equal_losses_says_nothing(losses, roundoff, expected):
    numbers = torch.tensor(losses, dtype=torch.float64)
    measured = reduction_ratio(*numbers, eps=EPS, roundoff=roundoff)
    assert float(measured) == pytest.approx(expected, abs=1e-6)


def test_a_small_loss_of_single_precision_is_measured_with_all_digits():
    z = torch.tensor([[20.0, 0.0]])
    y = torch.zeros(1, dtype=torch.int64)
    single = MeasuredLoss.of_outputs(F.cross_entropy, z, y)
    assert single.value == 0
    assert float(single.roundoff) == pytest.approx(200 * torch.finfo(torch.float32).eps)
    measured = single.in_double()
    assert float(measured.value) == pytest.approx(math.log1p(math.exp(-20)), rel=1e-6)
    assert float(measured.roundoff) == pytest.approx(200 * EPS)
    masked = torch.tensor([[20.0, 0.0, -torch.inf]])
    roundoff = MeasuredLoss.of_outputs(F.cross_entropy, masked, y).in_double().roundoff
    assert float(roundoff) == pytest.approx(200 * EPS)
    weights = torch.ones(2)  # single precision, which cross_entropy does not mix with double
    coarse = MeasuredLoss.of_outputs(lambda z, y: F.cross_entropy(z, y, weights), z, y)
    assert coarse.in_double().value.dtype == torch.float32
    assert MeasuredLoss.of_outputs(F.cross_entropy, z.double(), y).in_double is None


def test_no_step_is_bad_on_account_of_roundoff_that_the_estimate_leaves_out():
    """Squares of 10⁴ leave no digit of a loss below 1 in single precision."""

    def expanded(z, y):
        return (z * z - 2 * z * y + y * y).mean()

    y = torch.full((1,), 1e4)
    for start in (0.5, 0.75, 1.0, 1.25):
        before = MeasuredLoss.of_outputs(expanded, y + start, y)
        after = MeasuredLoss.of_outputs(expanded, y + start / 2, y)
        predicted = torch.tensor(0.75 * start**2)
        assert before.ratio(after, predicted, eps=EPS) >= 0.25


def test_a_step_to_a_loss_that_is_not_finite_is_bad_though_double_precision_would_do():
    def overflowing(z, y):
        return torch.log(1 + torch.exp(z - y)).mean()

    z, y = torch.zeros(2), torch.zeros(2)
    before, after = (MeasuredLoss.of_outputs(overflowing, x, y) for x in (z, z + 100))
    assert after.value.isinf()
    assert after.in_double().value.isfinite()
    assert before.ratio(after, torch.tensor(1.0), eps=EPS) == -math.inf
    nowhere = MeasuredLoss.of_scalar(torch.tensor(torch.nan))
    assert before.ratio(nowhere, torch.tensor(1.0), eps=EPS) == -math.inf


def test_a_ratio_of_single_precision_that_rounding_would_change_is_that_of_double():
    y = torch.zeros(4, dtype=torch.int64)
    z = torch.tensor([[2.0, 0.0]]).expand(4, -1)
    for change in (1.0, 1e-2, 1e-4, 1e-6):
        shifted = z + torch.tensor([change, 0.0])
        before, after = (MeasuredLoss.of_outputs(F.cross_entropy, x, y) for x in (z, shifted))
        exact = [F.cross_entropy(x.double(), y) for x in (z, shifted)]
        predicted = 2 * (exact[0] - exact[1])
        found = before.ratio(after, predicted, eps=EPS)
        assert found == pytest.approx(0.5, rel=1e-2)


@pytest.mark.parametrize(
    ("options", "measurements"),
    [({"lr": 1e-9}, 2), ({"lr": 1.0}, 0), ({"lr": 1e-9, "adapt_damping": False}, 0)],
)
def test_a_loss_is_measured_in_double_where_its_change_is_small(options, measurements):
    calls = []

    def loss(z, y):
        calls.append(z.dtype)
        return F.cross_entropy(z, y)

    x = X.float()
    model = nn.Linear(3, 4)
    optimizer = GaussNewton(model, loss, **options)
    optimizer.step(lambda: (model(x), LABELS))
    calls.clear()
    optimizer.step(lambda: (model(x), LABELS))
    assert calls.count(torch.float64) == measurements


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [GaussNewton, NaturalGradient, Newton])
def test_a_loss_that_rounds_to_zero_does_not_drive_the_damping_up(kind, dtype):
    """It was 1e30 after 100 steps, so that nothing could be learnt any more."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, dtype=dtype), torch.randint(3, (8,))
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)
    optimizer = Newton(model) if kind is Newton else kind(model, F.cross_entropy)

    def closure():
        return F.cross_entropy(model(x), y) if kind is Newton else (model(x), y)

    for _ in range(200):
        optimizer.step(closure)
    assert F.cross_entropy(model(x), y) < 1e-12
    assert optimizer.param_groups[0]["damping"] < 1e4


def test_the_damping_does_not_decrease_below_its_floor():
    rule = {"decrease": 0.5, "increase": 4.0, "floor": 1e-3}
    assert levenberg_marquardt(1.5e-3, 1.0, **rule) == 1e-3
    assert levenberg_marquardt(1e-30, 1.0, **rule) == 1e-30
    assert levenberg_marquardt(1e-30, 0.0, **rule) == 4e-30


def test_the_damping_of_kfac_does_not_decrease_below_its_floor():
    model = nn.Linear(3, 4).double()
    options = {"kl_clip": None, "lr": 1e-3, "damping": 1e-2, "momentum": 0.0}
    optimizer = KFAC(model, F.cross_entropy, adapt_every=1, **options)
    floor = EPS * 1e-2
    optimizer.param_groups[0]["damping"] = 1.01 * floor
    optimizer.step(lambda: (model(X), LABELS))
    assert optimizer.ratio > 0.75
    assert optimizer.param_groups[0]["damping"] == floor


def branch_of(rho):
    if rho <= 0:
        return "taken back"
    if rho < 0.25:
        return "increased"
    return "decreased" if rho > 0.75 else "kept"


def test_damping_follows_the_ratio_and_bad_steps_are_taken_back():
    """Gauss–Newton on Rosenbrock's residuals, step by step against the formulae."""

    def residuals(x):
        return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])

    x = torch.tensor([-1.2, 1.0]).double()
    model = Point(x)
    damping = 1e-4
    branches = set()
    optimizer = GaussNewton(
        model,
        lambda z, _: 0.5 * z.square().sum(),
        lr=0.8,
        damping=damping,
    )
    for _ in range(30):
        r = residuals(x)
        J = torch.func.jacrev(residuals)(x)
        g = J.T @ r
        G = J.T @ J
        delta = -0.8 * torch.linalg.solve(G + damping * torch.eye(2).double(), g)
        before = 0.5 * r.square().sum()
        after = 0.5 * residuals(x + delta).square().sum()
        slack = 10 * EPS * before
        predicted = -g @ delta - 0.5 * delta @ G @ delta
        rho = (before - after + slack) / (predicted + slack)
        branches.add(branch_of(rho))
        x = x + delta if rho > 0 else x
        if rho < 0.25:
            damping = 4 * damping
        elif rho > 0.75:
            damping = damping / 2

        old = model.x.detach().clone()
        loss = optimizer.step(lambda: (residuals(model.x), None))
        assert float(loss) == pytest.approx(float(before), rel=1e-9)
        assert optimizer.ratio == pytest.approx(float(rho), rel=1e-6)
        assert torch.equal(model.x, old) == (rho <= 0)
        assert relative_error(model.x.detach(), x) < 1e-9
        assert optimizer.param_groups[0]["damping"] == pytest.approx(damping, rel=1e-12)
    assert branches == {"taken back", "increased", "kept", "decreased"}
    assert float(loss) < 1e-3


@pytest.mark.parametrize(
    ("rho", "moves", "factor"),
    [
        (-0.01, 0, 4),
        (0.01, 1, 4),
        (0.249, 1, 4),
        (0.251, 1, 1),
        (0.749, 1, 1),
        (0.751, 1, 0.5),
        (1.3, 1, 0.5),
    ],
)
def test_the_thresholds_of_the_ratio(rho, moves, factor):
    """x + ½x² + ½(ρ − 1)x³ from 0 to −1: the loss falls by ½ρ, and the model by ½."""
    model = Point(torch.zeros(1).double())
    optimizer = Newton(model, damping=0.1)

    def loss():
        x = model.x
        return (x + 0.5 * x**2 + 0.5 * (rho - 1) * x**3).sum()

    optimizer.step(loss)
    assert optimizer.ratio == pytest.approx(rho, rel=1e-12)
    assert float(model.x.detach()) == pytest.approx(-moves, rel=1e-14)
    assert optimizer.param_groups[0]["damping"] == 0.1 * factor


def test_a_step_to_a_loss_that_is_not_finite_is_taken_back():
    model = Point(torch.tensor([0.5]).double())
    optimizer = Newton(model, damping=1e-3)
    start = model.x.detach().clone()
    loss = optimizer.step(lambda: (model.x + 4 * model.x.sqrt()).sum())  # to a negative x
    assert math.isfinite(loss)
    assert optimizer.ratio == -math.inf
    assert torch.equal(model.x.detach(), start)
    assert optimizer.param_groups[0]["damping"] == 4e-3


def test_a_closure_that_raises_at_the_new_parameters_leaves_the_old_ones():
    model = nn.ParameterList([nn.Parameter(torch.tensor([0.5], dtype=torch.float64))])

    def loss():
        x = model[0]
        if x.item() > 1:
            raise ArithmeticError("x > 1")
        return (x - 3).square().sum()

    with pytest.raises(ArithmeticError, match="x > 1"):
        Newton(model).step(loss)
    assert model[0].item() == 0.5


def test_at_a_minimum_roundoff_takes_no_step_back():
    A = symmetric([[1.0, 2.0, 3.0]])[0]
    b = randn(3, seed=3)
    model = Point(torch.linalg.solve(A, b))
    optimizer = Newton(model, damping=1e-2)
    for _ in range(60):
        optimizer.step(lambda: 0.5 * model.x @ A @ model.x - b @ model.x)
        assert optimizer.ratio > 0.75
    floor = 1e-2 * EPS
    assert optimizer.param_groups[0]["damping"] == pytest.approx(floor, rel=1e-12, abs=0)
