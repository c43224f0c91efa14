"""Real architectures under five methods: right against plain loops, with and without vmap."""

import warnings
from functools import cache
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from zoo import plain
from zoo.models import ZOO

from metaimplicit import CG, FixedPoint, GradientDescent, Implicit, MetaLearner, Nystrom
from metaimplicit.solvers import GMRES

RHO = 0.5
METHODS = {  # a method for n parameters, and the plain loop that it is held against
    "unrolled": (lambda n: "unrolled", plain.unrolled),
    "first-order": (lambda n: "first-order", plain.first_order),
    "cg": (lambda n: Implicit(CG(max_steps=n, tol=1e-12)), plain.gauss_newton),
    "nystrom": (lambda n: Implicit(Nystrom(rank=n, rho=RHO)), plain.damped_gauss_newton),
    "fixed-point": (lambda n: FixedPoint(GMRES(max_steps=n, tol=1e-12)), plain.hessian),
}
RECURRENT = ("lstm tagger", "gru tagger")


def normalized(v, g, dim=0):
    """Weight normalisation without torch's own function, whose second derivative is wrong."""
    return v * g / v.flatten(1).norm(dim=1).reshape(g.shape)


def start_of(name):
    """The same model and episodes at each call."""
    make_model, make_data, _ = ZOO[name]
    torch.manual_seed(0)
    model = make_model()
    support, query = make_data(), make_data()
    return model, SimpleNamespace(support=support, query=query)


@cache
def meta_gradient(name, oracle):
    model, episodes = start_of(name)
    loss = ZOO[name][2]
    pairs = [list(zip(*pair, strict=True)) for pair in (episodes.support, episodes.query)]
    with patch("torch._weight_norm", normalized), sdpa_kernel(SDPBackend.MATH):
        return oracle(model, loss, *pairs)


# Every model is unrolled and takes products. What it computes under the other methods it computes
# under these two, so that the others take turns. In a loop, torch runs a model as it does alone.
CASES = [(name, method, "vmap") for name in ZOO for method in ("unrolled", "cg")]
CASES += [("gpt", "first-order", "vmap"), ("tcn", "fixed-point", "vmap")]
CASES += [("u-net", "nystrom", "vmap"), ("deep sets", "fixed-point", "vmap")]
CASES += [(name, method, "loop") for name in RECURRENT for method in ("unrolled", "cg")]
CASES += [("resnet-12", "cg", "loop")]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("name", "method", "vectorize"), CASES)
def test_the_meta_gradient_is_that_of_a_plain_loop(name, method, vectorize):
    model, episodes = start_of(name)
    make_method, oracle = METHODS[method]
    chosen = make_method(sum(p.numel() for p in model.parameters()))
    inner = GradientDescent(steps=plain.STEPS, lr=plain.LR)
    learner = MetaLearner(
        model,
        ZOO[name][2],
        inner=inner,
        method=chosen,
        proximal=plain.PROXIMAL,
        vectorize=vectorize,
    )
    if name in RECURRENT and vectorize == "vmap":
        with pytest.raises(Exception, match="vectorize='loop'"):
            learner.backward(episodes)
        return

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")  # of torch
        step = learner.backward(episodes)
    result = plain.flat(p.grad for p in model.parameters())
    right = meta_gradient(name, oracle)
    error = (result - right).norm() / right.norm()
    # A rank of n leaves out columns that are zero to half of the digits.
    assert error < (1e-5 if method == "nystrom" else 1e-8), step.report
