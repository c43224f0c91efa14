"""The few-shot front door: what adapts, what is learnt, what comes back, and what is refused."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from oracles import finite_difference, randn, relative_error
from torch import nn

from metaimplicit import (
    CG,
    METHODS,
    GradientDescent,
    Implicit,
    MetaLearner,
    Nystrom,
    TorchOptimizer,
    Truncated,
)
from metaimplicit.methods import known_options, make_method

TASKS, WAYS, QUERIES, INPUTS = 3, 4, 2, 6


def episodes(seed=0, dtype=torch.float64):
    support = torch.arange(WAYS).expand(TASKS, -1)
    query = torch.arange(WAYS).repeat(QUERIES).expand(TASKS, -1)
    return SimpleNamespace(
        support=(randn(TASKS, WAYS, INPUTS, seed=seed).to(dtype), support),
        query=(randn(TASKS, WAYS * QUERIES, INPUTS, seed=seed + 1).to(dtype), query),
    )


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUTS, 5), nn.Tanh(), nn.Linear(5, WAYS)).double()


def learner(model=None, **kwargs):
    settings = {
        "inner": GradientDescent(steps=3, lr=0.3),
        "method": "cg",
        "proximal": 0.5,
        "vectorize": "vmap",
    } | kwargs
    return MetaLearner(network() if model is None else model, F.cross_entropy, **settings)


def outer_loss(learn, parameter, value):
    with torch.no_grad():
        kept = parameter.clone()
        parameter.copy_(value)
        loss = learn.evaluate(episodes())[0][-1].mean()
        parameter.copy_(kept)
    return loss


@pytest.mark.parametrize("flag", [m for m in METHODS if m != "reptile"])
def test_every_method_trains_every_parameter(flag):
    learn = learner(method=make_method(flag, **known_options(flag, solver_steps=2, rank=4)))
    step = learn.backward(episodes())
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in learn.parameters())
    assert step.loss.item() == pytest.approx(
        learn.evaluate(episodes())[0][-1].mean().item(), rel=1e-12
    )
    assert step.accuracy.item() == pytest.approx(learn.evaluate(episodes())[1][-1].mean().item())
    assert step.report.inner_steps.tolist() == [3] * TASKS
    if isinstance(learn.method, Implicit):
        assert step.report.curvature == (
            flag if flag in ("kfac", "ekfac", "diagonal") else "gauss-newton"
        )
        assert step.report.sigma == 0.5
    else:
        assert step.report.curvature is None
        assert step.report.sigma == 0


def test_the_gradient_is_that_of_the_loss_after_adaptation():
    learn = learner(method="unrolled")
    learn.backward(episodes())
    for p in learn.parameters():
        direction = randn(*p.shape, seed=7)
        expected = finite_difference(partial(outer_loss, learn, p), p.detach().clone(), direction)
        assert float((p.grad * direction).sum()) == pytest.approx(
            float(expected), rel=1e-6, abs=1e-10
        )


def test_gradients_accumulate_as_backward_does():
    learn = learner()
    learn.backward(episodes())
    once = [p.grad.clone() for p in learn.parameters()]
    learn.backward(episodes())
    for p, g in zip(learn.parameters(), once, strict=True):
        assert relative_error(p.grad, 2 * g) < 1e-15


@pytest.mark.parametrize("vectorize", ["loop", "auto"])
@pytest.mark.parametrize("method", ["unrolled", "cg"])
def test_ways_to_batch_agree(method, vectorize):
    expected, got = learner(method=method), learner(method=method, vectorize=vectorize)
    state = torch.get_rng_state()
    expected.backward(episodes())
    got.backward(episodes())
    for a, b in zip(got.parameters(), expected.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) < 1e-12
    assert got.vectorize in ("vmap", "loop")
    assert torch.equal(state, torch.get_rng_state())
    chunked = learner(method=method, chunk_size=2)
    chunked.backward(episodes())
    for a, b in zip(chunked.parameters(), expected.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) < 1e-12


@pytest.mark.parametrize(("kind", "count"), [("scalar", 1), ("per-tensor", 4), ("per-element", 4)])
def test_step_sizes_are_learnt(kind, count):
    learn = learner(method="unrolled", learn={"lr": kind, "proximal": "scalar"})
    assert len(learn.learnt) == count + 1
    sizes = [p for name, p in learn.learnt.items() if name.startswith("log_lr")]
    assert all(torch.allclose(p.exp(), torch.full_like(p, 0.3)) for p in sizes)
    if kind == "per-element":
        assert sum(p.numel() for p in sizes) == sum(p.numel() for p in learn.model.parameters())
    learn.backward(episodes())
    for p in learn.learnt.values():
        direction = torch.ones_like(p)
        expected = finite_difference(partial(outer_loss, learn, p), p.detach().clone(), direction)
        assert float(p.grad.sum()) == pytest.approx(float(expected), rel=1e-6, abs=1e-10)


def test_an_implicit_method_learns_the_proximal_strength():
    settings = {"inner": GradientDescent(steps=500, lr=0.3), "learn": {"proximal"}, "proximal": 1.0}
    implicit = learner(
        method=Implicit(CG(max_steps=60, tol=1e-12), curvature="hessian"), **settings
    )
    unrolled = learner(method="unrolled", **settings)
    for learn in (implicit, unrolled):
        learn.backward(episodes())
    for a, b in zip(implicit.parameters(), unrolled.parameters(), strict=True):
        assert relative_error(a.grad, b.grad) < 1e-6


def test_an_inner_optimiser_can_have_its_step_size_learnt():
    learn = learner(
        method="unrolled", inner=TorchOptimizer(torch.optim.Adam, steps=2, lr=0.1), learn={"lr"}
    )
    learn.backward(episodes())
    (p,) = learn.learnt.values()
    expected = finite_difference(
        partial(outer_loss, learn, p), p.detach().clone(), torch.ones_like(p)
    )
    assert p.grad.item() == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("method", ["unrolled", "cg", "first-order"])
@pytest.mark.parametrize(
    "adapt",
    ["2.*", ["2.weight", "2.bias"], lambda name: name.startswith("2.")],
    ids=["pattern", "names", "predicate"],
)
def test_only_what_is_chosen_adapts(adapt, method):
    learn = learner(method=method, adapt=adapt)
    data = episodes()
    adapted = learn.adapt((data.support[0][0], data.support[1][0]))
    assert sorted(adapted.params) == ["2.bias", "2.weight"]
    learn.backward(data)
    assert all(p.grad.abs().max() > 0 for p in learn.parameters())
    if method == "unrolled":
        body = learn.model[0].weight
        direction = randn(*body.shape, seed=8)
        expected = finite_difference(
            partial(outer_loss, learn, body), body.detach().clone(), direction
        )
        assert float((body.grad * direction).sum()) == pytest.approx(float(expected), rel=1e-6)


class Odd(nn.Module):
    """A frozen layer, a buffer, a shared weight and an unused parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.frozen = nn.Linear(INPUTS, INPUTS).requires_grad_(False)
        self.first, self.second = nn.Linear(INPUTS, INPUTS), nn.Linear(INPUTS, INPUTS)
        self.second.weight = self.first.weight
        self.head = nn.Linear(INPUTS, WAYS)
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.tensor(0.5))
        self.double()

    def forward(self, x):
        return self.head(
            torch.tanh(self.second(torch.tanh(self.first(self.frozen(x)))) * self.scale)
        )


@pytest.mark.parametrize("method", ["unrolled", "cg", "first-order", "reptile"])
def test_frozen_shared_and_unused_parameters_and_buffers(method):
    learn = learner(Odd(), method=method)
    learn.backward(episodes())
    assert learn.model.frozen.weight.grad is None
    assert learn.model.second.weight is learn.model.first.weight
    assert learn.model.unused.grad.abs().max() == 0
    assert learn.model.first.weight.grad.abs().max() > 0
    if method == "unrolled":
        p = learn.model.first.weight
        direction = randn(*p.shape, seed=9)
        expected = finite_difference(partial(outer_loss, learn, p), p.detach().clone(), direction)
        assert float((p.grad * direction).sum()) == pytest.approx(float(expected), rel=1e-6)


def test_adapt_and_evaluate_follow_gradient_descent():
    learn, data = learner(proximal=0.0, method="unrolled"), episodes()
    model = network()
    for task in range(TASKS):
        model.load_state_dict(learn.model.state_dict())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        for step in range(6):
            logits = model(data.query[0][task])
            losses, accuracies = learn.evaluate(data, steps=5)
            assert losses.shape == accuracies.shape == (6, TASKS)
            assert losses[step, task].item() == pytest.approx(
                F.cross_entropy(logits, data.query[1][task]).item()
            )
            assert (
                accuracies[step, task] == (logits.argmax(-1) == data.query[1][task]).double().mean()
            )
            optimizer.zero_grad()
            F.cross_entropy(model(data.support[0][task]), data.support[1][task]).backward()
            optimizer.step()
    one = learn.adapt((data.support[0][1], data.support[1][1]))
    many = learn.adapt(data.support, batched=True)
    assert len(many) == TASKS
    assert len(one) == 1
    assert relative_error(one(data.query[0][1]), many(data.query[0])[1]) < 1e-12
    assert relative_error(many[1](data.query[0][1]), many(data.query[0])[1]) < 1e-12
    longer = learn.adapt((data.support[0][1], data.support[1][1]), steps=5)
    assert F.cross_entropy(longer(data.query[0][1]), data.query[1][1]).item() == pytest.approx(
        losses[5, 1].item()
    )
    assert learn.evaluate(data, steps=0)[0].shape == (1, TASKS)
    with pytest.raises(ValueError, match="steps: got -1"):
        learn.evaluate(data, steps=-1)
    with pytest.raises(TypeError, match="holds one task"):
        one[0]


def test_evaluation_pads_a_loop_that_stops_early():
    learn = learner(inner=GradientDescent(steps=50, lr=0.3, tol=0.2))
    losses, _ = learn.evaluate(episodes())
    assert losses.shape == (51, TASKS)
    assert torch.equal(losses[-1], losses[-2])


def test_regression_has_no_accuracy():
    data = episodes()
    data.support = (data.support[0], randn(TASKS, WAYS, 1, seed=3))
    data.query = (data.query[0], randn(TASKS, WAYS * QUERIES, 1, seed=4))
    torch.manual_seed(0)
    learn = MetaLearner(
        nn.Linear(INPUTS, 1).double(),
        F.mse_loss,
        inner=GradientDescent(),
        proximal=0.1,
        method="cg",
    )
    assert learn.backward(data).accuracy is None
    assert learn.evaluate(data)[1] is None


def test_a_state_dict_holds_everything_learnt():
    learn, other = (learner(method="unrolled", learn={"lr": "per-tensor"}) for _ in range(2))
    with torch.no_grad():
        for p in learn.parameters():
            p.add_(0.1)
    other.load_state_dict(learn.state_dict())
    assert torch.equal(other.evaluate(episodes())[0], learn.evaluate(episodes())[0])


class Dropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(INPUTS, WAYS).double()

    def forward(self, x):
        return F.dropout(self.linear(x), 0.5, self.training)


def test_dropout_is_drawn_for_each_task_and_off_in_evaluation_mode():
    torch.manual_seed(0)
    learn = learner(Dropout(), method="unrolled")
    data = episodes()
    same = SimpleNamespace(
        support=(data.support[0][:1].expand(TASKS, -1, -1), data.support[1]),
        query=(data.query[0][:1].expand(TASKS, -1, -1), data.query[1]),
    )
    losses, _ = learn.evaluate(same)
    assert len(set(losses[-1].tolist())) == TASKS
    learn.eval()
    losses, _ = learn.evaluate(same)
    assert torch.allclose(losses[-1], losses[-1][:1].expand(TASKS), rtol=1e-12)


@pytest.mark.parametrize(
    ("method", "device"), [("unrolled", "meta"), ("first-order", "meta"), (Truncated(1), "meta")]
)
def test_placement_follows_the_tensors(method, device):
    """Under fake tensors nothing is computed, but every tensor that the engine makes must be on the device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        with torch.device(device):
            model = nn.Sequential(nn.Linear(INPUTS, 5), nn.Tanh(), nn.Linear(5, WAYS))
            pair = (torch.empty(TASKS, WAYS, INPUTS), torch.empty(TASKS, WAYS, WAYS))
        inner = GradientDescent(steps=2, lr=0.1, momentum=0.5)
        learn = MetaLearner(
            model, F.mse_loss, inner=inner, method=method, proximal=0.1, vectorize="vmap"
        )
        step = learn.backward(SimpleNamespace(support=pair, query=pair))
        assert step.loss.device.type == device
        assert all(p.grad.device.type == device for p in learn.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("flag", [m for m in METHODS if m != "reptile"])
def test_cuda_agrees_with_the_cpu(flag):
    gradients = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        learn = learner(method=make_method(flag, **known_options(flag, solver_steps=2, rank=4))).to(
            device
        )
        data = episodes()
        torch.manual_seed(1)
        on = SimpleNamespace(
            support=[t.to(device) for t in data.support], query=[t.to(device) for t in data.query]
        )
        learn.backward(on)
        gradients.append([p.grad.cpu() for p in learn.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert relative_error(b, a) < 1e-9


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.log_lr = nn.Parameter(torch.zeros(WAYS))


# what is refused


def change(data, **parts):
    return SimpleNamespace(**({"support": data.support, "query": data.query} | parts))


def test_bad_episodes_are_refused_before_any_work():
    learn, data = learner(), episodes()
    x, y = data.support
    cases = [
        (
            change(data, support=(x, y + 1)),
            r"episodes.support labels: got 4, expected class indices from 0 to 3",
        ),
        (change(data, query=(data.query[0], data.query[1] - 1)), r"episodes.query labels: got -1"),
        (
            change(data, support=(x, y.clamp(max=2))),
            "task 0 asks for class 3 in its query, but its support set has no",
        ),
        (change(data, support=(x[:, :2], y)), "begin with .tasks, examples., neither empty"),
        (change(data, support=(x[:, :0], y[:, :0])), "neither empty"),
        (
            change(data, query=(data.query[0][:2], data.query[1][:2])),
            "one task axis of the same size",
        ),
    ]
    for bad, message in cases:
        with pytest.raises(ValueError, match=message):
            learn.backward(bad)
        assert all(p.grad is None for p in learn.parameters())


def test_running_statistics_are_refused_in_training_and_used_in_evaluation():
    model = nn.Sequential(nn.Linear(INPUTS, 5), nn.BatchNorm1d(5), nn.Linear(5, WAYS)).double()
    learn = learner(model)
    with pytest.raises(
        ValueError,
        match=r"'1' \(BatchNorm1d\) tracks running statistics.*track_running_stats=False",
    ):
        learn.backward(episodes())
    with pytest.raises(ValueError, match="tracks running statistics"):
        learn.adapt(episodes().support, batched=True)
    learn.eval()
    learn.backward(episodes())
    assert learn.model[1].num_batches_tracked == 0
    model[1] = nn.BatchNorm1d(5, track_running_stats=False).double()
    learner(model).backward(episodes())


def test_bad_settings_are_refused():
    cases = [
        ({"method": "maml"}, "method: got 'maml', expected one of unrolled"),
        ({"adapt": "3.*"}, r"adapt: '3.\*' matches no parameter that requires grad"),
        ({"adapt": ["2.*", "tail"]}, "adapt: 'tail' matches no parameter"),
        ({"adapt": lambda name: False}, "the predicate' matches no parameter"),
        ({"adapt": []}, "matches no parameter"),
        ({"vectorize": "map"}, "vectorize: got 'map'"),
        ({"proximal": -1.0}, "proximal: got -1.0, expected a strength ≥ 0"),
        ({"proximal": 0.0}, "proximal: got 0 with an implicit method"),
        ({"learn": {"lr"}}, "learn 'lr': implicit cannot give its gradient.*unrolled"),
        (
            {"learn": {"proximal"}, "method": "first-order"},
            "learn 'proximal': first-order cannot give",
        ),
        ({"learn": {"eps"}}, r"learn: got \['eps'\], expected some of"),
        (
            {"learn": {"lr": "each"}, "method": "unrolled"},
            "learn 'lr': got 'each', expected one of",
        ),
        (
            {"learn": {"proximal": "per-tensor"}},
            "learn 'proximal': got 'per-tensor', expected 'scalar'",
        ),
        (
            {"learn": {"proximal"}, "proximal": 0.0, "method": "unrolled"},
            "expected a strength > 0 to start from",
        ),
        (
            {"learn": {"lr"}, "method": "unrolled", "inner": GradientDescent(lr=torch.tensor(0.1))},
            "expected a number > 0",
        ),
        (
            {"model": Named(), "method": "unrolled", "learn": {"lr"}},
            "the model has a parameter 'log_lr' already",
        ),
        ({"model": network().requires_grad_(False)}, "model: got no parameter that requires grad"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            learner(**settings)


def test_a_copy_is_independent():
    learn = learner(Dropout(), method="unrolled")
    copied = copy.deepcopy(learn)
    copied.eval()
    assert torch.equal(copied.evaluate(episodes())[0], copied.evaluate(episodes())[0])
    assert not torch.equal(learn.evaluate(episodes())[0], learn.evaluate(episodes())[0])


def test_learnt_numbers_are_logarithms():
    learn = learner(method="unrolled", learn={"lr", "proximal"}, proximal=0.7)
    assert learn.learnt["log_proximal"].exp().item() == pytest.approx(0.7)
    assert learn.learnt["log_lr"].exp().item() == pytest.approx(0.3)


class NoVmap(nn.Module):
    """An operation that looks at a value, which vmap refuses."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(INPUTS, WAYS).double()

    def forward(self, x):
        out = self.linear(x)
        return out * (2 if out.sum().item() > -1e9 else 1)


def test_auto_falls_back_to_the_loop_where_vmap_is_impossible():
    learn = learner(NoVmap(), vectorize="auto")
    learn.backward(episodes())
    assert learn.vectorize == "loop"
    assert learn.adapt(episodes().support, batched=True)(episodes().query[0]).shape == (
        TASKS,
        WAYS * QUERIES,
        WAYS,
    )


def test_auto_leaves_a_generator_where_it_was():
    generator = torch.Generator().manual_seed(3)
    learn = learner(method=Implicit(Nystrom(rank=4, generator=generator)), vectorize="auto")
    learn._faster((episodes().support, episodes().query))
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(3).get_state())


def test_dense_predictions_have_classes_on_the_second_axis():
    class Pixels(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(INPUTS, WAYS * 2).double()

        def forward(self, x):
            return self.linear(x).unflatten(1, (WAYS, 2))

    data = episodes()
    data.support = (data.support[0], data.support[1].unsqueeze(-1).expand(-1, -1, 2))
    data.query = (data.query[0], data.query[1].unsqueeze(-1).expand(-1, -1, 2))
    learn = learner(Pixels(), method="unrolled")
    outputs = learn.adapt(data.support, batched=True)(data.query[0])
    expected = (outputs.argmax(2) == data.query[1]).double().mean()
    assert learn.backward(data).accuracy == expected


class Counting(nn.Module):
    """Keeps a mean of what passes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(INPUTS, WAYS).double()
        self.register_buffer("mean", torch.zeros(INPUTS, dtype=torch.float64))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.layer(x - self.mean)


def test_a_buffer_that_a_forward_pass_changes_is_named():
    with pytest.raises(
        ValueError, match="model: a forward pass changed buffer 'mean', so each task would see"
    ):
        learner(Counting(), vectorize="loop").backward(episodes())


class Unbatchable(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(INPUTS, WAYS).double()

    def forward(self, x):
        return self.layer(x) * (1.0 if x.sum().item() > -1e9 else 0.0)


def test_a_model_that_cannot_be_vmapped_adapts_before_it_has_been_trained():
    learn, seen = learner(Unbatchable(), vectorize="auto"), episodes()
    adapted = learn.adapt(seen.support, batched=True)
    expected = learner(Unbatchable(), vectorize="loop")
    expected.model.load_state_dict(learn.model.state_dict())
    assert torch.equal(
        adapted(seen.query[0]), expected.adapt(seen.support, batched=True)(seen.query[0])
    )
    assert learn.vectorize == "loop"
    learn = learner(vectorize="auto")
    with pytest.raises(RuntimeError):
        learn.adapt((seen.support[0][..., :3], seen.support[1]), batched=True)
    assert learn.vectorize == "auto"


def test_parameters_frozen_or_unfrozen_since_are_named():
    for name, grad in (("0.weight", False), ("2.bias", True)):
        model = network()
        model[2].bias.requires_grad_(not grad if name == "2.bias" else True)
        learn = learner(model)
        dict(model.named_parameters())[name].requires_grad_(grad)
        with pytest.raises(
            ValueError, match=rf"model: '{name}' was frozen or unfrozen after the learner was built"
        ):
            learn.backward(episodes())


def test_adapt_checks_what_it_is_given():
    learn, seen = learner(), episodes()
    with pytest.raises(ValueError, match="steps: got -1, expected at least 0 inner steps"):
        learn.adapt(seen.support, steps=-1, batched=True)
    with pytest.raises(
        ValueError,
        match=r"support: got inputs \(1, 4, 6\) and targets \(1, 3\), expected both to begin",
    ):
        learn.adapt((seen.support[0][0], seen.support[1][0][:3]))
    with pytest.raises(ValueError, match="make targets that are no classes float"):
        learn.backward(
            SimpleNamespace(support=(seen.support[0], seen.support[1] + 9), query=seen.query)
        )


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(INPUTS, WAYS).double()

    def forward(self, x):
        return self.layer(x), x


@pytest.mark.parametrize("method", ["cg", "unrolled"])
def test_a_model_of_several_outputs_is_named(method):
    with pytest.raises(
        ValueError, match="model: got a call that returns tuple, expected one tensor; wrap it"
    ):
        learner(Pairs(), method=method).backward(episodes())
