"""K-FAC and EKFAC against references built from their definitions, example by example."""

import pytest
import torch
import torch.nn.functional as F
from curvlinops import EKFACLinearOperator, KFACLinearOperator
from oracles import dense, generator, randn, relative_error
from torch import nn

from metaimplicit.operators import Fisher, Identity, KroneckerFactored, LossParts
from metaimplicit.params import flatten
from metaimplicit.solvers import CG, Factored, Status

TASKS = 2
EXAMPLES = 4
CLASSES = 3


class Net(nn.Module):
    """A convolution with stride and padding, and two linear layers, one without a bias."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=(1, 0), dilation=(1, 2))
        self.middle = nn.Linear(45, 4, bias=False)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.middle(torch.tanh(self.conv(x)).flatten(1))))


torch.manual_seed(0)
MODEL = Net().double()
IMAGES = randn(TASKS, EXAMPLES, 2, 4, 9, seed=1)
LABELS = torch.arange(EXAMPLES).remainder(CLASSES).expand(TASKS, -1)
PARAMS = {
    name: torch.stack([p.detach() + 0.1 * randn(*p.shape, seed=10 * t + i) for t in range(TASKS)])
    for i, (name, p) in enumerate(MODEL.named_parameters())
}
X = randn(TASKS, EXAMPLES, 5, seed=2)


def lifted(model, inputs):
    def call(params, x):
        return torch.func.functional_call(model, params, (x,))

    def lift(function, params):
        return torch.vmap(lambda p, x: function(lambda q: call(q, x), p))(params, inputs)

    return lift


def cross_entropy(z):
    return torch.vmap(F.cross_entropy)(z, LABELS[:, : z.shape[1]])


def half_square(z):
    return 0.5 * z.square().sum(-1).mean(1)


def kfac(model=MODEL, inputs=IMAGES, params=PARAMS, loss=cross_entropy, **options):
    return KroneckerFactored(model, lifted(model, inputs), loss, params, **options)


def layer_statistics(task, name, conv):
    """The inputs ā of each example at every position, and its weighted gradients of each class."""
    inputs = {}
    outputs = {}
    layer = dict(MODEL.named_modules())[name]

    def record(_, given, out):
        inputs["a"] = given[0]
        outputs["z"] = out

    handle = layer.register_forward_hook(record)
    own = {n: p[task].requires_grad_() for n, p in PARAMS.items()}
    statistics = []
    for i in range(EXAMPLES):
        logits = torch.func.functional_call(MODEL, own, (IMAGES[task, i : i + 1],))
        log_p = torch.log_softmax(logits[0], -1)
        g = []
        for c in range(CLASSES):
            (slope,) = torch.autograd.grad(-log_p[c], outputs["z"], retain_graph=True)
            g.append(log_p[c].exp().sqrt().detach() * (slope[0].flatten(1).T if conv else slope))
        a = inputs["a"].detach()
        if conv:
            a = F.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride)[0].T
        if layer.bias is not None:
            a = torch.cat([a, torch.ones(len(a), 1).double()], dim=1)
        statistics.append((a, torch.stack(g)))
    handle.remove()
    return statistics


def reference(task, corrected):
    blocks = []
    for name in ("conv", "middle", "head"):
        pairs = layer_statistics(task, name, name == "conv")
        positions = sum(len(x) for x, _ in pairs)
        a = sum(x.T @ x for x, _ in pairs) / positions
        g = sum(torch.einsum("cro,crp->op", y, y) for _, y in pairs) / EXAMPLES
        if not corrected:
            blocks.append(torch.kron(g, a))
            continue
        basis = torch.kron(torch.linalg.eigh(g).eigenvectors, torch.linalg.eigh(a).eigenvectors)
        gradients = torch.cat([torch.einsum("cro,ri->coi", y, x).flatten(1) for x, y in pairs])
        blocks.append(basis @ torch.diag((gradients @ basis).square().sum(0) / EXAMPLES) @ basis.T)
    return torch.block_diag(*blocks)


def reordered(operator):
    """The dense operator with each layer's bias as its last input, as the references have it."""
    index = torch.arange(operator.shape[1])
    parts = dict(
        zip(PARAMS, torch.split(index, [p[0].numel() for p in PARAMS.values()]), strict=True)
    )
    order = []
    for layer in ("conv", "middle", "head"):
        rows = parts[f"{layer}.weight"].reshape(PARAMS[f"{layer}.weight"].shape[1], -1)
        if f"{layer}.bias" in parts:
            rows = torch.cat([rows, parts[f"{layer}.bias"].unsqueeze(1)], dim=1)
        order.append(rows.flatten())
    order = torch.cat(order)
    return dense(operator)[:, order][:, :, order]


@pytest.mark.parametrize("corrected", [False, True])
def test_the_matrix_is_its_definition(corrected):
    actual = reordered(kfac(corrected=corrected))
    for task in range(TASKS):
        assert relative_error(actual[task], reference(task, corrected)) < 1e-10


@pytest.mark.parametrize("corrected", [False, True])
def test_the_matrix_is_that_of_curvlinops(corrected):
    actual = dense(kfac(corrected=corrected))
    make = EKFACLinearOperator if corrected else KFACLinearOperator
    for task in range(TASKS):
        model = Net().double()
        model.load_state_dict({name: p[task] for name, p in PARAMS.items()})
        other = make(
            model,
            nn.CrossEntropyLoss(),
            list(model.parameters()),
            [(IMAGES[task], LABELS[task])],
            fisher_type="type-2",
            separate_weight_and_bias=False,
        )
        expected = other @ torch.eye(actual.shape[1], dtype=torch.float64)
        assert relative_error(actual[task], expected) < 1e-12


@pytest.mark.parametrize("corrected", [False, True])
def test_for_a_linear_network_and_one_example_it_is_the_blocks_of_fishers_matrix(corrected):
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, CLASSES)).double()
    params = {n: torch.stack([p.detach(), -p.detach()]) for n, p in model.named_parameters()}
    inputs = X[:, :1]
    actual = dense(kfac(model, inputs, params, corrected=corrected))
    lift = lifted(model, inputs)
    exact = dense(Fisher(lambda p: lift(lambda call, q: call(q), p), cross_entropy, params))
    sizes = [5 * 4 + 4, 4 * CLASSES + CLASSES]
    mask = torch.block_diag(*(torch.ones(k, k) for k in sizes)).double()
    assert relative_error(actual, exact * mask) < 1e-12


@pytest.mark.parametrize("likelihood", ["softmax", "gaussian"])
@pytest.mark.parametrize("expectation", ["exact", "monte-carlo", "empirical"])
def test_for_one_layer_and_one_example_it_is_fishers_matrix(likelihood, expectation):
    model = nn.Linear(5, CLASSES).double()
    params = {n: torch.stack([p.detach(), 2 * p.detach()]) for n, p in model.named_parameters()}
    inputs = X[:, :1]
    options = {"likelihood": likelihood, "expectation": expectation, "samples": 3}
    loss = cross_entropy if likelihood == "softmax" else half_square
    actual = dense(kfac(model, inputs, params, loss, generator=generator(5), **options))
    lift = lifted(model, inputs)
    exact = Fisher(
        lambda p: lift(lambda call, q: call(q), p),
        loss,
        params,
        generator=generator(5),
        **options,
    )
    assert relative_error(actual, dense(exact)) < 1e-12


@pytest.mark.parametrize("corrected", [False, True])
def test_a_hook_of_the_user_belongs_to_what_follows_the_layer(corrected):
    layer = nn.Linear(5, CLASSES).double()
    layer.register_forward_hook(lambda _, given, output: 3 * output.sin())
    params = {n: torch.stack([p.detach(), 2 * p.detach()]) for n, p in layer.named_parameters()}
    actual = dense(kfac(layer, X[:, :1], params, corrected=corrected))
    lift = lifted(layer, X[:, :1])
    exact = dense(Fisher(lambda p: lift(lambda call, q: call(q), p), cross_entropy, params))
    assert relative_error(actual, exact) < 1e-12


@pytest.mark.parametrize("corrected", [False, True])
def test_the_inverse_is_exact_and_rho_is_added_to_the_shift(corrected):
    operator = kfac(corrected=corrected)
    b = randn(*operator.shape, seed=3)
    shifted = operator + Identity(operator, 0.3)
    solution = Factored().solve(shifted, b)
    matrix = dense(shifted)
    expected = torch.linalg.solve(matrix, b)
    assert relative_error(solution.value, expected) < 1e-12
    assert solution.status.tolist() == [Status.CONVERGED] * TASKS
    damped = Factored(rho=0.2).solve(shifted, b)
    eye = torch.eye(operator.shape[1], dtype=torch.float64)
    assert relative_error(damped.value, torch.linalg.solve(matrix + 0.2 * eye, b)) < 1e-12
    assert damped.status.tolist() == [Status.MAX_STEPS] * TASKS


@pytest.mark.slow
def test_a_preconditioner_of_factors_saves_products():
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()
    inputs = randn(TASKS, 90, 5, seed=7) * torch.logspace(-2, 1, 5)
    labels = torch.arange(90).remainder(CLASSES).expand(TASKS, -1)
    lift = lifted(model, inputs)
    params = {n: p.contiguous() for n, p in params_of(model).items()}

    def loss(z):
        return torch.vmap(F.cross_entropy)(z, labels)

    fisher = Fisher(lambda p: lift(lambda call, q: call(q), p), loss, params)
    operator = fisher + Identity(fisher, 1e-5)
    b = randn(*fisher.shape, seed=3)
    factors = kfac(model, inputs, params, loss)
    plain = CG(max_steps=299, tol=1e-8).solve(operator, b)
    helped = CG(max_steps=299, tol=1e-8).solve(
        operator, b, preconditioner=lambda r: factors.inverse(r, 1e-5)
    )
    assert helped.products < 0.7 * plain.products
    assert relative_error(helped.value, plain.value) < 1e-6


def test_hooks_are_removed_even_after_an_error():
    kfac()
    assert all(not module._forward_hooks for module in MODEL.modules())
    with pytest.raises(RuntimeError):
        KroneckerFactored(MODEL, lifted(MODEL, IMAGES[..., :1]), cross_entropy, PARAMS)
    assert all(not module._forward_hooks for module in MODEL.modules())


# refusals


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.unused = nn.Linear(5, 5)

    def forward(self, x):
        return self.layer(self.layer(x))[:, :CLASSES]


class Tied(nn.Module):
    """An encoder whose decoder is its transpose, or where `first`, a decoder whose encoder is."""

    def __init__(self, *, first=False):
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.first = first

    def forward(self, x):
        if self.first:
            return self.layer(F.linear(x, self.layer.weight.T))[:, :CLASSES]
        return F.linear(self.layer(x), self.layer.weight.T)[:, :CLASSES]


class Conditioned(nn.Module):
    """A layer runs on a vector that all examples share."""

    def __init__(self):
        super().__init__()
        self.context = nn.Linear(4, CLASSES)
        self.layer = nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.layer(x) + self.context(torch.ones(4).to(x))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def params_of(model):
    return {n: p.detach().expand(TASKS, *p.shape) for n, p in model.named_parameters()}


NORMED = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, CLASSES)).double()
GROUPED = nn.Sequential(nn.Conv2d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(96, CLASSES)).double()
SEQUENCE = nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Linear(5, CLASSES)).double()
SHARED = Shared().double()
DOUBLED = nn.Sequential(Doubled(5, CLASSES)).double()


@pytest.mark.parametrize(
    ("model", "inputs", "adapted", "message"),
    [
        (NORMED, X, "", r"'1.bias' belongs to no linear .* others='zero'"),
        (SHARED, X, "layer", "layer 'layer' is called twice"),
        (SHARED, X, "unused", "layer 'unused' adapts but is not called"),
        (GROUPED, IMAGES, "", "layer '0' is grouped"),
        (Conditioned().double(), X, "", r"got an input of shape \(4,\) to Linear\(.* a row for"),
        (Tied().double(), X, "", "'layer.weight' is read outside of its layer"),
        (Tied(first=True).double(), X, "", "'layer.weight' is read outside of its layer"),
        (DOUBLED, X, "", "layer '0' .* or its forward is its own"),
        (SEQUENCE, X, "", r"got outputs of shape \(\d+, \d+, 1, \d+\), expected \[tasks, m, d\]"),
    ],
)
def test_a_layer_without_factors_is_refused_by_name(model, inputs, adapted, message):
    params = {n: p for n, p in params_of(model).items() if n.startswith(adapted)}
    with pytest.raises(ValueError, match=f"KFAC: {message}"):
        kfac(model, inputs, params)


def test_a_layer_without_factors_can_have_a_block_of_zeros():
    params = params_of(NORMED)
    operator = kfac(NORMED, X, params, others="zero")
    zeros = {n: torch.zeros_like(p) for n, p in params.items()}
    bias_of_the_norm = flatten(zeros | {"1.bias": torch.ones(TASKS, 4).double()})
    assert operator.matvec(bias_of_the_norm).abs().max() == 0
    inverse = operator.inverse(bias_of_the_norm, 0.5)
    assert relative_error(inverse, bias_of_the_norm / 0.5) < 1e-14


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ({"module": None}, "KFAC: got an inner loss that hides its layers"),
        ({"apply_model": None}, "KFAC: got an inner loss that hides its layers"),
    ],
)
def test_a_loss_without_the_parts_is_refused(missing, message):
    lift = lifted(MODEL, IMAGES)
    parts = {
        "params": PARAMS,
        "outputs": lambda p: lift(lambda call, q: call(q), p),
        "loss": cross_entropy,
        "module": MODEL,
        "apply_model": lift,
    }
    operator = KroneckerFactored.from_loss(LossParts(**parts))
    v = randn(*operator.shape, seed=4)
    assert torch.equal(operator.matvec(v), kfac().matvec(v))
    with pytest.raises(ValueError, match=message):
        KroneckerFactored.from_loss(LossParts(**(parts | missing)))


def test_an_unknown_option_is_refused():
    with pytest.raises(ValueError, match="KFAC others: got 'skip', expected 'raise' or 'zero'"):
        kfac(others="skip")
    with pytest.raises(ValueError, match="KFAC expectation: got 'emperical', expected one of"):
        kfac(expectation="emperical")
    with pytest.raises(ValueError, match="KFAC likelihood: got 'normal', expected one of"):
        kfac(likelihood="normal")
    with pytest.raises(ValueError, match="KFAC samples: got 0, expected at least 1"):
        kfac(expectation="monte-carlo", samples=0)


def test_a_factored_solve_needs_a_core_with_an_inverse_and_a_positive_shift():
    operator = kfac()
    b = randn(*operator.shape, seed=3)
    with pytest.raises(ValueError, match="Factored: got Identity, expected a curvature that knows"):
        Factored().solve(Identity(operator, 1.0) + Identity(operator, 1.0), b)
    with pytest.raises(ValueError, match=r"Factored: got σ \+ ρ = 0.0"):
        Factored(rho=0.0).solve(operator, b)


@pytest.mark.parametrize("corrected", [False, True])
def test_a_task_that_is_not_finite_leaves_the_others_as_they_are(corrected):
    images = IMAGES.clone()
    images[0, 0] = torch.nan
    v = randn(TASKS, flatten(PARAMS).shape[1], seed=5)
    options = {"likelihood": "softmax", "corrected": corrected}
    broken = kfac(inputs=images, **options).matvec(v)
    whole = kfac(**options).matvec(v)
    assert broken[0].isnan().any()
    assert relative_error(broken[1], whole[1]) < 1e-12
