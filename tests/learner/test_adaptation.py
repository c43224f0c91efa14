"""What `evaluate` measures along the inner loop, and the models that `adapt` returns."""

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from learner.few_shot import TASKS, LinearModel, draw_episodes, make_learner, make_network
from oracles import relative_error
from torch import nn

from metaimplicit import GradientDescent, MetaLearner


@pytest.mark.parametrize("task", range(TASKS))
def test_evaluate_and_adapt_follow_gradient_descent(task):
    learner = make_learner(proximal=0.0, method="unrolled")
    data = draw_episodes()
    losses, accuracies = learner.evaluate(data, steps=5)
    assert losses.shape == accuracies.shape == (6, TASKS)

    support = (data.support[0][task], data.support[1][task])
    inputs = data.query[0][task]
    labels = data.query[1][task]
    model = make_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for step in range(6):
        logits = model(inputs)
        assert losses[step, task].item() == pytest.approx(F.cross_entropy(logits, labels).item())
        assert accuracies[step, task] == (logits.argmax(-1) == labels).double().mean()
        adapted = learner.adapt(support, steps=step)
        assert relative_error(adapted(inputs), logits.detach()) < 1e-12
        optimizer.zero_grad()
        F.cross_entropy(model(support[0]), support[1]).backward()
        optimizer.step()


def test_a_loop_that_keeps_no_iterates_is_measured_at_its_ends():
    """L-BFGS ends at the argmin of the loss with its penalty."""
    learner = make_learner(inner="lbfgs", proximal=0.5)
    data = draw_episodes()
    start = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    losses, accuracies = learner.evaluate(data)
    assert losses.shape == accuracies.shape == (2, TASKS)
    for task in range(TASKS):
        x, y = (part[task] for part in data.support)
        adapted = learner.adapt((x, y))
        theta = {name: p.requires_grad_() for name, p in adapted.params.items()}
        penalty = sum((p - start[name]).square().sum() for name, p in theta.items())
        logits = torch.func.functional_call(learner.model, theta, (x,))
        loss = F.cross_entropy(logits, y) + 0.25 * penalty
        gradients = torch.autograd.grad(loss, list(theta.values()))
        assert max(g.abs().max() for g in gradients) < 1e-6
        x, y = (part[task] for part in data.query)
        outputs_of_ends = [learner.model(x), adapted(x)]
        for row, outputs in enumerate(outputs_of_ends):
            assert relative_error(losses[row, task], F.cross_entropy(outputs, y).detach()) < 1e-6


def test_a_batch_of_adapted_models_holds_one_model_for_each_task():
    learner = make_learner()
    data = draw_episodes()
    inputs = data.query[0]
    one = learner.adapt((data.support[0][1], data.support[1][1]))
    batch = learner.adapt(data.support, batched=True)
    assert (len(one), len(batch)) == (1, TASKS)
    assert relative_error(one(inputs[1]), batch(inputs)[1]) < 1e-12
    assert relative_error(batch[1](inputs[1]), batch(inputs)[1]) < 1e-12
    with pytest.raises(TypeError, match="holds one task; adapt with batched=True"):
        one[0]


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_a_batch_of_adapted_models_is_differentiated_in_its_inputs(vectorize):
    """As an adversary does, and as each of the models is."""
    learner = make_learner(vectorize=vectorize)
    data = draw_episodes()
    inputs = data.query[0].clone().requires_grad_()
    batch = learner.adapt(data.support, batched=True)
    (of_batch,) = torch.autograd.grad(batch(inputs).square().sum(), inputs)
    apart = [batch[task](inputs[task]).square().sum() for task in range(TASKS)]
    (of_each,) = torch.autograd.grad(torch.stack(apart).sum(), inputs)
    assert relative_error(of_batch, of_each) < 1e-12


def test_a_slice_of_a_batch_of_adapted_models_is_the_batch_of_these_tasks():
    data = draw_episodes(tasks=3)
    inputs = data.query[0][:, :2]  # as many examples as the slice has tasks
    batch = make_learner(make_network()[:2], head="ridge", method=None, proximal=None).adapt(
        data.support, batched=True
    )
    rest = batch[1:]
    assert len(rest) == 2
    assert relative_error(rest(inputs[1:]), batch(inputs)[1:]) < 1e-12
    assert relative_error(rest[-1](inputs[2]), batch(inputs)[2]) < 1e-12
    for index in (None, [0, 1], torch.tensor([0, 1])):
        with pytest.raises(TypeError, match="expected the number of a task, or a slice"):
            batch[index]


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("tasks", [1, 3])
def test_a_batch_of_adapted_models_refuses_inputs_of_another_number_of_tasks(vectorize, tasks):
    learner = make_learner(vectorize=vectorize)
    batch = learner.adapt(draw_episodes().support, batched=True)
    inputs = draw_episodes(tasks=tasks).query[0]
    for given in (inputs, list(inputs)):
        with pytest.raises(ValueError, match=f"got {tasks} sets of them, expected {TASKS}, one"):
            batch(given)


def test_an_adapted_model_takes_the_arrays_that_it_was_adapted_to():
    data = draw_episodes()
    learner = make_learner()
    inputs, labels = (x.numpy() for x in data.support)
    batch = learner.adapt((inputs, labels), batched=True)
    one = learner.adapt((inputs[1], labels[1]))
    expected = batch(data.query[0])
    queries = data.query[0].numpy()
    assert torch.equal(batch(queries), expected)
    assert relative_error(torch.stack(batch(list(queries))), expected) < 1e-12
    assert relative_error(one(queries[1]), expected[1]) < 1e-12


def test_parameters_that_do_not_adapt_are_those_of_the_learner_at_the_call():
    learner = make_learner(adapt="2.*")
    data = draw_episodes()
    adapted = learner.adapt(data.support, batched=True)
    before = adapted(data.query[0])
    with torch.no_grad():
        learner.model[0].weight.mul_(2.0)
        learner.model[2].weight.mul_(0.0)
    after = adapted(data.query[0])
    assert not torch.allclose(before, after)
    expected = learner.predict(adapted.params, data.query[0], batched=True)
    assert torch.equal(after, expected)


def test_evaluate_measures_after_the_numbers_of_steps_asked_for():
    learner = make_learner()
    losses, accuracies = learner.evaluate(draw_episodes(), steps=5)
    some, some_accuracies = learner.evaluate(draw_episodes(), steps=[4, 1])
    assert torch.equal(some, losses[[4, 1]])
    assert torch.equal(some_accuracies, accuracies[[4, 1]])
    assert learner.evaluate(draw_episodes())[0].shape == (3, TASKS)
    assert learner.evaluate(draw_episodes(), steps=0)[0].shape == (1, TASKS)
    for steps in (-1, [2, -1], []):
        with pytest.raises(ValueError, match=r"steps: got .*, expected at least 0 inner steps"):
            learner.evaluate(draw_episodes(), steps=steps)


@pytest.mark.parametrize("steps", [torch.tensor([2, 0]), np.array([2, 0])])
def test_evaluate_takes_arrays_of_numbers_of_steps(steps):
    learner = make_learner()
    losses, _ = learner.evaluate(draw_episodes(), steps=steps)
    assert torch.equal(losses, learner.evaluate(draw_episodes(), steps=[2, 0])[0])
    assert torch.equal(losses, learner.evaluate(draw_episodes(), steps=steps[0])[0][[2, 0]])


def test_evaluate_repeats_the_last_iterate_of_each_task_whose_loop_stops_early():
    stopping = make_learner(inner=GradientDescent(steps=20, lr=0.3, tol=0.3))
    endless = make_learner(inner=GradientDescent(steps=20, lr=0.3))
    losses, _ = stopping.evaluate(draw_episodes())
    expected, _ = endless.evaluate(draw_episodes())
    steps_taken = stopping.backward(draw_episodes()).report.inner_steps
    assert losses.shape == (21, TASKS)
    for task, steps in enumerate(steps_taken.tolist()):
        assert 1 < steps < 20
        path = losses[:, task]
        assert torch.allclose(path[: steps + 1], expected[: steps + 1, task], rtol=1e-12)
        assert torch.equal(path[steps:], path[steps].expand(21 - steps))


class Dropout(LinearModel):
    """Drops half of the outputs in training mode."""

    def forward(self, x):
        return F.dropout(self.layer(x), 0.5, self.training)


def test_dropout_is_drawn_for_each_task_and_off_in_evaluation_mode():
    learner = make_learner(Dropout(), method="unrolled")
    data = draw_episodes()
    same_tasks = SimpleNamespace(
        support=(data.support[0][:1].expand(TASKS, -1, -1), data.support[1]),
        query=(data.query[0][:1].expand(TASKS, -1, -1), data.query[1]),
    )
    losses, _ = learner.evaluate(same_tasks)
    assert len(set(losses[-1].tolist())) == TASKS
    learner.eval()
    losses, _ = learner.evaluate(same_tasks)
    assert torch.allclose(losses[-1], losses[-1][:1].expand(TASKS), rtol=1e-12)


def test_a_copy_of_a_learner_is_independent():
    learner = make_learner(Dropout(), method="unrolled")
    copied = copy.deepcopy(learner)
    copied.eval()

    def losses(of):
        return of.evaluate(draw_episodes())[0]

    assert torch.equal(losses(copied), losses(copied))
    assert not torch.equal(losses(learner), losses(learner))


def test_a_loss_of_the_parameters_themselves_is_refused_as_backward_refuses_it():
    model = make_network()

    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets) + model[2].weight.square().sum()

    data = draw_episodes()
    learner = MetaLearner(model, loss, vectorize="loop")
    message = r"loss: it depends on the parameter '2\.weight' of the model itself"
    with pytest.raises(ValueError, match=message):
        learner.adapt(data.support, batched=True)
    with pytest.raises(ValueError, match=message):
        learner.evaluate(data)
    with pytest.raises(ValueError, match=r"'model\.2\.weight' requires grad"):
        learner.backward(data)

    # A parameter that does not adapt is the same in the loss and in the model.
    of_body = MetaLearner(model, loss, adapt="0.*").adapt(data.support, batched=True)
    plain = MetaLearner(model, F.cross_entropy, adapt="0.*").adapt(data.support, batched=True)
    torch.testing.assert_close(of_body.params, plain.params, rtol=1e-12, atol=0)


class Tied(nn.Module):
    """Two layers of one weight, and a head."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.second(self.first(x).tanh()).tanh())


@pytest.mark.parametrize(
    ("adapt", "expected"),
    [
        ("second.*", ["first.weight", "second.bias"]),
        (lambda name: name == "second.weight", ["first.weight"]),
        (["first.bias", "head.*"], ["first.bias", "head.weight", "head.bias"]),
    ],
)
def test_a_tied_parameter_adapts_by_any_of_its_names(adapt, expected):
    assert MetaLearner(Tied(), F.cross_entropy, adapt=adapt).adapted == expected
