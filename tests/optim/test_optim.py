"""Newton, Gauss–Newton and the natural gradient against dense matrices, and what all optimisers share."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from oracles import generator, krylov_basis, krylov_minimiser, randn, relative_error, symmetric
from torch import nn

from metaimplicit.optim import KFAC, GaussNewton, NaturalGradient, Newton
from metaimplicit.solvers import CG, MINRES, Dense

EXAMPLES, INPUTS, CLASSES = 12, 3, 4
X, LABELS = randn(EXAMPLES, INPUTS, seed=1), torch.arange(EXAMPLES).remainder(CLASSES)
TARGETS = randn(EXAMPLES, CLASSES, seed=2)
EXACT = CG(max_steps=400, tol=1e-14)


def half_square(z, y):
    return 0.5 * (z - y).square().sum(-1).mean()


def network(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(INPUTS, 4), nn.Tanh(), nn.Linear(4, CLASSES)).to(dtype)


class Point(nn.Module):
    """A vector to be minimised over."""

    def __init__(self, start):
        super().__init__()
        self.x = nn.Parameter(start.clone())


def vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def dense(model, loss, targets, kind, likelihood="softmax"):
    """(g, C) at the model's parameters by autograd on the flat vector: C is H, G or F."""
    shapes = {name: p.shape for name, p in model.named_parameters()}

    def outputs(flat):
        parts = torch.split(flat, [s.numel() for s in shapes.values()])
        params = {
            name: part.reshape(s) for part, (name, s) in zip(parts, shapes.items(), strict=True)
        }
        return torch.func.functional_call(model, params, (X,))

    at = vector(model)
    g = torch.func.grad(lambda v: loss(outputs(v), targets))(at)
    if kind == "newton":
        return g, torch.func.hessian(lambda v: loss(outputs(v), targets))(at)
    jacobian, z = torch.func.jacrev(outputs)(at).flatten(0, -2), outputs(at)
    if kind == "gauss-newton":
        bend = torch.func.hessian(lambda v: loss(v.reshape(z.shape), targets))(z.flatten())
    else:  # the covariance of the score, example by example
        p = z.softmax(-1)
        each = [
            torch.diag(q) - torch.outer(q, q)
            if likelihood == "softmax"
            else torch.eye(CLASSES).to(z)
            for q in p
        ]
        bend = torch.block_diag(*each) / len(z)
    return g, jacobian.T @ bend @ jacobian


# Newton


@pytest.mark.parametrize("solver", [None, EXACT, Dense()])
def test_newton_solves_a_convex_quadratic_in_one_step(solver):
    A, b = symmetric([[0.5, 1.0, 3.0, 10.0, 40.0]])[0], randn(5, seed=3)
    model = Point(randn(5, seed=4))
    optimizer = Newton(model, damping=0.0, adapt_damping=False, solver=solver)
    before = (0.5 * model.x @ A @ model.x - b @ model.x).detach()
    g = (A @ model.x - b).detach()
    loss = optimizer.step(lambda: 0.5 * model.x @ A @ model.x - b @ model.x)
    assert loss.dim() == 0
    assert not loss.requires_grad
    assert float(loss) == float(before)
    assert relative_error(model.x.grad, g) < 1e-14
    assert relative_error(model.x.detach(), torch.linalg.solve(A, b)) < 1e-10


@pytest.mark.parametrize("damping", [0.0, 0.7, 5.0])
def test_newton_on_an_indefinite_quadratic_takes_the_modified_step(damping):
    values = [-3.0, -0.2, 0.0, 0.5, 2.0]
    A, b, start = symmetric([values], seed=5)[0], randn(5, seed=3), randn(5, seed=4)
    model = Point(start)
    Newton(model, lr=0.3, damping=damping, adapt_damping=False).step(
        lambda: 0.5 * model.x @ A @ model.x - b @ model.x
    )
    basis = torch.linalg.qr(randn(1, 5, 5, seed=5)).Q[0]
    inverse = [1 / max(abs(v), damping) if max(abs(v), damping) > 0 else 0.0 for v in values]
    expected = start - 0.3 * basis @ (
        torch.tensor(inverse, dtype=torch.float64) * (basis.T @ (A @ start - b))
    )
    assert relative_error(model.x.detach(), expected) < 1e-10


def test_newton_cg_ends_at_negative_curvature_and_descends():
    """Against minimisers over Krylov spaces: the last of those that the quadratic has."""
    A = symmetric([[-0.5, 0.2, 0.5, 2.0, 6.0, 7.0]], seed=5)[0]
    shifted, lengths = A + 0.1 * torch.eye(6).double(), set()
    for seed in range(12):
        g, model = randn(6, seed=seed), Point(torch.zeros(6).double())
        optimizer = Newton(
            model, damping=0.1, adapt_damping=False, solver=CG(max_steps=6, tol=1e-12)
        )
        optimizer.step(lambda model=model, g=g: g @ model.x + 0.5 * model.x @ A @ model.x)
        bases = [krylov_basis(shifted, g, k) for k in range(1, 7)]
        # a direction of CG has negative curvature as soon as the space does
        steps = sum(float(torch.linalg.eigvalsh(Q.T @ shifted @ Q)[0]) > 0 for Q in bases)
        steepest = g * (g @ g) / (g @ shifted @ g).abs()
        expected = -krylov_minimiser(shifted, g, steps) if steps else -steepest
        lengths.add(steps)
        assert relative_error(model.x.detach(), expected) < 1e-8
        assert float(model.x.detach() @ g) < 0
    assert len(lengths) >= 3
    assert 6 not in lengths
    g, model = torch.linalg.qr(randn(1, 6, 6, seed=5)).Q[0, :, 0], Point(torch.zeros(6).double())
    for solver in (CG(max_steps=6), MINRES(max_steps=6)):  # along the eigenvector of −0.5 + 0.1
        model = Point(torch.zeros(6).double())
        optimizer = Newton(model, damping=0.1, adapt_damping=False, solver=solver)
        optimizer.step(lambda model=model: g @ model.x + 0.5 * model.x @ A @ model.x)
        assert relative_error(model.x.detach(), -g / 0.4) < 1e-10


def test_newton_of_a_network_is_the_dense_step_either_way():
    model = network()
    g, H = dense(model, F.cross_entropy, LABELS, "newton")
    shift = 1.1 * float(torch.linalg.eigvalsh(H)[0].abs())
    start = vector(model)
    other = copy.deepcopy(model)
    Newton(other, damping=shift, adapt_damping=False, solver=EXACT).step(
        lambda: F.cross_entropy(other(X), LABELS)
    )
    eye = torch.eye(len(g)).to(g)
    assert relative_error(vector(other), start - torch.linalg.solve(H + shift * eye, g)) < 1e-10
    Newton(model, damping=shift, adapt_damping=False).step(
        lambda: F.cross_entropy(model(X), LABELS)
    )
    values, Q = torch.linalg.eigh(H)
    assert (
        relative_error(vector(model), start - Q @ ((Q.T @ g) / values.abs().clamp(min=shift)))
        < 1e-10
    )


# damping


def test_damping_follows_the_ratio_and_bad_steps_are_taken_back():
    """Gauss–Newton on Rosenbrock's residuals, step by step against the formulae; every branch is met."""

    def residuals(x):
        return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])

    model, x, damping, branches = (
        Point(torch.tensor([-1.2, 1.0]).double()),
        torch.tensor([-1.2, 1.0]).double(),
        1e-4,
        set(),
    )
    optimizer = GaussNewton(model, lambda z, _: 0.5 * z.square().sum(), lr=0.8, damping=damping)
    for _ in range(30):
        r, J = residuals(x), torch.func.jacrev(residuals)(x)
        g, G = J.T @ r, J.T @ J
        delta = -0.8 * torch.linalg.solve(G + damping * torch.eye(2).double(), g)
        before, after = 0.5 * r.square().sum(), 0.5 * residuals(x + delta).square().sum()
        slack = 10 * torch.finfo(torch.float64).eps * before
        rho = (before - after + slack) / (-g @ delta - 0.5 * delta @ G @ delta + slack)
        branches.add(
            "back" if rho <= 0 else "harder" if rho < 0.25 else "easier" if rho > 0.75 else "same"
        )
        x = x + delta if rho > 0 else x
        damping = 4 * damping if rho < 0.25 else damping / 2 if rho > 0.75 else damping
        held = model.x.detach().clone()
        loss = optimizer.step(lambda: (residuals(model.x), None))
        assert float(loss) == pytest.approx(float(before), rel=1e-9)
        assert optimizer.ratio == pytest.approx(float(rho), rel=1e-6)
        assert torch.equal(model.x, held) == (rho <= 0)
        assert relative_error(model.x.detach(), x) < 1e-9
        assert optimizer.param_groups[0]["damping"] == pytest.approx(damping, rel=1e-12)
    assert branches == {"back", "harder", "same", "easier"}
    assert float(loss) < 1e-3


@pytest.mark.parametrize(
    ("rho", "moves", "factor"),
    [
        (-0.01, 0, 4),
        (0.01, 1, 4),
        (0.249, 1, 4),
        (0.251, 1, 1),
        (0.749, 1, 1),
        (0.751, 1, 0.5),
        (1.3, 1, 0.5),
    ],
)
def test_the_thresholds_of_the_ratio(rho, moves, factor):
    """x + ½x² + ½(ρ − 1)x³ from 0 to −1: a fall of ½ρ where the model has ½."""
    model = Point(torch.zeros(1).double())
    optimizer = Newton(model, damping=0.1)
    optimizer.step(lambda: (model.x + 0.5 * model.x**2 + 0.5 * (rho - 1) * model.x**3).sum())
    assert optimizer.ratio == pytest.approx(rho, rel=1e-12)
    assert float(model.x.detach()) == pytest.approx(-moves, rel=1e-14)
    assert optimizer.param_groups[0]["damping"] == 0.1 * factor


def test_a_trial_that_is_not_finite_is_taken_back():
    model = Point(torch.tensor([0.5]).double())
    optimizer = Newton(model, damping=1e-3)  # the step leaves the domain of √
    start = model.x.detach().clone()
    loss = optimizer.step(lambda: (model.x + 4 * model.x.sqrt()).sum())
    assert math.isfinite(loss)
    assert optimizer.ratio == -math.inf
    assert torch.equal(model.x.detach(), start)
    assert optimizer.param_groups[0]["damping"] == 4e-3


def test_at_a_minimum_round_off_takes_nothing_back():
    A, b = symmetric([[1.0, 2.0, 3.0]])[0], randn(3, seed=3)
    model = Point(torch.linalg.solve(A, b))
    optimizer = Newton(model, damping=1e-2)
    for _ in range(200):
        optimizer.step(lambda: 0.5 * model.x @ A @ model.x - b @ model.x)
        assert optimizer.ratio > 0.75
    assert optimizer.param_groups[0]["damping"] == pytest.approx(
        1e-2 * torch.finfo(torch.float64).eps, rel=1e-12, abs=0
    )


# Gauss–Newton and the natural gradient


@pytest.mark.parametrize("solver", [None, EXACT])
@pytest.mark.parametrize(
    ("make", "loss", "targets", "kind", "likelihood"),
    [
        (GaussNewton, F.cross_entropy, LABELS, "gauss-newton", ""),
        (GaussNewton, F.mse_loss, TARGETS, "gauss-newton", ""),
        (NaturalGradient, F.cross_entropy, LABELS, "fisher", "softmax"),
        (NaturalGradient, half_square, TARGETS, "fisher", "gaussian"),
    ],
)
def test_the_step_is_the_dense_one(make, loss, targets, kind, likelihood, solver):
    model = network()
    g, C = dense(model, loss, targets, kind, likelihood)
    expected = vector(model) - 0.7 * torch.linalg.solve(C + 1e-2 * torch.eye(len(g)).to(g), g)
    options = {"likelihood": likelihood} if likelihood else {}
    optimizer = make(
        model, loss, lr=0.7, damping=1e-2, adapt_damping=False, solver=solver, **options
    )
    value = loss(model(X), targets).detach()
    assert float(optimizer.step(lambda: (model(X), targets))) == float(value)
    assert relative_error(vector(model), expected) < 1e-9
    assert relative_error(torch.cat([p.grad.flatten() for p in model.parameters()]), g) < 1e-13


@pytest.mark.parametrize("make", [GaussNewton, NaturalGradient])
def test_without_products_or_with_them_a_run_is_the_same(make):
    runs = []
    for solver in (None, EXACT):
        model = network()
        optimizer = make(model, F.cross_entropy, solver=solver)
        for _ in range(6):
            optimizer.step(lambda model=model: (model(X), LABELS))
        runs.append((vector(model), optimizer.param_groups[0]["damping"]))
    assert relative_error(runs[0][0], runs[1][0]) < 1e-8
    assert runs[0][1] == runs[1][1]


def test_on_linear_least_squares_gauss_newton_is_newton_and_ends_at_once():
    def start():
        torch.manual_seed(0)
        return nn.Linear(INPUTS, CLASSES).double()

    one, two = start(), start()
    GaussNewton(one, half_square, damping=0.0, adapt_damping=False).step(lambda: (one(X), TARGETS))
    Newton(two, damping=0.0, adapt_damping=False).step(lambda: half_square(two(X), TARGETS))
    best = torch.linalg.lstsq(
        torch.cat([X, torch.ones(EXAMPLES, 1).double()], 1), TARGETS
    ).solution.T
    for model in (one, two):
        assert (
            relative_error(torch.cat([model.weight, model.bias[:, None]], 1).detach(), best) < 1e-10
        )


class Reparametrised(nn.Module):
    """The network 3-2-4 of θ = T φ, φ its one parameter; linear in z, with a Fisher matrix of full rank."""

    def __init__(self, transform, theta):
        super().__init__()
        self.register_buffer("transform", transform)
        self.phi = nn.Parameter(torch.linalg.solve(transform, theta))

    def forward(self, x):
        first, bias, second, shift = torch.split(self.transform @ self.phi, [6, 2, 8, 4])
        return torch.tanh(x @ first.reshape(3, 2) + bias) @ second.reshape(2, 4) + shift


def test_the_natural_gradient_does_not_see_the_coordinates():
    theta, eye = randn(20, seed=7), torch.eye(20).double()
    inputs, targets = 2 * randn(40, INPUTS, seed=8), randn(40, CLASSES, seed=9)
    natural, plain = [], []
    for transform in (eye, eye + 0.3 * randn(20, 20, seed=10)):
        model = Reparametrised(transform, theta)
        fisher = NaturalGradient(
            model, half_square, lr=0.5, damping=0.0, adapt_damping=False, likelihood="gaussian"
        )
        fisher.step(lambda model=model: (model(inputs), targets))
        natural.append(model(inputs).detach())
        model = Reparametrised(transform, theta)
        half_square(model(inputs), targets).backward()
        torch.optim.SGD(model.parameters(), lr=0.5).step()
        plain.append(model(inputs).detach())
    assert relative_error(natural[0], natural[1]) < 1e-8
    assert relative_error(plain[0], plain[1]) > 1e-2
    assert relative_error(natural[0], Reparametrised(eye, theta)(inputs).detach()) > 1e-2


def test_the_empirical_fisher_is_that_of_the_examples_own_gradients():
    model = network()
    rows = []
    for x, y in zip(X, LABELS, strict=True):
        loss = F.cross_entropy(model(x[None]), y[None])
        rows.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
        )
    each = torch.stack(rows)
    fisher = each.T @ each / EXAMPLES + 0.1 * torch.eye(each.shape[1]).double()
    expected = vector(model) - torch.linalg.solve(fisher, each.mean(0))
    optimizer = NaturalGradient(
        model, F.cross_entropy, damping=0.1, adapt_damping=False, expectation="empirical"
    )
    optimizer.step(lambda: (model(X), LABELS))
    assert relative_error(vector(model), expected) < 1e-10


def test_sampled_targets_are_drawn_anew_at_every_step():
    model, random = network(), generator(3)
    optimizer = NaturalGradient(
        model,
        F.cross_entropy,
        lr=0.3,
        damping=0.1,
        adapt_damping=False,
        expectation="monte-carlo",
        seed=3,
    )
    for _ in range(3):
        own = generator(int(torch.randint(2**62, (), generator=random)))
        drawn = torch.multinomial(model(X).detach().softmax(-1), 1, generator=own)[:, 0]
        rows = []
        for x, y in zip(X, drawn, strict=True):
            loss = F.cross_entropy(model(x[None]), y[None])
            rows.append(
                torch.cat(
                    [g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]
                )
            )
        fisher = (
            sum(torch.outer(row, row) for row in rows) / EXAMPLES
            + 0.1 * torch.eye(len(rows[0])).double()
        )
        g = torch.autograd.grad(F.cross_entropy(model(X), LABELS), list(model.parameters()))
        expected = vector(model) - 0.3 * torch.linalg.solve(
            fisher, torch.cat([part.flatten() for part in g])
        )
        optimizer.step(lambda: (model(X), LABELS))
        assert relative_error(vector(model), expected) < 1e-10


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def test_gauss_newton_of_a_recurrent_network():
    torch.manual_seed(0)
    model, inputs, targets = Recurrent().double(), randn(5, 4, 2, seed=3), randn(5, 2, seed=4)
    params = dict(model.named_parameters())
    rows = [
        torch.autograd.grad(z, params.values(), retain_graph=True) for z in model(inputs).flatten()
    ]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    residual = (model(inputs) - targets).flatten().detach()
    step = torch.linalg.solve(
        J.T @ J / 5 + 0.1 * torch.eye(J.shape[1]).double(), J.T @ residual / 5
    )
    expected = vector(model) - step
    GaussNewton(model, half_square, damping=0.1, adapt_damping=False).step(
        lambda: (model(inputs), targets)
    )
    assert relative_error(vector(model), expected) < 1e-10


# what all share

MAKERS = {
    "newton": lambda model: Newton(model),
    "newton-cg": lambda model: Newton(model, solver=CG(max_steps=8)),
    "gauss-newton": lambda model: GaussNewton(model, F.cross_entropy),
    "natural": lambda model: NaturalGradient(
        model, F.cross_entropy, expectation="monte-carlo", seed=3
    ),
    "kfac": lambda model: KFAC(
        model,
        F.cross_entropy,
        lr=0.01,
        update_every=2,
        invert_every=4,
        kl_clip=None,
        adapt_every=3,
        seed=3,
    ),
}


def closure_for(name, model, x=X, y=LABELS):
    if name.startswith("newton"):
        return lambda: F.cross_entropy(model(x), y)
    return lambda: (model(x), y)


@pytest.mark.parametrize("name", MAKERS)
def test_a_resumed_run_goes_on_to_the_same_bits(name):
    model = network()
    optimizer = MAKERS[name](model)
    for _ in range(5):
        optimizer.step(closure_for(name, model))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    for _ in range(5):
        optimizer.step(closure_for(name, model))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = network(seed=1)
    other.load_state_dict(saved["model"])
    resumed = MAKERS[name](other)
    if name in ("natural", "kfac"):
        with pytest.raises(ValueError, match="state: got none of random numbers"):
            resumed.load_state_dict({k: v for k, v in saved["optimizer"].items() if k != "random"})
    resumed.load_state_dict(saved["optimizer"])
    for _ in range(5):
        resumed.step(closure_for(name, other))
    assert torch.equal(vector(model), vector(other))
    assert optimizer.param_groups[0]["damping"] == resumed.param_groups[0]["damping"]


@pytest.mark.parametrize("name", MAKERS)
def test_a_scheduler_sets_the_length_and_frozen_parameters_stay(name):
    model = network()
    model[0].requires_grad_(False)
    frozen = vector(model[0])
    optimizer = MAKERS[name](model)
    assert len(optimizer.param_groups[0]["params"]) == 2
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.25)
    lr = optimizer.param_groups[0]["lr"]
    with pytest.raises(ValueError, match="got another parameter group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    steps = []
    for _ in range(2):
        scaled, before = copy.deepcopy(optimizer.state_dict()), vector(model[2])
        optimizer.step(closure_for(name, model))
        steps.append(vector(model[2]) - before)
        model[2].load_state_dict({"weight": before[:16].reshape(4, 4), "bias": before[16:]})
        optimizer.load_state_dict(scaled)  # the same step again, of another length
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == lr / 16
    assert torch.equal(vector(model[0]), frozen)
    assert relative_error(steps[1], 0.25 * steps[0]) < 1e-12


class Noisy(nn.Module):
    """Linear in its parameters for one draw of the mask; batch-norm has none, but counts."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(INPUTS, affine=False)
        self.head = nn.Linear(INPUTS, CLASSES)

    def forward(self, x):
        return self.head(F.dropout(self.norm(x), 0.5, self.training))


@pytest.mark.parametrize("name", ["newton", "gauss-newton", "natural", "kfac"])
def test_every_evaluation_of_a_step_sees_the_same_dropout_and_buffers(name):
    torch.manual_seed(0)
    model = Noisy().double()
    once = copy.deepcopy(model)
    options = {"likelihood": "gaussian"} if name in ("natural", "kfac") else {}
    optimizer = {
        "newton": lambda: Newton(model, lr=0.5, damping=1e-3),
        "gauss-newton": lambda: GaussNewton(model, half_square, lr=0.5, damping=1e-3),
        "natural": lambda: NaturalGradient(model, half_square, lr=0.5, damping=1e-3, **options),
        "kfac": lambda: KFAC(model, half_square, lr=0.1, adapt_every=1, **options),
    }[name]()
    torch.manual_seed(5)
    value = half_square(once(X), TARGETS).detach()
    after = torch.get_rng_state()
    torch.manual_seed(5)
    newton = name == "newton"
    loss = optimizer.step(
        (lambda: half_square(model(X), TARGETS)) if newton else (lambda: (model(X), TARGETS))
    )
    assert float(loss) == float(value)
    assert optimizer.ratio == pytest.approx(
        1.0, abs=1e-9
    )  # the model of second order is exact for one mask
    assert torch.equal(torch.get_rng_state(), after)
    for key in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(model.norm, key), getattr(once.norm, key))
    assert model.norm.num_batches_tracked == 1


def test_what_a_trial_draws_is_not_missed():
    model, calls = network(), []

    def closure():
        calls.append(torch.rand(1 + len(calls)))
        return F.cross_entropy(model(X), LABELS)

    torch.manual_seed(5)
    Newton(model).step(closure)
    after = torch.get_rng_state()
    torch.manual_seed(5)
    torch.rand(1)
    assert len(calls) == 2
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_not_finite_moves_nothing(name):
    model = network()
    start = vector(model)
    bad = X.clone()
    bad[0, 0] = math.nan
    with pytest.raises(
        FloatingPointError, match="the loss or the outputs are not finite; nothing was moved"
    ):
        MAKERS[name](model).step(closure_for(name, model, x=bad))
    assert torch.equal(vector(model), start)


@pytest.mark.parametrize("name", MAKERS)
def test_a_gradient_that_is_not_finite_moves_nothing(name):
    model = network()
    start, optimizer = vector(model), MAKERS[name](model)
    optimizer.loss = lambda z, y: (0 * z).sqrt().mean()
    closure = (
        (lambda: (0 * model(X)).sqrt().mean())
        if name.startswith("newton")
        else (lambda: (model(X), LABELS))
    )
    with pytest.raises(FloatingPointError, match="gradient is not finite"):
        optimizer.step(closure)
    assert torch.equal(vector(model), start)
    assert all(
        state.keys() <= {"momentum"} for state in optimizer.state.values()
    )  # no average has a NaN in it


@pytest.mark.parametrize("name", MAKERS)
def test_a_step_wants_its_closure(name):
    model = network()
    optimizer = MAKERS[name](model)
    with pytest.raises(ValueError, match=r"step: got None, expected closure\(\) -> "):
        optimizer.step()
    newton = name.startswith("newton")
    detached = (
        (lambda: model(X).detach().mean()) if newton else (lambda: (model(X).detach(), LABELS))
    )
    with pytest.raises(ValueError, match=r"does not depend on .*model"):
        optimizer.step(detached)
    if newton:
        with pytest.raises(
            ValueError, match=r"closure: returned shape \(12,\), expected a scalar tensor"
        ):
            optimizer.step(lambda: F.cross_entropy(model(X), LABELS, reduction="none"))
        with pytest.raises(ValueError, match="closure: returned tuple, expected a scalar tensor"):
            optimizer.step(lambda: (model(X), LABELS))
        return
    with pytest.raises(ValueError, match=r"closure: returned shape \(\), expected a pair"):
        optimizer.step(lambda: F.cross_entropy(model(X), LABELS))
    optimizer.loss = lambda z, y: F.cross_entropy(z, y, reduction="none")
    with pytest.raises(ValueError, match=r"loss: returned shape \(12,\), expected a scalar tensor"):
        optimizer.step(lambda: (model(X), LABELS))
    if name != "gauss-newton":
        with pytest.raises(
            ValueError, match=r"outputs of shape \(12,\), expected \[examples, …, d\]"
        ):
            optimizer.step(lambda: (model(X)[:, 0], LABELS))


def test_a_parameter_read_past_the_model_is_named():
    model = network()
    held = list(model.parameters())

    def penalised(z, y):
        return F.cross_entropy(z, y) + sum(p.square().sum() for p in held)

    with pytest.raises(ValueError, match=r"loss: it reads '0.weight' past the model"):
        GaussNewton(model, penalised).step(lambda: (model(X), LABELS))
    with pytest.raises(ValueError, match=r"closure: it reads '0.weight' past the model"):
        Newton(model).step(lambda: penalised(model(X), LABELS))
    Newton(model).step(
        lambda: (
            F.cross_entropy(model(X), LABELS) + sum(p.square().sum() for p in model.parameters())
        )
    )


def test_numbers_and_models_out_of_range_are_named():
    model = network()
    for make in (lambda **o: Newton(model, **o), lambda **o: GaussNewton(model, F.mse_loss, **o)):
        for options, message in (
            ({"lr": 0.0}, "lr: got 0.0, expected a finite number > 0"),
            ({"lr": math.inf}, "lr: got inf, expected a finite number > 0"),
            ({"damping": 0.0}, "damping: got 0.0, expected a finite number > 0"),
            (
                {"damping": -1.0, "adapt_damping": False},
                "damping: got -1.0, expected a finite number ≥ 0",
            ),
            (
                {"damping": math.nan, "adapt_damping": False},
                "damping: got nan, expected a finite number ≥ 0",
            ),
            ({"solver": "cg"}, "solver: got 'cg', expected one of metaimplicit.solvers"),
        ):
            with pytest.raises(ValueError, match=message):
                make(**options)
    with pytest.raises(ValueError, match=r"Newton model: got list, expected an nn.Module"):
        Newton(list(model.parameters()))
    with pytest.raises(ValueError, match="no parameter that requires grad"):
        Newton(network().requires_grad_(False))
    mixed = network()
    mixed[2].float()
    with pytest.raises(
        ValueError, match=r"got '2.weight' as torch.float32 on cpu, expected torch.float64"
    ):
        Newton(mixed)
    with pytest.raises(ValueError, match="loss: got 'mse', expected a function"):
        GaussNewton(model, "mse")
    with pytest.raises(ValueError, match="loss: got reduction='none'"):
        GaussNewton(model, nn.MSELoss(reduction="none"))
    with pytest.raises(
        ValueError, match="loss: got reduction='sum', expected the mean over examples"
    ):
        NaturalGradient(model, nn.CrossEntropyLoss(reduction="sum"))
    with pytest.raises(
        ValueError, match="likelihood: got 'softmax' for mse_loss, expected 'gaussian'"
    ):
        NaturalGradient(model, F.mse_loss)
    with pytest.raises(
        ValueError, match="likelihood: got 'gaussian' for CrossEntropyLoss, expected 'softmax'"
    ):
        KFAC(model, nn.CrossEntropyLoss(), likelihood="gaussian")
    with pytest.raises(
        ValueError, match="likelihood: got 'poisson', expected one of softmax, gaussian"
    ):
        NaturalGradient(model, F.cross_entropy, likelihood="poisson")
    with pytest.raises(ValueError, match="expectation: got 'mean', expected one of exact"):
        NaturalGradient(model, F.cross_entropy, expectation="mean")
    for damping in (1e-3, 2.0):  # that outweighs the curvature or not
        concave = GaussNewton(model, lambda z, y: -F.mse_loss(z, y), damping=damping)
        with pytest.raises(
            ValueError, match="GaussNewton loss: got one not convex in the outputs; use Newton"
        ):
            concave.step(lambda: (model(X), TARGETS))


def test_a_step_that_is_not_finite_moves_nothing():
    model = Point(torch.zeros(2).double())
    start = model.x.detach().clone()
    with pytest.raises(
        FloatingPointError, match="the step is not finite; nothing was moved; raise damping"
    ):
        Newton(model, damping=0.0, adapt_damping=False, solver=CG()).step(lambda: model.x.sum())
    assert torch.equal(model.x.detach(), start)


def test_large_models_get_an_iterative_solver():
    assert isinstance(Newton(nn.Linear(31, 32)).solver, Dense)
    assert isinstance(Newton(nn.Linear(32, 32)).solver, CG)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["newton", "newton-cg", "gauss-newton"])
def test_cuda_agrees_with_the_cpu(name):
    ends = []
    for device in ("cpu", "cuda"):
        model = network().to(device)
        optimizer = MAKERS[name](model)
        for _ in range(4):
            optimizer.step(closure_for(name, model, X.to(device), LABELS.to(device)))
        ends.append(vector(model).cpu())
    assert relative_error(ends[1], ends[0]) < 1e-8
