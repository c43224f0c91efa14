"""Losses with parameters, losses of the query set, and losses of all iterates."""

import copy

import pytest
import torch
from learner.plain_loop import LR, STEPS, assert_learns, assert_same, plain_maml
from oracles import finite_difference
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from metaimplicit import (
    BilevelProblem,
    Dense,
    FirstOrder,
    GradientDescent,
    Implicit,
    MetaLearner,
    Truncated,
    Unrolled,
    argmin,
    hypergradient,
)

TASKS = 2
FEATURES = 4
WAYS = 5
pytestmark = pytest.mark.usefixtures("float64")


def draw():
    labels = torch.arange(10) % WAYS
    return [tuple((torch.randn(10, FEATURES), labels) for _ in range(2)) for _ in range(TASKS)]


def stacked(tasks):
    return tree_map(lambda *x: torch.stack(x), *tasks)


class Temperature(nn.Module):
    """Cross-entropy at a temperature."""

    def __init__(self, t=1.5):
        super().__init__()
        self.t = nn.Parameter(torch.tensor(t))

    def forward(self, outputs, targets):
        return F.cross_entropy(outputs * self.t, targets)


class ClassWeights(nn.Module):
    """Cross-entropy with a weight for each class."""

    def __init__(self):
        super().__init__()
        self.log_weights = nn.Parameter(torch.randn(WAYS) / 3)

    def forward(self, outputs, targets):
        losses = F.cross_entropy(outputs, targets, reduction="none")
        return (losses * self.log_weights.exp()[targets]).mean()


class Critic(nn.Module):
    """A network of outputs and one-hot targets (Bechtle et al. 2021)."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2 * WAYS, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, outputs, targets):
        both = torch.cat([outputs, F.one_hot(targets, WAYS).to(outputs)], dim=1)
        return F.cross_entropy(outputs, targets) + self.net(both).square().mean()


class HalfFrozen(nn.Module):
    """A temperature that is learnt, and one that is not, in a module below."""

    def __init__(self):
        super().__init__()
        self.inner = Temperature()
        self.fixed = nn.Parameter(torch.tensor(0.7), requires_grad=False)

    def forward(self, outputs, targets):
        return self.inner(outputs * self.fixed, targets)


class Buffered(Temperature):
    """A temperature beside a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, outputs, targets):
        return self.scale * super().forward(outputs, targets)


class Unread(Temperature):
    """A parameter that nothing reads."""

    def __init__(self):
        super().__init__()
        self.unread = nn.Parameter(torch.ones(2))


LEARNT = {
    "temperature": Temperature,
    "class weights": ClassWeights,
    "critic": Critic,
    "half frozen": HalfFrozen,
    "buffered": Buffered,
    "unread": Unread,
    "several": lambda: Chain(),
    "label smoothing": lambda: nn.CrossEntropyLoss(label_smoothing=0.1),
}


class Join(nn.Module):
    """The first of two modules in a loss: it scales the outputs."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(WAYS) + 0.5)

    def forward(self, outputs, targets):
        return outputs * self.scale, targets


class Chain(nn.Module):
    """A loss of two modules with parameters."""

    def __init__(self):
        super().__init__()
        self.first = Join()
        self.second = ClassWeights()

    def forward(self, outputs, targets):
        return self.second(*self.first(outputs, targets))


def make_learner(loss, model=None, **options):
    inner = GradientDescent(steps=STEPS, lr=LR)
    options = {"inner": inner, "vectorize": "vmap"} | options
    return MetaLearner(nn.Linear(FEATURES, WAYS) if model is None else model, loss, **options)


@pytest.mark.parametrize(
    ("name", "vectorize"),
    [*((name, "vmap") for name in LEARNT), ("half frozen", "loop"), ("several", "loop")],
)
def test_the_parameters_of_a_loss_are_learnt(name, vectorize):
    tasks = draw()
    loss = LEARNT[name]()
    learner = make_learner(loss, vectorize=vectorize)
    learnt = {f"loss.{n}": p for n, p in loss.named_parameters() if p.requires_grad}
    names = set(learner.state_dict())
    assert set(learnt) <= names
    assert set(learnt) <= set(learner.meta)

    frozen = [p for p in loss.parameters() if not p.requires_grad]
    for p in frozen:
        p.requires_grad_()
    losses, outputs, gradients = plain_maml(learner.model, loss, tasks)
    for p in frozen:
        p.requires_grad_(False)
    step = learner.backward(stacked(tasks))
    assert_same(step.loss, losses.mean())
    parameters = [*learner.model.parameters(), *loss.parameters()]
    for p, gradient in zip(parameters, gradients, strict=True):
        if any(p is q for q in frozen):
            assert p.grad is None
        else:
            assert_same(p.grad, torch.zeros_like(p) if gradient is None else gradient)
    assert_same(learner.evaluate(stacked(tasks))[0][-1], losses)
    assert_same(learner.adapt(tasks[0][0])(tasks[0][1][0]), outputs[0])


@pytest.mark.parametrize("name", ["critic", "several"])
def test_implicit_methods_learn_the_parameters_of_a_loss(name):
    """At convergence, their gradient is that of the unrolled loop."""
    tasks = stacked(draw())
    options = {"inner": GradientDescent(steps=16, lr=0.4), "proximal": 2.0}
    implicit = make_learner(
        LEARNT[name](), method=Implicit(Dense(), curvature="hessian"), **options
    )
    unrolled = make_learner(copy.deepcopy(implicit.loss), implicit.model, **options)
    implicit.backward(tasks)
    expected = [p.grad.clone() for p in implicit.parameters()]
    implicit.zero_grad()
    unrolled.backward(tasks)
    for gradient, p in zip(expected, unrolled.parameters(), strict=True):
        assert p.grad.abs().max() > 0
        assert_same(gradient, p.grad, rtol=1e-6)


def test_gauss_newton_sees_the_loss_at_its_parameters():
    """For a linear model, Gauss–Newton is the Hessian, whatever convex loss is learnt."""
    tasks = stacked(draw())
    gradients = []
    loss = Temperature(2.5)
    model = nn.Linear(FEATURES, WAYS)
    for curvature in ("hessian", "gauss-newton"):
        method = Implicit(Dense(), curvature=curvature)
        learner = make_learner(loss, model, method=method, proximal=2.0)
        learner.zero_grad()
        learner.backward(tasks)
        gradients.append([p.grad.clone() for p in learner.parameters()])
    for hessian, gauss_newton in zip(*gradients, strict=True):
        assert_same(gauss_newton, hessian, rtol=1e-9)


def test_first_order_keeps_the_direct_gradient_of_a_loss_and_refuses_that_of_another():
    tasks = draw()
    loss = Temperature()
    learner = make_learner(loss, method=FirstOrder())
    learner.backward(stacked(tasks))
    with torch.no_grad():
        ends = [learner.adapt(support) for support, _ in tasks]
    direct = [loss(end(x), y) for end, (_, (x, y)) in zip(ends, tasks, strict=True)]
    (expected,) = torch.autograd.grad(torch.stack(direct).mean(), [loss.t])
    assert_same(loss.t.grad, expected)

    learner = make_learner(loss, method=FirstOrder(), query_loss=F.cross_entropy)
    with pytest.raises(ValueError, match=r"first-order cannot give the gradient of meta\['loss.t"):
        learner.backward(stacked(tasks))


QUERY_LOSSES = {
    "a function": lambda: (nn.CrossEntropyLoss(label_smoothing=0.1), F.cross_entropy),
    "a function for a learnt loss": lambda: (Temperature(), F.cross_entropy),
    "a learnt loss for a function": lambda: (F.cross_entropy, Temperature(0.5)),
    "another learnt loss": lambda: (Critic(), ClassWeights()),
    "the same module": lambda: (lambda loss: (loss, loss))(ClassWeights()),
    "a part of the loss": lambda: (lambda loss: (loss, loss.second))(Chain()),
    "the loss as a part": lambda: (lambda loss: (loss.second, loss))(Chain()),
    "a loss of another kind": lambda: (
        F.cross_entropy,
        lambda z, y: (z - F.one_hot(y, WAYS)).square().mean(),
    ),
}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *((name, Unrolled()) for name in QUERY_LOSSES),
        *(("another learnt loss", method) for method in (Truncated(STEPS), "forward")),
        *(("a part of the loss", method) for method in (Truncated(STEPS), "forward")),
    ],
    ids=str,
)
def test_the_query_set_may_have_a_loss_of_its_own(name, method):
    tasks = draw()
    loss, query_loss = QUERY_LOSSES[name]()
    learner = make_learner(loss, query_loss=query_loss, method=method)
    expected = plain_maml(learner.model, loss, tasks, query_loss=query_loss)
    step = assert_learns(learner, stacked(tasks), expected)
    accuracies = [
        (z.argmax(1) == y).double().mean()
        for z, (_, (_, y)) in zip(expected[1], tasks, strict=True)
    ]
    assert_same(step.accuracy, torch.stack(accuracies).mean())


def test_a_loss_that_holds_the_model_is_refused():
    """It would read the parameters before adaptation."""

    class Distance(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, outputs, targets):
            return F.cross_entropy(outputs, targets) + 0.1 * self.model.weight.square().sum()

    model = nn.Linear(FEATURES, WAYS)
    for losses in ((Distance(model), None), (F.cross_entropy, Distance(model))):
        with pytest.raises(ValueError, match="got one with the parameter 'weight' of the model"):
            make_learner(losses[0], model, query_loss=losses[1])


def test_names_that_the_model_has_already_are_refused():
    model = nn.ModuleDict({"loss": nn.Linear(2, 2)})
    model.loss.register_parameter("t", nn.Parameter(torch.ones(())))
    with pytest.raises(ValueError, match=r"the model has a parameter 'loss\.t' already"):
        make_learner(Temperature(), model)


def test_a_parameter_of_the_loss_that_was_frozen_since_is_named():
    loss = Temperature()
    learner = make_learner(loss)
    loss.t.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'loss\.t' was frozen, unfrozen, added"):
        learner.backward(stacked(draw()))


# ---------------------------------------------------------------- losses of all iterates

WEIGHTS = {
    "none": None,
    "mean": [1 / 3, 1 / 3, 1 / 3],
    "rising": [0.2, 0.3, 0.5],
    "without θ_0": [0.0, 0.6, 0.4],
    "θ_T alone": [0.0, 0.0, 1.0],
    "θ_0 alone": [1.0, 0.0, 0.0],
    "of any sign": [-1.0, 0.5, 2.0],
    "a tensor": torch.tensor([0.5, 0.3, 0.2]),
}


@pytest.mark.parametrize(
    ("name", "vectorize"),
    [*((name, "vmap") for name in WEIGHTS), ("none", "loop"), ("of any sign", "loop")],
)
def test_the_losses_of_all_iterates_are_weighed(name, vectorize):
    tasks = draw()
    weights = WEIGHTS[name]
    method = Unrolled(iterates=True, weights=weights)
    learner = make_learner(Temperature(), method=method, vectorize=vectorize)
    plain = WEIGHTS["mean"] if weights is None else [float(w) for w in weights]
    expected = plain_maml(learner.model, learner.loss, tasks, weights=plain)
    step = assert_learns(learner, stacked(tasks), expected)
    # The accuracy is that of θ_T, and `evaluate` measures one iterate after another.
    accuracies = [
        (z.argmax(1) == y).double().mean()
        for z, (_, (_, y)) in zip(expected[1], tasks, strict=True)
    ]
    assert_same(step.accuracy, torch.stack(accuracies).mean())
    losses, _ = learner.evaluate(stacked(tasks))
    weighed = (torch.tensor(plain)[:, None] * losses).sum(0)
    assert_same(weighed, expected[0])


def test_weights_hold_for_any_problem():
    """g = Σ_t w_t θ_t² with θ_t = 2⁻ᵗ φ, so dg/dφ = 2φ Σ_t w_t 4⁻ᵗ."""
    problem = BilevelProblem(
        init=lambda meta, data: {"w": meta["w"]},
        inner_loss=lambda params, meta, data: params["w"].square(),
        outer_loss=lambda params, meta, data: (params["w"].square(), params["w"]),
    )
    meta = {"w": torch.tensor(3.0)}
    inner = GradientDescent(steps=2, lr=0.25)
    method = Unrolled(iterates=True, weights=(0.5, 0.25, 2.0))
    result = hypergradient(problem, meta, None, inner=inner, method=method)
    assert_same(result.grads["w"], torch.tensor(6.0 * (0.5 + 0.25 / 4 + 2.0 / 16)))
    assert_same(result.outer_loss, torch.tensor(9.0 * (0.5 + 0.25 / 4 + 2.0 / 16)))
    assert_same(result.aux, torch.tensor(0.75))  # that of θ_T
    with pytest.raises(ValueError, match="argmin method: got 'unrolled', which is weighted"):
        argmin(problem.inner_loss, problem.init, meta, None, inner=inner, method=method)


def test_weights_that_fit_no_iterates_are_refused():
    with pytest.raises(ValueError, match=r"weights: got .* with iterates=False"):
        Unrolled(weights=[1.0])
    learner = make_learner(F.cross_entropy, method=Unrolled(iterates=True, weights=[0.5, 0.5]))
    with pytest.raises(ValueError, match="got 2 for 2 inner steps, expected 3"):
        learner.backward(stacked(draw()))


def test_the_gradient_of_a_learnt_loss_is_that_of_the_evaluated_loss():
    """Finite differences of the whole procedure."""
    tasks = stacked(draw())
    learner = make_learner(Critic(), query_loss=F.cross_entropy)
    learner.backward(tasks)
    for p in learner.loss.parameters():
        direction = torch.randn_like(p)

        def loss_at(value, p=p):
            before = p.detach().clone()
            p.data.copy_(value)
            losses = learner.evaluate(tasks)[0][-1].mean()
            p.data.copy_(before)
            return losses

        slope = finite_difference(loss_at, p.detach().clone(), direction)
        assert_same((p.grad * direction).sum(), slope, rtol=1e-6)
