"""Operations whose CUDA kernels lack derivatives or batching rules."""

import pytest
import torch
from oracles import dense, randn, relative_error
from torch import nn

from metaimplicit import GradientDescent, MetaLearner
from metaimplicit.mended import mended_derivatives
from metaimplicit.operators import Fisher
from metaimplicit.unsupported import UnsupportedOperationError

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


class Last(nn.Module):
    """The last outputs of a recurrent network."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)[0][:, -1]


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
        assert relative_error(slopes[i].detach(), expected[i].sum(dim=(0, 1, 2, 3))) < 1e-12


@pytest.mark.parametrize("name", NETWORKS)
def test_recurrent_networks_adapt_in_evaluation_mode(name):
    """There, the kernels of cuDNN have no derivative."""
    accuracies = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = Last(NETWORKS[name]()).double().to(device)
        inner = GradientDescent(steps=2, lr=0.1)
        learner = MetaLearner(model, nn.functional.mse_loss, inner=inner, vectorize="loop").eval()
        support, query = ((randn(2, 6, 5, 3, seed=i), randn(2, 6, 4, seed=i + 2)) for i in (0, 1))
        task = [tuple(x.to(device) for x in part) for part in (support, query)]
        accuracies.append(learner.evaluate(tuple(task))[0].cpu())
    assert relative_error(*reversed(accuracies)) < 1e-10


@pytest.mark.parametrize("elsewhere", ["inputs", "targets"])
def test_data_on_another_device_are_named(elsewhere):
    learner = MetaLearner(nn.Linear(3, 4).double().cuda(), nn.functional.mse_loss)
    part = {"inputs": randn(2, 6, 3, seed=0), "targets": randn(2, 6, 4, seed=1)}
    part = tuple(x if name == elsewhere else x.cuda() for name, x in part.items())
    with pytest.raises(UnsupportedOperationError, match=r"different devices meet \(.*\.to"):
        learner.backward((part, part))


@pytest.mark.parametrize("likelihood", ["softmax", "sigmoid", "gaussian"])
def test_targets_are_drawn_on_the_device_of_the_generator(likelihood):
    losses = {
        "softmax": lambda z: nn.functional.cross_entropy(z[0], torch.zeros(4).long().to(z.device)),
        "sigmoid": lambda z: nn.functional.binary_cross_entropy_with_logits(z[0], 0 * z[0]),
        "gaussian": lambda z: nn.functional.mse_loss(z[0], 0 * z[0]),
    }
    matrices = []
    for device in ("cpu", "cuda"):
        fisher = Fisher(
            lambda p: p["z"],
            lambda z: losses[likelihood](z).unsqueeze(0),
            {"z": randn(1, 4, 3, seed=0).to(device)},
            expectation="monte-carlo",
            generator=torch.Generator().manual_seed(0),
        )
        matrices.append(dense(fisher)[0].cpu())
    assert relative_error(*reversed(matrices)) < 1e-12
