"""Operations whose CUDA kernels lack derivatives or batching rules."""

import pytest
import torch
from oracles import randn, relative_error
from torch import nn

from metaimplicit.mended import mended_derivatives

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
NETWORKS = {
    "lstm": lambda: nn.LSTM(3, 4, batch_first=True),
    "gru": lambda: nn.GRU(3, 4, batch_first=True),
    "tanh": lambda: nn.RNN(3, 4, batch_first=True),
    "relu": lambda: nn.RNN(3, 4, batch_first=True, nonlinearity="relu"),
}


def hessian_product(name, device):
    torch.manual_seed(0)
    model = NETWORKS[name]().double().to(device)
    x = randn(2, 5, 3, seed=7).to(device)
    params = list(model.parameters())
    with mended_derivatives:
        loss = model(x)[0].square().sum()
    gradients = torch.autograd.grad(loss, params, create_graph=True)
    vectors = [randn(*p.shape, seed=i).to(device) for i, p in enumerate(params)]
    products = torch.autograd.grad(gradients, params, vectors)
    return torch.cat([p.flatten() for p in products]).cpu()


@pytest.mark.parametrize("name", NETWORKS)
def test_recurrent_networks_have_second_derivatives(name):
    assert relative_error(hessian_product(name, "cuda"), hessian_product(name, "cpu")) < 1e-10


@pytest.mark.parametrize("affine", [True, False])
def test_running_statistics_work_under_vmap(affine):
    norm = nn.BatchNorm2d(3, affine=affine, device="cuda", dtype=torch.float64).eval()
    norm.running_mean.copy_(randn(3, seed=0))
    norm.running_var.copy_(randn(3, seed=2).square() + 0.5)
    images = randn(4, 2, 3, 5, 5, seed=1).cuda()

    def slope(x):
        return torch.func.grad(lambda x: norm(x).pow(3).sum())(x)

    expected = [torch.autograd.functional.jacobian(lambda x: norm(x).pow(3), x) for x in images]
    with mended_derivatives:
        outputs, slopes = torch.vmap(norm)(images), torch.vmap(slope)(images)
    for i, x in enumerate(images):
        assert relative_error(outputs[i].detach(), norm(x).detach()) < 1e-12
        assert relative_error(slopes[i], expected[i].sum(dim=(0, 1, 2, 3))) < 1e-12
