"""ResNet-12, and convolutional networks whose blocks differ in width."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metaimplicit.models import MLP, ConvNet, ResidualBlock, ResNet12
from metaimplicit.normalization import is_transductive

NORMS = {"batch": True, "running": False, "group": False, "layer": False}  # is it transductive


def number_of_parameters(net):
    return sum(p.numel() for p in net.parameters())


def scramble(net):
    """Move the parameters away from the ones and zeros that normalisations start with."""
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn_like(p))
    return net


def normalise(x, weight, bias):
    """Batch normalisation by its formula."""
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = (x - mean).pow(2).mean((0, 2, 3), keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * weight[:, None, None] + bias[:, None, None]


def leaky(x):
    return torch.where(x > 0, x, 0.1 * x)


def block_by_hand(params, x):
    """A residual block as Lee et al. (2019) have it, of parameters in the order of the layers."""
    c1, w1, b1, c2, w2, b2, c3, w3, b3, c0, w0, b0 = params
    y = leaky(normalise(F.conv2d(x, c1, padding=1), w1, b1))
    y = leaky(normalise(F.conv2d(y, c2, padding=1), w2, b2))
    y = normalise(F.conv2d(y, c3, padding=1), w3, b3)
    y = leaky(y + normalise(F.conv2d(x, c0), w0, b0))
    m, channels, height, width = y.shape
    y = y[:, :, : height // 2 * 2, : width // 2 * 2]
    return y.reshape(m, channels, height // 2, 2, width // 2, 2).amax((3, 5))


def test_a_residual_block_equals_its_formula_with_its_gradient():
    block = ResidualBlock(3, 4, activation="leaky-relu", norm="batch").double()
    scramble(block)
    params = list(block.parameters())
    x = torch.randn(5, 3, 7, 6, dtype=torch.float64, requires_grad=True)
    got = block(x)
    expected = block_by_hand(params, x)
    assert got.shape == (5, 4, 3, 3)
    assert (got - expected).norm() <= 1e-12 * expected.norm()

    weights = torch.randn_like(got)
    slopes = [torch.autograd.grad((y * weights).sum(), [x, *params]) for y in (got, expected)]
    for slope, reference in zip(*slopes, strict=True):
        assert (slope - reference).norm() <= 1e-10 * (1 + reference.norm())


def test_the_resnet_is_its_blocks_a_mean_and_a_linear_layer():
    net = scramble(ResNet12((3, 16, 20), 5, filters=(4, 6, 6, 8)).double())
    x = torch.randn(3, 3, 16, 20, dtype=torch.float64)
    features = x
    for block in net.features:
        features = block_by_hand(list(block.parameters()), features)
    expected = features.mean((2, 3)) @ net.head.weight.T + net.head.bias
    assert (net(x) - expected).norm() <= 1e-12 * expected.norm()


def test_the_resnet_has_as_many_parameters_as_published():
    """Lee et al. (2019), of which the linear layer is left out."""
    widths = [3, 64, 160, 320, 640]
    expected = 0
    for m, n in pairwise(widths):
        convolutions = 9 * m * n + 2 * 9 * n * n + m * n
        expected += convolutions + 4 * 2 * n  # with the scales and shifts of four normalisations
    net = ResNet12((3, 84, 84), None)
    assert number_of_parameters(net) == expected == 12_424_320


def test_the_network_of_r2d2_has_as_many_parameters_as_its_formula():
    filters = (96, 192, 384, 512)
    widths = [3, *filters]
    expected = sum(9 * m * n + n + 2 * n for m, n in pairwise(widths))
    net = ConvNet((3, 32, 32), None, filters=filters, strided=False, activation="leaky-relu")
    assert number_of_parameters(net) == expected
    assert net(torch.rand(2, 3, 32, 32)).shape == (2, 512 * 2 * 2)


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_reach_every_parameter(norm):
    for net in (
        ResNet12((1, 16, 16), 3, filters=(4, 8, 8, 16), norm=norm),
        ConvNet((1, 16, 16), 3, filters=(4, 8, 8, 16), norm=norm),
    ):
        assert is_transductive(net) is NORMS[norm]
        net(torch.randn(6, 1, 16, 16)).pow(3).sum().backward()
        convolutions = {p for m in net.modules() if isinstance(m, nn.Conv2d) for p in [m.bias]}
        for name, p in net.named_parameters():
            # A normalisation removes the bias in front of it, at least if it has the batch's mean.
            assert p in convolutions or p.grad.norm() > 1e-4, name


def test_an_mlp_flattens_inputs_of_several_axes():
    net = MLP((3, 4, 5), 2, hidden=(7,))
    x = torch.randn(6, 3, 4, 5)
    vectors = MLP(60, 2, hidden=(7,))
    vectors.load_state_dict(dict(zip(vectors.state_dict(), net.parameters(), strict=True)))
    assert torch.equal(net(x), vectors(x.reshape(6, 60)))
    assert net.head_name == "3"
    assert [vectors.head_name, MLP((60,), None, hidden=(7,)).head_name] == ["2", "2"]


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 15, 16), {}, r"input_shape: got \(3, 15, 16\), of which 4 poolings leave nothing"),
        ((3, 16, 16), {"filters": (4, 8)}, "filters: got 2 numbers, expected one for each of 4"),
        ((3, 16, 16), {"filters": (4, 8, 0, 8)}, "filters: got 0, expected at least 1"),
        ((3, 16, 16), {"norm": "instance"}, "norm: got 'instance', expected one of batch"),
        ((60,), {}, r"input_shape: got \(60,\), expected \(channels, height, width\)"),
    ],
)
def test_the_resnet_names_the_argument_that_is_wrong(shape, options, message):
    with pytest.raises(ValueError, match=message):
        ResNet12(shape, 5, **options)
