"""Second-order optimisers where a loop is less than ideal, and numbers that a plain run does not reach."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracles import randn, relative_error
from torch import nn

from metaimplicit.optim import KFAC, GaussNewton, NaturalGradient, Newton
from metaimplicit.optim.base import levenberg_marquardt, ratio
from metaimplicit.solvers import CG

X, LABELS = randn(12, 3, seed=1), torch.arange(12).remainder(4)
BINARY = (randn(12, 1, seed=2) > 0).double()
MAKERS = {
    "newton": lambda model: Newton(model),
    "gauss-newton": lambda model: GaussNewton(model, F.cross_entropy),
    "natural": lambda model: NaturalGradient(model, F.cross_entropy, expectation="monte-carlo"),
    "kfac": lambda model: KFAC(model, F.cross_entropy),
}


def network(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), *layers, nn.Linear(4, 4)).double()


def closure(name, model):
    return (
        (lambda: F.cross_entropy(model(X), LABELS))
        if name == "newton"
        else (lambda: (model(X), LABELS))
    )


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("name", MAKERS)
def test_a_copy_goes_on_by_itself(name, copied):
    model = network(nn.Tanh())
    optimizer = MAKERS[name](model)
    optimizer.step(closure(name, model))
    other, its = copied((model, optimizer))
    for _ in range(3):
        optimizer.step(closure(name, model))
    before = vector(model)
    for _ in range(3):
        its.step(closure(name, other))
    assert torch.equal(vector(other), before)
    assert torch.equal(vector(model), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("name", MAKERS)
def test_a_copy_of_one_that_a_scheduler_holds_steps_by_itself(name, copied):
    model = network(nn.Tanh())
    optimizer = MAKERS[name](model)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    other, its = copied((model, optimizer))
    before = vector(model)
    for _ in range(5):  # the first of them may be taken back
        its.step(closure(name, other))
    assert torch.equal(vector(model), before)
    assert not torch.equal(vector(other), before)


@pytest.mark.parametrize("name", MAKERS)
def test_a_parameter_frozen_since_is_named(name):
    model = network(nn.Tanh())
    optimizer = MAKERS[name](model)
    model[2].weight.requires_grad_(False)
    with pytest.raises(
        ValueError,
        match=r"step: '2\.weight' was frozen after the optimiser was built; build it anew",
    ):
        optimizer.step(closure(name, model))


@pytest.mark.parametrize("name", MAKERS)
def test_half_precision_is_refused(name):
    with pytest.raises(
        ValueError, match=r"got '0\.weight' as torch\.bfloat16.*in single or double precision"
    ):
        MAKERS[name](network().bfloat16())


def test_a_backward_in_the_closure_is_named():
    model = network(nn.Tanh())

    def usual():
        loss = F.cross_entropy(model(X), LABELS)
        loss.backward()
        return loss

    with pytest.raises(
        ValueError,
        match=r"closure: it has used its graph up; call no backward\(\) there, step does",
    ):
        Newton(model).step(usual)


def test_a_closure_that_refuses_the_trial_point_leaves_the_old_one():
    model = nn.ParameterList([nn.Parameter(torch.tensor([0.5], dtype=torch.float64))])

    def loss():
        x = model[0]
        if x.item() > 1:
            raise ArithmeticError("x > 1")
        return (x - 3).square().sum()

    with pytest.raises(ArithmeticError, match="x > 1"):
        Newton(model).step(loss)
    assert model[0].item() == 0.5


@pytest.mark.parametrize("make", [NaturalGradient, KFAC])
def test_a_loss_that_is_no_cross_entropy_of_the_last_axis_is_refused(make):
    message = "loss: got one whose gradient does not sum to zero over the last axis of the outputs"
    for model, loss, targets in (
        (nn.Linear(3, 1).double(), F.binary_cross_entropy_with_logits, BINARY),
        (
            nn.Sequential(nn.Linear(3, 8), nn.Unflatten(1, (4, 2))).double(),
            F.cross_entropy,
            LABELS[:, None].repeat(1, 2),
        ),
    ):
        with pytest.raises(ValueError, match=f"{make.__name__} {message}"):
            make(model, loss).step(lambda model=model, targets=targets: (model(X), targets))
    smooth = network()
    make(smooth, nn.CrossEntropyLoss(label_smoothing=0.1)).step(lambda: (smooth(X), LABELS))
    ends = []
    for layers, loss in (((), F.cross_entropy), ((nn.LogSoftmax(1),), F.nll_loss)):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), *layers).double()
        make(model, loss, expectation="exact").step(lambda model=model: (model(X), LABELS))
        ends.append(vector(model))
    assert relative_error(*ends) < 1e-12
    masked = network()
    without = torch.tensor([False, False, False, True])
    make(masked, F.cross_entropy).step(
        lambda: (masked(X).masked_fill(without, -torch.inf), LABELS.remainder(3))
    )
    assert vector(masked).isfinite().all()


def test_convexity_is_judged_with_a_losses_own_tensors():
    """Class weights in single precision, which a loss in double would not take; and a concave loss is still refused."""
    torch.manual_seed(0)
    x, y = 1000 * torch.randn(30, 6), torch.arange(30).remainder(4)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    weighted = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0, 4.0]))
    start = vector(model)
    GaussNewton(model, weighted, damping=1e-6).step(lambda: (model(x), y))
    assert not torch.equal(vector(model), start)
    concave = GaussNewton(model, lambda z, y: -weighted(z, y), damping=1e-6)
    with pytest.raises(ValueError, match="GaussNewton loss: got one not convex in the outputs"):
        concave.step(lambda: (model(x), y))


# K-FAC


def test_the_first_momentum_is_no_alias_of_the_gradient():
    """Zeroing gradients in place, as `zero_grad(set_to_none=False)` does, leaves the velocity."""
    ends = []
    for zeroed in (False, True):
        model = network(nn.LayerNorm(4))
        optimizer = KFAC(model, F.cross_entropy, others="gradient", kl_clip=None)
        for _ in range(3):
            optimizer.step(closure("kfac", model))
            if zeroed:
                optimizer.zero_grad(set_to_none=False)
        ends.append(vector(model))
    assert torch.equal(*ends)


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
        (Scaled(4, 4), ".* or its forward is its own"),
        (LowRank(), "'down' is no weight or bias of such a layer"),
    ],
)
def test_a_layer_that_only_derives_from_a_linear_one_is_named(layer, why):
    with pytest.raises(ValueError, match=rf"KFAC: layer '1' \({type(layer).__name__}\): {why}"):
        KFAC(network(layer), F.cross_entropy)


def test_a_model_without_a_layer_for_it_is_refused():
    with pytest.raises(
        ValueError, match="KFAC model: got no linear or 2-d convolutional layer that requires grad"
    ):
        KFAC(nn.LayerNorm(4), F.cross_entropy, others="gradient")


def test_a_layer_called_by_keyword_is_seen():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 4).double()

        def forward(self, x):
            return self.layer(input=x)

    torch.manual_seed(0)
    model = Keyword()
    other = copy.deepcopy(model)
    for each, call in ((model, model), (other, other.layer)):
        KFAC(each, F.cross_entropy).step(lambda call=call: (call(X), LABELS))
    assert torch.equal(vector(model), vector(other))


def test_factors_far_apart_in_size_are_balanced():
    """Of a confident network tr G is tiny, and tr A/tr G more than single precision holds."""
    model = nn.Linear(4, 4)
    with torch.no_grad():
        model.weight.copy_(48 * torch.eye(4))
        model.bias.zero_()
    KFAC(model, F.cross_entropy).step(lambda: (model(torch.eye(4)), torch.arange(4)))
    assert vector(model).isfinite().all()


def test_a_factor_of_zero_leaves_the_damping_whole():
    """Behind a last layer of zeros no gradient comes through: G = 0 there, and π = 1."""
    model = network(nn.Tanh())
    with torch.no_grad():
        model[2].weight.zero_()
    optimizer = KFAC(model, F.cross_entropy, damping=0.04)
    optimizer.step(closure("kfac", model))
    state = optimizer.state[model[0].weight]
    assert (state["G"] == 0).all()
    assert relative_error(state["G inverse"], torch.eye(4).double() / 0.2) < 1e-12
    assert vector(model).isfinite().all()


def test_the_next_inversion_reads_the_damping_of_the_group():
    model = network(nn.Tanh())
    optimizer = KFAC(model, F.cross_entropy)
    optimizer.step(closure("kfac", model))
    optimizer.param_groups[0]["damping"] = 3.0
    optimizer.step(closure("kfac", model))
    for layer in (model[0], model[2]):
        state = optimizer.state[layer.weight]
        pi = math.sqrt(float(state["A"].diagonal().mean() / state["G"].diagonal().mean()))
        for key, shift in (("A", pi * math.sqrt(3)), ("G", math.sqrt(3) / pi)):
            damped = state[key] + shift * torch.eye(len(state[key])).double()
            assert relative_error(state[f"{key} inverse"], torch.linalg.inv(damped)) < 1e-10


def test_gaussian_targets_are_drawn_around_the_outputs():
    """G of a single linear layer is that of the draws themselves: Σ ε εᵀ/m."""
    model = nn.Linear(3, 4).double()
    optimizer = KFAC(
        model,
        lambda z, y: 0.5 * (z - y).square().sum(-1).mean(),
        likelihood="gaussian",
        expectation="monte-carlo",
        seed=5,
    )
    optimizer.step(lambda: (model(X), torch.zeros(12, 4).double()))
    own = torch.Generator().manual_seed(
        int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(5)))
    )
    noise = torch.randn(1, 1, 12, 4, generator=own, dtype=torch.float64)[0, 0]
    assert relative_error(optimizer.state[model.weight]["G"], noise.T @ noise / 12) < 1e-12


def test_the_clip_counts_every_parameter():
    """ν² lr² uᵀ∇L = κ with u = ∇L for those of no block; at a large enough lr the clip is active."""
    model = network(nn.LayerNorm(4))
    before = vector(model)
    optimizer = KFAC(model, F.cross_entropy, lr=5.0, momentum=0.0, others="gradient", kl_clip=1e-3)
    optimizer.step(closure("kfac", model))
    delta = vector(model) - before
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    nu = float(delta[-24:-20].norm() / (5.0 * g[-24:-20].norm()))  # of LayerNorm's bias
    assert nu < 1
    assert nu * 5.0 * -float(delta @ g) == pytest.approx(1e-3, rel=1e-10)


# the ratio and what follows from it


def test_the_ratio_at_a_minimum_and_its_floor():
    eps = torch.finfo(torch.float64).eps
    assert ratio(torch.tensor([0.0, 0.0, 0.0]), eps) == 1.0
    assert ratio(torch.tensor([0.0, 1e-9, 0.0]), eps) == -math.inf
    assert ratio(torch.tensor([1.0, 1.0 + eps, eps], dtype=torch.float64), eps) == pytest.approx(
        1, abs=0.2
    )
    rule = {"easier": 0.5, "harder": 4.0, "floor": 1e-3}
    assert levenberg_marquardt(1.5e-3, 1.0, **rule) == 1e-3
    assert levenberg_marquardt(1e-30, 1.0, **rule) == 1e-30
    assert levenberg_marquardt(1e-30, 0.0, **rule) == 4e-30


def test_the_damping_of_kfac_has_a_floor():
    model = nn.Linear(3, 4).double()
    optimizer = KFAC(
        model, F.cross_entropy, adapt_every=1, kl_clip=None, lr=1e-3, damping=1e-2, momentum=0.0
    )
    floor = torch.finfo(torch.float64).eps * 1e-2
    optimizer.param_groups[0]["damping"] = 1.01 * floor
    optimizer.step(lambda: (model(X), LABELS))
    assert optimizer.ratio > 0.75
    assert optimizer.param_groups[0]["damping"] == floor


def test_the_solver_of_large_models():
    assert Newton(nn.Linear(32, 32)).solver == CG(max_steps=50, tol=1e-3)
