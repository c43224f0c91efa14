"""Evaluations of a closure within a step: dropout, buffers, random numbers, and mistakes."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from oracles import relative_error
from second_order import (
    CLASSES,
    INPUTS,
    LABELS,
    OPTIMIZERS,
    TARGETS,
    X,
    closure_for,
    half_square,
    tanh_network,
    vector,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from metaimplicit.optim import KFAC, GaussNewton, NaturalGradient, Newton
from metaimplicit.optim.closure import ReplayedClosure


class Noisy(nn.Module):
    """Linear in its parameters for one mask. Its batch-norm has no parameters, but counts."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(INPUTS, affine=False)
        self.head = nn.Linear(INPUTS, CLASSES)

    def forward(self, x):
        return self.head(F.dropout(self.norm(x), 0.5, self.training))


@pytest.mark.parametrize(
    "make",
    [
        lambda model: Newton(model, lr=0.5, damping=1e-3),
        lambda model: GaussNewton(model, half_square, lr=0.5, damping=1e-3),
        lambda model: NaturalGradient(
            model, half_square, lr=0.5, damping=1e-3, likelihood="gaussian"
        ),
        lambda model: KFAC(model, half_square, lr=0.1, adapt_every=1, likelihood="gaussian"),
    ],
    ids=["newton", "gauss-newton", "natural", "kfac"],
)
def test_every_evaluation_of_a_step_sees_the_same_dropout_and_buffers(make):
    torch.manual_seed(0)
    model = Noisy().double()
    called_once = copy.deepcopy(model)
    optimizer = make(model)
    torch.manual_seed(5)
    value = half_square(called_once(X), TARGETS).detach()
    random_state = torch.get_rng_state()

    def closure():
        outputs = model(X)
        if isinstance(optimizer, Newton):
            return half_square(outputs, TARGETS)
        return outputs, TARGETS

    torch.manual_seed(5)
    loss = optimizer.step(closure)
    assert float(loss) == float(value)
    # For one mask the quadratic model is exact.
    assert optimizer.ratio == pytest.approx(1.0, abs=1e-9)
    assert torch.equal(torch.get_rng_state(), random_state)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(model.norm, key), getattr(called_once.norm, key))
    assert model.norm.num_batches_tracked == 1


def test_every_replay_begins_with_the_buffers_of_the_first_call():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self):
            self.calls += 1
            return self.calls.item()

    model = Counting()
    replay = ReplayedClosure(model, model, torch.device("cpu"))
    assert [replay() for _ in range(3)] == [1.0, 1.0, 1.0]
    assert model.calls == 1


def test_random_numbers_of_later_evaluations_leave_the_global_generator_alone():
    model = tanh_network()
    calls = []

    def closure():
        calls.append(torch.rand(1 + len(calls)))  # more numbers in every call
        return F.cross_entropy(model(X), LABELS)

    torch.manual_seed(5)
    Newton(model).step(closure)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    torch.rand(1)
    assert len(calls) == 2
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_inputs_that_are_not_finite_change_no_parameter(name):
    model = tanh_network()
    start = vector(model)
    inputs = X.clone()
    inputs[0, 0] = math.nan
    message = "the loss or the outputs are not finite; no parameter was changed"
    with pytest.raises(FloatingPointError, match=message):
        OPTIMIZERS[name](model).step(closure_for(name, model, x=inputs))
    assert torch.equal(vector(model), start)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_gradient_that_is_not_finite_changes_no_parameter(name):
    model = tanh_network()
    start = vector(model)
    optimizer = OPTIMIZERS[name](model)
    optimizer.loss = lambda z, y: (0 * z).sqrt().mean()

    def closure():
        if name.startswith("newton"):
            return (0 * model(X)).sqrt().mean()
        return model(X), LABELS

    with pytest.raises(FloatingPointError, match="gradient is not finite"):
        optimizer.step(closure)
    assert torch.equal(vector(model), start)
    # No running average has taken a NaN.
    assert all(state.keys() <= {"momentum"} for state in optimizer.state.values())


@pytest.mark.parametrize(("closure", "got"), [(None, "None"), (torch.ones(9), "Tensor")])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_without_a_closure_says_what_it_expects(name, closure, got):
    with pytest.raises(ValueError, match=rf"step: got {got}, expected closure\(\) -> "):
        OPTIMIZERS[name](tanh_network()).step(closure)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_closure_that_detaches_the_outputs_is_refused(name):
    model = tanh_network()

    def detached():
        outputs = model(X).detach()
        return outputs.mean() if name.startswith("newton") else (outputs, LABELS)

    with pytest.raises(ValueError, match=r"does not depend on .*model"):
        OPTIMIZERS[name](model).step(detached)


@pytest.mark.parametrize("name", ["newton", "newton-cg"])
def test_newton_refuses_a_closure_that_returns_no_scalar(name):
    model = tanh_network()
    optimizer = OPTIMIZERS[name](model)
    message = r"closure: returned shape \(12,\), expected a scalar tensor"
    with pytest.raises(ValueError, match=message):
        optimizer.step(lambda: F.cross_entropy(model(X), LABELS, reduction="none"))
    with pytest.raises(ValueError, match="closure: returned tuple, expected a scalar tensor"):
        optimizer.step(lambda: (model(X), LABELS))


@pytest.mark.parametrize("name", ["gauss-newton", "natural", "kfac"])
def test_the_others_refuse_a_closure_that_returns_no_pair(name):
    model = tanh_network()
    optimizer = OPTIMIZERS[name](model)
    with pytest.raises(ValueError, match=r"closure: returned shape \(\), expected a pair"):
        optimizer.step(lambda: F.cross_entropy(model(X), LABELS))
    optimizer.loss = lambda z, y: F.cross_entropy(z, y, reduction="none")
    message = r"loss: returned shape \(12,\), expected a scalar tensor"
    with pytest.raises(ValueError, match=message):
        optimizer.step(lambda: (model(X), LABELS))


@pytest.mark.parametrize("name", ["natural", "kfac"])
def test_a_fisher_matrix_needs_outputs_with_an_axis_of_classes(name):
    model = tanh_network()
    message = r"outputs of shape \(12,\), expected \[examples, …, d\]"
    with pytest.raises(ValueError, match=message):
        OPTIMIZERS[name](model).step(lambda: (model(X)[:, 0], LABELS))


def test_a_parameter_that_is_read_without_calling_the_model_is_named():
    model = tanh_network()
    parameters = list(model.parameters())

    def penalised(z, y):
        return F.cross_entropy(z, y) + sum(p.square().sum() for p in parameters)

    message = "it reads '0.weight' without calling the model"
    with pytest.raises(ValueError, match=f"loss: {message}"):
        GaussNewton(model, penalised).step(lambda: (model(X), LABELS))
    with pytest.raises(ValueError, match=f"closure: {message}"):
        Newton(model).step(lambda: penalised(model(X), LABELS))

    def inside():
        penalty = sum(p.square().sum() for p in model.parameters())
        return F.cross_entropy(model(X), LABELS) + penalty

    Newton(model).step(inside)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_closure_that_calls_backward_is_refused(name):
    model = tanh_network()
    closure = closure_for(name, model)

    def goes_back():
        result = closure()
        loss = result if isinstance(result, torch.Tensor) else F.cross_entropy(*result)
        loss.backward()
        return result

    message = r"closure: it has freed its graph; do not call backward\(\) in it"
    with pytest.raises(ValueError, match=message):
        OPTIMIZERS[name](model).step(goes_back)


class Recomputed(nn.Module):
    """A network with dropout in a block that runs again in the backward pass."""

    def __init__(self, run):
        super().__init__()
        torch.manual_seed(0)
        self.block = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5))
        self.head = nn.Linear(4, 4)
        self.run = run

    def forward(self, x):
        return self.head(self.run(self.block, x))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_dropout_in_a_checkpoint_draws_what_it_does_outside(name):
    ends = []
    for run in (lambda block, x: block(x), partial(checkpoint, use_reentrant=False)):
        model = Recomputed(run).double()
        optimizer = OPTIMIZERS[name](model)
        torch.manual_seed(5)
        for _ in range(2):
            optimizer.step(closure_for(name, model))
        ends.append(vector(model))
    assert relative_error(ends[1], ends[0]) < 1e-9


@pytest.mark.parametrize(
    "make",
    [
        Newton,
        lambda model: GaussNewton(model, F.cross_entropy),
        lambda model: KFAC(model, F.cross_entropy, others="gradient"),
    ],
    ids=["newton", "gauss-newton", "kfac"],
)
def test_the_gradient_of_a_parameter_may_be_changed_in_place(make):
    """Autograd gives one tensor for both terms of a sum."""

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(INPUTS, CLASSES).double()
            self.first, self.second = (
                nn.Parameter(torch.zeros(CLASSES, dtype=torch.float64)) for _ in range(2)
            )

        def forward(self, x):
            return self.head(x) + (self.first + self.second)

    model = Shifted()
    optimizer = make(model)
    optimizer.step(closure_for(type(optimizer).__name__.lower(), model))
    before = model.second.grad.clone()
    assert before.any()
    model.first.grad.zero_()
    assert torch.equal(model.second.grad, before)


def test_autocast_sees_parameters_that_have_moved():
    """Within its block, it keeps a parameter in the short type in which it was read first."""
    model = nn.Linear(INPUTS, CLASSES)
    replay = ReplayedClosure(model, lambda: model(X.float()), torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        before = replay()
        with torch.no_grad():
            model.bias += 1
            assert torch.allclose((replay() - before).float(), torch.ones(()), rtol=0.02)
        assert replay().requires_grad


def test_autocast_around_a_loop_sees_every_step():
    model = tanh_network().float()
    optimizer = KFAC(model, F.cross_entropy, lr=1.0, kl_clip=None)

    def closure():
        return model(X.float()), LABELS

    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(closure)
        after = F.cross_entropy(copy.deepcopy(model)(X.float()), LABELS)
        assert optimizer.step(closure).item() == pytest.approx(after.item(), rel=1e-6)
