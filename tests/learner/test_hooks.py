"""Hooks of parameters see the meta-gradient, and those that vmap gets wrong are warned of."""

import pytest
import torch
import torch.nn.functional as F
from crossing import every_pair
from learner.few_shot import INPUTS, WAYS, draw_episodes, make_learner
from torch import nn

from metaimplicit import GradientDescent, MetaLearner
from metaimplicit.learner.gradients import accumulate, accumulate_in_data


def gradient_of_backward(learner, data):
    learner.zero_grad()
    learner.backward(data)
    return learner.model[0].weight.grad.clone()


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_hooks_of_parameters_see_the_meta_gradient(mode):
    learner = make_learner()
    data = draw_episodes()
    whole = gradient_of_backward(learner, data)
    weight = learner.model[0].weight
    mask = torch.zeros_like(weight)
    mask[0] = 1
    accumulated = []
    weight.register_hook(lambda g: g * mask)
    weight.register_post_accumulate_grad_hook(lambda p: accumulated.append(p.grad.clone()))
    with mode():
        masked = gradient_of_backward(learner, data)
    assert torch.equal(masked, whole * mask)
    assert torch.equal(accumulated[0], masked)
    assert len(accumulated) == 1


def test_gradients_are_added_as_a_loss_adds_them():
    w = torch.ones(3, requires_grad=True)
    (2 * w).sum().backward()
    held = w.grad
    gradient = torch.arange(3.0)
    accumulate({"w": w, "frozen": torch.ones(3)}, {"w": gradient, "frozen": torch.ones(3)})
    assert torch.equal(w.grad, 2 + torch.arange(3.0))
    assert w.grad is held  # in place
    assert torch.equal(gradient, torch.arange(3.0))


def test_a_gradient_is_no_view_of_what_was_handed_in():
    w = torch.ones(3, requires_grad=True)
    gradient = torch.arange(3.0)
    accumulate({"w": w}, {"w": gradient})
    accumulate_in_data({"w": w}, {"w": torch.ones(3)}, weight=2.0)
    assert torch.equal(gradient, torch.arange(3.0))


class Reversed(nn.Module):
    """Reverses the gradient of its features by a hook of a tensor."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(INPUTS, 5).double()
        self.head = nn.Linear(5, WAYS).double()

    def forward(self, x):
        z = torch.tanh(self.body(x))
        if z.requires_grad:
            z.register_hook(torch.neg)
        return self.head(z)


class Halved(Reversed):
    """Halves it by a hook of a module."""

    def __init__(self):
        super().__init__()
        self.head.register_full_backward_hook(lambda module, inputs, outputs: (0.5 * inputs[0],))

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


@pytest.mark.compared
@pytest.mark.parametrize(
    ("model", "method", "vectorize"),
    every_pair([Reversed, Halved], ["unrolled", "first-order"], ["vmap", "auto"]),
)
def test_vmap_that_gets_a_hook_wrong_is_warned_of(model, method, vectorize):
    learner = MetaLearner(
        model(),
        F.cross_entropy,
        inner=GradientDescent(steps=2, lr=0.3),
        method=method,
        vectorize=vectorize,
    )
    advice = "Say 'auto' or 'loop'" if vectorize == "vmap" else "a loop over the tasks is used"
    with pytest.warns(RuntimeWarning, match=rf"vmap differs from a loop by .*{advice}"):
        learner.backward(draw_episodes())
    learner.backward(draw_episodes())
    assert learner.vectorize == ("vmap" if vectorize == "vmap" else "loop")
