"""Recurrent networks on a GPU, where the kernels of cuDNN have first derivatives only."""

import pytest
import torch
from oracles import randn, relative_error
from torch import nn

from metaimplicit.mended import mended_derivatives

NETWORKS = {"lstm": nn.LSTM, "gru": nn.GRU, "tanh": nn.RNN, "relu": nn.RNN}


def products(name, device, mode):
    """The product of a Hessian with a vector, for each of two sequences."""
    torch.manual_seed(0)
    options = {"nonlinearity": name} if name in ("tanh", "relu") else {}
    model = NETWORKS[name](3, 4, batch_first=True, **options).double().to(device)
    params = dict(model.named_parameters())
    tangents = {n: randn(*p.shape, seed=i).to(device) for i, (n, p) in enumerate(params.items())}
    sequences = randn(2, 2, 5, 3, seed=7).to(device)

    def loss(params, x):
        return torch.func.functional_call(model, params, (x,))[0].square().sum()

    def product(x):
        gradient = torch.func.grad(loss)
        if mode == "jvp":
            return torch.func.jvp(lambda p: gradient(p, x), (params,), (tangents,))[1]
        return torch.func.vjp(lambda p: gradient(p, x), params)[1](tangents)[0]

    with mended_derivatives:
        if mode == "vmap":
            return torch.vmap(product)(sequences)
        rows = [product(x) for x in sequences]
    return {n: torch.stack([row[n] for row in rows]) for n in params}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", ["reverse", "jvp", "vmap"])
@pytest.mark.parametrize("name", NETWORKS)
def test_second_derivatives_are_those_of_the_cpu(name, mode):
    on_cpu = products(name, "cpu", "reverse")
    for key, product in products(name, "cuda", mode).items():
        assert relative_error(product.cpu(), on_cpu[key]) < 1e-10
