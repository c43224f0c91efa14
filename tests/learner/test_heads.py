"""Heads that a learner fits to every task, against plain torch."""

import pytest
import torch
import torch.nn.functional as F
from learner.few_shot import (
    INPUTS,
    QUERIES,
    TASKS,
    WAYS,
    assert_gradients_match_differences,
    draw_episodes,
)
from oracles import randn, relative_error
from torch import nn

from metaimplicit import GradientDescent, MetaLearner
from metaimplicit.inner import Logistic, SoftmaxCrossEntropy, SquaredError
from metaimplicit.learner.heads import HEADS, ConvexHead, Prototypes
from metaimplicit.normalization import describe_normalization

pytestmark = pytest.mark.usefixtures("float64")

FEATURES = 7
CONVEX = [flag for flag, head in HEADS.items() if head.is_convex]


def make_body(*norm):
    return nn.Sequential(nn.Linear(INPUTS, 8), *norm, nn.Tanh(), nn.Linear(8, FEATURES))


def make(head, body=None, **options):
    return MetaLearner(body or make_body(), F.cross_entropy, head=head, **options)


def one_hot(labels):
    return F.one_hot(labels, WAYS).double()


def with_ones(features):
    return torch.cat([features, torch.ones_like(features[..., :1])], dim=-1)


def ridge_outputs(support, labels, queries, *, strength, temperature, scale):
    """R2D2 (Bertinetto et al. 2019, eq. 6 and 8) of one task, by the normal equations."""
    x = with_ones(support) / temperature
    gram = x.T @ x + strength * torch.eye(x.shape[1])
    weight = torch.linalg.solve(gram, x.T @ one_hot(labels))
    return scale * with_ones(queries) / temperature @ weight


def prototype_outputs(support, labels, queries, *, temperature):
    """−‖x − c‖²/τ of one task."""
    means = torch.stack([support[labels == k].mean(0) for k in range(WAYS)])
    return -torch.cdist(queries, means).square() / temperature


def plain_loss(body, function, episodes, **numbers):
    """The mean query loss of a head in plain torch, task by task."""
    losses = []
    for task in range(TASKS):
        (x, y), (xq, yq) = ((i[task], t[task]) for i, t in (episodes.support, episodes.query))
        losses.append(F.cross_entropy(function(body(x), y, body(xq), **numbers), yq))
    return torch.stack(losses).mean()


RIDGE = ConvexHead(SquaredError(), strength=0.3, temperature=0.7, scale=4.0)


@pytest.mark.parametrize(
    ("head", "function", "numbers"),
    [
        (RIDGE, ridge_outputs, {"strength": 0.3, "temperature": 0.7, "scale": 4.0}),
        (Prototypes(temperature=2.0), prototype_outputs, {"temperature": 2.0}),
    ],
    ids=["ridge", "prototypes"],
)
def test_loss_and_gradient_are_those_of_plain_torch(head, function, numbers):
    body = make_body()
    learner = make(head, body, learn=list(head.numbers))
    episodes = draw_episodes()
    step = learner.backward(episodes)
    logs = {name: torch.tensor(value).log().requires_grad_() for name, value in numbers.items()}
    values = {name: log.exp() for name, log in logs.items()}
    loss = plain_loss(body, function, episodes, **values)
    assert relative_error(step.loss, loss.detach()) < 1e-12
    parameters = [*body.parameters(), *logs.values()]
    expected = torch.autograd.grad(loss, parameters)
    actual = [p.grad for p in learner.meta.values()]
    for gradient, other in zip(actual, expected, strict=True):
        assert (gradient - other).norm() < 1e-11 * (1 + other.norm())


@pytest.mark.parametrize("head", HEADS)
def test_gradients_are_those_of_the_loss(head):
    learner = make(head, learn=list(HEADS[head].numbers))
    learner.backward(draw_episodes())
    assert_gradients_match_differences(learner, learner.parameters())


@pytest.mark.parametrize(
    ("head", "is_frozen"),
    [
        *(("ridge", True), ("logistic", False), ("hinge", True)),
        *(("prototypes", True), ("prototypes", False)),
    ],
)
def test_the_numbers_of_a_head_are_learnt_on_features_that_are_not(head, is_frozen):
    body = make_body().requires_grad_(False) if is_frozen else nn.Identity()
    learner = make(head, body, learn=list(HEADS[head].numbers), vectorize="loop")
    learner.backward(draw_episodes())
    learnt = [p for p in learner.parameters() if p.requires_grad]
    assert learnt == list(learner.learnt.parameters())
    assert_gradients_match_differences(learner, learnt)


@pytest.mark.parametrize("head", CONVEX)
def test_methods_agree_where_the_argmin_is_exact(head):
    gradients = []
    for method in ("auto", "unrolled", "dense"):
        torch.manual_seed(0)
        learner = make(head, method=method, vectorize="loop")
        step = learner.backward(draw_episodes())
        assert step.report.features == "once"
        gradients.append(torch.cat([p.grad.flatten() for p in learner.parameters()]))
    assert relative_error(gradients[1], gradients[0]) < 1e-10
    assert relative_error(gradients[2], gradients[0]) < 1e-10


def test_the_factor_of_the_argmin_takes_no_products():
    report = make("ridge").backward(draw_episodes()).report
    assert (report.products, report.chosen) == (0, "Factored: the inner loop left its inverse")


@pytest.mark.parametrize(
    ("head", "name"),
    [
        ("logistic", "SoftmaxCrossEntropy"),
        ("hinge", "SmoothHinge"),
        ("prototypes", "Prototypes"),
        (ConvexHead(Logistic()), "Logistic"),
    ],
)
def test_heads_of_classes_refuse_values_and_take_soft_labels(head, name):
    inputs = randn(1, 9, INPUTS, seed=1)
    soft = randn(1, 9, 2, seed=2).softmax(-1)
    learner = MetaLearner(nn.Linear(INPUTS, FEATURES), F.mse_loss, head=head).double()
    message = f"head: got {name} for support targets from .* to .*, which are values, expected"
    for values in (2 * soft, -soft):
        with pytest.raises(ValueError, match=message):
            learner.backward({"support": (inputs, values), "query": (inputs, values)})
        with pytest.raises(ValueError, match=message):
            learner.adapt((inputs[0], values[0]))
    assert learner.backward({"support": (inputs, soft), "query": (inputs, soft)}).loss > 0


@pytest.mark.parametrize("head", HEADS)
def test_a_step_size_is_not_learnt_where_there_is_none(head):
    with pytest.raises(ValueError, match=r"learn 'lr': got it with .*, which has no step size"):
        make(head, learn=["lr"])


def test_values_are_not_scaled_as_scores_of_classes_are():
    inputs, values = randn(1, 9, INPUTS, seed=1), randn(1, 9, 2, seed=2)
    data = {"support": (inputs, values), "query": (inputs, values)}
    body = nn.Linear(INPUTS, FEATURES)
    message = "head: got scale=15.0, which multiplies scores of classes, .* expected scale=1"
    learner = MetaLearner(body, F.mse_loss, head="ridge")
    with pytest.raises(ValueError, match=message):
        learner.backward(data)
    with pytest.raises(ValueError, match=message):
        learner.adapt((inputs[0], values[0]))

    adapted = MetaLearner(body, F.mse_loss, head=ConvexHead(SquaredError())).adapt(
        (inputs[0], values[0])
    )
    x = with_ones(body(inputs[0])).detach()
    weight = torch.linalg.solve(x.T @ x + torch.eye(x.shape[1]), x.T @ values[0])
    assert relative_error(adapted(inputs[0]), x @ weight) < 1e-12


def test_prototypes_of_soft_labels_are_weighted_means():
    features = randn(4, FEATURES, seed=1)
    labels = torch.tensor([[0.8, 0.1, 0.1], [0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.1, 0.8, 0.1]])
    means = labels.T @ features / labels.sum(0)[:, None]
    weight = Prototypes().init({}, features, labels)["head.weight"]
    assert relative_error(weight, 2 * means) < 1e-14


def test_prototypes_that_adapt_are_proto_maml():
    """Every parameter takes one step on the support loss from the class means."""
    body = make_body()
    inner = GradientDescent(steps=1, lr=0.1)
    learner = make(Prototypes(), body, inner=inner)
    episodes = draw_episodes()
    step = learner.backward(episodes)
    assert step.report.features == ""

    start = dict(body.named_parameters())
    losses = []
    for task in range(TASKS):
        (x, y), (xq, yq) = ((i[task], t[task]) for i, t in (episodes.support, episodes.query))
        means = torch.stack([body(x)[y == k].mean(0) for k in range(WAYS)])
        # The class means are parameters of their own: their step has no gradient of the body.
        params = {name: p.clone() for name, p in start.items()}
        params |= {"w": 2 * means, "b": -means.square().sum(1)}

        def outputs(params, inputs, body=body):
            of_body = {name: params[name] for name in start}
            features = torch.func.functional_call(body, of_body, (inputs,))
            return features @ params["w"].T + params["b"]

        loss = F.cross_entropy(outputs(params, x), y)
        gradients = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        pairs = zip(params.items(), gradients, strict=True)
        params = {name: p - 0.1 * g for (name, p), g in pairs}
        losses.append(F.cross_entropy(outputs(params, xq), yq))
    loss = torch.stack(losses).mean()
    assert relative_error(step.loss, loss.detach()) < 1e-12
    expected = torch.autograd.grad(loss, list(start.values()))
    for p, gradient in zip(body.parameters(), expected, strict=True):
        assert (p.grad - gradient).norm() < 1e-11 * (1 + gradient.norm())


@pytest.mark.parametrize("adapt", [None, "head.*"], ids=["all", "head"])
def test_proto_maml_learns_its_step_size_and_temperature(adapt):
    inner = GradientDescent(steps=2, lr=0.1)
    learner = make("prototypes", inner=inner, adapt=adapt, learn=["lr", "temperature"])
    learner.backward(draw_episodes())
    assert set(learner.learnt.by_name()) == {"log_lr", "log_temperature"}
    learnt = learner.learnt.by_name().values()
    assert_gradients_match_differences(learner, [*learnt, learner.model[0].weight])


def test_prototypes_whose_head_adapts_alone_run_the_body_once():
    inner = GradientDescent(steps=2, lr=0.1)
    body = make_body()
    learner = make("prototypes", body, inner=inner, adapt="head.*", vectorize="vmap")
    learner.backward(draw_episodes())  # the first batch is compared with a loop
    calls = []
    body.register_forward_hook(lambda *_: calls.append(1))
    report = learner.backward(draw_episodes()).report
    assert report.features == "once"
    assert len(calls) == 2  # support and query, of all tasks


@pytest.mark.parametrize("head", HEADS)
def test_tasks_of_training_and_test_differ_in_ways_and_shots(head):
    learner = make(head, vectorize="loop")
    learner.backward(draw_episodes())
    labels = torch.arange(6).repeat(2).expand(2, -1)
    sets = [(randn(2, 12, INPUTS, seed=seed), labels) for seed in (5, 6)]
    losses, accuracies = learner.evaluate({"support": sets[0], "query": sets[1]})
    assert losses.shape == accuracies.shape == (2, 2)
    adapted = learner.adapt(sets[0], batched=True)
    assert adapted(sets[1][0]).shape == (2, 12, 6)
    loss = F.cross_entropy(adapted(sets[1][0]).flatten(0, 1), labels.flatten())
    assert loss.item() == pytest.approx(losses[-1].mean().item(), rel=1e-12)


@pytest.mark.parametrize("method", [None, "dense", "cg", "minres", "lanczos", "neumann"])
def test_tasks_of_several_sizes_are_computed_one_by_one(method):
    """The states of the solves do not fit together, since the heads differ in size."""
    learner = make("ridge", method=method)
    other = make("ridge", learner.model, method=method)
    sizes = [(WAYS, 1), (3, 2)]
    tasks = []
    for ways, shots in sizes:
        labels = torch.arange(ways).repeat(shots)
        sets = [(randn(ways * shots, INPUTS, seed=seed), labels) for seed in (ways, 9)]
        tasks.append({"support": sets[0], "query": sets[1]})
    loss = learner.backward(tasks).loss
    singles = [other.backward([task]).loss for task in tasks]
    assert loss.item() == pytest.approx(torch.stack(singles).mean().item(), rel=1e-12)


def test_heads_of_one_batch_have_one_number_of_classes():
    sets = [(randn(ways, INPUTS, seed=ways), torch.arange(ways)) for ways in (3, 4)]
    with pytest.raises(ValueError, match="support: got tasks with different numbers of classes"):
        make("ridge").adapt(sets, batched=True)


def test_ridge_regression_takes_targets_that_are_numbers():
    learner = MetaLearner(make_body(), F.mse_loss, head=ConvexHead(SquaredError(), strength=0.1))
    support = (randn(TASKS, 5, INPUTS, seed=1), randn(TASKS, 5, 2, seed=2))
    query = (randn(TASKS, 6, INPUTS, seed=3), randn(TASKS, 6, 2, seed=4))
    loss = learner.backward((support, query)).loss
    features, of_query = (with_ones(learner.model(x)) for x in (support[0], query[0]))
    gram = features.mT @ features + 0.1 * torch.eye(FEATURES + 1)
    outputs = of_query @ torch.linalg.solve(gram, features.mT @ support[1])
    assert relative_error(loss, F.mse_loss(outputs, query[1]).detach()) < 1e-12


# Normalisation.


def test_statistics_of_a_set_are_those_of_the_plain_way():
    """With batch statistics, the body sees one set of one task at a time."""
    body = make_body(nn.BatchNorm1d(8, track_running_stats=False))
    episodes = draw_episodes()
    for way in ("vmap", "loop"):
        loss = make(Prototypes(), body, vectorize=way).backward(episodes).loss
        expected = plain_loss(body, prototype_outputs, episodes, temperature=1.0)
        assert relative_error(loss, expected.detach()) < 1e-12
    assert describe_normalization(body) == "all images of a set of a task"


def test_running_statistics_are_learnt_in_training_alone():
    norm = nn.BatchNorm1d(8)
    learner = make("ridge", make_body(norm))
    episodes = draw_episodes()
    hidden = []
    norm.register_forward_hook(lambda _, args, __: hidden.append(args[0].detach()))
    learner.backward(episodes)
    count = TASKS * WAYS * (1 + QUERIES)
    assert [len(x) for x in hidden] == [count]  # the images of all tasks in one batch
    assert relative_error(norm.running_mean, 0.1 * hidden[0].mean(0)) < 1e-12

    before = norm.running_mean.clone()
    losses, _ = learner.evaluate(episodes)
    adapted = learner.adapt(episodes.support, batched=True)
    outputs = adapted(episodes.query[0])
    assert torch.equal(norm.running_mean, before)
    assert norm.training

    # Predictions do not depend on one another, so that the test is not transductive.
    alone = torch.cat([adapted(episodes.query[0][:, i : i + 1]) for i in range(WAYS * QUERIES)], 1)
    assert relative_error(alone, outputs) < 1e-12
    loss = F.cross_entropy(outputs.flatten(0, 1), episodes.query[1].flatten())
    assert loss.item() == pytest.approx(losses[-1].mean().item(), rel=1e-12)


def test_chunks_of_running_statistics_hold_whole_sets_of_up_to_120_images():
    norm = nn.BatchNorm1d(8)
    learner = make("ridge", make_body(norm))
    sizes = []
    norm.register_forward_hook(lambda _, args, __: sizes.append(len(args[0])))
    labels = torch.arange(WAYS).repeat(8).expand(5, -1)
    sets = [(randn(5, 32, INPUTS, seed=seed), labels) for seed in (1, 2)]
    learner.backward(tuple(sets))
    assert sizes == [107, 107, 106]


def test_in_evaluation_mode_the_gradient_is_that_with_running_statistics():
    body = make_body(nn.BatchNorm1d(8))
    learner = make(RIDGE, body).eval()
    episodes = draw_episodes()
    step = learner.backward(episodes)
    numbers = {"strength": 0.3, "temperature": 0.7, "scale": 4.0}
    loss = plain_loss(body, ridge_outputs, episodes, **numbers)
    assert relative_error(step.loss, loss.detach()) < 1e-12


# Refusals.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "svm"}, "head: got 'svm', expected one of ridge, logistic"),
        ({"head": "ridge", "proximal": 1.0}, "proximal: got 1.0 with ConvexHead, expected none"),
        ({"head": "ridge", "query_loss": F.cross_entropy}, "query_loss: got one with ConvexHead"),
        ({"head": "ridge", "adapt": ["0.*", "head.*"]}, "expected the head alone"),
        ({"head": "prototypes", "inner": GradientDescent(), "adapt": "0.*"}, "the head among them"),
        ({"head": "prototypes", "method": "cg"}, "with Prototypes, whose start it cannot"),
        ({"head": "ridge", "method": "first-order"}, "first-order: got Ridge"),
        ({"head": "ridge", "inner": "newton", "method": "sama"}, "sama: got Newton"),
        ({"head": "ridge", "learn": ["proximal"]}, r"learn: got \['proximal'\] with a head"),
        ({"head": "ridge", "learn": ["lr"]}, "learn 'lr'"),
        ({"head": "ridge", "learn": {"scale": "per-tensor"}}, "learn 'scale': got 'per-tensor'"),
        (
            {"head": ConvexHead(SquaredError(), scale=torch.tensor(2.0)), "learn": ["scale"]},
            "got a head with",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        MetaLearner(make_body(), F.cross_entropy, **options)


def change_labels(episodes, support, query):
    (x, _), (xq, _) = episodes.support, episodes.query
    return {"support": (x, support), "query": (xq, query)}


@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_numbers_of_a_head_that_are_not_positive_are_refused(value):
    for name in ("strength", "temperature", "scale"):
        with pytest.raises(ValueError, match=f"ConvexHead {name}: got {value}, expected a number"):
            ConvexHead(SquaredError(), **{name: value})
    with pytest.raises(ValueError, match=f"Prototypes temperature: got {value}, expected a num"):
        Prototypes(temperature=value)


def test_labels_that_a_head_cannot_fit_are_named():
    episodes = draw_episodes()
    labels, queries = episodes.support[1], episodes.query[1]
    learner = make("logistic")
    with pytest.raises(ValueError, match="support labels: got -1, expected class indices from 0"):
        learner.backward(change_labels(episodes, labels - 1, queries))
    with pytest.raises(ValueError, match=r"episodes\.query labels: got 4, expected class indices"):
        learner.backward(change_labels(episodes, labels, queries + 1))
    with pytest.raises(ValueError, match=r"support targets: got \(2, 4\), expected class indices"):
        learner.backward(change_labels(episodes, labels.double(), queries))


def test_a_module_of_the_model_may_be_called_head():
    outputs = []
    for name in ("head", "last"):
        torch.manual_seed(0)
        body = make_body()
        body.add_module(name, nn.Linear(FEATURES, WAYS))
        inputs, labels = (x[0] for x in draw_episodes().support)
        learner = make("ridge", body)
        outputs.append(learner.adapt((inputs, labels))(inputs))
        assert learner.backward(draw_episodes()).report.features == "once"
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


def test_features_of_another_shape_are_named():
    learner = make("ridge", Grid())
    with pytest.raises(ValueError, match=r"features of shape \(4, 2, 3\), expected \[m, p\]"):
        learner.backward(draw_episodes())


class Grid(nn.Module):
    """A body without a flat output."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.scale * x.unflatten(1, (2, 3))


def test_a_body_has_one_kind_of_statistics():
    norms = (nn.BatchNorm1d(8), nn.BatchNorm1d(8, track_running_stats=False))
    learner = make("ridge", make_body(*norms))
    with pytest.raises(ValueError, match="running statistics beside others that use those of"):
        learner.backward(draw_episodes())


def test_a_body_whose_layers_all_adapt_may_not_track_statistics():
    body = make_body(nn.BatchNorm1d(8))
    learner = make("prototypes", body, inner=GradientDescent())
    with pytest.raises(ValueError, match="tracks running statistics"):
        learner.backward(draw_episodes())


def test_the_loss_of_a_head_may_be_any():
    head = ConvexHead(SoftmaxCrossEntropy(), strength=0.5)
    learner = MetaLearner(make_body(), nn.CrossEntropyLoss(label_smoothing=0.1), head=head)
    assert learner.backward(draw_episodes()).accuracy is not None


@pytest.mark.parametrize("head", HEADS)
def test_the_type_of_the_outputs_is_that_of_the_model(head):
    """The loss holds weights of classes, which torch takes in the type of the outputs alone."""
    episodes = draw_episodes()
    body = make_body()
    weights = torch.arange(1.0, WAYS + 1)
    torch.set_default_dtype(torch.float32)
    loss = nn.CrossEntropyLoss(weight=weights)
    loss = MetaLearner(body, loss, head=head, vectorize="loop").backward(episodes).loss
    assert loss.dtype == torch.float64


@pytest.mark.parametrize("head", HEADS)
def test_a_task_of_fewer_classes_is_the_same_beside_one_of_more(head):
    support, queries = randn(2, 6, INPUTS, seed=1), randn(2, 6, INPUTS, seed=2)
    labels = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 1, 1, 2, 2]])
    learner = make(head)
    both = {"support": (support, labels), "query": (queries, labels)}
    apart = [
        {
            "support": (support[i : i + 1], labels[i : i + 1]),
            "query": (queries[i : i + 1], labels[i : i + 1]),
        }
        for i in range(2)
    ]
    expected = torch.cat([learner.evaluate(task)[0] for task in apart], dim=1)
    assert relative_error(learner.evaluate(both)[0], expected) < 1e-14

    gradients = []
    for tasks in ([both], apart):
        learner.zero_grad()
        for task in tasks:
            learner.backward(task)
        parts = [p.grad.flatten() / len(tasks) for p in learner.parameters()]
        gradients.append(torch.cat(parts))
    assert relative_error(*gradients) < 1e-12


@pytest.mark.parametrize("head", HEADS)
def test_a_class_without_support_examples_is_refused(head):
    labels = torch.tensor([[1, 1, 2, 2]])
    support = (randn(1, 4, INPUTS, seed=1), labels)
    message = "support labels: got 2 but no 0 in a task, expected .*; number the classes of each"
    learner = make(head)
    with pytest.raises(ValueError, match=f"episodes.{message}"):
        learner.backward({"support": support, "query": support})
    with pytest.raises(ValueError, match=message):
        learner.adapt((support[0][0], labels[0]))
