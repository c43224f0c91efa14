"""K-FAC against matrices built from its definition: per example, by Kronecker products, and step by step."""

import math

import pytest
import torch
import torch.nn.functional as F
from oracles import generator, randn, relative_error
from torch import nn

from metaimplicit.optim import KFAC, base

EXAMPLES, CLASSES = 6, 3
LABELS = torch.arange(EXAMPLES).remainder(CLASSES)
TARGETS = randn(EXAMPLES, CLASSES, seed=2)


def half_square(z, y):
    return 0.5 * (z - y).square().sum(-1).mean()


def linear(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, CLASSES, bias=False)
    ).double()


def conv(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=(1, 0), dilation=(1, 2)),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        nn.Linear(45, CLASSES),
    ).double()


VECTORS, IMAGES = randn(EXAMPLES, 4, seed=1), randn(EXAMPLES, 2, 4, 9, seed=1)
NETS = {"linear": (linear, VECTORS), "conv": (conv, IMAGES)}


def batches(name, count):
    """Inputs that change from step to step."""
    return [NETS[name][1] + 0.3 * randn(*NETS[name][1].shape, seed=20 + i) for i in range(count)]


def layers_of(model):
    return [layer for layer in model if isinstance(layer, (nn.Linear, nn.Conv2d))]


def draws(likelihood, z, random):
    """[(weight, gradient of −log p(y|z) in z)] of one example, over all y or one that is drawn."""
    if likelihood == "gaussian":
        return [(1.0, row) for row in torch.eye(CLASSES).double()]
    p = z.softmax(-1)
    if random is not None:
        return [(1.0, p - F.one_hot(random, CLASSES))]
    return [(float(p[c]), p - F.one_hot(torch.tensor(c), CLASSES)) for c in range(CLASSES)]


def factors(model, inputs, likelihood, labels=None):
    """(A, G) of each layer, one example after the other, from a network run by hand."""
    layers = layers_of(model)
    sums = [[0.0, 0.0] for _ in layers]
    for i, x in enumerate(inputs):
        a, outs, given = x[None], [], []
        for layer in model:
            if layer in layers:
                given.append(a.detach())
                a = layer(a)
                outs.append(a)
            else:
                a = a.relu() if isinstance(layer, nn.ReLU) else a.flatten(1)
        for weight, slope in draws(
            likelihood, a[0].detach(), None if labels is None else labels[i]
        ):
            found = torch.autograd.grad(a, outs, slope[None].detach(), retain_graph=True)
            for total, g in zip(sums, found, strict=True):
                rows = g.flatten(2)[0].T if g.dim() == 4 else g
                total[1] = total[1] + weight * sum(torch.outer(r, r) for r in rows) / len(inputs)
        for total, layer, v in zip(sums, layers, given, strict=True):
            rows = v
            if isinstance(layer, nn.Conv2d):
                rows = F.unfold(v, layer.kernel_size, layer.dilation, layer.padding, layer.stride)[
                    0
                ].T
            if layer.bias is not None:
                rows = torch.cat([rows, torch.ones(len(rows), 1).double()], 1)
            total[0] = total[0] + sum(torch.outer(r, r) for r in rows) / (len(rows) * len(inputs))
    return sums


def rows_of(layer, part=lambda p: p.detach()):
    weight = part(layer.weight).flatten(1)
    return weight if layer.bias is None else torch.cat([weight, part(layer.bias)[:, None]], 1)


def all_rows(model, part=lambda p: p.detach()):
    return torch.cat([rows_of(layer, part).flatten() for layer in layers_of(model)])


def block_diagonal(averages, damping):
    """⊕ (G + √λ/π I) ⊗ (A + π√λ I), of W̄ row by row."""
    blocks = []
    for A, G in averages:
        pi = math.sqrt(float(A.trace() / len(A)) / float(G.trace() / len(G)))
        A, G = (
            A + pi * math.sqrt(damping) * torch.eye(len(A)).double(),
            G + math.sqrt(damping) / pi * torch.eye(len(G)).double(),
        )
        blocks.append(torch.kron(G, A))
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    ("loss", "targets", "likelihood"),
    [(F.cross_entropy, LABELS, "softmax"), (half_square, TARGETS, "gaussian")],
)
def test_the_direction_is_the_dense_one(net, loss, targets, likelihood):
    make, inputs = NETS[net]
    model = make()
    F_hat = block_diagonal(factors(model, inputs, likelihood), 0.02)
    value = loss(model(inputs), targets)
    g = torch.autograd.grad(value, list(model.parameters()))
    by_parameter = dict(zip(model.parameters(), g, strict=True))
    g, before = all_rows(model, lambda p: by_parameter[p]), all_rows(model)
    optimizer = KFAC(
        model,
        loss,
        lr=0.3,
        damping=0.02,
        momentum=0.0,
        kl_clip=None,
        likelihood=likelihood,
        expectation="exact",
    )
    assert float(optimizer.step(lambda: (model(inputs), targets))) == float(value.detach())
    assert relative_error(all_rows(model), before - 0.3 * torch.linalg.solve(F_hat, g)) < 1e-10
    assert relative_error(all_rows(model, lambda p: p.grad), g) < 1e-13


@pytest.mark.parametrize("targets", [LABELS, None])
def test_a_run_is_the_loop_written_out(targets):
    """Averages, their decay, amortised factors and inverses, sampled targets, KL clipping, momentum."""
    model = conv()
    lr, damping, kappa, mu, decay = 0.05, 0.02, 5e-3, 0.8, 0.6
    sampled = targets is None
    optimizer = KFAC(
        model, F.cross_entropy, lr=lr, damping=damping, momentum=mu, decay=decay, update_every=2, invert_every=4,
        kl_clip=kappa, expectation="monte-carlo" if sampled else "exact", seed=7,
    )  # fmt: skip
    other, random = conv(), generator(7)
    averages, velocity, count, clipped = None, 0.0, 0, []
    for step, inputs in enumerate(batches("conv", 11)):
        optimizer.step(lambda inputs=inputs: (model(inputs), LABELS))
        value = F.cross_entropy(other(inputs), LABELS)
        g = dict(
            zip(
                other.parameters(),
                torch.autograd.grad(value, list(other.parameters())),
                strict=True,
            )
        )
        if step < 3 or step % 2 == 0:
            labels = None
            if sampled:
                own = generator(int(torch.randint(2**62, (), generator=random)))
                labels = torch.multinomial(other(inputs).detach().softmax(-1), 1, generator=own)[
                    :, 0
                ]
            new, count = factors(other, inputs, "softmax", labels), count + 1
            keep = min(1 - 1 / count, decay)
            averages = new if averages is None else [
                [keep * old + (1 - keep) * late for old, late in zip(pair, fresh, strict=True)]
                for pair, fresh in zip(averages, new, strict=True)
            ]  # fmt: skip
        if step < 3 or step % 4 == 0:
            F_hat = block_diagonal(averages, damping)
        rows = all_rows(other, lambda p, g=g: g[p])
        u = torch.linalg.solve(F_hat, rows)
        nu = min(1.0, math.sqrt(kappa / (lr**2 * float(u @ rows))))
        clipped.append(nu < 1)
        velocity = mu * velocity + nu * u
        moved = all_rows(other) - lr * velocity
        for layer in layers_of(other):
            size = rows_of(layer).numel()
            w, moved = moved[:size].reshape(len(layer.weight), -1), moved[size:]
            layer.load_state_dict(
                {"weight": w[:, :-1].reshape(layer.weight.shape), "bias": w[:, -1]}
            )
        assert relative_error(all_rows(model), all_rows(other)) < 1e-9, step
    assert True in clipped
    assert False in clipped


def test_of_one_linear_layer_and_one_example_it_is_the_natural_gradient():
    """There F = G ⊗ A; at a damping that tends to nothing, the pseudo-inverse of both."""
    torch.manual_seed(0)
    model = nn.Linear(4, CLASSES).double()
    x, y = VECTORS[:1], TARGETS[:1]
    residual = (model(x) - y).detach()
    ends = []
    for damping in (1e-6, 1e-8):
        model_copy = nn.Linear(4, CLASSES).double()
        model_copy.load_state_dict(model.state_dict())
        KFAC(
            model_copy, half_square, lr=1.0, damping=damping, momentum=0.0, kl_clip=None, likelihood="gaussian",
            expectation="exact",
        ).step(lambda m=model_copy: (m(x), y))  # fmt: skip
        ends.append(float((model_copy(x) - y).detach().norm() / residual.norm()))
    # F̂⁻¹∇L leaves (1 − s) of the residual, s = 1/((1 + √λ/π)(1 + π√λ/‖ā‖²)), π² = ‖ā‖²/5
    square = float(x.square().sum()) + 1
    pi = math.sqrt(square / 5)
    for damping, left in zip((1e-6, 1e-8), ends, strict=True):
        root = math.sqrt(damping)
        assert left == pytest.approx(1 - 1 / ((1 + root / pi) * (1 + pi * root / square)), rel=1e-6)


@pytest.mark.parametrize("expectation", ["exact", "monte-carlo", "empirical"])
def test_examples_in_rows_of_rows_are_the_same_examples(expectation):
    torch.manual_seed(0)
    steps = []
    for shape in ((EXAMPLES,), (2, 3)):
        model = nn.Linear(4, CLASSES).double()
        torch.nn.init.constant_(model.weight, 0.3)
        torch.nn.init.constant_(model.bias, -0.1)
        optimizer = KFAC(
            model,
            lambda z, y: F.cross_entropy(z.flatten(0, -2), y),
            kl_clip=None,
            expectation=expectation,
        )
        optimizer.step(lambda m=model, shape=shape: (m(VECTORS.reshape(*shape, 4)), LABELS))
        steps.append(all_rows(nn.Sequential(model)))
    assert relative_error(steps[0], steps[1]) < 1e-12


def test_empirical_factors_are_those_of_the_targets():
    model = linear()
    optimizer = KFAC(model, F.cross_entropy, expectation="empirical")
    expected = factors(model, VECTORS, "softmax", LABELS)
    optimizer.step(lambda: (model(VECTORS), LABELS))
    for layer, (A, G) in zip(layers_of(model), expected, strict=True):
        assert relative_error(optimizer.state[layer.weight]["A"], A) < 1e-12
        assert relative_error(optimizer.state[layer.weight]["G"], G) < 1e-12


@pytest.mark.parametrize(
    "options", [{"kl_clip": None, "lr": 0.05}, {"kl_clip": None, "lr": 4.0}, {"kl_clip": 1e-6}]
)
def test_damping_follows_the_ratio_with_the_exact_fisher(options):
    """(19/20)^T or (20/19)^T, by m(δ) = L + gᵀδ + ½ δᵀFδ; a step cut short loosens nothing."""
    model = linear()
    optimizer = KFAC(
        model,
        F.cross_entropy,
        damping=0.05,
        momentum=0.0,
        adapt_every=2,
        expectation="exact",
        **options,
    )
    damping = 0.05
    for step in range(4):
        before = torch.cat([p.detach().flatten() for p in model.parameters()])
        shapes = {name: p.shape for name, p in model.named_parameters()}

        def outputs(flat, shapes=shapes):
            parts = torch.split(flat, [s.numel() for s in shapes.values()])
            params = {
                n: part.reshape(s) for part, (n, s) in zip(parts, shapes.items(), strict=True)
            }
            return torch.func.functional_call(model, params, (VECTORS,))

        J, z = torch.func.jacrev(outputs)(before).flatten(0, 1), outputs(before).detach()
        bend = (
            torch.block_diag(*(torch.diag(p) - torch.outer(p, p) for p in z.softmax(-1))) / EXAMPLES
        )
        g = torch.func.grad(lambda v, outputs=outputs: F.cross_entropy(outputs(v), LABELS))(before)
        loss = optimizer.step(lambda: (model(VECTORS), LABELS))
        delta = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
        if step % 2 == 0:
            assert optimizer.param_groups[0]["damping"] == pytest.approx(damping, rel=1e-12)
            continue
        fall = loss - F.cross_entropy(model(VECTORS), LABELS).detach()
        expected = -g @ delta - 0.5 * delta @ (J.T @ bend @ J) @ delta
        slack = 10 * torch.finfo(torch.float64).eps * loss
        rho = float((fall + slack) / (expected + slack)) if expected + slack > 0 else -math.inf
        assert optimizer.ratio == pytest.approx(rho, rel=1e-8)
        if rho < 0.25:
            damping *= (20 / 19) ** 2
        elif rho > 0.75 and options["kl_clip"] is None:
            damping *= (19 / 20) ** 2
        assert optimizer.param_groups[0]["damping"] == pytest.approx(damping, rel=1e-12)
    assert (damping > 0.05) == (options.get("lr") == 4.0)
    assert (damping < 0.05) == (options.get("lr") == 0.05)


def test_other_layers_take_the_gradient_and_frozen_ones_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 5), nn.Linear(5, CLASSES)
    ).double()
    model[3].requires_grad_(False)
    model[4].bias.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = KFAC(model, F.cross_entropy, lr=0.5, momentum=0.0, kl_clip=None, others="gradient")
    value = F.cross_entropy(model(VECTORS), LABELS)
    g = torch.autograd.grad(value, [model[1].weight, model[1].bias])
    model[1].reset_running_stats()
    optimizer.step(lambda: (model(VECTORS), LABELS))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"0.weight", "0.bias", "1.weight", "1.bias", "4.weight"}
    assert relative_error(model[1].weight.detach(), before["1.weight"] - 0.5 * g[0]) < 1e-12
    assert relative_error(model[1].bias.detach(), before["1.bias"] - 0.5 * g[1]) < 1e-12
    assert model[1].num_batches_tracked == 1


class Tied(nn.Module):
    def __init__(self, shared):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.shared = shared
        if shared:
            self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x)) if self.shared else self.first(self.first(x))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        self.second(x)
        return self.first(x)


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
def test_layers_it_does_not_know_are_named(layer, name, why):
    model = nn.Sequential(nn.Linear(4, 4), layer)
    with pytest.raises(
        ValueError, match=rf"KFAC: layer '1' \({name}\): {why}.*use optim.GaussNewton, or freeze it"
    ):
        KFAC(model, F.cross_entropy)
    KFAC(model, F.cross_entropy, others="gradient")
    layer.requires_grad_(False)
    KFAC(model, F.cross_entropy)


def test_sharing_and_calling_twice_or_never_are_named():
    with pytest.raises(
        ValueError,
        match=r"KFAC: 'first.weight' and 'second.weight' are one parameter, of two layers",
    ):
        KFAC(Tied(True), F.cross_entropy, others="gradient")
    x, y = torch.randn(5, 4), torch.arange(5).remainder(4)
    twice = Tied(False)
    twice.second.requires_grad_(False)
    with pytest.raises(
        ValueError,
        match=r"KFAC: layer 'first' is called twice, expected once; use optim.GaussNewton",
    ):
        KFAC(twice, F.cross_entropy).step(lambda: (twice(x), y))
    unused = Unused()
    with pytest.raises(
        ValueError,
        match=r"KFAC: the outputs do not depend on layer 'second'; use optim.GaussNewton",
    ):
        KFAC(unused, F.cross_entropy).step(lambda: (unused(x), y))
    never = Tied(True)
    never.second = nn.Linear(4, 4)
    never.shared = None
    never.forward = lambda x: never.first(x)
    with pytest.raises(
        ValueError, match=r"KFAC: layer 'second' adapts but is not called; use optim.GaussNewton"
    ):
        KFAC(never, F.cross_entropy).step(lambda: (never(x), y))
    bias = nn.Sequential(nn.Linear(4, 4))
    bias[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="'bias' requires grad without a weight that does"):
        KFAC(bias, F.cross_entropy)
    assert all(
        not layer._forward_hooks for model in (twice, unused, never) for layer in model.modules()
    )
    normed = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(
        ValueError, match=r"KFAC: the loss does not depend on '1.weight'; freeze it"
    ):
        KFAC(normed, F.cross_entropy, others="gradient").step(lambda: (normed[0](x), y))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr: got 0.0, expected a finite number > 0"),
        ({"damping": 0.0}, "damping: got 0.0, expected a finite number > 0"),
        ({"damping": math.inf}, "damping: got inf, expected a finite number > 0"),
        ({"kl_clip": 0.0}, "kl_clip: got 0.0, expected a finite number > 0"),
        ({"momentum": 1.0}, r"momentum: got 1.0, expected a number in \[0, 1\)"),
        ({"decay": -0.1}, r"decay: got -0.1, expected a number in \[0, 1\)"),
        ({"update_every": 0}, "update_every: got 0, expected at least 1 step"),
        ({"invert_every": 0}, "invert_every: got 0, expected at least 1 step"),
        ({"adapt_every": 0}, "adapt_every: got 0, expected at least 1 step"),
        ({"others": "zero"}, "others: got 'zero', expected 'raise' or 'gradient'"),
        ({"likelihood": "poisson"}, "likelihood: got 'poisson', expected one of softmax, gaussian"),
        ({"expectation": "mean"}, "expectation: got 'mean', expected one of exact"),
    ],
)
def test_options_out_of_range_are_named(options, message):
    with pytest.raises(ValueError, match=f"KFAC {message}"):
        KFAC(linear(), F.cross_entropy, **options)
    with pytest.raises(ValueError, match="KFAC loss: got reduction='sum'"):
        KFAC(linear(), nn.CrossEntropyLoss(reduction="sum"))


def test_a_factor_that_is_singular_in_its_precision_moves_nothing():
    model = linear().float()
    start = [p.detach().clone() for p in model.parameters()]
    optimizer = KFAC(model, F.cross_entropy, damping=1e-30)
    with pytest.raises(
        FloatingPointError, match=r"a factor is singular at damping = 1e-30; raise damping"
    ):
        optimizer.step(lambda: (model(VECTORS[:1].float()), LABELS[:1]))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))


@pytest.mark.parametrize("device", ["meta"])
def test_placement_follows_the_parameters(device, monkeypatch):
    """Under fake tensors nothing is computed, so nothing can be refused; all that is made must be on the device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setattr(base, "raise_if", lambda *_: None)
    monkeypatch.setattr("metaimplicit.optim.kfac.raise_if", lambda *_: None)
    with FakeTensorMode():
        with torch.device(device):
            model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 3))
            x, y = torch.empty(5, 1, 4, 4), torch.empty(5, dtype=torch.int64)
        optimizer = KFAC(
            model, F.cross_entropy, expectation="exact", update_every=1, invert_every=1
        )
        for _ in range(2):
            loss = optimizer.step(lambda: (model(x), y))
        assert loss.device.type == device
        assert all(p.grad.device.type == device for p in model.parameters())
        assert all(
            t.device.type == device for state in optimizer.state.values() for t in state.values()
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu():
    ends = []
    for device in ("cpu", "cuda"):
        model = conv().to(device)
        optimizer = KFAC(model, F.cross_entropy, adapt_every=2, expectation="exact")
        for inputs in batches("conv", 4):
            x, y = inputs.to(device), LABELS.to(device)
            optimizer.step(lambda model=model, x=x, y=y: (model(x), y))
        ends.append(all_rows(model).cpu())
    assert relative_error(ends[1], ends[0]) < 1e-8
