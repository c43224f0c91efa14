"""The meta-gradient that `MetaLearner.backward` adds, by every method and for every parameter."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from learner.few_shot import (
    INPUTS,
    TASKS,
    WAYS,
    LinearModel,
    assert_gradients_match_differences,
    draw_episodes,
    make_learner,
    make_network,
)
from oracles import finite_difference, randn, relative_error
from torch import nn

from metaimplicit import CG, METHODS, GradientDescent, Implicit, MetaLearner, Proximal, Truncated
from metaimplicit.learner import Episode, Pair
from metaimplicit.learner.buffers import reject_changed_tensors
from metaimplicit.methods import known_options, make_method

DERIVATIVES = [flag for flag in METHODS if flag != "reptile"]


@pytest.mark.parametrize("flag", METHODS)
@pytest.mark.filterwarnings("ignore:.*ended with:RuntimeWarning")  # a rank of 10 of 59 is low
def test_every_method_trains_every_parameter_with_its_defaults(flag):
    learner = MetaLearner(make_network(), F.cross_entropy, method=flag, vectorize="loop")
    reaches_start = "start" in METHODS[flag].reach
    assert (learner.penalty is None) == reaches_start
    assert reaches_start or learner.penalty.strength == 2.0

    step = learner.backward(draw_episodes())
    for p in learner.parameters():
        assert p.grad.isfinite().all()
        assert p.grad.abs().max() > 0
    losses, accuracies = learner.evaluate(draw_episodes())
    assert step.loss.item() == pytest.approx(losses[-1].mean().item(), rel=1e-12)
    assert step.accuracy.item() == pytest.approx(accuracies[-1].mean().item())
    assert step.report.inner_steps.tolist() == [5] * TASKS
    if isinstance(learner.method, Implicit):
        assert step.report.curvature == (METHODS[flag].curvature or "gauss-newton")
        assert step.report.sigma == 2.0
    else:
        assert step.report.curvature is None
        assert step.report.sigma == 0


def test_the_defaults_are_maml():
    """A model and a loss are enough for the meta-gradient of five steps of gradient descent."""
    learner = MetaLearner(make_network(), F.cross_entropy)
    step = learner.backward(draw_episodes())
    assert step.report.method == "unrolled"
    assert step.report.inner_steps.tolist() == [5] * TASKS

    start = dict(make_network().named_parameters())
    data = draw_episodes()
    losses = []
    for task in range(TASKS):
        params = start
        for _ in range(5):
            outputs = torch.func.functional_call(learner.model, params, data.support[0][task])
            loss = F.cross_entropy(outputs, data.support[1][task])
            gradients = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            pairs = zip(params.items(), gradients, strict=True)
            params = {name: p - 0.1 * g for (name, p), g in pairs}
        outputs = torch.func.functional_call(learner.model, params, data.query[0][task])
        losses.append(F.cross_entropy(outputs, data.query[1][task]))
    expected = torch.autograd.grad(torch.stack(losses).mean(), list(start.values()))
    for p, gradient in zip(learner.model.parameters(), expected, strict=True):
        assert relative_error(p.grad, gradient) < 1e-12


def test_the_gradient_is_that_of_the_loss_after_adaptation():
    learner = make_learner(method="unrolled")
    learner.backward(draw_episodes())
    assert_gradients_match_differences(learner, learner.parameters())


@pytest.mark.parametrize("sizes", [[WAYS] * TASKS, [WAYS, WAYS - 1]], ids=["one", "several"])
def test_images_that_require_grad_have_a_gradient(sizes):
    """Tasks of several sizes are computed one after another."""
    data = draw_episodes()
    images = [x[:m].clone().requires_grad_() for x, m in zip(data.support[0], sizes, strict=True)]

    def episodes(first):
        supports = zip([first, *images[1:]], data.support[1], sizes, strict=True)
        pairs = [(x, labels[:m]) for x, labels, m in supports]
        return list(zip(pairs, zip(*data.query, strict=True), strict=True))

    learner = make_learner(method="unrolled")
    learner.backward(episodes(images[0]))
    direction = randn(*images[0].shape, seed=7)
    expected = finite_difference(
        lambda x: learner.evaluate(episodes(x))[0][-1].mean(), images[0].detach(), direction
    )
    slope = float((images[0].grad * direction).sum())
    assert slope == pytest.approx(float(expected), rel=1e-7)


def test_gradients_accumulate_as_those_of_backward_do():
    learner = make_learner()
    learner.backward(draw_episodes())
    once = [p.grad.clone() for p in learner.parameters()]
    learner.backward(draw_episodes())
    for p, gradient in zip(learner.parameters(), once, strict=True):
        assert relative_error(p.grad, 2 * gradient) < 1e-15


def test_episodes_may_be_named_tuples():
    data = draw_episodes()
    plain = make_learner()
    named = make_learner()
    plain.backward(data)
    named.backward(Episode(Pair(*data.support), Pair(*data.query)))
    for p, q in zip(plain.parameters(), named.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


@pytest.mark.parametrize(
    ("adapt", "method"),
    [
        ("2.*", "unrolled"),
        ("2.*", "cg"),
        (["2.weight", "2.bias"], "first-order"),
        (lambda name: name.startswith("2."), "first-order"),
    ],
    ids=["pattern-unrolled", "pattern-cg", "names", "predicate"],
)
def test_only_the_chosen_parameters_adapt_and_all_are_learnt(adapt, method):
    learner = make_learner(method=method, adapt=adapt)
    data = draw_episodes()
    adapted = learner.adapt((data.support[0][0], data.support[1][0]))
    assert sorted(adapted.params) == ["2.bias", "2.weight"]
    learner.backward(data)
    assert all(p.grad.abs().max() > 0 for p in learner.parameters())
    if method == "unrolled":
        assert_gradients_match_differences(learner, learner.model[0].parameters())


class UnusualModel(nn.Module):
    """A frozen layer, a buffer, a shared weight and an unused parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.frozen = nn.Linear(INPUTS, INPUTS).requires_grad_(False)
        self.first = nn.Linear(INPUTS, INPUTS)
        self.second = nn.Linear(INPUTS, INPUTS)
        self.second.weight = self.first.weight
        self.head = nn.Linear(INPUTS, WAYS)
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.tensor(0.5))
        self.double()

    def forward(self, x):
        hidden = torch.tanh(self.first(self.frozen(x)))
        return self.head(torch.tanh(self.second(hidden) * self.scale))


@pytest.mark.parametrize("method", ["unrolled", "cg", "first-order", "reptile"])
def test_frozen_shared_and_unused_parameters_and_buffers(method):
    learner = make_learner(UnusualModel(), method=method)
    learner.backward(draw_episodes())
    model = learner.model
    assert model.frozen.weight.grad is None
    assert model.second.weight is model.first.weight
    assert model.unused.grad.abs().max() == 0
    assert model.first.weight.grad.abs().max() > 0
    if method == "unrolled":
        assert_gradients_match_differences(learner, [model.first.weight])


def test_regression_has_no_accuracy():
    data = draw_episodes()
    x, labels = data.support
    data.support = (x, randn(*labels.shape, 1, seed=3))
    x_query, query_labels = data.query
    data.query = (x_query, randn(*query_labels.shape, 1, seed=4))
    model = nn.Linear(INPUTS, 1).double()
    learner = MetaLearner(model, F.mse_loss, proximal=0.1, method="cg")
    assert learner.backward(data).accuracy is None
    assert learner.evaluate(data)[1] is None


def test_dense_predictions_have_classes_on_the_second_axis():
    class Pixels(nn.Module):
        """Two pixels, each with one score for each class."""

        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(INPUTS, WAYS * 2).double()

        def forward(self, x):
            return self.linear(x).unflatten(1, (WAYS, 2))

    data = draw_episodes()
    x, labels = data.support
    data.support = (x, labels.unsqueeze(-1).expand(-1, -1, 2))
    x_query, query_labels = data.query
    data.query = (x_query, query_labels.unsqueeze(-1).expand(-1, -1, 2))
    learner = make_learner(Pixels(), method="unrolled")
    outputs = learner.adapt(data.support, batched=True)(data.query[0])
    expected = (outputs.argmax(2) == data.query[1]).double().mean()
    assert learner.backward(data).accuracy == expected


@pytest.mark.parametrize("method", ["first-order", Truncated(1)], ids=str)
def test_every_tensor_is_on_the_device_of_the_data(method):
    """Fake tensors compute nothing, but have a device, so this runs without a second one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        with torch.device("meta"):
            model = nn.Sequential(nn.Linear(INPUTS, 5), nn.Tanh(), nn.Linear(5, WAYS))
            pair = (torch.empty(TASKS, WAYS, INPUTS), torch.empty(TASKS, WAYS, WAYS))
        inner = GradientDescent(steps=2, lr=0.1, momentum=0.5)
        learner = MetaLearner(
            model, F.mse_loss, inner=inner, method=method, proximal=0.1, vectorize="vmap"
        )
        step = learner.backward(SimpleNamespace(support=pair, query=pair))
        assert step.loss.device.type == "meta"
        assert all(p.grad.device.type == "meta" for p in learner.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("flag", DERIVATIVES)
def test_cuda_agrees_with_the_cpu(flag):
    gradients = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        method = make_method(flag, **known_options(flag, solver_steps=2, rank=4))
        learner = make_learner(method=method).to(device)
        data = draw_episodes()
        torch.manual_seed(1)
        moved = SimpleNamespace(
            support=[t.to(device) for t in data.support],
            query=[t.to(device) for t in data.query],
        )
        learner.backward(moved)
        gradients.append([p.grad.cpu() for p in learner.parameters()])
    for on_cpu, on_cuda in zip(*gradients, strict=True):
        assert relative_error(on_cuda, on_cpu) < 1e-9


class RunningMean(LinearModel):
    """Keeps a mean of its inputs in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(INPUTS, dtype=torch.float64))

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        return self.layer(x - self.mean)


@pytest.mark.parametrize("way", ["loop", "vmap", "auto"])
@pytest.mark.filterwarnings("ignore:vmap differs from a loop:RuntimeWarning")
def test_a_forward_pass_that_changes_a_buffer_is_refused(way):
    """Vmap leaves a dead tensor there, which is taken out."""
    model = RunningMean()
    message = "model: a forward pass changed buffer 'mean', so each task would see"
    with pytest.raises(ValueError, match=message):
        make_learner(model, vectorize=way).backward(draw_episodes())
    assert model.mean.isfinite().all()


@pytest.mark.parametrize("call", ["evaluate", "adapt"])
def test_adapting_to_a_task_does_not_change_buffers_either(call):
    learner = make_learner(RunningMean(), vectorize="loop")
    data = draw_episodes()
    run = {
        "evaluate": lambda: learner.evaluate(data),
        "adapt": lambda: learner.adapt(data.support, batched=True),
    }
    with pytest.raises(ValueError, match="model: a forward pass changed buffer 'mean'"):
        run[call]()


class Replacing(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(2))

    def forward(self):
        self.mean = torch.zeros(2)


@pytest.mark.parametrize("passes", [1, 2, 3, 4])
def test_a_buffer_that_was_replaced_is_noticed_though_its_address_is_used_again(passes):
    """Of two replacements, the second is where the first buffer was."""
    model = nn.ModuleDict({"model": Replacing()})

    def run():
        with reject_changed_tensors(model):
            for _ in range(passes):
                model["model"]()

    with pytest.raises(ValueError, match="model: a forward pass changed buffer 'mean'"):
        run()


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("call", ["backward", "evaluate", "adapt"])
def test_a_parameter_that_a_forward_pass_writes_to_is_named(call, vectorize):
    """The norms of the rows that are looked up become at most 0.1, in φ itself."""
    model = nn.Sequential(nn.Embedding(6, 4, max_norm=0.1), nn.Linear(4, 3)).double()
    learner = MetaLearner(model, F.cross_entropy, vectorize=vectorize)
    labels = torch.arange(6).remainder(3)
    support = (torch.arange(6), labels)
    batch = tuple(x.expand(2, 6) for x in support)
    data = support if call == "adapt" else (batch, batch)
    with pytest.raises(
        ValueError, match=r"model: a forward pass wrote to the parameter '0.weight'"
    ):
        getattr(learner, call)(data)


def test_a_frozen_parameter_may_be_written_to():
    """It is no part of φ, and its rows keep their norms once they have them."""
    model = nn.Sequential(nn.Embedding(6, 4, max_norm=0.1), nn.Linear(4, 3)).double()
    model[0].requires_grad_(False)
    learner = MetaLearner(model, F.cross_entropy, vectorize="loop")
    labels = torch.arange(6).remainder(3)
    batch = tuple(x.expand(2, 6) for x in (torch.arange(6), labels))
    learner.backward((batch, batch))
    assert model[1].weight.grad.abs().max() > 0


class RunningCentre(nn.Module):
    """A loss that keeps a mean of its outputs in a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("centre", torch.zeros((), dtype=torch.float64))

    def forward(self, outputs, targets):
        with torch.no_grad():
            self.centre.mul_(0.9).add_(0.1 * outputs.detach().mean())
        return F.cross_entropy(outputs - self.centre, targets)


@pytest.mark.parametrize("part", ["loss", "query_loss"])
def test_a_loss_that_changes_a_buffer_is_refused(part):
    losses = {"loss": F.cross_entropy} | {part: RunningCentre()}
    learner = MetaLearner(make_network(), **losses, vectorize="loop")
    with pytest.raises(ValueError, match=f"^{part}: a forward pass changed buffer 'centre', so"):
        learner.backward(draw_episodes())
    assert all(p.grad is None for p in learner.parameters())


def test_the_problem_takes_plain_pairs_and_gives_the_gradient_of_backward():
    from metaimplicit import hypergradient

    learner = make_learner(method=Implicit(CG(max_steps=4)))
    data = draw_episodes()
    learner.backward(data)
    result = hypergradient(
        learner.problem,
        learner.meta,
        (data.support, data.query),
        inner=learner.inner,
        method=learner.method,
        batched=True,
    )
    for name, p in learner.model.named_parameters():
        assert relative_error(result.grads[name], p.grad) < 1e-12


def test_nothing_that_is_known_of_a_loss_is_taken_for_known_of_another():
    """Losses that are gone leave their addresses to later ones."""
    learner = make_learner(vectorize="loop")
    for _ in range(6):  # the third loss is where the first was
        learner.loss = lambda outputs, labels: F.cross_entropy(outputs, labels)
        assert not learner.problem.inner_loss.checked
        learner.backward(draw_episodes())
        assert learner.problem.inner_loss.checked


@pytest.mark.parametrize("method", ["cg", Implicit(CG(max_steps=5)), "unrolled"])
def test_a_method_that_is_set_later_is_the_one_that_the_constructor_takes(method):
    """An implicit method without a curvature takes the Gauss–Newton matrix."""
    changed = make_learner(method="first-order", vectorize="loop")
    changed.method = method
    gradients = []
    for learner in (changed, make_learner(method=method, vectorize="loop")):
        learner.backward(draw_episodes())
        gradients.append([p.grad for p in learner.model.parameters()])
    for got, expected in zip(*gradients, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("method", ["cg", "unrolled"])
def test_a_penalty_that_is_set_later_is_that_of_the_constructor(method):
    changed = make_learner(method=method, proximal=2.0, vectorize="loop")
    changed.backward(draw_episodes())
    changed.zero_grad()
    changed.penalty = Proximal(0.3)
    gradients = []
    for learner in (changed, make_learner(method=method, proximal=0.3, vectorize="loop")):
        learner.backward(draw_episodes())
        gradients.append([p.grad for p in learner.model.parameters()])
    for got, expected in zip(*gradients, strict=True):
        assert torch.equal(got, expected)
