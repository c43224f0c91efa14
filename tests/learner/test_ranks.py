"""Several processes give the meta-gradient, the loss and the accuracy of one that has all tasks."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from learner.few_shot import WAYS, draw_episodes, make_learner
from rank_group import results, run_on_ranks, start
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
    ranks = Ranks.of_group()
    assert ranks.rank == rank
    return measure(ranks)


@pytest.mark.slow
def test_two_processes_give_what_one_gives_with_all_tasks():
    first, second = run_on_ranks(measure_on_rank, 2)
    assert first == second  # to the bit
    for key, expected in measure(Ranks()).items():
        expected = torch.tensor(expected, dtype=torch.float64)
        error = (torch.tensor(first[key], dtype=torch.float64) - expected).norm()
        assert error <= 1e-12 * expected.norm(), key


def agree(rank):
    ranks = Ranks.of_group()
    with pytest.raises(ValueError, match="got 2 tasks for 3 processes"):
        ranks.share(draw_episodes(tasks=2))
    body = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh()).double()
    learner = MetaLearner(body, F.cross_entropy, head="ridge")
    learner.load_state_dict(ranks.from_first(learner.state_dict))
    start = {name: x.tolist() for name, x in learner.named_parameters()}
    share = ranks.share(draw_episodes(tasks=4))
    ranks.average(learner, learner.backward(share))
    numbers = {"loss": float(rank), "accuracy": None, "bad": float("nan")}
    return {
        "largest": ranks.largest(rank, -rank),
        "means": ranks.means(numbers, tasks=rank + 1),
        "start": start,
        "statistics": (body[1].running_mean.tolist(), body[1].running_var.tolist()),
    }


@pytest.mark.slow
def test_processes_agree_on_numbers_weights_and_statistics():
    ends = run_on_ranks(agree, 3)
    for end in ends:
        assert end["largest"] == [2, 0]
        assert end["means"]["loss"] == pytest.approx((0 * 1 + 1 * 2 + 2 * 3) / 6, rel=1e-15)
        assert end["means"]["accuracy"] is None
        assert end["means"]["bad"] != end["means"]["bad"]
        assert end["start"] == ends[0]["start"]
        assert end["statistics"] == ends[0]["statistics"]


def fail_first(rank):
    ranks = Ranks.of_group()
    try:
        ranks.from_first(lambda: 1 / 0)
    except (ZeroDivisionError, LostRanksError) as error:
        failed = type(error).__name__
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(LostRanksError, match=r"ranks: lost another process \(.*--resume"):
        ranks.largest(1.0)
    return failed


@pytest.mark.slow
def test_a_process_that_fails_or_is_killed_ends_the_others():
    assert results(start(fail_first, 2)) == ["ZeroDivisionError", None]


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
