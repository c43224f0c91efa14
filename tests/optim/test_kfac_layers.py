"""Which layers K-FAC moves and how, which it refuses, and what it does at extreme factors."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from oracles import generator, randn, relative_error
from second_order import (
    EXAMPLES,
    LABELS,
    X,
    closure_for,
    network,
    tanh_network,
    vector,
)
from torch import nn

from metaimplicit.optim import KFAC

CLASSES = 3
VECTORS = randn(6, 4, seed=1)
VECTOR_LABELS = torch.arange(6).remainder(CLASSES)


def test_other_layers_take_the_gradient_and_frozen_parameters_stay():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, CLASSES)
    ).double()
    norm = model[1]
    model[3].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = F.cross_entropy(model(VECTORS), VECTOR_LABELS)
    weight_gradient, bias_gradient = torch.autograd.grad(loss, [norm.weight, norm.bias])
    norm.reset_running_stats()

    options = {"momentum": 0.0, "kl_clip": None, "others": "gradient"}
    optimizer = KFAC(model, F.cross_entropy, lr=0.5, **options)
    optimizer.step(lambda: (model(VECTORS), VECTOR_LABELS))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"0.weight", "0.bias", "1.weight", "1.bias", "4.weight"}
    weight = before["1.weight"] - 0.5 * weight_gradient
    bias = before["1.bias"] - 0.5 * bias_gradient
    assert relative_error(norm.weight.detach(), weight) < 1e-12
    assert relative_error(norm.bias.detach(), bias) < 1e-12
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize(
    ("layer", "name", "why"),
    [
        (nn.LSTM(4, 4), "LSTM", "a recurrent layer uses its weights at every time step"),
        (nn.GRU(4, 4), "GRU", "a recurrent layer"),
        (nn.RNN(4, 4), "RNN", "a recurrent layer"),
        (nn.LSTMCell(4, 4), "LSTMCell", "a recurrent layer"),
        (nn.Embedding(4, 4), "Embedding", "only linear and 2-d convolutional layers"),
        (nn.Conv1d(4, 4, 1), "Conv1d", "only linear and 2-d convolutional layers"),
        (nn.BatchNorm1d(4), "BatchNorm1d", "only linear and 2-d convolutional layers"),
        (nn.Conv2d(4, 4, 1, groups=2), "Conv2d", "it is grouped, or its padding"),
        (nn.Conv2d(4, 4, 3, padding="same"), "Conv2d", "it is grouped, or its padding"),
        (
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            "Conv2d",
            "it is grouped, or its padding",
        ),
    ],
)
def test_layers_without_factors_are_named(layer, name, why):
    model = nn.Sequential(nn.Linear(4, 4), layer)
    message = rf"KFAC: layer '1' \({name}\): {why}.*use optim.GaussNewton, or freeze it"
    with pytest.raises(ValueError, match=message):
        KFAC(model, F.cross_entropy)
    KFAC(model, F.cross_entropy, others="gradient")
    layer.requires_grad_(False)
    KFAC(model, F.cross_entropy)


class Scaled(nn.Linear):
    def forward(self, x):
        return F.linear(x, 2 * self.weight, self.bias)


class LowRank(nn.Linear):
    def __init__(self):
        super().__init__(4, 4)
        self.down = nn.Parameter(torch.zeros(1, 4))


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Scaled(4, 4), ".* or its class defines another forward"),
        (LowRank(), "'down' is neither the weight nor the bias of such a layer"),
    ],
)
def test_a_layer_that_only_derives_from_a_linear_one_is_named(layer, why):
    with pytest.raises(ValueError, match=rf"KFAC: layer '1' \({type(layer).__name__}\): {why}"):
        KFAC(network(layer), F.cross_entropy)


def test_a_bias_without_its_weight_is_named():
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="'bias' requires grad without a weight that does"):
        KFAC(model, F.cross_entropy)


def test_a_model_without_a_layer_with_factors_is_refused():
    message = "KFAC model: got no linear or 2-d convolutional layer that requires grad"
    with pytest.raises(ValueError, match=message):
        KFAC(nn.LayerNorm(4), F.cross_entropy, others="gradient")


class TwoLayers(nn.Module):
    """Two layers, and a forward pass that is given."""

    def __init__(self, forward):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.forward = lambda x: forward(self, x)


def test_a_parameter_of_two_layers_is_named():
    model = TwoLayers(lambda self, x: self.second(self.first(x)))
    model.second.weight = model.first.weight
    message = "KFAC: 'first.weight' and 'second.weight' are one parameter of two layers"
    with pytest.raises(ValueError, match=message):
        KFAC(model, F.cross_entropy, others="gradient")


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: F.linear(self.second(self.first(x)), self.first.weight),
        lambda self, x: self.second(self.first(F.linear(x, self.first.weight).relu_()).relu_()),
        lambda self, x: self.second(self.first(x)) / self.first.weight.norm(),
    ],
    ids=["after", "before", "norm"],
)
def test_a_parameter_that_is_read_outside_of_its_layer_is_named(forward):
    model = TwoLayers(forward)
    x = torch.randn(5, 4)
    message = "KFAC: 'first.weight' is read outside of its layer, too"
    with pytest.raises(ValueError, match=message):
        KFAC(model, F.cross_entropy).step(lambda: (model(x), torch.arange(5).remainder(4)))
    model.first.weight.requires_grad_(False)
    model.first.bias.requires_grad_(False)
    KFAC(model, F.cross_entropy).step(lambda: (model(x), torch.arange(5).remainder(4)))


def call_and_ignore_second(self, x):
    self.second(x)
    return self.first(x)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (
            lambda self, x: self.second(self.first(self.first(x))),
            "layer 'first' is called twice, expected once",
        ),
        (call_and_ignore_second, "the outputs do not depend on layer 'second'"),
        (lambda self, x: self.first(x), "layer 'second' adapts but is not called"),
    ],
    ids=["twice", "ignored", "never"],
)
def test_a_layer_that_is_not_called_exactly_once_is_named(forward, message):
    model = TwoLayers(forward)
    x = torch.randn(5, 4)
    y = torch.arange(5).remainder(4)
    with pytest.raises(ValueError, match=f"KFAC: {message}; use optim.GaussNewton"):
        KFAC(model, F.cross_entropy).step(lambda: (model(x), y))
    assert not any(layer._forward_hooks for layer in model.modules())


def test_a_parameter_on_which_the_loss_does_not_depend_is_named():
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).double()
    message = "KFAC: the loss does not depend on '1.weight'; freeze it"
    with pytest.raises(ValueError, match=message):
        KFAC(model, F.cross_entropy, others="gradient").step(lambda: (model[0](X), LABELS))


def test_a_layer_that_is_called_by_keyword_is_recorded():
    class ByKeyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4).double()

        def forward(self, x):
            return self.layer(input=x)

    torch.manual_seed(0)
    model = ByKeyword()
    other = copy.deepcopy(model)
    KFAC(model, F.cross_entropy).step(lambda: (model(X), LABELS))
    KFAC(other, F.cross_entropy).step(lambda: (other.layer(X), LABELS))
    assert torch.equal(vector(model), vector(other))


class SparseProduct(nn.Module):
    """A product with the identity, whose derivative takes one vector at a time."""

    def forward(self, x):
        return torch.sparse.mm(torch.eye(x.shape[1], dtype=x.dtype).to_sparse(), x.T).T


def test_what_takes_one_vector_at_a_time_changes_no_step():
    model, other = network(SparseProduct()), network(nn.Identity())
    for net in (model, other):
        optimizer = KFAC(net, F.cross_entropy, expectation="exact")
        optimizer.step(lambda net=net: (net(X), LABELS))
    assert relative_error(vector(model), vector(other)) < 1e-14


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_anomalies_may_be_looked_for():
    model, other = network(), network()
    with torch.autograd.detect_anomaly():
        KFAC(model, F.cross_entropy, expectation="exact").step(lambda: (model(X), LABELS))
    KFAC(other, F.cross_entropy, expectation="exact").step(lambda: (other(X), LABELS))
    assert torch.equal(vector(model), vector(other))


@pytest.mark.parametrize("rows", [(), (5,), (5, 2)])
def test_an_activation_in_place_changes_no_step(rows):
    inputs = randn(6, *rows, 4, seed=3)
    labels = VECTOR_LABELS.reshape(-1, *[1] * len(rows)).expand(6, *rows)

    def moved(in_place):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(in_place), nn.Linear(5, CLASSES)).double()
        optimizer = KFAC(model, F.cross_entropy, expectation="exact", kl_clip=None)
        optimizer.step(lambda: (model(inputs).movedim(-1, 1), labels))
        return vector(model)

    assert torch.equal(moved(in_place=True), moved(in_place=False))


def test_a_factor_that_is_singular_in_its_precision_changes_no_parameter():
    model = tanh_network().float()
    start = vector(model)
    optimizer = KFAC(model, F.cross_entropy, damping=1e-30)
    message = r"a factor is singular at damping = 1e-30; raise damping"
    with pytest.raises(FloatingPointError, match=message):
        optimizer.step(lambda: (model(X[:1].float()), LABELS[:1]))
    assert torch.equal(vector(model), start)


def test_factors_far_apart_in_size_are_balanced():
    """For a confident network tr A/tr G is more than single precision holds."""
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.copy_(48 * torch.eye(4))
        model.bias.zero_()
    KFAC(model, F.cross_entropy).step(lambda: (model(torch.eye(4)), torch.arange(4)))
    assert vector(model).isfinite().all()


def test_with_a_factor_of_zero_the_damping_is_shared_equally():
    """No gradient passes a last layer of zeros, so G = 0 behind it, and π = 1."""
    model = tanh_network()
    with torch.no_grad():
        model[2].weight.zero_()
    optimizer = KFAC(model, F.cross_entropy, damping=0.04)
    optimizer.step(closure_for("kfac", model))
    state = optimizer.state[model[0].weight]
    assert (state["G"] == 0).all()
    assert relative_error(state["G inverse"], torch.eye(4).double() / 0.2) < 1e-12
    assert vector(model).isfinite().all()


def test_the_next_inversion_reads_the_damping_of_the_group():
    model = tanh_network()
    optimizer = KFAC(model, F.cross_entropy)
    optimizer.step(closure_for("kfac", model))
    optimizer.param_groups[0]["damping"] = 3.0
    optimizer.step(closure_for("kfac", model))
    for layer in (model[0], model[2]):
        state = optimizer.state[layer.weight]
        pi = math.sqrt(float(state["A"].diagonal().mean() / state["G"].diagonal().mean()))
        for key, shift in (("A", pi * math.sqrt(3)), ("G", math.sqrt(3) / pi)):
            damped = state[key] + shift * torch.eye(len(state[key])).double()
            assert relative_error(state[f"{key} inverse"], torch.linalg.inv(damped)) < 1e-10


def test_gaussian_targets_are_drawn_around_the_outputs():
    """So G of a single linear layer is that of the draws themselves, Σ ε εᵀ/m."""
    model = nn.Linear(3, 4).double()
    optimizer = KFAC(
        model,
        lambda z, y: 0.5 * (z - y).square().sum(-1).mean(),
        likelihood="gaussian",
        expectation="monte-carlo",
        seed=5,
    )
    optimizer.step(lambda: (model(X), torch.zeros(EXAMPLES, 4).double()))
    draws = generator(int(torch.randint(2**62, (), generator=generator(5))))
    noise = torch.randn(1, 1, EXAMPLES, 4, generator=draws, dtype=torch.float64)[0, 0]
    assert relative_error(optimizer.state[model.weight]["G"], noise.T @ noise / EXAMPLES) < 1e-12


def test_the_clip_counts_every_parameter():
    """ν² lr² uᵀ∇L = κ, with u = ∇L for parameters without factors, if lr is large enough."""
    model = network(nn.LayerNorm(4))
    before = vector(model)
    options = {"momentum": 0.0, "others": "gradient", "kl_clip": 1e-3}
    optimizer = KFAC(model, F.cross_entropy, lr=5.0, **options)
    optimizer.step(closure_for("kfac", model))
    delta = vector(model) - before
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    norm_bias = slice(-24, -20)
    nu = float(delta[norm_bias].norm() / (5.0 * g[norm_bias].norm()))
    assert nu < 1
    assert nu * 5.0 * -float(delta @ g) == pytest.approx(1e-3, rel=1e-10)


def test_zeroing_the_gradients_in_place_leaves_the_momentum():
    ends = []
    for zeroes in (False, True):
        model = network(nn.LayerNorm(4))
        optimizer = KFAC(model, F.cross_entropy, others="gradient", kl_clip=None)
        for _ in range(3):
            optimizer.step(closure_for("kfac", model))
            if zeroes:
                optimizer.zero_grad(set_to_none=False)
        ends.append(vector(model))
    assert torch.equal(*ends)


def test_all_tensors_are_on_the_device_of_the_parameters(monkeypatch):
    """Fake tensors hold no values, so no check can read one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from metaimplicit.operators import likelihood_inference, loss_scores
    from metaimplicit.operators.cut import Cut
    from metaimplicit.operators.likelihood import Family

    for module in ("checks", "factors", "kfac"):
        monkeypatch.setattr(f"metaimplicit.optim.{module}.raise_if", lambda *_: None)
    monkeypatch.setattr(loss_scores, "_is_uniform", lambda _: True)
    monkeypatch.setattr(loss_scores, "cut_before_log_softmax", lambda loss, *_: Cut(loss))
    monkeypatch.setattr(likelihood_inference, "_find_family", lambda *_, **__: Family("softmax"))
    with FakeTensorMode():
        with torch.device("meta"):
            model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
            x = torch.empty(5, 1, 4, 4)
            y = torch.empty(5, dtype=torch.int64)
        options = {"expectation": "exact", "update_every": 1, "invert_every": 1}
        optimizer = KFAC(model, F.cross_entropy, **options)
        for _ in range(2):
            loss = optimizer.step(lambda: (model(x), y))
        tensors = [loss, *(p.grad for p in model.parameters())]
        for state in optimizer.state.values():
            tensors += state.values()
        assert all(tensor.device.type == "meta" for tensor in tensors)


class Doubling(torch.autograd.Function):
    """2x, with a backward that reads a number, which torch cannot vmap."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, g):
        return 2 * g if float(g.abs().max()) < 1e9 else g


class Doubled(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_a_backward_that_torch_cannot_vmap_is_called_score_by_score():
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    y = torch.arange(8) % 3
    weights = []
    for function in (Doubling.apply, lambda x: 2 * x):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), Doubled(function), nn.Linear(5, 3))
        optimizer = KFAC(model, F.cross_entropy, expectation="exact")
        for _ in range(3):
            optimizer.step(lambda model=model: (model(x), y))
        weights.append(model[0].weight.detach())
    torch.testing.assert_close(*weights)


def test_a_step_in_inference_mode_is_the_same():
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    y = torch.arange(8) % 3
    weights = []
    for mode in (torch.inference_mode, torch.enable_grad):
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        optimizer = KFAC(model, F.cross_entropy)
        with mode():
            for _ in range(3):
                optimizer.step(lambda model=model: (model(x), y))
        weights.append(model.weight.detach())
    assert torch.equal(*weights)
