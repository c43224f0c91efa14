"""Tangents that torch lacks, of mse_loss outside of vmap; and random numbers in derivatives."""

import pytest
import torch
from reported.helpers import INNER, LR, STEPS, assert_learns, draw, plain_maml, split
from torch import nn
from torch.nn import functional as F

from metaimplicit import (
    BilevelProblem,
    Dense,
    Forward,
    FromMeta,
    GradientDescent,
    Implicit,
    MetaLearner,
    Unrolled,
    hypergradient,
)
from metaimplicit.operators import central_difference


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer(1, 3, batch_first=True)
        self.head = nn.Linear(3, 1)

    def forward(self, x):
        return self.head(self.layer(x.unsqueeze(-1))[0][:, -1]).squeeze(-1)


class UsersLoss(nn.Module):
    """A loss of the user's that calls F.mse_loss."""

    def forward(self, outputs, targets):
        return 0.5 * F.mse_loss(outputs.tanh(), targets, reduction="sum")


LOSSES = {
    "mse_loss": F.mse_loss,
    "MSELoss": nn.MSELoss(),
    "none": lambda z, y: F.mse_loss(z, y, reduction="none").square().mean(),
    "user's": UsersLoss(),
    "smooth_l1_loss": F.smooth_l1_loss,
}
MODELS = {
    "GRU": lambda: Recurrent(nn.GRU),
    "LSTM": lambda: Recurrent(nn.LSTM),
    "linear": lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0)),
}


# A layer sees nothing of the loss, so a loss of torch's and one of the user's suffice for them.
CASES = [("linear", loss) for loss in LOSSES] + [("GRU", "mse_loss"), ("LSTM", "user's")]


def regression():
    episodes = draw(tasks=2)
    episodes.support = (episodes.support[0], torch.randn(2, 5))
    episodes.query = (episodes.query[0], torch.randn(2, 5))
    return episodes


@pytest.mark.filterwarnings("ignore:the meta-gradient has the norm:RuntimeWarning")
@pytest.mark.parametrize(("name", "loss"), CASES)
def test_forward_mode_has_the_meta_gradient_of_a_plain_loop(name, loss):
    model = MODELS[name]()
    episodes = regression()
    expected = plain_maml(model, split(episodes), LOSSES[loss])
    for vectorize in ("loop", "vmap") if name == "linear" else ("loop",):  # torch's layers need it
        model.zero_grad()
        options = {"method": Forward(), "vectorize": vectorize}
        assert_learns(expected, model, episodes, LOSSES[loss], **options)


@pytest.mark.parametrize(("name", "loss"), CASES)
def test_tangents_of_gradients_are_products_with_the_hessian(name, loss):
    model = MODELS[name]()
    episodes = regression()

    def gradient(products):
        model.zero_grad()
        method = Implicit(Dense(), curvature="hessian", products=products)
        options = {"inner": INNER, "method": method, "proximal": 1.0, "vectorize": "loop"}
        MetaLearner(model, LOSSES[loss], **options).backward(episodes)
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    expected = gradient("double-backward")
    torch.testing.assert_close(gradient("forward-over-reverse"), expected, rtol=1e-9, atol=1e-12)


class NoisyLinear(nn.Linear):
    """A layer of the user's that draws its own noise."""

    def forward(self, x):
        return super().forward(x * (1 + 0.3 * torch.randn_like(x)))


RANDOM = {
    "Dropout": lambda: [nn.Linear(4, 6), nn.Dropout(0.4)],
    "AlphaDropout": lambda: [nn.Linear(4, 6), nn.AlphaDropout(0.4)],
    "dropout of the input": lambda: [nn.Dropout(0.4), nn.Linear(4, 6)],
    "noise": lambda: [NoisyLinear(4, 6)],
}


def random_meta_gradient(model, episodes, **options):
    model.zero_grad()
    torch.manual_seed(1)
    learner = MetaLearner(model, F.cross_entropy, inner=INNER, **options)
    learner.backward(episodes)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize(
    ("name", "vectorize", "chunk"),  # all tangents of a step at once, or some of them
    [
        *(("Dropout", "vmap", None), ("AlphaDropout", "vmap", None)),
        *(("noise", "vmap", 40), ("Dropout", "loop", 40)),
    ],
)
def test_forward_mode_draws_what_reverse_mode_draws(name, vectorize, chunk):
    model = nn.Sequential(*RANDOM[name](), nn.Tanh(), nn.Linear(6, 5))
    episodes = draw(tasks=2)
    expected = random_meta_gradient(model, episodes, method=Unrolled(), vectorize=vectorize)
    got = random_meta_gradient(model, episodes, method=Forward(chunk=chunk), vectorize=vectorize)
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", RANDOM)
def test_forward_mode_has_the_gradient_of_a_plain_loop_with_the_same_draws(name):
    model = nn.Sequential(*RANDOM[name](), nn.Tanh(), nn.Linear(6, 5))
    episodes = draw(tasks=1)
    got = random_meta_gradient(model, episodes, method=Forward(), vectorize="loop")
    torch.manual_seed(1)
    _, gradients = plain_maml(model, split(episodes))
    expected = torch.cat([g.flatten() for g in gradients])
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)


def test_the_tangent_of_a_step_size_has_one_mask_as_well():
    start, lr = torch.tensor([1.0, 2.0, 3.0]), torch.tensor(LR)

    def inner_loss(params, meta, data):
        return 0.5 * (F.dropout(torch.ones(3), 0.5) * params["w"]).square().sum()

    problem = BilevelProblem(
        init=lambda meta, data: {"w": start},
        inner_loss=inner_loss,
        outer_loss=lambda params, meta, data: params["w"].sum(),
    )
    inner = GradientDescent(steps=STEPS, lr=FromMeta("lr"))
    torch.manual_seed(4)
    result = hypergradient(problem, {"lr": lr}, None, inner=inner, method=Forward())

    torch.manual_seed(4)
    masks = [F.dropout(torch.ones(3), 0.5).square() for _ in range(STEPS)]
    assert not torch.equal(masks[0], masks[1])
    # w_T = Π_t (1 − lr m_t) w_0 with the squared masks m_t.
    rate = lr.clone().requires_grad_()
    end = start
    for m in masks:
        end = end * (1 - rate * m)
    (expected,) = torch.autograd.grad(end.sum(), rate)
    torch.testing.assert_close(result.grads["lr"], expected, rtol=1e-12, atol=0)


def test_a_difference_has_one_mask_at_both_of_its_ends():
    theta, v = {"w": torch.randn(2, 5)}, torch.randn(2, 5)
    torch.manual_seed(2)
    slope = central_difference(lambda p: F.dropout(p["w"], 0.5).sum(1), theta, v)
    torch.manual_seed(2)
    mask = F.dropout(torch.ones(2, 5), 0.5)
    torch.testing.assert_close(slope, (mask * v).sum(1), rtol=1e-8, atol=1e-8)
