"""Meta-gradients in half precision, against those in single precision.

A meta-gradient may lose as many digits as the plain gradient of the query loss does, times five.
"""

from functools import cache
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metaimplicit import METHODS, GradientDescent, MetaLearner
from metaimplicit.operators import Identity

LABELS = torch.arange(8).remainder(4).expand(2, 8)
HALF = [torch.bfloat16, torch.float16]
DIFFERENCES = {"f2sa", "reptile"}  # they subtract nearly equal numbers
FORWARD = {"forward", "real-time"}  # they take a tangent for each of the parameters
FLAGS = [flag for flag in METHODS if flag not in DIFFERENCES | FORWARD]  # types take turns


def build_model(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)


def draw_episodes(dtype):
    torch.manual_seed(1)
    support, query = torch.randn(2, 2, 8, 6)
    return SimpleNamespace(support=(support.to(dtype), LABELS), query=(query.to(dtype), LABELS))


def gradient_of(model):
    return torch.cat([p.grad.float().flatten() for p in model.parameters()])


def plain_gradient(dtype):
    model = build_model(dtype)
    inputs, labels = draw_episodes(dtype).query
    F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten()).backward()
    return gradient_of(model)


def meta_gradient(flag, dtype, vectorize):
    model = build_model(dtype)
    inner = GradientDescent(steps=2, lr=0.1)
    learner = MetaLearner(model, F.cross_entropy, inner=inner, method=flag, vectorize=vectorize)
    learner.backward(draw_episodes(dtype))
    return gradient_of(model)


@cache
def single_precision(flag):
    return meta_gradient(flag, torch.float32, "loop")


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.filterwarnings("ignore:.* ended with:RuntimeWarning")  # 5 steps, or round-off
@pytest.mark.parametrize(
    ("flag", "dtype", "vectorize"),
    [(flag, HALF[i % 2], ["vmap", "loop"][i // 2 % 2]) for i, flag in enumerate(FLAGS)],
    ids=str,
)
def test_a_meta_gradient_loses_as_few_digits_as_a_gradient(flag, dtype, vectorize):
    of_gradient = distance(plain_gradient(dtype), plain_gradient(torch.float32))
    try:
        gradient = meta_gradient(flag, dtype, vectorize)
    except ValueError as error:
        pytest.fail(f"{error}\nif {flag} has to refuse half precision, add it to DIFFERENCES above")
    assert distance(gradient, single_precision(flag)) < 5 * of_gradient


@pytest.mark.filterwarnings("ignore:.* ended with:RuntimeWarning")
@pytest.mark.parametrize(
    "flag", ["unrolled", "first-order", "cg", "dense", "nystrom", "fixed-point"]
)
def test_autocast_loses_as_few_digits_as_a_gradient(flag):
    exact = plain_gradient(torch.float32)
    single = single_precision(flag)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        of_gradient = distance(plain_gradient(torch.float32), exact)
        assert of_gradient > 1e-4
        assert distance(meta_gradient(flag, torch.float32, "vmap"), single) < 5 * of_gradient


@pytest.mark.parametrize("flag", sorted(DIFFERENCES))
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_method_that_subtracts_nearly_equal_numbers_is_refused_in_half_precision(dtype, flag):
    with pytest.raises(ValueError, match=f"{flag}: got .* in {dtype}, expected float32 or float64"):
        meta_gradient(flag, dtype, "vmap")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("flag", ["dense", "auto", "lanczos", "cg", "minres"])
def test_a_solver_in_half_precision_works_with_more_digits(flag, dtype):
    """The system is exact in half precision, and so is its solution in single precision."""
    solver = METHODS[flag].solver
    b = torch.tensor([[1.0, 2.0, -4.0]], dtype=dtype)
    solution = solver.solve(Identity(b, scale=4.0), b)
    assert solution.value.dtype == dtype
    assert torch.equal(solution.value, b / 4)
    assert solution.residual.dtype == torch.float32
    again = solver.solve(Identity(b, scale=4.0), b, state=solution.state)
    assert torch.equal(again.value, b / 4)
