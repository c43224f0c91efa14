"""Our unrolled meta-gradient equals that of learn2learn's MAML, on episodes of its tasksets."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from tasksets import import_learn2learn
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from metaimplicit import GradientDescent, MetaLearner
from metaimplicit.lifted import Vectorize
from tasks.episodes import Episodes, EpisodeSampler
from tasks.learn2learn import LearnToLearn

l2l = import_learn2learn()

pytestmark = pytest.mark.learn2learn

WAYS = 4
SHOTS = 2
QUERIES = 3
SIDE = 6
LR = 0.4


def noisy_images(dtype: torch.dtype, classes: int = 12, count: int = 8) -> TensorDataset:
    """Noisy copies of one random picture for each class: inputs `[1, 6, 6]`."""
    rng = torch.Generator().manual_seed(0)
    pictures = torch.randn(classes, 1, 1, SIDE, SIDE, generator=rng, dtype=torch.float64)
    noise = torch.randn(classes, count, 1, SIDE, SIDE, generator=rng, dtype=torch.float64)
    images = (pictures + 0.7 * noise).flatten(0, 1).to(dtype)
    return TensorDataset(images, torch.arange(classes).repeat_interleave(count))


def make_sampler(dtype: torch.dtype, tasks: int = 4, seed: int = 0) -> EpisodeSampler:
    dataset = l2l.data.MetaDataset(noisy_images(dtype))
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


def build(network: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return network().to(dtype)


def maml(model: nn.Module, episodes: Episodes, steps: int) -> tuple[float, list[Tensor]]:
    """The mean query loss over tasks and its gradient, by learn2learn, task by task."""
    outer = l2l.algorithms.MAML(model, lr=LR, first_order=False)
    losses = []
    for task in range(len(episodes)):
        inputs, targets = (x[task] for x in episodes.support)
        query_inputs, query_targets = (x[task] for x in episodes.query)
        learner = outer.clone()
        for _ in range(steps):
            learner.adapt(F.cross_entropy(learner(inputs), targets))
        losses.append(F.cross_entropy(learner(query_inputs), query_targets))
    loss = torch.stack(losses).mean()
    return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))


def make_learner(
    model: nn.Module, steps: int, method: str = "unrolled", vectorize: Vectorize = "vmap"
) -> MetaLearner:
    # "auto" would choose by a timing, and the two agree to a tolerance, not to the bit.
    inner = GradientDescent(steps=steps, lr=LR)
    return MetaLearner(model, F.cross_entropy, inner=inner, method=method, vectorize=vectorize)


def gradients(model: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def relative_distance(got: list[Tensor], expected: list[Tensor]) -> float:
    """‖got − expected‖ / ‖expected‖ over all parameters at once."""
    a = torch.cat([g.detach().flatten() for g in got])
    b = torch.cat([g.detach().flatten() for g in expected])
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("network", [mlp, conv])
def test_unrolled_equals_maml(
    network: Callable[[], nn.Module],
    steps: int,
    vectorize: Vectorize,
    dtype: torch.dtype,
    tolerance: float,
) -> None:
    model = build(network, dtype)
    episodes = make_sampler(dtype)[0]
    loss, expected = maml(model, episodes, steps)
    step = make_learner(model, steps, vectorize=vectorize).backward(episodes)
    assert float(step.loss) == pytest.approx(loss, rel=tolerance)
    assert relative_distance(gradients(model), expected) < tolerance


def test_the_agreement_is_of_second_order() -> None:
    """First-order MAML is far from both, so the comparison sees the term that matters."""
    model = build(conv, torch.float64)
    episodes = make_sampler(torch.float64)[0]
    _, expected = maml(model, episodes, steps=5)
    make_learner(model, 5, "first-order").backward(episodes)
    assert relative_distance(gradients(model), expected) > 1e-2


def train(seed: int, meta_steps: int = 5) -> tuple[list[float], list[Tensor], list[Tensor]]:
    """The losses, the first meta-gradient and the final parameters of a short run."""
    model = build(conv, torch.float32)
    learner = make_learner(model, steps=2)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-2)
    losses: list[float] = []
    first: list[Tensor] = []
    for episodes in islice(make_sampler(torch.float32, seed=seed), meta_steps):
        step = learner.backward(episodes)
        first = first or gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(step.loss))
    return losses, first, [p.detach().clone() for p in model.parameters()]


def test_a_taskset_feeds_a_training_run() -> None:
    losses, first, end = train(seed=0)
    model = build(conv, torch.float32)
    _, expected = maml(model, make_sampler(torch.float32)[0], steps=2)
    assert relative_distance(first, expected) < 1e-6
    assert all(torch.tensor(losses).isfinite())
    assert all(p.isfinite().all() for p in end)
    # Adam's first step has length lr in every coordinate that has a gradient.
    for p, start in zip(end, model.parameters(), strict=True):
        assert (p - start).abs().max() > 1e-3


def test_a_training_run_is_reproducible_to_the_bit() -> None:
    random.seed(1)
    losses, _, end = train(seed=0)
    random.seed(2)
    torch.rand(3)
    losses_again, _, end_again = train(seed=0)
    assert losses == losses_again
    assert all(torch.equal(a, b) for a, b in zip(end, end_again, strict=True))
    other_losses, _, _ = train(seed=1)
    assert other_losses != losses
