"""The networks of the few-shot literature, and their batch normalisation."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metaimplicit.models import MLP, ConvNet
from metaimplicit.normalization import BatchNorm, is_transductive


def test_batch_norm_equals_that_of_torch_to_its_second_derivative():
    norm = BatchNorm(3).double()
    reference = nn.BatchNorm2d(3, track_running_stats=False).double()
    with torch.no_grad():
        for p in norm.parameters():
            p.copy_(torch.randn_like(p))
    reference.load_state_dict(norm.state_dict())
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    direction = torch.randn_like(x)  # a plain sum would cancel to round-off

    def derivatives(module):
        y = module(x)
        (first,) = torch.autograd.grad((y.pow(3) * direction).sum(), x, create_graph=True)
        slope = (first * direction).sum()
        return y, first, *torch.autograd.grad(slope, (x, *module.parameters()))

    for got, expected in zip(derivatives(norm), derivatives(reference), strict=True):
        assert (got - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize(
    ("shape", "strided", "features"), [((1, 28, 28), True, 8 * 4), ((3, 28, 20), False, 8)]
)
def test_the_conv_net_halves_its_image_four_times_and_is_transductive(shape, strided, features):
    net = ConvNet(shape, 5, filters=8, strided=strided)
    assert net.head.in_features == features
    x = torch.rand(6, *shape)
    assert net(x).shape == (6, 5)
    assert is_transductive(net)
    assert not torch.allclose(net(x)[:2], net(x[:2]), atol=1e-4)
    assert not list(net.buffers())


def softplus_by_its_formula(x):
    return torch.logaddexp(20 * x, torch.zeros_like(x)) / 20


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("relu", torch.relu),
        ("leaky-relu", lambda x: torch.where(x > 0, x, 0.1 * x)),
        ("gelu", F.gelu),
        ("softplus", softplus_by_its_formula),
    ],
)
def test_the_conv_net_has_the_activation_that_is_named(name, function):
    net = ConvNet((1, 4, 4), 2, filters=3, blocks=1, activation=name).double()
    convolution = net.features[0]
    norm = net.features[1]
    x = torch.randn(6, 1, 4, 4, dtype=torch.float64)
    expected = net.head(function(norm(convolution(x))).flatten(1))
    # torch's softplus is x itself at 20x > 20.
    assert (net(x) - expected).norm() <= 1e-8 * expected.norm()


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (
            (1, 8, 8),
            {"strided": False},
            r"input_shape: got \(1, 8, 8\), of which 4 poolings leave nothing",
        ),
        ((784,), {}, r"input_shape: got \(784,\), expected \(channels, height, width\)"),
        ((0, 8, 8), {}, r"input_shape: got \(0, 8, 8\), expected .*, each ≥ 1"),
        ((1, 0, 0), {}, r"input_shape: got \(1, 0, 0\), expected .*, each ≥ 1"),
        ((1, 28, 28), {"filters": 0}, "filters: got 0, expected at least 1"),
        ((1, 28, 28), {"filters": 2.5}, "filters: got 2.5, expected a whole number, at least 1"),
        (
            (1, 28, 28),
            {"activation": "tanh"},
            "activation: got 'tanh', expected one of relu, leaky-relu, softplus, gelu",
        ),
        ((1, 28, 28), {"norm": "instance"}, "norm: got 'instance', expected one of batch, running"),
    ],
)
def test_the_conv_net_names_the_argument_that_is_wrong(shape, options, message):
    with pytest.raises(ValueError, match=message):
        ConvNet(shape, 5, **options)


@pytest.mark.parametrize(
    ("norm", "transductive"),
    [("batch", True), ("running", False), ("group", False), ("layer", False)],
)
def test_the_conv_net_has_the_normalisation_that_is_named(norm, transductive):
    net = ConvNet((1, 8, 8), outputs=5, filters=12, norm=norm).eval()
    images = torch.randn(6, 1, 8, 8)
    alone = torch.cat([net(image.unsqueeze(0)) for image in images])
    assert is_transductive(net) is transductive
    assert torch.allclose(alone, net(images), atol=1e-5) is not transductive


@pytest.mark.parametrize("filters", [8, 16, (32, 32, 32, 4), 2])
def test_features_of_one_pixel_depend_on_the_image_under_group_norm(filters):
    net = ConvNet((3, 16, 16), outputs=3, filters=filters, norm="group")
    assert net(torch.rand(20, 3, 16, 16)).std(0).min() > 0.01


def test_networks_without_a_last_layer_end_with_features():
    whole = ConvNet((1, 8, 8), outputs=5, filters=4)
    body = ConvNet((1, 8, 8), outputs=None, filters=4)
    body.load_state_dict({n: p for n, p in whole.state_dict().items() if "head" not in n})
    images = torch.randn(3, 1, 8, 8)
    assert torch.equal(whole.head(body(images)), whole(images))
    mlp = MLP(3, None, hidden=(4, 5))
    assert mlp(torch.randn(6, 3)).shape == (6, 5)
    assert mlp(torch.randn(6, 3)).min() == 0  # the ReLU of the last hidden layer


def test_the_mlp_is_by_default_that_of_maml():
    net = MLP(1, 1)
    weights = 1 * 40 + 40 * 40 + 40 * 1
    biases = 40 + 40 + 1
    assert sum(p.numel() for p in net.parameters()) == weights + biases
    assert isinstance(net[-1], nn.Linear)
    assert not is_transductive(net)
    with pytest.raises(ValueError, match=r"widths: got \[1, 0, 1\]"):
        MLP(1, 1, hidden=(0,))


@pytest.mark.parametrize("strided", [True, False])
def test_the_features_of_the_last_blocks_are_joined(strided):
    net = ConvNet((3, 16, 16), 5, filters=(4, 6, 8, 10), strided=strided, norm="group", joined=2)
    images = torch.randn(2, 3, 16, 16)
    size = len(net.features) // 4
    third = net.features[: 3 * size](images)
    fourth = net.features[3 * size :](third)
    features = torch.cat([third.flatten(1), fourth.flatten(1)], dim=1)
    assert torch.equal(net(images), net.head(features))
    assert features.shape[1] == 8 * 2 * 2 + 10
    with pytest.raises(ValueError, match="joined: got 5, expected from 1 to 4, the blocks"):
        ConvNet((3, 16, 16), 5, joined=5)
