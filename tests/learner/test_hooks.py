"""Hooks of parameters see the meta-gradient, as they see that of a loss."""

import pytest
import torch
from learner.few_shot import draw_episodes, make_learner

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
