"""How often a meta-step reads the value of a tensor, which on a GPU waits for all work before."""

import warnings
from collections import Counter

import pytest
import torch
from learner.few_shot import draw_episodes, make_learner
from torch.utils._python_dispatch import TorchDispatchMode

from metaimplicit import METHODS, GradientDescent, Unrolled
from metaimplicit.methods import known_options, make_method
from metaimplicit.solvers import iteration

# These differ from others in the numbers that they start from, or in the sketch that they draw.
ALIKE = {"nystrom-gaussian", "ekfac", "t1-t2"}
READS = {torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal}


class CountReads(TorchDispatchMode):
    """Counts the operations that return the value of a tensor to Python."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in READS:
            self.counts[function.overloadpacket] += 1
        return function(*args, **(kwargs or {}))


def a_learner(method):
    return make_learner(inner=GradientDescent(steps=2, lr=0.05), method=method, vectorize="vmap")


def small(flag, solver_steps=2):
    return make_method(flag, **known_options(flag, solver_steps=solver_steps, rank=3))


def count_reads(learner, tasks=2, *, is_new=True):
    data = draw_episodes(tasks=tasks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # two products are few
        if is_new:
            learner.backward(data)  # which compares vmap with a loop
        with CountReads() as reads:
            learner.backward(data)
    return reads.counts.total()


@pytest.fixture
def waits(monkeypatch):
    """Reads are as rare as on a GPU."""
    monkeypatch.setattr(iteration, "waits_to_read", lambda x: True)


@pytest.mark.parametrize("flag", [flag for flag in METHODS if flag not in ALIKE])
def test_the_reads_of_a_meta_step_do_not_depend_on_its_numbers_of_steps(flag, waits):
    learner = a_learner(small(flag, solver_steps=1))
    learner.inner = GradientDescent(steps=1, lr=0.05)
    reads = count_reads(learner)
    assert reads < 30
    learner.inner = GradientDescent(steps=2, lr=0.05)
    learner.method = small(flag, solver_steps=2)
    assert count_reads(learner, is_new=False) == reads


@pytest.mark.parametrize("flag", ["unrolled", "cg", "kfac"])
def test_the_reads_of_a_meta_step_do_not_depend_on_the_number_of_tasks(flag, waits):
    learner = a_learner(small(flag))
    assert count_reads(learner, tasks=2) == count_reads(learner, tasks=3)


def test_a_read_in_every_step_would_be_seen(waits, monkeypatch):
    replay = Unrolled(memory="replay")
    reads = count_reads(a_learner(replay))
    step = GradientDescent.take_step

    def read(self, params, *args, **options):
        assert all(bool(p.isfinite().all()) for p in params.values())
        return step(self, params, *args, **options)

    monkeypatch.setattr(GradientDescent, "take_step", read)
    steps, runs, tensors = 2, 2, 4  # the pull runs the steps again
    assert count_reads(a_learner(replay)) == reads + steps * runs * tensors


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("flag", METHODS)
def test_the_waits_of_a_gpu_do_not_depend_on_the_size_of_a_meta_step(flag):
    def count_waits(steps, tasks):
        learner = make_learner(
            inner=GradientDescent(steps=steps, lr=0.05),
            method=make_method(flag, **known_options(flag, solver_steps=3, rank=3)),
            vectorize="vmap",
        ).to("cuda")
        data = draw_episodes(tasks=tasks)
        data.support, data.query = (
            [x.to("cuda") for x in part] for part in (data.support, data.query)
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(2):
                learner.backward(data)
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                learner.backward(data)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(warning.message) for warning in caught)

    waits = count_waits(4, 2)
    assert waits < 30
    assert count_waits(12, 2) == waits
    assert count_waits(4, 5) == waits
