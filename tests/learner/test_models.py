"""The networks that are adapted."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metaimplicit.models import MLP, BatchNorm, ConvNet, is_transductive


def test_batch_norm_equals_torchs_without_running_statistics_to_its_second_derivative():
    torch.manual_seed(0)
    ours, theirs = BatchNorm(3).double(), nn.BatchNorm2d(3, track_running_stats=False).double()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        with torch.no_grad():
            q.copy_(p.copy_(torch.randn_like(p)))
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(x)  # an even-handed sum would cancel to round-off
    found = []
    for norm in (ours, theirs):
        y = norm(x)
        (first,) = torch.autograd.grad((y.pow(3) * direction).sum(), x, create_graph=True)
        found.append(
            (y, first, *torch.autograd.grad((first * direction).sum(), (x, *norm.parameters())))
        )
    for mine, torchs in zip(*found, strict=True):
        assert (mine - torchs).norm() <= 1e-12 * torchs.norm()


@pytest.mark.parametrize(
    ("shape", "strided", "width"), [((1, 28, 28), True, 8 * 4), ((3, 28, 20), False, 8)]
)
def test_conv_net_halves_four_times_and_is_transductive(shape, strided, width):
    net = ConvNet(shape, 5, filters=8, strided=strided)
    assert net.head.in_features == width
    x = torch.rand(6, *shape)
    assert net(x).shape == (6, 5)
    assert is_transductive(net)
    assert not torch.allclose(net(x)[:2], net(x[:2]), atol=1e-4)
    assert not list(net.buffers())


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("relu", torch.relu),
        ("gelu", F.gelu),
        ("softplus", lambda x: torch.logaddexp(20 * x, torch.zeros_like(x)) / 20),
    ],
)
def test_the_conv_nets_activation_is_the_one_named(name, function):
    torch.manual_seed(0)
    net = ConvNet((1, 4, 4), 2, filters=3, blocks=1, activation=name).double()
    convolution, norm = net.features[0], net.features[1]
    x = torch.randn(6, 1, 4, 4, dtype=torch.float64)
    expected = net.head(function(norm(convolution(x))).flatten(1))
    assert (
        net(x) - expected
    ).norm() <= 1e-8 * expected.norm()  # softplus turns to x itself at 20x > 20


def test_conv_net_says_which_number_is_wrong():
    with pytest.raises(
        ValueError, match=r"input_shape: got \(1, 8, 8\), which 4 poolings leave nothing of"
    ):
        ConvNet((1, 8, 8), 5, strided=False)
    with pytest.raises(
        ValueError, match=r"input_shape: got \(784,\), expected \(channels, height, width\)"
    ):
        ConvNet((784,), 5)
    with pytest.raises(ValueError, match="filters: got 0"):
        ConvNet((1, 28, 28), 5, filters=0)
    with pytest.raises(
        ValueError, match="activation: got 'tanh', expected one of relu, softplus, gelu"
    ):
        ConvNet((1, 28, 28), 5, activation="tanh")


def test_mlp_has_mamls_parameters_and_is_inductive():
    net = MLP(1, 1)
    assert sum(p.numel() for p in net.parameters()) == 1 * 40 + 40 + 40 * 40 + 40 + 40 + 1
    assert isinstance(net[-1], nn.Linear)
    assert not is_transductive(net)
    with pytest.raises(ValueError, match=r"widths: got \[1, 0, 1\]"):
        MLP(1, 1, hidden=(0,))
