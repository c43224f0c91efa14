"""K-FAC gives the rows of a layer the weights of their examples, in whatever order it sees them."""

import pytest
import torch
import torch.nn.functional as F
from curvature_by_hand import parts_of
from oracles import dense, randn, relative_error
from torch import nn

from metaimplicit.operators import KroneckerFactored
from metaimplicit.operators.layers import ordered_weights
from metaimplicit.operators.loss_scores import loss_scores
from metaimplicit.optim import KFAC

M = 5
X = randn(M, 4, seed=1)
TOKENS = randn(M, 5, 4, seed=2)  # as many positions as examples, so that shapes tell nothing
SHORT = randn(M, 3, 4, seed=3)
LENGTHS = torch.tensor([2, 5, 1, 4, 3])
PADDED = torch.where(torch.arange(5) < LENGTHS[:, None], torch.arange(25).reshape(5, 5) % 3, -100)
W = torch.tensor([0.5, 1.0, 3.0]).double()


class Ordered(nn.Module):
    """A network whose layers see the rows of their input in another order."""

    def __init__(self, there, back, activation):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 3).double()
        self.last = nn.Linear(3, 3).double()
        self.there = there
        self.back = back
        self.activation = activation

    def forward(self, x):
        return self.back(self.last(self.activation(self.first(self.there(x)))))


def swap(x):
    return x.transpose(0, 1)


def keep(x):
    return x


def sort(x):
    return x[LENGTHS.argsort()]


def unsort(z):
    return z[LENGTHS.argsort().argsort()]


def by_token(z, y):
    return F.cross_entropy(z.flatten(0, 1), y.flatten(), weight=W)


def weighted(z, y):
    return F.cross_entropy(z, y, weight=W)


CASES = {
    "sequence first": (swap, swap, TOKENS, PADDED, by_token),
    "sequence first, other length": (swap, swap, SHORT, PADDED[:, :3], by_token),
    "sorted by length": (sort, unsort, TOKENS, PADDED, by_token),
    "reversed examples": (
        lambda x: x.flip(0),
        lambda z: z.flip(0),
        X,
        torch.tensor([0, -100, 2, 1, 1]),
        weighted,
    ),
}


def factor(model, loss, x, y):
    """A of each layer: the weighted rows that the loss reads, ordered by the model itself."""
    weights = torch.where(y >= 0, W[y.clamp(min=0)], 0.0)
    weights = model.there(weights / weights.sum()).reshape(-1)
    rows = model.there(x).flatten(0, -2)
    factors = []
    for layer in (model.first, model.last):
        a = torch.cat([rows, torch.ones(len(rows), 1).double()], 1).detach()
        factors.append(a.T @ (weights[:, None] * a))
        rows = model.activation(layer(rows))
    return factors


@pytest.mark.parametrize("activation", [torch.tanh, torch.relu])
@pytest.mark.parametrize("name", CASES)
def test_the_optimiser_weighs_each_row_as_the_loss_weighs_its_example(name, activation):
    there, back, x, y, loss = CASES[name]
    model = Ordered(there, back, activation)
    with torch.no_grad():
        model.first.bias.fill_(1.5)  # so that relu leaves something of every row
    expected = factor(model, loss, x, y)
    optimizer = KFAC(model, loss, lr=1e-9)
    optimizer.step(lambda: (model(x), y))
    for layer, A in zip((model.first, model.last), expected, strict=True):
        assert relative_error(optimizer.state[layer.weight]["A"], A) < 1e-10


def test_rows_that_reach_nothing_share_the_rest():
    """Where an order has to be found, a dead unit hides the weight of its row."""
    x = torch.tensor([[1.0], [-1.0], [2.0]]).double()
    labels = torch.tensor([0, -100, 1])
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.ReLU(), nn.Linear(1, 2)).double()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    optimizer = KFAC(model, F.cross_entropy)
    optimizer.step(lambda: (model(x), labels))
    # In the order of the loss the weights are (½, 0, ½).
    expected = torch.tensor([[0.5 * 1 + 0.5 * 4]]).double()
    assert relative_error(optimizer.state[model[0].weight]["A"], expected) < 1e-12


@pytest.mark.parametrize("corrected", [False, True])
def test_the_operator_does_not_depend_on_the_order_either(corrected):
    x = X
    y = torch.tensor([0, -100, 2, 1, 1])
    matrices = []
    for there in (keep, lambda x: x.flip(0)):
        parts = parts_of(Ordered(there, there, torch.tanh), weighted, x, y)
        matrices.append(dense(KroneckerFactored.from_loss(parts, corrected=corrected))[0])
    assert relative_error(*matrices) < 1e-10


def test_an_attention_layer_between_does_not_hide_that_the_sequence_is_first():
    """Rows reach several positions then, and the order is the one that fits best."""

    class Mixing(Ordered):
        def forward(self, x):
            h = torch.tanh(self.first(self.there(x)))
            axis = 0 if self.there is swap else 1
            return self.back(self.last(h + 0.1 * h.cumsum(axis)))

    factors = []
    for order in (keep, swap):
        model = Mixing(order, order, torch.tanh)
        optimizer = KFAC(model, by_token, lr=1e-9)
        optimizer.step(lambda model=model: (model(TOKENS), PADDED))
        factors.append([optimizer.state[layer.weight]["A"] for layer in (model.first, model.last)])
    for batch_first, sequence_first in zip(*factors, strict=True):
        assert relative_error(sequence_first, batch_first) < 1e-10


def test_the_rest_for_rows_that_nothing_reaches_is_that_of_each_task():
    weights = torch.tensor([[1.0, 2, 3, 4], [4, 1, 3, 2]], dtype=torch.float64) / 10
    order = torch.tensor([[2, 0, 3, 1], [1, 3, 0, 2]])
    plain = torch.ones(2, 4).double()
    plain[0, :2] = 0.0
    plain[1, 3] = 0.0
    weighted = plain * weights.gather(1, order)
    probes = torch.stack([plain, weighted]).sqrt()[..., None, None]
    found = ordered_weights(weights, probes).squeeze(-1)
    expected = weights.gather(1, order)
    expected[0, :2] = expected[0, :2].mean()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_rows_of_another_number_than_the_examples_weigh_the_same():
    """A layer may see the three pairs of two examples, each of which has one number."""
    weights = torch.tensor([[0.4, 0.6]])
    weighted = torch.tensor([0.4, 0.5, 0.6]).reshape(1, 3, 1, 1)
    probes = torch.stack([torch.ones(1, 3, 1, 1), weighted]).sqrt()
    assert ordered_weights(weights, probes).flatten().tolist() == pytest.approx([1 / 3] * 3)


def test_round_off_does_not_hide_an_order_that_is_almost_that_of_the_loss():
    """The ratios lie beside the weights, and the order of the loss is the nearest guess of all."""
    order = torch.tensor([[1, 0, 2, 3]])
    for seed in range(20):
        weights = torch.tensor([[1.0, 2.0, 3.0, 40.0]]) + randn(1, 4, seed=seed).float().abs()
        weights = weights / weights.sum()
        scores = randn(1, 4, 1, 3, seed=seed).float()
        weighted = weights.gather(1, order).sqrt()[..., None, None] * scores
        found = ordered_weights(weights, torch.stack([scores, weighted])).squeeze(-1)
        torch.testing.assert_close(found, weights.gather(1, order), rtol=1e-5, atol=0)


@pytest.mark.parametrize("positions", [1, 2])
def test_rows_that_reach_neighbours_a_little_are_in_the_order_of_the_loss(positions):
    weights = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64) / 10
    ratio = 0.9 * weights + 0.1 * weights.roll(1, 1)
    rows = ratio.repeat_interleave(positions, dim=1).reshape(1, 4, positions, 1)
    found = ordered_weights(weights, torch.stack([torch.ones_like(rows), rows]).sqrt())
    expected = weights.unsqueeze(-1).expand(1, 4, positions) / positions
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(("excess", "has_probes"), [(1e-10, False), (1e-6, True)])
def test_rows_are_probed_only_if_examples_have_other_weights(excess, has_probes):
    """Up to the root of round-off, weights are equal."""
    weights = torch.ones(4).double()
    weights[0] += excess
    result = loss_scores(
        lambda z: (weights[:, None] * z.square()).sum((1, 2)),
        torch.zeros(1, 4, 1).double(),
        owner="KFAC",
        likelihood=None,
        expectation="exact",
        checked={},
    )
    assert (result.probes is not None) == has_probes
