"""K-FAC and EKFAC against references built from their definitions, task by task, example by example."""

import pytest
import torch
import torch.nn.functional as F
from curvlinops import EKFACLinearOperator, KFACLinearOperator
from oracles import generator, randn, relative_error
from torch import nn

from metaimplicit import Identity
from metaimplicit.operators import Fisher, KroneckerFactored
from metaimplicit.params import flatten
from metaimplicit.solvers import CG, Factored, Status

TASKS, EXAMPLES, CLASSES = 2, 4, 3


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
IMAGES, LABELS = (
    randn(TASKS, EXAMPLES, 2, 4, 9, seed=1),
    torch.arange(EXAMPLES).remainder(CLASSES).expand(TASKS, -1),
)
PARAMS = {
    name: torch.stack([p.detach() + 0.1 * randn(*p.shape, seed=10 * t + i) for t in range(TASKS)])
    for i, (name, p) in enumerate(MODEL.named_parameters())
}
X = randn(TASKS, EXAMPLES, 5, seed=2)


def lifted(model, inputs):
    def call(params, x):
        return torch.func.functional_call(model, params, (x,))

    return lambda function, params: torch.vmap(lambda p, x: function(lambda q: call(q, x), p))(
        params, inputs
    )


def cross_entropy(z):
    return torch.vmap(F.cross_entropy)(z, LABELS[:, : z.shape[1]])


def kfac(model=MODEL, inputs=IMAGES, params=PARAMS, loss=cross_entropy, **options):
    return KroneckerFactored(model, lifted(model, inputs), loss, params, **options)


def dense(operator):
    eye = torch.eye(operator.shape[1], dtype=torch.float64)[:, None, :].expand(
        -1, operator.shape[0], -1
    )
    return operator.matmat(eye).transpose(0, 1)


def layer_statistics(task, name, conv):
    """For each example: its inputs ā at every position, and for each class the weighted gradients there."""
    inputs, outputs = {}, {}
    layer = dict(MODEL.named_modules())[name]

    def record(_, given, out):
        inputs["a"], outputs["z"] = given[0], out

    handle = layer.register_forward_hook(record)
    own = {n: p[task].requires_grad_() for n, p in PARAMS.items()}
    found = []
    for i in range(EXAMPLES):
        logits = torch.func.functional_call(MODEL, own, (IMAGES[task, i : i + 1],))
        log_p, g = torch.log_softmax(logits[0], -1), []
        for c in range(CLASSES):
            (slope,) = torch.autograd.grad(-log_p[c], outputs["z"], retain_graph=True)
            g.append(log_p[c].exp().sqrt().detach() * (slope[0].flatten(1).T if conv else slope))
        a = inputs["a"].detach()
        if conv:
            a = F.unfold(a, layer.kernel_size, layer.dilation, layer.padding, layer.stride)[0].T
        if layer.bias is not None:
            a = torch.cat([a, torch.ones(len(a), 1).double()], dim=1)
        found.append((a, torch.stack(g)))
    handle.remove()
    return found


def reference(task, corrected):
    blocks = []
    for name in ("conv", "middle", "head"):
        found = layer_statistics(task, name, name == "conv")
        positions = found[0][0].shape[0]
        a = sum(x.T @ x for x, _ in found) / (EXAMPLES * positions)
        g = sum(torch.einsum("cro,crp->op", y, y) for _, y in found) / EXAMPLES
        if not corrected:
            blocks.append(torch.kron(g, a))
            continue
        basis = torch.kron(torch.linalg.eigh(g).eigenvectors, torch.linalg.eigh(a).eigenvectors)
        gradients = torch.cat([torch.einsum("cro,ri->coi", y, x).flatten(1) for x, y in found])
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
def test_it_is_its_definition(corrected):
    got = reordered(kfac(corrected=corrected))
    for task in range(TASKS):
        assert relative_error(got[task], reference(task, corrected)) < 1e-10


@pytest.mark.parametrize("corrected", [False, True])
def test_it_is_that_of_curvlinops(corrected):
    got = dense(kfac(corrected=corrected))
    make = EKFACLinearOperator if corrected else KFACLinearOperator
    for task in range(TASKS):
        model = Net().double()
        model.load_state_dict({name: p[task] for name, p in PARAMS.items()})
        own = list(model.parameters())
        data = [(IMAGES[task], LABELS[task])]
        other = make(
            model,
            nn.CrossEntropyLoss(),
            own,
            data,
            fisher_type="type-2",
            separate_weight_and_bias=False,
        )
        expected = other @ torch.eye(got.shape[1], dtype=torch.float64)
        assert relative_error(got[task], expected) < 1e-12


@pytest.mark.parametrize("corrected", [False, True])
def test_of_a_linear_network_on_one_datum_it_is_the_block_fisher(corrected):
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, CLASSES)).double()
    params = {n: torch.stack([p.detach(), -p.detach()]) for n, p in model.named_parameters()}
    inputs = X[:, :1]
    got = dense(kfac(model, inputs, params, corrected=corrected))
    lift = lifted(model, inputs)
    exact = dense(Fisher(lambda p: lift(lambda call, q: call(q), p), cross_entropy, params))
    sizes = [5 * 4 + 4, 4 * CLASSES + CLASSES]
    mask = torch.block_diag(*(torch.ones(k, k) for k in sizes)).double()
    assert relative_error(got, exact * mask) < 1e-12


@pytest.mark.parametrize("likelihood", ["softmax", "gaussian"])
@pytest.mark.parametrize("expectation", ["exact", "monte-carlo", "empirical"])
def test_the_head_of_one_datum_has_the_fisher_of_any_expectation(likelihood, expectation):
    model = nn.Linear(5, CLASSES).double()
    params = {n: torch.stack([p.detach(), 2 * p.detach()]) for n, p in model.named_parameters()}
    inputs, options = X[:, :1], {"likelihood": likelihood, "expectation": expectation, "samples": 3}
    got = dense(kfac(model, inputs, params, generator=generator(5), **options))
    lift = lifted(model, inputs)
    exact = Fisher(
        lambda p: lift(lambda call, q: call(q), p),
        cross_entropy,
        params,
        generator=generator(5),
        **options,
    )
    assert relative_error(got, dense(exact)) < 1e-12


@pytest.mark.parametrize("corrected", [False, True])
def test_its_inverse_is_exact(corrected):
    operator = kfac(corrected=corrected)
    b = randn(*operator.shape, seed=3)
    shifted = operator + Identity(operator, 0.3)
    solution = Factored().solve(shifted, b)
    expected = torch.linalg.solve(dense(shifted), b)
    assert relative_error(solution.value, expected) < 1e-12
    assert solution.status.tolist() == [Status.CONVERGED] * TASKS
    damped = Factored(rho=0.2).solve(shifted, b)
    eye = torch.eye(operator.shape[1], dtype=torch.float64)
    assert relative_error(damped.value, torch.linalg.solve(dense(shifted) + 0.2 * eye, b)) < 1e-12
    assert damped.status.tolist() == [Status.MAX_STEPS] * TASKS


def test_as_a_preconditioner_it_saves_products():
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, CLASSES)).double()
    inputs = randn(TASKS, 90, 5, seed=7) * torch.logspace(-2, 1, 5)
    labels = torch.arange(90).remainder(CLASSES).expand(TASKS, -1)
    lift, params = lifted(model, inputs), {n: p.contiguous() for n, p in params_of(model).items()}

    def loss(z):
        return torch.vmap(F.cross_entropy)(z, labels)

    fisher = Fisher(lambda p: lift(lambda call, q: call(q), p), loss, params)
    operator, b = fisher + Identity(fisher, 1e-5), randn(*fisher.shape, seed=3)
    factors = kfac(model, inputs, params, loss)
    plain = CG(max_steps=299, tol=1e-8).solve(operator, b)
    helped = CG(max_steps=299, tol=1e-8).solve(
        operator, b, preconditioner=lambda r: factors.inverse(r, 1e-5)
    )
    assert helped.products < 0.7 * plain.products
    assert relative_error(helped.value, plain.value) < 1e-6


def test_hooks_leave_nothing_behind():
    kfac()
    assert all(not module._forward_hooks for module in MODEL.modules())
    v = randn(*kfac().shape, seed=4)
    with pytest.raises(RuntimeError):
        KroneckerFactored(MODEL, lifted(MODEL, IMAGES[..., :1]), cross_entropy, PARAMS)
    assert all(not module._forward_hooks for module in MODEL.modules())
    assert flatten({"v": v}).shape == v.shape


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5)
        self.unused = nn.Linear(5, 5)

    def forward(self, x):
        return self.layer(self.layer(x))[:, :CLASSES]


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def params_of(model):
    return {n: p.detach().expand(TASKS, *p.shape) for n, p in model.named_parameters()}


def test_what_it_does_not_know_is_named():
    normed = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, CLASSES)).double()
    with pytest.raises(ValueError, match=r"KFAC: '1.bias' belongs to no linear .* others='zero'"):
        kfac(normed, X, params_of(normed))
    operator = kfac(normed, X, params_of(normed), others="zero")
    parts = {n: torch.zeros_like(p) for n, p in params_of(normed).items()}
    other = flatten(parts | {"1.bias": torch.ones(TASKS, 4).double()})
    assert operator.matvec(other).abs().max() == 0
    assert relative_error(operator.inverse(other, 0.5), other / 0.5) < 1e-14
    shared = Shared().double()
    own = {n: p for n, p in params_of(shared).items() if n.startswith("layer")}
    with pytest.raises(ValueError, match="KFAC: layer 'layer' is called twice"):
        kfac(shared, X, own)
    once = {n: p for n, p in params_of(shared).items() if n.startswith("unused")}
    with pytest.raises(ValueError, match="KFAC: layer 'unused' adapts but is not called"):
        kfac(shared, X, once)
    grouped = nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(96, CLASSES)
    ).double()
    with pytest.raises(ValueError, match="KFAC: layer '0' is grouped"):
        kfac(grouped, IMAGES, params_of(grouped))
    doubled = nn.Sequential(Doubled(5, CLASSES)).double()
    with pytest.raises(ValueError, match=r"KFAC: layer '0' .* or its forward is its own"):
        kfac(doubled, X, params_of(doubled))
    rows = nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Linear(5, CLASSES)
    ).double()  # a sequence of outputs for each
    with pytest.raises(
        ValueError,
        match=r"KFAC: got outputs of shape \(\d+, \d+, 1, \d+\), expected \[tasks, m, d\]",
    ):
        kfac(rows, X, params_of(rows))
    with pytest.raises(ValueError, match="KFAC others: got 'skip'"):
        kfac(others="skip")
    plain = kfac()
    b = randn(*plain.shape, seed=3)
    with pytest.raises(ValueError, match="Factored: got Identity, expected K-FAC"):
        Factored().solve(Identity(plain, 1.0) + Identity(plain, 1.0), b)
    with pytest.raises(ValueError, match=r"Factored: got σ \+ ρ = 0.0"):
        Factored(rho=0.0).solve(plain, b)
    with pytest.raises(ValueError, match="Factored rho: got -1"):
        Factored(rho=-1.0)
