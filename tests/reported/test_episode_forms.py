"""Episodes in the forms that other libraries and models use."""

from types import SimpleNamespace

import pytest
import torch
from reported.helpers import assert_learns, assert_same, draw, plain_maml, split
from torch import nn
from torch.nn import functional as F


class TwoInputs(nn.Module):
    """A model of an input and a mask, which may also come stacked, as the plain loop calls it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 5)

    def forward(self, x, mask=None):
        x, mask = x.unbind(-1) if mask is None else (x, mask)
        return self.linear(x * mask.sigmoid())


def cross_entropy_of_label(outputs, targets):
    return F.cross_entropy(outputs, targets["label"])


def batch(plain, inputs=lambda x: x, targets=lambda y: y):
    """The batch `plain` with its inputs and targets in another form."""
    pairs = {name: getattr(plain, name) for name in ("support", "query")}
    return SimpleNamespace(**{name: (inputs(x), targets(y)) for name, (x, y) in pairs.items()})


def several_inputs():
    """The inputs are a tuple of positional arguments, each with the task axis first."""
    stacked = draw(inputs=lambda *shape: torch.randn(*shape, 4, 2))
    return stacked, batch(stacked, inputs=lambda x: x.unbind(-1))


def named_inputs():
    """The inputs are a dict of keyword arguments, each with the task axis first."""
    stacked = draw(inputs=lambda *shape: torch.randn(*shape, 4, 2))
    return stacked, batch(stacked, inputs=lambda x: {"x": x[..., 0], "mask": x[..., 1]})


def named_targets():
    """The targets are a dict, which the loss reads."""
    plain = draw()
    return plain, batch(plain, targets=lambda y: {"label": y})


def torchmeta_batch():
    """The batch is a dict of two pairs."""
    plain = draw()
    return plain, {"train": plain.support, "test": plain.query}


def tuple_of_pairs():
    plain = draw()
    return plain, (plain.support, plain.query)


def ragged_lists():
    """Inputs and targets are lists of one tensor for each task, of different lengths."""
    plain = batch(draw(), inputs=list, targets=list)
    for tensors in plain.support:
        tensors[1] = tensors[1][:5]
    return plain, plain


@pytest.mark.parametrize(
    "form",
    [several_inputs, named_inputs, named_targets, torchmeta_batch, tuple_of_pairs, ragged_lists],
)
def test_episodes_of_this_form_have_the_meta_gradient_of_a_plain_loop(form):
    plain, episodes = form()
    model = TwoInputs() if form in (several_inputs, named_inputs) else nn.Linear(4, 5)
    loss = cross_entropy_of_label if form is named_targets else F.cross_entropy
    expected = plain_maml(model, split(plain))
    learner = assert_learns(expected, model, episodes, loss)
    assert_same(learner.evaluate(episodes)[0][-1].mean(), expected[0])
