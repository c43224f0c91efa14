"""MAML as a loop over tasks, one call of the model at a time. It calls nothing of the package."""

import torch
from torch import nn
from torch.func import functional_call

STEPS = 2
LR = 0.1


def call(model, params, inputs):
    """The model at some parameters: a tuple is positional arguments, a dict keyword arguments."""
    if isinstance(inputs, dict):
        return functional_call(model, params, (), inputs)
    return functional_call(model, params, inputs if isinstance(inputs, tuple) else (inputs,))


def descend(loss, start, rate=lambda step, name: LR, steps=STEPS):
    """The iterates of θ_{t+1} = θ_t − rate(t, name) ∂loss/∂θ(θ_t), with their graph."""
    iterates = [start]
    for step in range(steps):
        params = iterates[-1]
        gradients = torch.autograd.grad(loss(params), list(params.values()), create_graph=True)
        pairs = zip(params.items(), gradients, strict=True)
        iterates.append({name: p - rate(step, name) * g for (name, p), g in pairs})
    return iterates


def parameters_of(*parts):
    """The parameters of modules, each of them once, in their order."""
    modules = [part for part in parts if isinstance(part, nn.Module)]
    return list(dict.fromkeys(p for module in modules for p in module.parameters()))


def plain_maml(model, loss, tasks, *, query_loss=None, weights=None, descend=descend):
    """The query loss of each task, its outputs, and the gradients of the mean loss.

    `tasks` are ((inputs, targets), (inputs, targets)) pairs. With weights, the loss of a task is
    the weighted sum over all its iterates.
    """
    query_loss = query_loss or loss
    start = dict(model.named_parameters())
    losses, outputs = [], []
    for (x, y), (x_query, y_query) in tasks:

        def support_loss(params, x=x, y=y):
            return loss(call(model, params, x), y)

        iterates = descend(support_loss, start)
        of_iterates = [call(model, params, x_query) for params in iterates]
        outputs.append(of_iterates[-1].detach())
        if weights is None:
            losses.append(query_loss(of_iterates[-1], y_query))
        else:
            values = [query_loss(z, y_query) for z in of_iterates]
            losses.append(sum(w * value for w, value in zip(weights, values, strict=True)))
    parameters = parameters_of(model, loss, query_loss)
    gradients = torch.autograd.grad(torch.stack(losses).mean(), parameters, allow_unused=True)
    return torch.stack(losses).detach(), outputs, gradients


def assert_same(got, expected, rtol=1e-11):
    """Compare to round-off: a few hundred float64 operations amplify 1e-16 to about 1e-13."""
    torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-13)


def assert_learns(learner, episodes, expected, rtol=1e-11):
    """Loss and meta-gradients of a learner, and the losses it evaluates, are those of the loop."""
    losses, _, gradients = expected
    step = learner.backward(episodes)
    assert_same(step.loss, losses.mean(), rtol)
    parameters = parameters_of(learner.model, learner.loss, learner.query_loss)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert_same(parameter.grad, gradient, rtol)
    return step
