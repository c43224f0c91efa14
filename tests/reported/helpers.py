"""MAML as a plain loop over tasks in torch, which the tests of this folder compare with."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from metaimplicit import BilevelProblem, GradientDescent, MetaLearner, Unrolled, hypergradient

STEPS = 2
LR = 0.1
INNER = GradientDescent(steps=STEPS, lr=LR)


def fails_today(error, reason):
    """The mark of a test that fails with this error, for this reason, until the code is mended."""
    return pytest.mark.xfail(strict=True, raises=error, reason=reason)


def refuses(*patterns):
    """Expect a ValueError whose message matches every pattern, in any order."""
    return pytest.raises(ValueError, match="(?s)" + "".join(f"(?=.*(?:{p}))" for p in patterns))


def assert_same(got, expected, rtol=1e-11):
    """Compare to round-off: a few hundred float64 operations amplify 1e-16 to about 1e-13."""
    torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-13)


def draw(tasks=2, examples=5, inputs=lambda *shape: torch.randn(*shape, 4)):
    """A batch of tasks of 5 classes, whose support and query sets have `examples` examples."""
    labels = torch.arange(examples) % 5
    support, query = ((inputs(tasks, examples), labels.repeat(tasks, 1)) for _ in range(2))
    return SimpleNamespace(support=support, query=query)


def split(episodes):
    """The (support, query) pairs of a batch, one for each task."""
    (x, y), (x_query, y_query) = episodes.support, episodes.query
    return [((x[i], y[i]), (x_query[i], y_query[i])) for i in range(len(y))]


def descend(loss, start, rate=lambda step, name: LR, steps=STEPS):
    """The iterates of θ_{t+1} = θ_t − rate(t, name) ∂loss/∂θ(θ_t), with their graph."""
    iterates = [start]
    for step in range(steps):
        params = iterates[-1]
        gradients = torch.autograd.grad(loss(params), list(params.values()), create_graph=True)
        pairs = zip(params.items(), gradients, strict=True)
        iterates.append({name: p - rate(step, name) * g for (name, p), g in pairs})
    return iterates


def plain_maml(model, tasks, loss=F.cross_entropy, query_loss=None, last=1, descend=descend):
    """The mean query loss over tasks and their `last` iterates, and its gradients."""
    start = dict(model.named_parameters())
    losses = []
    for (x, y), query in tasks:
        iterates = descend(lambda p, x=x, y=y: loss(functional_call(model, p, x), y), start)
        for params in iterates[-last:]:
            outputs = functional_call(model, params, query[0])
            losses.append((query_loss or loss)(outputs, query[1]))
    mean = torch.stack(losses).mean()
    return mean.detach(), torch.autograd.grad(mean, learnt_parameters(model, loss))


def learnt_parameters(model, loss):
    return [*model.parameters(), *(loss.parameters() if isinstance(loss, nn.Module) else ())]


def assert_learns(expected, model, episodes, loss=F.cross_entropy, **options):
    """The loss and the meta-gradients of a MetaLearner are `expected`, those of `plain_maml`."""
    learner = MetaLearner(model, loss, **({"inner": INNER, "method": Unrolled()} | options))
    step = learner.backward(episodes)
    assert_same(step.loss, expected[0])
    for parameter, gradient in zip(learnt_parameters(model, loss), expected[1], strict=True):
        assert_same(parameter.grad, gradient)
    return learner


def cross_entropy(model, params, pair):
    return F.cross_entropy(functional_call(model, params, (pair[0],)), pair[1])


def assert_hypergradient(expected, model, episodes):
    """The same of `hypergradient`, under its default, vmap."""
    problem = BilevelProblem(
        init=lambda meta, data: dict(meta),
        inner_loss=lambda params, meta, data: cross_entropy(model, params, data[0]),
        outer_loss=lambda params, meta, data: cross_entropy(model, params, data[1]),
    )
    meta = {name: p.detach() for name, p in model.named_parameters()}
    data = (episodes.support, episodes.query)
    result = hypergradient(problem, meta, data, inner=INNER, method=Unrolled(), batched=True)
    assert_same(result.outer_loss, expected[0])
    for (name, _), gradient in zip(model.named_parameters(), expected[1], strict=True):
        assert_same(result.grads[name], gradient)
    return result
