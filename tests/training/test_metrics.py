"""Means, intervals, and what evaluation counts."""

import pytest
import torch

import tasks
from metaimplicit import GradientDescent, MetaLearner
from metaimplicit.models import MLP
from metaimplicit.training import Estimate, evaluate, plot_adaptation


def test_interval_is_196_standard_errors_of_the_sample_deviation():
    estimate = Estimate.of(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert estimate.mean == 3.0
    # deviations −2 −1 0 3: s² = 14/3
    assert estimate.interval == pytest.approx(1.96 * (14 / 3) ** 0.5 / 2, rel=1e-14)
    assert estimate.tasks == 4
    with pytest.raises(
        ValueError, match=r"values: got shape \(1,\), expected one number for each of 2 tasks"
    ):
        Estimate.of(torch.ones(1))


def test_evaluation_is_the_learners_trimmed_to_the_tasks_asked_for_and_leaves_its_mode():
    torch.manual_seed(0)
    learner = MetaLearner(
        MLP(1, 1),
        torch.nn.functional.mse_loss,
        inner=GradientDescent(2, lr=0.01),
        method="unrolled",
    )
    sampler = tasks.EpisodeSampler(tasks.load("sinusoid", shots=5, queries=5).test, tasks=3, seed=1)
    result = evaluate(learner, (sampler[i] for i in range(2)), tasks=5)
    assert (result.metric, result.losses.shape, learner.training) == ("mse", (3, 5), True)
    torch.testing.assert_close(
        result.losses[:, :3], learner.evaluate(sampler[0])[0], rtol=0, atol=0
    )

    # an oracle for one task: two plain steps of gradient descent
    support, query = ([x[1] for x in pair] for pair in (sampler[0].support, sampler[0].query))
    model = MLP(1, 1)
    model.load_state_dict(learner.model.state_dict())
    for _ in range(2):
        gradients = torch.autograd.grad(
            (model(support[0]) - support[1]).square().mean(), list(model.parameters())
        )
        with torch.no_grad():
            for p, g in zip(model.parameters(), gradients, strict=True):
                p -= 0.01 * g
    expected = (model(query[0]) - query[1]).square().mean()
    torch.testing.assert_close(result.losses[2, 1], expected.detach(), rtol=1e-5, atol=0)

    with pytest.raises(ValueError, match="batches: got none"):
        evaluate(learner, [])
    with pytest.raises(ValueError, match="steps: got -1"):
        evaluate(learner, [sampler[0]], steps=-1)


def test_an_evaluation_knows_after_how_many_steps_it_was_measured_and_leaves_every_module_as_it_was(
    tmp_path, monkeypatch
):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        MLP(1, 8), torch.nn.Dropout(0.5), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1)
    )
    learner = MetaLearner(
        model, torch.nn.functional.mse_loss, inner=GradientDescent(2, lr=0.01), method="unrolled"
    )
    model[1].eval()
    sampler = tasks.EpisodeSampler(tasks.load("sinusoid", shots=5, queries=5).test, tasks=3, seed=1)
    result = evaluate(learner, [sampler[0]], steps=[0, 3, 7])
    assert result.steps == (0, 3, 7)
    assert [row["steps"] for row in result.summary()["after_steps"]] == [0, 3, 7]
    assert result.summary()["inner_steps"] == 7
    assert (model.training, model[1].training, model[2].training) == (True, False, True)
    figures = []
    monkeypatch.setattr(
        "metaimplicit.training.plots._save", lambda figure, path: figures.append(figure)
    )
    plot_adaptation(tmp_path, result)
    assert figures[0].axes[0].lines[0].get_xdata().tolist() == [0, 3, 7]


class Merging(torch.nn.Module):
    """Adds a part to its weight in evaluation mode, and takes it away for training."""

    def __init__(self):
        super().__init__()
        self.layer, self.merged = MLP(1, 1), False

    def train(self, mode=True):
        if mode == self.merged:
            with torch.no_grad():
                for p in self.layer.parameters():
                    p.add_(-1.0 if mode else 1.0)
            self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        return self.layer(x)


def test_an_evaluation_ends_as_a_module_would_have_it():
    model = Merging()
    before = [p.detach().clone() for p in model.parameters()]
    learner = MetaLearner(
        model, torch.nn.functional.mse_loss, inner=GradientDescent(2, lr=0.01), method="unrolled"
    )
    sampler = tasks.EpisodeSampler(tasks.load("sinusoid", shots=5, queries=5).test, tasks=3, seed=1)
    evaluate(learner, [sampler[0]])
    for p, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), old, rtol=0, atol=1e-6)
