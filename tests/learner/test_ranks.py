"""Several processes give the meta-gradient, the loss and the accuracy of one that has all tasks."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from learner.few_shot import WAYS, draw_episodes, make_learner
from rank_group import run_on_ranks
from torch import nn

from metaimplicit import Implicit, MetaLearner, Nystrom
from metaimplicit.learner import LostRanksError, Ranks


def sketched():
    # Ω is drawn anew, and is the same for all tasks.
    generator = torch.Generator().manual_seed(5)
    return Implicit(Nystrom(rank=10, sketch="gaussian", generator=generator))


def make_head():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh()).double()
    return MetaLearner(model, F.cross_entropy, head="ridge", learn=["lambda"], vectorize="vmap")


LEARNERS = {
    "unrolled": lambda: make_learner(method="unrolled", learn=["lr"]),
    "cg": lambda: make_learner(method="cg"),
    "nystrom": lambda: make_learner(method="nystrom"),
    "drawn sketch": lambda: make_learner(method=sketched()),
    "first-order": lambda: make_learner(method="first-order"),
    "loop": lambda: make_learner(vectorize="loop"),
    "ridge": make_head,
}
COUNTS = (3, 4)  # of tasks, for two processes


def draw_ragged():
    """Three tasks of two sizes."""
    small, large = draw_episodes(tasks=2), draw_episodes(seed=5, tasks=1)
    twice = SimpleNamespace(support=[torch.cat([x, x], 1) for x in large.support])
    twice.query = large.query
    return [
        {name: tuple(x[i] for x in getattr(e, name)) for name in ("support", "query")}
        for e, i in ((small, 0), (twice, 0), (small, 1))
    ]


def batches(name):
    # A sketch is drawn for each size of tasks, so that it depends on the processes.
    ragged = [draw_ragged()] if name == "unrolled" else []
    return [*(draw_episodes(tasks=tasks) for tasks in COUNTS), *ragged]


def measure(ranks):
    """Gradients, loss and accuracy for all learners and batches, in the order of both."""
    ends = {}
    for name, make in LEARNERS.items():
        learner = make()
        for number, episodes in enumerate(batches(name)):
            learner.zero_grad()
            torch.manual_seed(number)  # of a sketch without a generator
            step = ranks.average(learner, learner.backward(ranks.share(episodes)))
            flat = torch.cat([p.grad.flatten() for p in learner.parameters()])
            ends[name, number] = torch.cat([flat, step.loss[None], step.accuracy[None]]).tolist()
    return ends


def measure_on_rank(rank):
    """The ends of a process, in a group whose last process is killed."""
    ranks = Ranks.of_group()
    assert ranks.rank == rank
    ends = measure(ranks)
    assert ends == ranks.from_first(lambda: ends)  # to the bit
    agree(ranks)
    lose(ranks)
    return ends


def agree(ranks):
    body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh()).double()
    with torch.no_grad():
        body[0].weight += ranks.rank
    learner = MetaLearner(body, F.cross_entropy, head="ridge")
    learner.load_state_dict(ranks.from_first(learner.state_dict))
    learner.vectorize = "vmap"
    ranks.average(learner, learner.backward(ranks.share(draw_episodes(tasks=3))))
    held = {name: x.tolist() for name, x in learner.state_dict().items()}
    assert body[1].running_mean.abs().max() > 0
    assert held == ranks.from_first(lambda: held)

    assert ranks.largest(ranks.rank, -ranks.rank) == [1, 0]
    numbers = {"loss": float(ranks.rank), "accuracy": None, "bad": float("nan")}
    means = ranks.means(numbers, tasks=ranks.rank + 1)
    assert means["loss"] == pytest.approx(2 / 3, rel=1e-15)
    assert means["accuracy"] is None
    assert means["bad"] != means["bad"]
    assert ranks.means({"accuracy": 0.5 if ranks.rank else None}, tasks=1) == {"accuracy": None}

    # The targets of one process alone are classes.
    episodes = draw_episodes(tasks=2)
    pairs = [[tuple(x[i] for x in e) for e in (episodes.support, episodes.query)] for i in (0, 1)]
    x, y = pairs[0][1]
    pairs[0][1] = x, F.one_hot(y, WAYS).to(x)
    learner = make_learner()
    step = ranks.average(learner, learner.backward(ranks.share(pairs)))
    assert step.accuracy is None


def lose(ranks):
    error = ZeroDivisionError if ranks.rank == 0 else LostRanksError
    with pytest.raises(error):
        ranks.from_first(lambda: 1 / 0)
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(LostRanksError, match=r"ranks: lost another process \(.*--resume"):
        ranks.largest(1.0)


@pytest.mark.slow
def test_two_processes_give_what_one_gives_with_all_tasks():
    ends, killed = run_on_ranks(measure_on_rank, 2)
    assert killed is None
    for key, expected in measure(Ranks()).items():
        expected = torch.tensor(expected, dtype=torch.float64)
        error = (torch.tensor(ends[key], dtype=torch.float64) - expected).norm()
        assert error <= 1e-12 * expected.norm(), key


def test_one_process_keeps_its_batches_and_steps():
    ranks = Ranks()
    episodes = draw_episodes()
    assert ranks.share(episodes) is episodes
    learner = make_learner()
    step = learner.backward(episodes)
    assert ranks.average(learner, step) is step


@pytest.mark.parametrize("tasks", [3, 4, 5])
def test_shares_are_a_partition(tasks):
    episodes = draw_episodes(tasks=tasks)
    shares = [Ranks(rank, 3).share(episodes) for rank in range(3)]
    assert torch.equal(torch.cat([s.query.inputs for s in shares]), episodes.query[0])
    sizes = [len(s.support.targets) for s in shares]
    assert max(sizes) - min(sizes) <= 1


def test_tasks_of_several_sizes_are_shared():
    ragged = draw_ragged()
    shares = [Ranks(rank, 2).share(ragged) for rank in range(2)]
    assert [len(task.support.targets) for share in shares for task in share] == [
        WAYS,
        2 * WAYS,
        WAYS,
    ]


def test_every_process_needs_a_task():
    with pytest.raises(ValueError, match="got 2 tasks for 3 processes"):
        Ranks(0, 3).share(draw_episodes(tasks=2))
