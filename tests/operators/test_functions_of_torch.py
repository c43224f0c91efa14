"""Operators of plain functions, whose operations torch differentiates wrongly or not at all."""

from functools import partial
from typing import get_args

import pytest
import torch
from oracles import dense, relative_error
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from metaimplicit.operators import GGN, Fisher, Hessian, KroneckerFactored, Products
from metaimplicit.params import flatten, unflatten

pytestmark = pytest.mark.usefixtures("float64")


class Attention(nn.Module):
    """Attention, which torch runs by a fused kernel if it may."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return F.scaled_dot_product_attention(self.layer(x), x, x).flatten(1)


class Recomputed(nn.Module):
    """A layer that runs again in the backward pass, at the parameters that it has then."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x):
        return checkpoint(lambda x: self.layer(x).tanh(), x, use_reentrant=False).flatten(1)


MODELS = {
    "weight norm": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.Tanh()),
    "attention": Attention,
    "checkpoint": Recomputed,
}


def make(name):
    """The outputs and the loss of a model for one task, as functions of θ, and θ itself."""
    torch.manual_seed(0)
    model = MODELS[name]()
    x, y = torch.randn(1, 4, 3), torch.randn(12)
    params = {name: p.detach()[None] + 0.1 for name, p in model.named_parameters()}

    def outputs(params):
        own = {name: p[0] for name, p in params.items()}
        return torch.func.functional_call(model, own, (x,)).reshape(1, -1)

    return outputs, lambda z: F.mse_loss(z, y[None]).reshape(1), params


def differences(outputs, loss, params):
    return dense(Hessian(lambda p: loss(outputs(p)), params, products="finite-differences"))


@pytest.mark.parametrize(
    ("name", "products"),
    [
        *((name, "double-backward") for name in MODELS),
        ("weight norm", "forward-over-reverse"),
        ("attention", "forward-over-reverse"),  # there are no checkpoints in forward mode
    ],
)
def test_the_hessian_is_that_of_differences(name, products):
    outputs, loss, params = make(name)
    hessian = Hessian(lambda p: loss(outputs(p)), params, products=products)
    assert relative_error(dense(hessian), differences(outputs, loss, params)) < 1e-7


WITHOUT_GRADIENTS = [torch.no_grad, torch.inference_mode]


def curvatures():
    """Each kind of curvature at one point, as functions of no arguments."""
    outputs, loss, params = make("attention")

    def whole(params):
        return loss(outputs(params))

    def fisher():
        return Fisher(lambda p: outputs(p).reshape(1, 4, 3), lambda z: loss(z.flatten(1)), params)

    hessians = {
        products: partial(Hessian, whole, params, products) for products in get_args(Products)
    }
    return hessians | {"gauss-newton": partial(GGN, outputs, loss, params), "fisher": fisher}


@pytest.mark.parametrize("mode", WITHOUT_GRADIENTS)
@pytest.mark.parametrize("kind", [*get_args(Products), "gauss-newton", "fisher"])
def test_a_curvature_is_the_same_where_no_gradients_are_recorded(kind, mode):
    make_curvature = curvatures()[kind]
    expected = dense(make_curvature())
    assert expected.abs().max() > 0
    with mode():
        operator = make_curvature()
        inside = dense(operator)
    for matrix in (inside, dense(operator)):
        assert relative_error(matrix, expected) < 1e-9


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc])
def test_products_with_sparse_matrices_have_no_batch(layout):
    graph = torch.randn(3, 3)

    def hessian(graph):
        def loss(params):
            return (graph @ params["w"][0]).pow(3).sum().reshape(1)

        return Hessian(loss, {"w": torch.arange(3.0).reshape(1, 3, 1)})

    sparse, expected = hessian(graph.to_sparse(layout=layout)), hessian(graph)
    assert relative_error(dense(sparse), dense(expected)) < 1e-14
    index = torch.tensor([2, 0])
    assert relative_error(sparse.columns(index), expected.columns(index)) < 1e-14


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_the_factors_of_a_graph_network_may_have_a_sparse_graph():
    """Its derivative takes the scores of the classes one at a time."""
    graph, x = torch.rand(4, 4), torch.randn(4, 3)
    layer = nn.Linear(3, 2)
    params = {name: p.detach()[None] for name, p in layer.named_parameters()}

    def factors(graph):
        def call(own):
            return graph @ torch.func.functional_call(layer, own, (x,))

        def lift(function, params):
            parts = function(call, {name: p[0] for name, p in params.items()})
            return tree_map(lambda part: part[None], parts)

        labels = torch.tensor([0, 1, 1, 0])
        loss = lambda z: F.cross_entropy(z[0], labels).reshape(1)  # noqa: E731
        return KroneckerFactored(layer, lift, loss, params)

    assert relative_error(dense(factors(graph.to_sparse())), dense(factors(graph))) < 1e-14


@pytest.mark.parametrize("name", MODELS)
def test_the_gauss_newton_matrix_is_that_of_a_jacobian_by_differences(name):
    outputs, loss, params = make(name)
    z = outputs(params).detach()
    steps = 1e-5 * torch.eye(sum(p.numel() for p in params.values()))

    def outputs_at(step):
        moved = flatten(params) + step
        return outputs(unflatten(moved, params)).detach()[0]

    jacobian = torch.stack([(outputs_at(s) - outputs_at(-s)) / 2e-5 for s in steps], 1)
    expected = 2 / z.numel() * jacobian.T @ jacobian
    assert relative_error(dense(GGN(outputs, loss, params))[0], expected) < 1e-7
