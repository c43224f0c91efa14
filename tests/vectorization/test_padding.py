"""The padding row of an embedding is not trained, whoever calls the embedding, and however."""

import copy

import pytest
import torch
from reported.helpers import (
    INNER,
    STEPS,
    assert_learns,
    assert_same,
    cross_entropy,
    draw,
    plain_maml,
    refuses,
    split,
)
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import embedding  # bound before anything is mended

from metaimplicit import BilevelProblem, FirstOrder, Implicit, MetaLearner, check_hypergradient
from metaimplicit.lifted import LiftedProblem
from metaimplicit.mended import mended_derivatives, without_padding
from metaimplicit.operators import Hessian

WORDS, WIDTH = 7, 3


class Head(nn.Module):
    """A linear layer on the mean of the words that `embed` returns."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WORDS, WIDTH))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, words):
        return self.head(self.embed(words).mean(-2))


class ByModule(Head):
    def __init__(self, **options):
        super().__init__()
        del self.weight
        self.layer = nn.Embedding(WORDS, WIDTH, **options)

    def embed(self, words):
        return self.layer(words)


class ByFunction(Head):
    def embed(self, words):
        return F.embedding(words, self.weight, padding_idx=2)


class ByImportedFunction(Head):
    def embed(self, words):
        return embedding(words, self.weight, 2)


class ByTorch(Head):
    def embed(self, words):
        return torch.embedding(self.weight, words, 2)


class Positions(Head):
    """Adds learnt positions, whose indices are the same in every task."""

    def embed(self, words):
        places = torch.arange(words.shape[-1])
        positions = F.embedding(places, self.weight.flip(0), padding_idx=1)
        return F.embedding(words, self.weight, padding_idx=2) + positions


class Tied(Head):
    """The padding row has a gradient as an output weight alone."""

    def embed(self, words):
        states = F.embedding(words, self.weight, padding_idx=2)
        return F.linear(torch.tanh(states @ self.weight.T), self.weight.T)


class Encoder(ByModule):
    """Attention that leaves the padding out."""

    def __init__(self):
        super().__init__(padding_idx=2)
        options = {"dim_feedforward": 4, "dropout": 0.0, "batch_first": True}
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 1, **options)

    def embed(self, words):
        return self.encoder(self.layer(words), src_key_padding_mask=words == 2)


MODELS = {
    "nn.Embedding": lambda: ByModule(padding_idx=2),
    "counted from the end": lambda: ByModule(padding_idx=-5),
    "F.embedding": ByFunction,
    "imported embedding": ByImportedFunction,
    "torch.embedding": ByTorch,
    "positions": Positions,
    "tied": Tied,
    "encoder": Encoder,
}
SCALED = {
    "frequencies": lambda: ByModule(padding_idx=2, scale_grad_by_freq=True),
    "frequencies without padding": lambda: ByModule(scale_grad_by_freq=True),
}
DIFFERENTIATE_TWICE = {
    "unrolled": "unrolled",
    "forward": "forward",
    "cg": "cg",
    "gauss-newton": Implicit(curvature="gauss-newton"),
    "forward-over-reverse": Implicit(products="forward-over-reverse"),
    "finite-differences": Implicit(products="finite-differences"),
}
WAYS = ("vmap", "loop", "auto")
vectorized = pytest.mark.parametrize("vectorize", WAYS)


def in_turns(models, in_every_way):
    """Each model in one of the ways to run its tasks, which take turns, and some in all of them."""
    rows = [(name, WAYS[i % 3]) for i, name in enumerate(models) if name not in in_every_way]
    rows += [(name, vectorize) for name in in_every_way for vectorize in WAYS]
    return pytest.mark.parametrize(("name", "vectorize"), rows)


def words(*shape):
    """Words 1 to 4. The padding, word 2, is there."""
    numbers = torch.randint(1, 5, (*shape, 4))
    numbers[..., 0] = 2
    return numbers.where(torch.arange(4) != 1, 1)


@in_turns(MODELS, ["F.embedding", "tied"])
def test_the_meta_gradient_is_that_of_a_plain_loop(name, vectorize):
    model = MODELS[name]()
    episodes = draw(tasks=2, inputs=words)
    with sdpa_kernel(SDPBackend.MATH):
        expected = plain_maml(model, split(episodes))
    assert_learns(expected, model, episodes, vectorize=vectorize)


@in_turns(["nn.Embedding", "torch.embedding", "encoder"], ["F.embedding"])
def test_the_padding_row_of_each_task_stays_where_it_was(name, vectorize):
    model = MODELS[name]()
    embedded = next(n for n, p in model.named_parameters() if len(p) == WORDS)
    with torch.no_grad():
        model.get_parameter(embedded)[2] = 0.5
    learner = MetaLearner(model, F.cross_entropy, inner=INNER, vectorize=vectorize)
    rows = learner.adapt(draw(inputs=words).support, batched=True).params[embedded]
    assert torch.equal(rows[:, 2], torch.full((2, WIDTH), 0.5))
    assert not torch.equal(rows[0, 1], rows[1, 1])


def first_order(model, episodes):
    """First-order MAML as a plain loop, whose gradients are those of torch."""
    start = list(model.parameters())
    total = [torch.zeros_like(p) for p in start]
    for (x, y), query in split(episodes):
        own = copy.deepcopy(model)
        optimizer = torch.optim.SGD(own.parameters(), lr=0.1)
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(own(x), y).backward()
            optimizer.step()
        optimizer.zero_grad()
        F.cross_entropy(own(query[0]), query[1]).backward()
        total = [t + p.grad for t, p in zip(total, own.parameters(), strict=True)]
    return [t / len(split(episodes)) for t in total]


@vectorized
@pytest.mark.parametrize("name", SCALED)
def test_first_order_counts_the_words_of_each_task(name, vectorize):
    model = SCALED[name]()
    episodes = draw(inputs=words)
    expected = first_order(model, episodes)
    learner = MetaLearner(
        model, F.cross_entropy, inner=INNER, method=FirstOrder(), vectorize=vectorize
    )
    learner.backward(episodes)
    assert_same([p.grad for p in model.parameters()], expected)


@pytest.mark.parametrize(
    ("method", "vectorize", "name"),
    [(m, WAYS[i % 3], list(SCALED)[i % 2]) for i, m in enumerate(DIFFERENTIATE_TWICE)],
)
def test_what_frequencies_scale_has_no_second_derivative(name, method, vectorize):
    learner = MetaLearner(
        SCALED[name](),
        F.cross_entropy,
        inner=INNER,
        method=DIFFERENTIATE_TWICE[method],
        vectorize=vectorize,
        proximal=1.0,
    )
    with refuses("scale_grad_by_freq=False"):
        learner.backward(draw(tasks=2, inputs=words))


def head_only(model, episodes, steps=STEPS, lr=0.1):
    """MAML that adapts the head alone, as a plain loop."""
    shared = {n: p for n, p in model.named_parameters() if not n.startswith("head")}
    losses = []
    for (x, y), query in split(episodes):
        head = {n: p for n, p in model.named_parameters() if n.startswith("head")}
        for _ in range(steps):
            loss = F.cross_entropy(torch.func.functional_call(model, shared | head, x), y)
            slopes = torch.autograd.grad(loss, list(head.values()), create_graph=True)
            head = {n: p - lr * g for (n, p), g in zip(head.items(), slopes, strict=True)}
        outputs = torch.func.functional_call(model, shared | head, query[0])
        losses.append(F.cross_entropy(outputs, query[1]))
    mean = torch.stack(losses).mean()
    return mean.detach(), torch.autograd.grad(mean, list(model.parameters()))


@in_turns(MODELS | SCALED, ["F.embedding", "frequencies"])
def test_an_embedding_that_all_tasks_share_has_its_gradient(name, vectorize):
    model = (MODELS | SCALED)[name]()
    episodes = draw(tasks=2, inputs=words)
    with sdpa_kernel(SDPBackend.MATH):
        expected = head_only(model, episodes)
    assert_learns(expected, model, episodes, vectorize=vectorize, adapt="head.*")


def test_a_batch_with_padding_may_follow_one_without():
    model = ByModule(padding_idx=6)
    learner = MetaLearner(model, F.cross_entropy, inner=INNER, vectorize="auto")
    without = draw(inputs=words)
    learner.backward(without)
    padded = draw(inputs=lambda *shape: words(*shape).where(torch.arange(4) != 1, 6))
    adapted = learner.adapt(padded.support, batched=True).params["layer.weight"]
    assert torch.equal(adapted[:, 6], model.layer.weight[6].detach().expand(2, -1))


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@vectorized
def test_the_padding_of_a_bag_holds_for_each_task_as_well(vectorize):
    def gradients(layer):
        torch.manual_seed(0)
        model = nn.Sequential(layer(), nn.Linear(WIDTH, 5))
        learner = MetaLearner(model, F.cross_entropy, method=FirstOrder(), vectorize=vectorize)
        learner.backward(draw(inputs=words))
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    class Sum(nn.Embedding):
        def forward(self, x):
            return super().forward(x).sum(-2)

    expected = gradients(lambda: Sum(WORDS, WIDTH, padding_idx=2))
    bag = gradients(lambda: nn.EmbeddingBag(WORDS, WIDTH, padding_idx=2, mode="sum"))
    assert_same(bag, expected)


def as_problem(model, penalty=0.0):
    def loss(params, meta, data):
        squares = sum(p.square().sum() for p in params.values())
        return cross_entropy(model, params, data) + 0.5 * penalty * squares

    return BilevelProblem(
        init=lambda meta, data: dict(meta),
        inner_loss=lambda params, meta, data: loss(params, meta, data[0]),
        outer_loss=lambda params, meta, data: loss(params, meta, data[1]),
    )


@pytest.mark.parametrize(
    ("name", "batched"),
    [("nn.Embedding", True), ("F.embedding", False), ("torch.embedding", True)],
)
def test_check_hypergradient_leaves_the_padding_row_where_it_is(name, batched):
    model = MODELS[name]()
    episodes = draw(tasks=2, inputs=words)
    meta = {n: p.detach() for n, p in model.named_parameters()}
    data = (episodes.support, episodes.query) if batched else split(episodes)[0]
    check = check_hypergradient(
        as_problem(model),
        meta,
        data,
        inner=INNER,
        method="unrolled",
        batched=batched,
        directions=1,
    )
    assert check.verdict.startswith("Right")
    assert check.error < 1e-8


@pytest.mark.parametrize(
    ("name", "penalty"),
    [("nn.Embedding", 0.0), ("F.embedding", 0.3), ("torch.embedding", 0.3)],
)
def test_differences_of_gradients_have_the_hessian_of_double_backward(name, penalty):
    model = MODELS[name]()
    data = split(draw(tasks=1, inputs=words))[0]
    params = {n: p.detach().unsqueeze(0) for n, p in model.named_parameters()}
    problem = LiftedProblem(as_problem(model, penalty), data, batched=False)

    vectors = torch.randn(4, 1, sum(p.numel() for p in params.values()))

    def multiply(products):
        return Hessian(lambda p: problem.inner(p, {}, data), params, products).matmat(vectors)

    expected = multiply("double-backward")
    assert_same(multiply("forward-over-reverse"), expected, rtol=1e-9)
    torch.testing.assert_close(multiply("finite-differences"), expected, rtol=0, atol=1e-8)


def test_padding_rows_are_found_whatever_the_scale_of_the_loss():
    data = split(draw(tasks=1, inputs=words))[0]
    model = MODELS["nn.Embedding"]()
    params = {n: p.detach().unsqueeze(0) for n, p in model.named_parameters()}
    problem = LiftedProblem(as_problem(model), data, batched=False)

    vectors = torch.randn(4, 1, sum(p.numel() for p in params.values()))

    def multiply(scale):
        def loss(p):
            return scale * problem.inner(p, {}, data)

        return Hessian(loss, params, "finite-differences").matmat(vectors)

    expected = multiply(1.0)
    for scale in (1e-12, 1e12):
        torch.testing.assert_close(multiply(scale) / scale, expected, rtol=0, atol=1e-8)


def test_differences_of_gradients_refuse_a_padding_row_that_is_tied():
    data = split(draw(tasks=1, inputs=words))[0]
    model = MODELS["tied"]()
    params = {n: p.detach().unsqueeze(0) for n, p in model.named_parameters()}
    problem = LiftedProblem(as_problem(model), data, batched=False)
    hessian = Hessian(lambda p: problem.inner(p, {}, data), params, "finite-differences")
    with refuses("padding_idx", "double-backward"):
        hessian.matmat(torch.eye(hessian.shape[1]).unsqueeze(1))


def test_the_padding_row_has_no_tangent():
    weight, along = torch.randn(2, WORDS, WIDTH)
    words = torch.tensor([1, 2, 2, 6])
    with mended_derivatives, forward_ad.dual_level():
        rows = F.embedding(words, forward_ad.make_dual(weight, along), padding_idx=2)
        tangent = forward_ad.unpack_dual(rows).tangent
    expected = along[words].clone()
    expected[1:3] = 0
    assert torch.equal(tangent, expected)


def test_blocks_without_padding_nest():
    words = torch.tensor([2])
    weight = torch.randn(WORDS, WIDTH, requires_grad=True)
    with without_padding() as outer:
        with without_padding() as inner:
            F.embedding(words, weight, padding_idx=2)
        F.embedding(words, weight, padding_idx=3)
    assert (outer, inner) == ([3], [2])
