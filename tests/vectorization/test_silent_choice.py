"""Vmap is given up without a word where it is impossible, and kept where it is right."""

import pytest
import torch
from reported.helpers import INNER, assert_learns, draw, plain_maml, split
from torch import nn
from torch.nn import functional as F
from torchvision.ops import StochasticDepth
from vectorization.problems import meta_of, network, problem_of
from vectorization.wrong_rules import WrongValue

from metaimplicit import MetaLearner, Unrolled, hypergradient
from metaimplicit.random_state import UnfusedDropout
from metaimplicit.vectorization.comparison import find_objection
from metaimplicit.vectorization.evaluations import evaluations


class Function(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Branch(nn.Module):
    def forward(self, x):
        return 2 * x if x.sum() > 0 else x


class HalfInside(nn.Module):
    """Computes in bfloat16 by an autocast that is not seen from outside."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6).float()

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.linear(x.float()).to(x.dtype)


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer(1, 6, batch_first=True)

    def forward(self, x):
        return self.layer(x.unsqueeze(-1))[0].mean(1)


class Packed(Recurrent):
    def forward(self, x):
        lengths = torch.full((len(x),), x.shape[1])
        pack = nn.utils.rnn.pack_padded_sequence(x.unsqueeze(-1), lengths, batch_first=True)
        return nn.utils.rnn.pad_packed_sequence(self.layer(pack)[0], batch_first=True)[0].mean(1)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g


def checkpointed(x):
    return torch.utils.checkpoint.checkpoint(torch.tanh, x, use_reentrant=False)


# What torch cannot vmap, with the module that is named (None where torch raises in the backward).
IMPOSSIBLE = {
    "LSTM": (lambda: Recurrent(nn.LSTM), "LSTM"),
    "GRU": (lambda: Recurrent(nn.GRU), "GRU"),
    "RNN": (lambda: Recurrent(nn.RNN), "RNN"),
    "packed sequences": (lambda: Packed(nn.GRU), "GRU"),
    "a number": (lambda: Function(lambda x: x * x.mean().item()), "Function"),
    "control flow": (Branch, "Branch"),
    "a mask": (lambda: Function(lambda x: x * x[x > 0].mean()), "Function"),
    "in place": (lambda: Function(lambda x: torch.zeros(len(x), 6).add_(x)), "Function"),
    "numpy": (lambda: Function(lambda x: x * float(x.detach().numpy().mean())), "Function"),
    "autograd.Function": (lambda: Function(Square.apply), "Function"),
    "rrelu": (lambda: nn.RReLU().eval(), "RReLU"),
    "checkpointing": (lambda: Function(checkpointed), None),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_the_loop_is_kept_without_a_word_where_vmap_is_impossible(name):
    make, module = IMPOSSIBLE[name]
    model = nn.Sequential(nn.Linear(4, 6), make(), nn.Linear(6, 5))
    episodes = draw(tasks=2, examples=5)
    loss, gradients = plain_maml(model, split(episodes))
    data = (episodes.support, episodes.query)
    how = {"inner": INNER, "method": Unrolled(), "batched": True}
    result = hypergradient(problem_of(model), meta_of(model), data, **how)
    torch.testing.assert_close(result.outer_loss, loss)
    torch.testing.assert_close(list(result.grads.values()), list(gradients))
    assert result.report.tasks_by.startswith("loop: ")
    if module is not None:
        assert f"({module})" in result.report.tasks_by


def test_the_learner_keeps_the_loop_without_a_word_as_well():
    model = nn.Sequential(nn.Linear(4, 6), Branch(), nn.Linear(6, 5))
    episodes = draw(tasks=2, examples=5)
    expected = plain_maml(model, split(episodes))
    learner = assert_learns(expected, model, episodes, vectorize="auto")
    assert learner.vectorize == "loop"
    assert "(Branch)" in learner.backward(episodes).report.tasks_by


@pytest.mark.parametrize("probability", [0.02, 0.5], ids=["all rows kept", "some rows dropped"])
def test_the_loop_is_kept_where_each_task_draws_into_a_tensor_that_all_share(probability):
    """Torch allows that under vmap only where all tasks draw the same numbers."""
    depth = StochasticDepth(probability, "row")
    model = nn.Sequential(nn.Linear(4, 6), depth, nn.Linear(6, 5))
    episodes = draw(tasks=2, examples=5)
    learners = [MetaLearner(model, F.cross_entropy, vectorize=way) for way in ("auto", "loop")]
    losses = []
    for learner in learners:
        torch.manual_seed(0)
        losses.append(learner.evaluate(episodes)[0])
    assert torch.equal(*losses)
    assert "(StochasticDepth)" in learners[0].backward(episodes).report.tasks_by


def noisy(generator):
    return Function(lambda x: x + torch.randn(x.shape, generator=generator))


class Counting(nn.Module):
    """A network that counts its calls in a buffer, which each call reads."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 5)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls.add_(1)
        return self.layer(x)


class Replacing(Counting):
    """The same with another tensor for each count."""

    def forward(self, x):
        self.calls = self.calls + 1
        return self.layer(x)


# What has to stay under vmap, since a loop has the same derivatives.
RIGHT = {
    "dropout": lambda: nn.Dropout(0.5),
    "dropout of channels": lambda: Function(lambda x: F.dropout1d(x.unsqueeze(0)).squeeze(0)),
    "noise": lambda: Function(lambda x: x + torch.randn_like(x)),
    "noise of a generator": lambda: noisy(torch.Generator().manual_seed(0)),
    "a random choice": lambda: Function(lambda x: x * torch.bernoulli(torch.full((6,), 0.5))),
    "nothing": nn.Identity,
    "not a number": lambda: Function(lambda x: x + torch.where(x > 100, 0.0, torch.nan)),
    "amplified round-off": lambda: Function(lambda x: torch.sin(1e9 * x)),
    "batch norm": lambda: nn.BatchNorm1d(6, track_running_stats=False),
    "a zero": lambda: Function(lambda x: 0 * x),
    "autocast in the model": HalfInside,
}


@pytest.mark.filterwarnings("ignore:the meta-gradient of .* is not finite:RuntimeWarning")
@pytest.mark.parametrize("name", RIGHT)
def test_vmap_is_kept_without_a_word_where_it_is_right(name):
    model = network(RIGHT[name]())
    episodes = draw()
    data = (episodes.support, episodes.query)
    generator = torch.get_rng_state()
    problem = problem_of(model)
    seen = []
    for vectorize in ("vmap", "auto"):
        torch.set_rng_state(generator)
        result = hypergradient(
            problem,
            meta_of(model),
            data,
            inner=INNER,
            method=Unrolled(),
            batched=True,
            vectorize=vectorize,
        )
        seen.append((result, torch.get_rng_state()))
    (vmap, after_vmap), (auto, after_auto) = seen
    assert auto.report.tasks_by == "vmap"
    assert torch.equal(after_vmap, after_auto)  # the comparison consumes no random numbers
    if name != "noise of a generator":
        torch.testing.assert_close(auto.grads, vmap.grads, rtol=0, atol=0, equal_nan=True)


class Attentive(nn.Module):
    """Self-attention over the numbers of an example, in training with dropout."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(2, 1, 4, dropout=0.3, batch_first=True)

    def forward(self, x):
        return self.layer(x.unflatten(-1, (3, 2))).flatten(1)


FUSED_DROPOUT = {
    "dropout": lambda: nn.Dropout(0.5),
    "dropout of all": lambda: nn.Dropout(1.0),
    "dropout in attention": Attentive,
}


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("train", [True, None, False])
def test_dropout_that_is_not_fused_has_the_numbers_and_slopes_of_vmap(p, train):
    x = torch.randn(4, 7)

    def value(x):
        return torch.native_dropout(x, p, train)[0].square().sum()

    value_and_slope = torch.func.grad_and_value(value)
    torch.manual_seed(0)
    of_vmap = torch.vmap(value_and_slope, randomness="same")(x)
    for i, of_task in enumerate(x):
        torch.manual_seed(0)
        with UnfusedDropout():
            slope, loss = value_and_slope(of_task)
        torch.testing.assert_close((slope, loss), (of_vmap[0][i], of_vmap[1][i]))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", FUSED_DROPOUT)
def test_dropout_on_cuda_is_no_difference_of_vmap(name):
    """Outside of vmap a fused kernel draws its mask, and other numbers."""
    model = network(FUSED_DROPOUT[name]()).to("cuda")
    episodes = draw()
    data = [tuple(x.to("cuda") for x in part) for part in (episodes.support, episodes.query)]
    learner = MetaLearner(model, F.cross_entropy, inner=INNER, vectorize="vmap")
    assert learner.backward(tuple(data)).report.tasks_by == "vmap"  # a warning is an error here


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_wrong_rule_beside_dropout_is_named_on_cuda():
    model = network(nn.Sequential(nn.Dropout(0.5), WrongValue())).to("cuda")
    episodes = draw()
    data = [tuple(x.to("cuda") for x in part) for part in (episodes.support, episodes.query)]
    learner = MetaLearner(model, F.cross_entropy, inner=INNER, vectorize="vmap")
    with pytest.warns(RuntimeWarning, match=r"WrongValue.*: vmap differs from a loop by"):
        learner.backward(tuple(data))


def test_half_precision_in_the_model_hides_no_wrong_rule():
    model = network(nn.Sequential(HalfInside(), WrongValue()))
    episodes = draw()
    data = (episodes.support, episodes.query)
    with pytest.warns(RuntimeWarning, match="vmap differs from a loop by"):
        hypergradient(
            problem_of(model),
            meta_of(model),
            data,
            inner=INNER,
            method=Unrolled(),
            batched=True,
        )


@pytest.mark.parametrize("counting", [Counting, Replacing])
def test_the_comparison_leaves_buffers_and_gradients_alone(counting):
    model = counting()
    episodes = draw()
    data = (episodes.support, episodes.query)
    compared = evaluations(last_step=1, second_derivatives=True)
    assert find_objection(problem_of(model), meta_of(model), data, compared) is None
    assert model.calls == 0
    assert all(p.grad is None for p in model.parameters())
