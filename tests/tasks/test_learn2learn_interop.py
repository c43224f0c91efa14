"""Our unrolled meta-gradient is learn2learn's MAML's, and a learn2learn taskset feeds a training run."""

from __future__ import annotations

import random
import warnings
from itertools import islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from metaimplicit import GradientDescent, MetaLearner
from metaimplicit.lifted import Vectorize
from tasks.episodes import Episodes, EpisodeSampler
from tasks.learn2learn import LearnToLearn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    l2l = pytest.importorskip("learn2learn", reason="needs the extra metaimplicit[learn2learn]")

pytestmark = pytest.mark.learn2learn

WAYS, SHOTS, QUERIES, SIDE = 4, 2, 3, 6
LR = 0.4


def images(dtype: torch.dtype, classes: int = 12, each: int = 8) -> TensorDataset:
    """Noisy copies of one random picture a class: inputs `[1, 6, 6]`, labels as torchvision gives them."""
    rng = torch.Generator().manual_seed(0)
    pictures = torch.randn(classes, 1, 1, SIDE, SIDE, generator=rng, dtype=torch.float64)
    noise = torch.randn(classes, each, 1, SIDE, SIDE, generator=rng, dtype=torch.float64)
    return TensorDataset(
        (pictures + 0.7 * noise).flatten(0, 1).to(dtype),
        torch.arange(classes).repeat_interleave(each),
    )


def sampler(dtype: torch.dtype, tasks: int = 4, seed: int = 0) -> EpisodeSampler:
    dataset = l2l.data.MetaDataset(images(dtype))
    named = l2l.data.transforms
    transforms = [
        named.NWays(dataset, n=WAYS),
        named.KShots(dataset, k=SHOTS + QUERIES),
        named.LoadData(dataset),
        named.RemapLabels(dataset),
        named.ConsecutiveLabels(dataset),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it prefers the newer name, Taskset
        taskset = l2l.data.TaskDataset(dataset, transforms)
    family = LearnToLearn(taskset, ways=WAYS, shots=SHOTS, queries=QUERIES, split="train")
    return EpisodeSampler(family, tasks=tasks, seed=seed)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 16), nn.Tanh(), nn.Linear(16, WAYS))


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 5, 3, padding=1),
        nn.ELU(),
        nn.Conv2d(5, 6, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(24, WAYS),
    )


def build(net: Any, dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return net().to(dtype)


def maml(model: nn.Module, episodes: Episodes, steps: int) -> tuple[float, list[Tensor]]:
    """Mean query loss over the tasks and its gradient, one task after another, by learn2learn."""
    outer = l2l.algorithms.MAML(model, lr=LR, first_order=False)
    losses = []
    for task in range(len(episodes)):
        (support, targets), (query, wanted) = (
            (x[task], y[task]) for x, y in (episodes.support, episodes.query)
        )
        learner = outer.clone()
        for _ in range(steps):
            learner.adapt(F.cross_entropy(learner(support), targets))
        losses.append(F.cross_entropy(learner(query), wanted))
    loss = torch.stack(losses).mean()
    return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))


def ours(
    model: nn.Module, steps: int, method: str = "unrolled", vectorize: Vectorize = "vmap"
) -> MetaLearner:
    # "auto" would choose by a timing, and the two agree to a tolerance, not to the bit.
    inner = GradientDescent(steps=steps, lr=LR)
    return MetaLearner(model, F.cross_entropy, inner=inner, method=method, vectorize=vectorize)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def distance(got: list[Tensor], expected: list[Tensor]) -> float:
    """Relative, over all parameters at once."""
    a, b = (torch.cat([g.detach().flatten() for g in side]) for side in (got, expected))
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("net", [mlp, conv])
def test_unrolled_equals_maml(
    net: Any, steps: int, vectorize: Vectorize, dtype: torch.dtype, tolerance: float
) -> None:
    model, episodes = build(net, dtype), sampler(dtype)[0]
    loss, expected = maml(model, episodes, steps)
    step = ours(model, steps, vectorize=vectorize).backward(episodes)
    assert float(step.loss) == pytest.approx(loss, rel=tolerance)
    assert distance(gradients(model), expected) < tolerance


def test_the_agreement_is_of_second_order() -> None:
    """First-order MAML is far from both, so the comparison sees the term that matters."""
    model, episodes = build(conv, torch.float64), sampler(torch.float64)[0]
    _, expected = maml(model, episodes, steps=5)
    ours(model, 5, "first-order").backward(episodes)
    assert distance(gradients(model), expected) > 1e-2


def train(seed: int, meta_steps: int = 5) -> tuple[list[float], list[Tensor], list[Tensor]]:
    """Losses, the first meta-gradient and the final parameters of a short run."""
    model = build(conv, torch.float32)
    learner = ours(model, steps=2)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
    losses, first = [], []
    for episodes in islice(sampler(torch.float32, seed=seed), meta_steps):
        step = learner.backward(episodes)
        first = first or gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(step.loss))
    return losses, first, [p.detach().clone() for p in model.parameters()]


def test_a_task_dataset_feeds_a_training_run() -> None:
    losses, first, end = train(seed=0)
    model = build(conv, torch.float32)
    _, expected = maml(model, sampler(torch.float32)[0], steps=2)
    assert distance(first, expected) < 1e-6
    assert all(torch.tensor(losses).isfinite())
    assert all(p.isfinite().all() for p in end)
    # Adam's first step has length lr in every coordinate with a gradient, so every tensor has moved.
    assert all(
        (p - start).abs().max() > 1e-3 for p, start in zip(end, model.parameters(), strict=True)
    )


def test_a_training_run_is_reproducible_to_the_bit() -> None:
    random.seed(1)
    losses, _, end = train(seed=0)
    random.seed(2)
    torch.rand(3)
    losses_again, _, end_again = train(seed=0)
    assert losses == losses_again
    assert all(torch.equal(a, b) for a, b in zip(end, end_again, strict=True))
    assert train(seed=1)[0] != losses
