"""What does not adapt is evaluated once, where that changes nothing but the time."""

from fnmatch import fnmatch

import pytest
import torch
import torch.nn.functional as F
from learner import plain_loop
from learner.few_shot import INPUTS, WAYS, draw_episodes
from oracles import relative_error
from torch import nn

from metaimplicit import GradientDescent, MetaLearner
from metaimplicit.learner import task_batches

pytestmark = pytest.mark.usefixtures("float64")

STEPS = 2


def make_model():
    return nn.Sequential(
        nn.Linear(INPUTS, 8),
        nn.BatchNorm1d(8, track_running_stats=False),
        nn.Tanh(),
        nn.Linear(8, WAYS),
    )


def make(model=None, **options):
    defaults = {
        "inner": GradientDescent(steps=STEPS, lr=0.3),
        "adapt": "3.*",
        "vectorize": "vmap",
    }
    torch.manual_seed(0)
    return MetaLearner(model or make_model(), F.cross_entropy, **(defaults | options))


def keep_plain(monkeypatch, learner):
    """Let a learner evaluate its whole model at every step."""
    with monkeypatch.context() as patch:
        patch.setattr(task_batches, "find_last_module", lambda *_: "asked not to")
        learner.evaluate(draw_episodes())
    return learner


def gradients(learner):
    return torch.cat([p.grad.flatten() for p in learner.meta.values()])


@pytest.mark.parametrize(
    ("method", "way"),
    [
        *(("unrolled", "vmap"), ("unrolled", "loop"), ("cg", "vmap"), ("dense", "loop")),
        *(("first-order", "vmap"), ("truncated", "loop"), ("forward", "vmap")),
    ],
)
def test_the_plain_way_gives_the_same(monkeypatch, method, way):
    """Batch statistics are those of each set of each task, as in the plain way."""
    options = {"method": method, "vectorize": way}
    if method in ("unrolled", "forward"):
        options["learn"] = ["lr"]
    plain = keep_plain(monkeypatch, make(**options))
    once = make(**options)
    episodes = draw_episodes()
    by_step = plain.backward(episodes)
    step = once.backward(episodes)
    assert by_step.report.features == "asked not to"
    assert step.report.features == "once"
    assert relative_error(step.loss, by_step.loss) < 1e-13
    assert relative_error(gradients(once), gradients(plain)) < 1e-11
    for values, others in zip(once.evaluate(episodes), plain.evaluate(episodes), strict=True):
        assert relative_error(values, others) < 1e-12
    adapted = [x.adapt(episodes.support, batched=True) for x in (once, plain)]
    for name in once.adapted:
        assert relative_error(*(a.params[name] for a in adapted)) < 1e-12
    outputs = [a(episodes.query[0]) for a in adapted]
    assert relative_error(*outputs) < 1e-12


def count_calls(learner):
    calls = []
    learner.model[0].register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("method", ["unrolled", "cg"])
def test_the_body_runs_once_over_support_and_query(method):
    learner = make(method=method)
    # The first batch of a shape is compared with a loop, and looks at the model once more.
    learner.backward(draw_episodes())
    learner.adapt(draw_episodes().support, batched=True)
    calls = count_calls(learner)
    learner.backward(draw_episodes())
    assert len(calls) == 2
    learner.evaluate(draw_episodes())
    assert len(calls) == 4
    learner.adapt(draw_episodes().support, batched=True)
    assert len(calls) == 5  # a support set stands for its query set


def test_the_last_module_may_adapt_in_part():
    learner = make(adapt="3.bias")
    assert learner.backward(draw_episodes()).report.features == "once"
    for name, p in learner.model.named_parameters():
        assert p.grad.abs().max() > 0, name


class Variant(nn.Module):
    """A body and a head, whose use a subclass changes."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(INPUTS, WAYS)
        self.head = nn.Linear(WAYS, WAYS)


class Twice(Variant):
    def forward(self, x):
        return self.head(self.head(self.body(x)))


class Scaled(Variant):
    def forward(self, x):
        return 2 * self.head(self.body(x))


class Functional(Variant):
    def forward(self, x):
        return F.linear(self.body(x), self.head.weight, self.head.bias)


class DependsOnHead(Variant):
    def forward(self, x):
        return self.head(self.body(x) * self.head.bias)


class DependsOnDetachedHead(Variant):
    def forward(self, x):
        return self.head(F.dropout(self.body(x), 0.1) / self.head.weight.detach().norm())


class Pair(Variant):
    def __init__(self):
        super().__init__()
        self.head = nn.Bilinear(WAYS, WAYS, WAYS)

    def forward(self, x):
        return self.head(self.body(x), self.body(x))


class Changing(Variant):
    """A head that runs as often as `times` says."""

    times = 1

    def forward(self, x):
        x = self.body(x)
        for _ in range(self.times):
            x = self.head(x)
        return x


class Dropping(Variant):
    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Dropout())
        self.head.register_parameter("bias", nn.Parameter(torch.zeros(WAYS)))
        self.head.forward = lambda x: self.head[0](x) + self.head.bias

    def forward(self, x):
        return self.head(self.body(x))


class MaskedHead(nn.Linear):
    mask = None

    def forward(self, h):
        return super().forward(h) * self.mask


class Masked(Variant):
    def __init__(self):
        super().__init__()
        self.head = MaskedHead(WAYS, WAYS)

    def forward(self, x):
        self.head.mask = x.mean(1, keepdim=True).exp()
        return self.head(self.body(x))


class Remembering(Variant):
    """The head reads the first of several numbers that the body leaves."""

    def __init__(self):
        super().__init__()
        self.head = ReadsMemory(WAYS, WAYS)
        self.head.memory = {"scales": [torch.ones(()), torch.ones(())]}

    def forward(self, x):
        h = self.body(x)
        self.head.memory["scales"][0] = h.detach().abs().mean()
        return self.head(h)


class ReadsMemory(nn.Linear):
    def forward(self, h):
        return super().forward(h) * self.memory["scales"][0]


class Cached(Variant):
    """The body keeps what does not depend on its inputs."""

    table = None

    def forward(self, x):
        if self.table is None:
            self.table = torch.linspace(0, 1, WAYS)
        return self.head(self.body(x) + self.table)


class Leaving(nn.Module):
    """It leaves what a loss may read, and takes inputs of a range, or words."""

    def __init__(self, words):
        super().__init__()
        self.body = nn.Embedding(9, WAYS) if words else nn.Linear(INPUTS, WAYS)
        self.head = nn.Linear(WAYS, WAYS)

    def forward(self, x):
        assert x.max() <= 8
        h = self.body(x)
        self.last = h.detach()
        return self.head(h)


@pytest.mark.parametrize("words", [True, False])
def test_a_loss_may_read_what_the_body_leaves(words):
    torch.manual_seed(0)
    model = Leaving(words)
    y = torch.arange(2).expand(3, -1)
    x = torch.randint(9, (3, 2)) if words else torch.rand(3, 2, INPUTS) * 8

    def loss(z, y):
        return F.cross_entropy(z, y) * (1 + model.last.square().mean())

    learner = MetaLearner(
        model, loss, inner=GradientDescent(steps=STEPS, lr=0.3), adapt="head.*", vectorize="loop"
    )
    sets = [(x[:, :1], y[:, :1]), (x, y)]  # one example to adapt to
    step = learner.backward(tuple(sets))

    def descend_in_part(loss, start):
        adapts = {name: p for name, p in start.items() if name.startswith("head")}
        iterates = plain_loop.descend(
            lambda params: loss(start | params), adapts, lambda *_: 0.3, STEPS
        )
        return [start | params for params in iterates]

    tasks = list(zip(*[zip(*pair, strict=True) for pair in sets], strict=True))
    losses, *_ = plain_loop.plain_maml(model, loss, tasks, descend=descend_in_part)
    assert relative_error(step.loss, losses.mean()) < 1e-13


def test_a_cache_is_no_reason_to_evaluate_features_again():
    learner = make(Cached(), adapt="head.*", vectorize="loop")
    assert learner.backward(draw_episodes()).report.features == "once"


class HeadInPlace(nn.Linear):
    def forward(self, h):
        return super().forward(F.relu_(h))


class InPlace(Variant):
    def __init__(self):
        super().__init__()
        self.head = HeadInPlace(WAYS, WAYS)

    def forward(self, x):
        return self.head(self.body(x))


class Tied(Variant):
    """The head comes last and has the weight of the body."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(INPUTS, WAYS)
        self.head = nn.Linear(INPUTS, WAYS)
        self.head.weight = self.body.weight

    def forward(self, x):
        return self.head(torch.tanh(self.body(x) @ self.body.weight))


def scale_in_training(module, args):
    return (2 * args[0],) if module.training else None


class Hooked(Variant):
    """The head has a hook that does nothing in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.head.register_forward_pre_hook(scale_in_training)

    def forward(self, x):
        return self.head(self.body(x))


@pytest.mark.parametrize("way", ["vmap", "loop"])
@pytest.mark.parametrize(
    ("model", "adapt"),
    [
        (Masked, "head.*"),
        (Remembering, "head.*"),
        (InPlace, "head.*"),
        (Tied, "head.bias"),
        (Hooked, "head.*"),
    ],
)
def test_any_head_gives_the_meta_gradient_of_a_plain_loop(model, adapt, way):
    learner = make(model(), adapt=adapt, vectorize=way)
    episodes = draw_episodes()
    learner.eval()
    learner.evaluate(episodes)  # what is found out here has to hold in training
    learner.train()
    step = learner.backward(episodes)

    def descend_in_part(loss, start):
        adapts = {name: p for name, p in start.items() if fnmatch(name, adapt)}
        iterates = plain_loop.descend(
            lambda params: loss(start | params), adapts, lambda *_: 0.3, STEPS
        )
        return [start | params for params in iterates]

    sides = [zip(*pair, strict=True) for pair in (episodes.support, episodes.query)]
    tasks = list(zip(*sides, strict=True))
    losses, _, expected = plain_loop.plain_maml(
        learner.model, F.cross_entropy, tasks, descend=descend_in_part
    )
    assert relative_error(step.loss, losses.mean()) < 1e-13
    for p, g in zip(learner.model.parameters(), expected, strict=True):
        assert relative_error(p.grad, g) < 1e-11


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Twice, "'head' runs 2 times"),
        (Scaled, "'head' has an output that is not the model's"),
        (Functional, "'head' does not run as a module"),
        (DependsOnHead, "the input of 'head' depends on parameters that adapt"),
        (DependsOnDetachedHead, "the input of 'head' depends on parameters that adapt"),
        (Pair, "'head' takes other inputs than one tensor"),
        (Dropping, "'head' has another output when it is called again"),
        (Masked, "a forward pass leaves what depends on its inputs in 'head.mask'"),
        (InPlace, "'head' writes to its input"),
    ],
)
def test_the_report_says_why_the_plain_way_is_kept(model, reason):
    learner = make(model(), adapt="head.*", vectorize="loop")
    assert learner.backward(draw_episodes()).report.features == reason


def test_other_reasons():
    several = make(adapt=["0.*", "3.*"])
    assert several.backward(draw_episodes()).report.features == "several modules adapt: '0', '3'"
    kfac = make(nn.Sequential(nn.Linear(INPUTS, 8), nn.Linear(8, WAYS)), adapt="1.*", method="kfac")
    reason = "the method looks into the layers of the model"
    assert kfac.backward(draw_episodes()).report.features == reason
    own = make(nn.Linear(INPUTS, WAYS), adapt="bias")
    assert own.backward(draw_episodes()).report.features == "the model itself adapts"
    assert make(adapt=None).backward(draw_episodes()).report.features == ""


def test_a_model_that_changes_afterwards_is_named():
    model = Changing()
    learner = make(model, adapt="head.*")
    learner.backward(draw_episodes())
    model.times = 2
    with pytest.raises(ValueError, match="for this batch, 'head' runs 2 times, but not for the"):
        learner.backward(draw_episodes())


def make_tracking():
    model = make_model()
    model[1] = nn.BatchNorm1d(8)
    return model


def test_running_statistics_are_allowed_where_the_layers_do_not_adapt(monkeypatch):
    learner = make(make_tracking())
    learner.backward(draw_episodes())
    norm = learner.model[1]
    assert norm.num_batches_tracked == 1
    with pytest.raises(ValueError, match="tracks running statistics"):
        make(make_tracking(), adapt=None).backward(draw_episodes())

    # In evaluation mode the plain way is allowed as well.
    plain = make(make_tracking()).eval()
    plain.load_state_dict(learner.state_dict())
    keep_plain(monkeypatch, plain)
    learner.zero_grad()
    loss = learner.eval().backward(draw_episodes()).loss
    assert relative_error(loss, plain.backward(draw_episodes()).loss) < 1e-13
    assert relative_error(gradients(learner), gradients(plain)) < 1e-11
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("adapt", ["3.*", None])
def test_a_frozen_body_is_evaluated_once_as_well(adapt):
    """Only the last layer has parameters that can adapt, whether they are named or not."""
    episodes = draw_episodes()
    expected = make()
    expected.backward(episodes)
    model = make().model
    model[:3].requires_grad_(False)
    learner = make(model, adapt=adapt)
    step = learner.backward(episodes)
    assert step.report.features == "once"
    assert set(learner.meta) == {"3.weight", "3.bias"}
    for name, value in learner.meta.items():
        assert relative_error(value.grad, expected.meta[name].grad) < 1e-12


def test_a_frozen_body_may_track_running_statistics():
    model = make_tracking()
    model[:3].requires_grad_(False)
    assert make(model).backward(draw_episodes()).report.features == "once"


def test_dropout_in_the_body_is_drawn_once():
    """An implicit method refuses random numbers in the inner loss, where there are none now."""
    model = make_model()
    model[2] = nn.Dropout()
    step = make(model, method="cg").backward(draw_episodes())
    assert step.report.features == "once"


class Attending(nn.Module):
    """A model whose features read the weights of its head, if it is told to or sees many inputs."""

    def __init__(self, most=99):
        super().__init__()
        self.body = nn.Linear(INPUTS, INPUTS)
        self.head = nn.Linear(INPUTS, WAYS)
        self.most = most

    def forward(self, x):
        h = torch.tanh(self.body(x))
        if len(x) > self.most:
            h = h + (h @ self.head.weight.T).softmax(1) @ self.head.weight
        return self.head(h)


def test_query_sets_tell_whether_features_depend_on_what_adapts(monkeypatch):
    """A support set has one example of a class, and a query set has two."""
    expected = keep_plain(monkeypatch, make(Attending(most=WAYS), adapt="head.*"))
    learner = make(Attending(most=WAYS), adapt="head.*")
    learner.model.load_state_dict(expected.model.state_dict())
    expected.backward(draw_episodes())
    step = learner.backward(draw_episodes())
    assert step.report.features == "the input of 'head' depends on parameters that adapt"
    assert torch.equal(gradients(learner), gradients(expected))


@pytest.mark.parametrize("way", ["vmap", "loop"])
def test_features_that_come_to_depend_on_what_adapts_are_refused(way):
    model = Attending()
    learner = make(model, adapt="head.*", vectorize=way)
    assert learner.backward(draw_episodes()).report.features == "once"
    model.most = WAYS - 1
    episodes = draw_episodes()
    for call in (
        lambda: learner.backward(episodes),
        lambda: learner.evaluate(episodes),
        lambda: learner.adapt(episodes.support, batched=True),
    ):
        with pytest.raises(ValueError, match="for this batch, the input of 'head' depends on"):
            call()
