"""Attention of every kind has the derivatives of torch's math kernel, through every door."""

from functools import cache

import pytest
import torch
from crossing import every_pair
from reported.helpers import (
    INNER,
    STEPS,
    assert_hypergradient,
    assert_learns,
    assert_same,
    cross_entropy,
    draw,
    plain_maml,
    split,
)
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from metaimplicit import (
    CG,
    BilevelProblem,
    FirstOrder,
    Forward,
    Implicit,
    MetaLearner,
    NewtonCG,
    Tuner,
    Unrolled,
    argmin,
    check_hypergradient,
)
from metaimplicit.optim import GaussNewton, NaturalGradient, Newton
from metaimplicit.solvers import Dense

WIDTH, LENGTH = 4, 3
OPTIONS = {"dim_feedforward": 5, "dropout": 0.0, "batch_first": True}


class Function(nn.Module):
    """A function of the queries, keys and values of its input, `[m, length, 2, width/2]`."""

    def __init__(self, function):
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.function = function

    def forward(self, x):
        parts = self.project(x).chunk(3, -1)
        heads = [part.unflatten(-1, (2, -1)).transpose(1, 2) for part in parts]
        return self.function(*heads).transpose(1, 2).flatten(2)


class MultiHead(nn.MultiheadAttention):
    def __init__(self, weights):
        super().__init__(WIDTH, 2, batch_first=True)
        self.weights = weights

    def forward(self, x):
        return super().forward(x, x, x, need_weights=self.weights)[0]


class Cross(nn.MultiheadAttention):
    """Attention to a shifted sequence, of which the last position is left out."""

    def forward(self, x):
        ignored = torch.tensor([False, False, True]).expand(len(x), -1)
        keys = x.roll(1, 1)
        return super().forward(x, keys, keys, key_padding_mask=ignored, need_weights=False)[0]


class Decoder(nn.TransformerDecoderLayer):
    def forward(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        return super().forward(x, x, tgt_mask=mask)


class Padded(nn.TransformerEncoder):
    """In evaluation mode torch would make nested tensors of these."""

    def forward(self, x):
        ignored = torch.tensor([False, False, True]).expand(len(x), -1)
        return super().forward(x, src_key_padding_mask=ignored)


def attend(q, k, v, **options):
    return F.scaled_dot_product_attention(q, k, v, **options)


KINDS = {
    "function": lambda: Function(attend),
    "causal": lambda: Function(lambda q, k, v: attend(q, k, v, is_causal=True)),
    "masked": lambda: Function(
        lambda q, k, v: attend(q, k, v, attn_mask=torch.eye(LENGTH).bool() | (torch.ones(1) > 0))
    ),
    "scaled": lambda: Function(lambda q, k, v: attend(q, k, v, scale=0.3)),
    "grouped": lambda: Function(lambda q, k, v: attend(q, k[:, :1], v[:, :1], enable_gqa=True)),
    "heads": lambda: MultiHead(weights=False),
    "heads with weights": lambda: MultiHead(weights=True),
    "cross": lambda: Cross(WIDTH, 2, batch_first=True),
    "encoder": lambda: nn.TransformerEncoderLayer(WIDTH, 2, **OPTIONS),
    "norm first": lambda: nn.TransformerEncoderLayer(
        WIDTH, 2, norm_first=True, activation="gelu", **OPTIONS
    ),
    "decoder": lambda: Decoder(WIDTH, 2, **OPTIONS),
    "padded encoder": lambda: Padded(nn.TransformerEncoderLayer(WIDTH, 2, **OPTIONS), 1),
}
FUNCTIONS = list(KINDS)[:5]
MODULES = list(KINDS)[5:]
# The learner takes every kind. Every door opens the same block, so that a function, heads and a
# layer suffice for the others.
some_kinds = pytest.mark.parametrize("kind", ["function", "heads", "encoder"])


def network(kind, training=True):
    return nn.Sequential(KINDS[kind](), nn.Flatten(), nn.Linear(WIDTH * LENGTH, 5)).train(training)


def sequences(tasks=2):
    return draw(tasks, examples=5, inputs=lambda *shape: torch.randn(*shape, LENGTH, WIDTH))


def by_math(function, *args):
    with sdpa_kernel(SDPBackend.MATH):
        return function(*args)


@cache
def by_plain_loop(kind, training=True):
    """A model, its episodes, their loss and the meta-gradients."""
    model = network(kind, training)
    episodes = sequences()
    return model, episodes, by_math(plain_maml, model, split(episodes))


# The learner calls the model once as it is, for the number of classes.
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    ("kind", "training", "vectorize"),
    [
        *every_pair(MODULES, [True, False], ["vmap", "loop"]),
        *((kind, True, "vmap") for kind in FUNCTIONS),  # which have no mode
        ("function", True, "loop"),
    ],
)
def test_the_learner_has_the_meta_gradient_of_a_plain_loop(kind, training, vectorize):
    model, episodes, expected = by_plain_loop(kind, training)
    model.zero_grad()
    assert_learns(expected, model, episodes, vectorize=vectorize)


@pytest.mark.parametrize(
    ("kind", "vectorize"),
    [
        *(("function", "vmap"), ("function", "loop"), ("grouped", "vmap")),
        *(("heads with weights", "loop"), ("encoder", "vmap")),
    ],
)
def test_forward_mode_has_the_meta_gradient_of_a_plain_loop(kind, vectorize):
    model, episodes, expected = by_plain_loop(kind)
    model.zero_grad()
    assert_learns(expected, model, episodes, method=Forward(), vectorize=vectorize)


@some_kinds
def test_hypergradient_has_the_meta_gradient_of_a_plain_loop(kind):
    model, episodes, expected = by_plain_loop(kind)
    assert_hypergradient(expected, model, episodes)


def implicit_gradient(model, strength=1.0, steps=STEPS, lr=0.1):
    """λA⁻¹v of one task, iMAML's meta-gradient, with A the Hessian of f + λ/2 ‖θ − φ‖²."""
    names = list(dict(model.named_parameters()))
    sizes = [p.numel() for p in model.parameters()]
    start = torch.cat([p.detach().flatten() for p in model.parameters()])

    def unpack(theta):
        parts = theta.split(sizes)
        shapes = [p.shape for p in model.parameters()]
        return {n: part.reshape(s) for n, part, s in zip(names, parts, shapes, strict=True)}

    def gradient(support, query):
        def f(theta):
            penalty = 0.5 * strength * (theta - start).square().sum()
            return cross_entropy(model, unpack(theta), support) + penalty

        theta = start
        for _ in range(steps):
            theta = theta - lr * torch.autograd.functional.jacobian(f, theta)
        slope = torch.autograd.functional.jacobian(
            lambda theta: cross_entropy(model, unpack(theta), query), theta
        )
        hessian = torch.autograd.functional.hessian(f, theta, vectorize=True)
        return strength * torch.linalg.solve(hessian, slope)

    return gradient


@cache
def by_dense_algebra(kind):
    """A model, its episodes and their meta-gradient."""
    model = network(kind)
    episodes = sequences()
    gradient = implicit_gradient(model)
    pairs = split(episodes)
    return model, episodes, by_math(lambda: sum(gradient(*pair) for pair in pairs) / len(pairs))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "products", "vectorize"),
    [("function", "double-backward", "loop"), ("heads", "forward-over-reverse", "vmap")],
)
def test_an_implicit_method_has_the_meta_gradient_of_dense_algebra(kind, products, vectorize):
    model, episodes, expected = by_dense_algebra(kind)
    model.zero_grad()
    learner = MetaLearner(
        model,
        F.cross_entropy,
        inner=INNER,
        method=Implicit(Dense(), curvature="hessian", products=products),
        proximal=1.0,
        vectorize=vectorize,
    )
    learner.backward(episodes)
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert_same(got, expected, rtol=1e-9)


def one_task(kind):
    """A ridge-like problem on one task: φ is the logarithm of the penalty's strength."""
    model = network(kind)
    start = {n: p.detach() for n, p in model.named_parameters()}
    ((support, query),) = split(sequences(tasks=1))

    def inner_loss(params, meta, data):
        squares = sum(p.square().sum() for p in params.values())
        return cross_entropy(model, params, support) + 0.5 * meta["log"].exp() * squares

    problem = BilevelProblem(
        init=lambda meta, data: start,
        inner_loss=inner_loss,
        outer_loss=lambda params, meta, data: cross_entropy(model, params, query),
    )
    return problem, {"log": torch.tensor(0.5)}


@some_kinds
def test_check_hypergradient_calls_it_right(kind):
    problem, meta = one_task(kind)
    check = check_hypergradient(problem, meta, None, inner=INNER, method="unrolled", directions=1)
    assert check.verdict.startswith("Right")


@pytest.mark.filterwarnings("ignore:argmin. the linear system was left:RuntimeWarning")
@pytest.mark.parametrize("method", ["unrolled", "forward", "cg"])
@pytest.mark.parametrize("kind", ["function", "encoder"])
def test_argmin_has_the_derivative_of_the_math_kernel(kind, method):
    problem, meta = one_task(kind)

    def gradient():
        log = meta["log"].clone().requires_grad_()
        params = argmin(
            problem.inner_loss, problem.init, {"log": log}, None, inner=INNER, method=method
        )
        problem.outer_loss(params, {}, None).backward()
        return log.grad

    assert_same(gradient(), by_math(gradient), rtol=1e-9)


@pytest.mark.parametrize("inner", [INNER, NewtonCG(steps=2)], ids=["descent", "newton-cg"])
def test_the_tuner_takes_the_step_of_the_math_kernel(inner):
    problem, meta = one_task("encoder")

    def norm():
        tuner = Tuner(problem, meta, inner=inner, method=Implicit(CG(max_steps=30)))
        return torch.tensor(tuner.step(None, None).norm)

    assert_same(norm(), by_math(norm), rtol=1e-9)


def test_a_newton_loop_needs_it_under_a_first_order_method_too():
    model = network("encoder")
    learner = MetaLearner(model, F.cross_entropy, inner=NewtonCG(steps=2), method=FirstOrder())
    learner.vectorize = "loop"
    learner.backward(sequences())
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("optimizer", [Newton, GaussNewton, NaturalGradient])
@pytest.mark.parametrize("kind", ["function", "encoder"])
def test_the_optimisers_take_the_step_of_the_math_kernel(optimizer, kind):
    x, y = torch.randn(5, LENGTH, WIDTH), torch.arange(5)

    def step():
        torch.manual_seed(0)
        model = network(kind)
        if optimizer is Newton:
            chosen = Newton(model, damping=0.1)
            chosen.step(lambda: F.cross_entropy(model(x), y))
        else:
            chosen = optimizer(model, F.cross_entropy, damping=0.1)
            chosen.step(lambda: (model(x), y))
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    assert_same(step(), by_math(step), rtol=1e-9)


def test_first_order_methods_keep_the_fused_kernel_in_a_loop():
    model = network("function")
    kernels = []

    def attend(*heads):
        out = F.scaled_dot_product_attention(*heads)
        if out.requires_grad:
            kernels.append(type(out.grad_fn).__name__)
        return out

    model[0].function = attend
    for method, fused in ((FirstOrder(), True), (Unrolled(), False)):
        learner = MetaLearner(model, F.cross_entropy, method=method, vectorize="loop")
        learner.backward(sequences())  # which looks at the outputs of one task first
        kernels.clear()
        learner.backward(sequences())
        assert kernels
        assert all(("Flash" in kernel) is fused for kernel in kernels)
