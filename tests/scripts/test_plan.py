"""The way to compute the meta-steps of a run, found by the clock."""

import warnings
from dataclasses import replace

import command_line.run_plan as run_plan
import command_line.ways as ways
import pytest
import torch
import train
from command_line import (
    MeasuredPlan,
    Search,
    Way,
    build_learner,
    change_way,
    find_plan,
    parse,
    read_plan,
    settle_plan,
    undone,
)
from scripts.running import SMALL
from torch import nn
from torch.nn.functional import cross_entropy

import tasks
from metaimplicit import MetaLearner, compilation
from metaimplicit.learner import Ranks
from metaimplicit.models import ConvNet
from metaimplicit.training import read_sealed_json

EAGER = Way("vmap", chunk_size=None, channels_last=False, compile=False, threads=1)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Clock:
    """A clock that stands still but for what `sleep` adds, in place of the module `time`."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(ways, "time", clock)
    return clock


def make_search(clock, seconds_of, *, run_seconds=1e6, gradient_of=lambda way: 1.0, says=None):
    """A search among ways that take `seconds_of(way)`, and the list of the ways it calls."""
    learner = MetaLearner(ConvNet((2, 8, 8), 3, filters=2), cross_entropy, vectorize="vmap")
    called = []

    def step():
        way = Way.of(learner)
        called.append(way)
        clock.sleep(seconds_of(way))
        for p in learner.parameters():
            p.grad = torch.full_like(p, gradient_of(way))
        if says and way.compile:
            warnings.warn(says, RuntimeWarning, stacklevel=1)
        return torch.zeros(())

    return Search(learner, step, run_seconds=lambda of_step: run_seconds), called


def run(search, fixed=(), threads=2):
    return find_plan(search, tasks=4, threads=threads, fixed=set(fixed))


def test_a_way_is_applied_and_read_back():
    learner = MetaLearner(ConvNet((2, 8, 8), 3, filters=2), cross_entropy)
    way = Way("loop", chunk_size=3, channels_last=True, compile=True, threads=2)
    for wanted in (way, EAGER):
        wanted.apply(learner)
        assert Way.of(learner) == wanted


def test_the_fastest_way_is_kept_one_change_after_the_other(clock):
    def seconds(way):
        fast = [way.threads == 2, way.chunk_size == 2, way.channels_last, way.compile]
        return 0.04 * 0.5 ** sum(fast) * (4 if way.vectorize == "loop" else 1)

    search, _ = make_search(clock, seconds)
    plan = run(search)
    assert plan.way == Way("vmap", chunk_size=2, channels_last=True, compile=True, threads=2)
    assert Way.of(search.learner) == plan.way
    assert [str(trial.way) for trial in plan.trials] == [
        "vmap, 1 thread",
        "vmap, 2 threads",
        "loop, 2 threads",
        "vmap by 2, 2 threads",
        "vmap by 2, 2 threads, channels last",
        "vmap by 2, 2 threads, channels last, compiled",
    ]


@pytest.mark.parametrize(("gain", "is_kept"), [(0.95, False), (0.85, True)])
def test_a_way_has_to_save_a_tenth_of_the_time(clock, gain, is_kept):
    search, _ = make_search(clock, lambda way: 0.1 * (gain if way.threads == 2 else 1))
    assert (run(search).way.threads == 2) is is_kept


def test_a_way_that_is_far_slower_is_timed_once(clock):
    search, called = make_search(clock, lambda way: 0.1 if way.vectorize == "vmap" else 0.5)
    run(search)
    assert [way.vectorize for way in called].count("loop") == 2


def test_ways_whose_times_differ_by_more_than_a_fifth_are_timed_again(clock):
    times = iter([0.1, 0.1, 0.13, *[0.1] * 100])
    search, called = make_search(clock, lambda way: next(times))
    run(search, fixed={"vectorize", "chunk_size", "channels_last", "compile"})
    # three calls of each, and another round of both
    assert [way.threads for way in called] == [1] * 3 + [2] * 3 + [1] * 3 + [2] * 3


def test_a_way_whose_first_call_is_slow_is_judged_by_later_ones(clock):
    called = []

    def seconds(way):
        called.append(way)
        return 0.1 if way.threads == 1 else 0.9 if called.count(way) == 1 else 0.02

    search, _ = make_search(clock, seconds)
    assert run(search, fixed={"vectorize", "chunk_size", "channels_last"}).way.threads == 2


def test_what_is_fixed_is_not_changed(clock):
    search, _ = make_search(clock, lambda way: 1.0 if way == EAGER else 0.1)
    plan = run(search, fixed=set(Way.__dataclass_fields__))
    assert (plan.way, len(plan.trials)) == (EAGER, 1)


def test_a_short_run_is_not_held_up(clock):
    search, called = make_search(clock, lambda way: 0.1, run_seconds=1.0)
    assert (run(search).way, called) == (EAGER, [EAGER] * 3)


@pytest.mark.parametrize(
    ("seconds", "run_seconds", "is_tried"),
    [(0.01, 1e4, True), (0.01, 100.0, False), (0.2, 1e4, False)],
    ids=["small and long", "short", "large"],
)
def test_compilation_is_tried_where_it_may_pay(clock, seconds, run_seconds, is_tried):
    search, called = make_search(clock, lambda way: seconds, run_seconds=run_seconds)
    run(search)
    assert any(way.compile for way in called) is is_tried


@pytest.mark.parametrize(("before", "after", "share"), [(1.0, 1.1, "0.1"), (0.0, 1.0, "inf")])
def test_a_way_with_another_gradient_is_refused(before, after, share, clock):
    search, _ = make_search(
        clock,
        lambda way: 0.01 if way.chunk_size else 0.1,
        gradient_of=lambda way: after if way.chunk_size else before,
    )
    plan = run(search)
    assert plan.way.chunk_size is None
    assert f"  its meta-gradient differs by {share} of its norm" in plan.table()


def test_the_first_way_of_a_run_is_accurate_in_single_precision():
    """In channels-last format, batch statistics of glyphs on black are not."""
    family = tasks.load("glyphs", ways=20, shots=1, queries=5).train
    batch = tasks.EpisodeSampler(family, tasks=2)[0]
    learner = build_learner(parse(["--device", "cpu"]), family)
    gradients = []
    for dtype in (torch.float32, torch.float64):
        learner.to(dtype).zero_grad()
        sets = ((inputs.to(dtype), labels) for inputs, labels in (batch.support, batch.query))
        learner.backward(tuple(sets))
        gradients.append(torch.cat([p.grad.flatten().double() for p in learner.parameters()]))
    single, double = gradients
    assert (single - double).norm() < 1e-4 * double.norm()


def test_a_meta_gradient_that_is_not_finite_ends_the_search(clock):
    search, called = make_search(clock, lambda way: 0.1, gradient_of=lambda way: float("nan"))
    assert run(search).way == EAGER
    assert set(called) == {EAGER}


def test_a_way_that_fails_is_refused_and_has_no_time(clock):
    def seconds(way):
        if way.threads == 2:
            raise RuntimeError
        return 0.1

    search, _ = make_search(clock, seconds)
    plan = run(search, fixed={"vectorize", "chunk_size", "channels_last", "compile"})
    assert Way.of(search.learner) == plan.way == EAGER
    assert plan.table().endswith(
        "  vmap, 2 threads                                  –  RuntimeError"
    )


def test_without_a_compiler_the_search_goes_on(clock, monkeypatch):
    monkeypatch.setattr(compilation, "missing_compiler", lambda device: "there is none")
    pair = (torch.randn(2, 3, 2, 8, 8), torch.arange(3).expand(2, -1))
    learner = MetaLearner(ConvNet((2, 8, 8), 3, filters=2), cross_entropy, vectorize="vmap")

    def step():
        clock.sleep(0.01)
        return learner.backward((pair, pair)).loss

    search = Search(learner, step, run_seconds=lambda of_step: 1e6)
    plan = run(search, fixed={"threads", "vectorize", "chunk_size", "channels_last"})
    assert (plan.way, len(plan.trials)) == (EAGER, 2)
    assert "compile: there is none; it runs eager" in plan.table()


def test_buffers_that_no_checkpoint_holds_are_put_back():
    learner = MetaLearner(nn.Linear(2, 3), cross_entropy)
    learner.model.register_buffer("calls", torch.zeros(1), persistent=False)
    with undone(learner):
        learner.model.calls += 1
    assert learner.model.calls == 0


def test_a_loop_is_called_one_whatever_the_chunk_size():
    assert str(replace(EAGER, vectorize="loop", chunk_size=4)) == "loop, 1 thread"


def test_a_way_that_cannot_be_compiled_is_refused_with_the_reason(clock):
    search, _ = make_search(clock, lambda way: 0.04 - 0.03 * way.compile, says="compile: no g++")
    plan = run(search)
    assert not plan.way.compile
    assert not search.learner.compiles
    assert "compile: no g++" in plan.table()


def test_the_table_says_when_compilation_has_paid_for_itself(clock):
    calls = []

    def seconds(way):
        calls.append(way)
        if not way.compile:
            return 0.04
        return 20.0 if calls.count(way) == 1 else 0.02

    search, _ = make_search(clock, seconds)
    table = run(search).table()
    assert "compilation took 20 s, and has paid off after 1,000 meta-steps" in table
    assert "  vmap, 1 thread, compiled                        20  kept" in table


def set_up(tmp_path, *options):
    args = ["--filters=4", "--meta-batch=2", "--queries=1", "--compile=False", *options]
    return train.set_up(train.parse([*args, f"--out={tmp_path}"]), Ranks())


class TickingClock(Clock):
    """A clock that goes on by 0.05 s whenever it is read."""

    def perf_counter(self):
        self.sleep(0.05)
        return self.now


@pytest.mark.parametrize(
    "options",
    [
        ["--task=sinusoid", "--method=nystrom-gaussian", "--proximal=10", "--inner-steps=2"],
        ["--task=glyphs", "--head=ridge"],
    ],
    ids=["sketch", "ridge"],
)
def test_a_search_leaves_the_run_as_it_is(options, tmp_path, monkeypatch):
    monkeypatch.setattr(ways, "time", TickingClock())
    trials = []
    states = []
    for number in (500, 1):
        timed = set_up(tmp_path, *options, f"--steps={number}")
        states.append(torch.get_rng_state())
        trials.append(len(timed.plan.trials))
        torch.manual_seed(0)
        untouched = build_learner(timed.options, timed.sampler.family).state_dict()
        for name, x in timed.learner.state_dict().items():
            assert torch.equal(x, untouched[name]), name
        assert all(p.grad is None for p in timed.learner.parameters())
    assert torch.equal(*states)
    assert trials[0] > trials[1] == 1


def test_all_ways_have_the_same_meta_gradient():
    torch.manual_seed(0)
    learner = MetaLearner(ConvNet((2, 8, 8), 3, filters=2).double(), cross_entropy)
    inputs, targets = torch.randn(4, 3, 2, 8, 8, dtype=torch.float64), torch.arange(3)
    pair = (inputs, targets.expand(4, -1))
    gradients = []
    for changes in (
        {},
        {"vectorize": "loop"},
        {"chunk_size": 3},
        {"channels_last": True},
        {"threads": 2},
    ):
        replace(EAGER, **changes).apply(learner)
        learner.zero_grad()
        learner.backward((pair, pair))
        gradients.append([p.grad for p in learner.parameters()])
    for other in gradients[1:]:
        for g, expected in zip(other, gradients[0], strict=True):
            torch.testing.assert_close(g, expected, rtol=1e-10, atol=1e-12)


def test_a_resumed_run_keeps_its_way(tmp_path, capsys):
    train.main([*SMALL, "--steps=2", f"--out={tmp_path}"])
    config = read_sealed_json(tmp_path / "config.json")
    assert config["plan"]["way"]["compile"] is False
    assert config["plan"]["load"] is None or config["plan"]["load"] >= 0
    stored = read_plan(tmp_path)
    assert stored.dump() == config["plan"]
    options = train.parse(["--resume", "--steps=3", f"--out={tmp_path}"])
    assert change_way(stored.way, options) == stored.way
    changed = change_way(stored.way, replace(options, threads=7, compile=True))
    assert changed == replace(stored.way, threads=7, compile=True)
    capsys.readouterr()
    train.main(["--resume", "--steps=3", f"--out={tmp_path}"])
    assert stored.summary() in capsys.readouterr().out
    assert read_sealed_json(tmp_path / "config.json")["plan"] == config["plan"]


def test_a_plan_without_trials_is_one_line():
    assert MeasuredPlan(EAGER).summary() == "plan: vmap, 1 thread"


def test_several_processes_are_not_timed(tmp_path):
    options = train.parse(["--steps=500", f"--out={tmp_path}"])
    learner = MetaLearner(nn.Linear(2, 3), cross_entropy)
    plan = settle_plan(options, learner, sampler=None, ranks=Ranks(0, 2), threads=2, can_vmap=True)
    assert plan == MeasuredPlan(EAGER)


@pytest.mark.parametrize(
    ("options", "can_vmap", "expected"),
    [
        ([], True, set()),
        (["--threads=1"], True, {"threads"}),
        (["--vectorize=vmap"], True, {"vectorize"}),
        (["--chunk-size=2"], True, {"vectorize", "chunk_size"}),
        (["--compile=False"], True, {"compile"}),
        ([], False, {"vectorize"}),
    ],
)
def test_options_fix_parts_of_the_plan(options, can_vmap, expected, tmp_path, monkeypatch):
    fixed = []
    monkeypatch.setattr(run_plan, "Search", lambda *args, **kwargs: None)
    monkeypatch.setattr(run_plan, "find_plan", lambda *args, **kwargs: fixed.append(kwargs))
    settle(train.parse(["--steps=5", f"--out={tmp_path}", *options]), can_vmap=can_vmap)
    assert fixed == [{"tasks": 8, "threads": 2, "fixed": expected}]


def settle(options, *, can_vmap=True, ranks=None):
    learner = MetaLearner(nn.Linear(2, 3), cross_entropy)
    pair = (torch.zeros(2, 3, 2), torch.arange(3).expand(2, -1))
    return settle_plan(
        options,
        learner,
        sampler=[(pair, pair)],
        ranks=ranks or Ranks(),
        threads=2,
        can_vmap=can_vmap,
    )


def test_a_run_that_goes_on_elsewhere_keeps_what_fits(tmp_path, monkeypatch):
    options = replace(train.parse(["--steps=5", f"--out={tmp_path}"]), resume=True)
    stored = MeasuredPlan(replace(EAGER, vectorize="loop", threads=2))
    monkeypatch.setattr(run_plan, "read_plan", lambda folder: stored)
    assert settle(options) == stored
    # Each of several processes has its own number of threads, which torchrun sets.
    torch.set_num_threads(1)
    assert settle(options, ranks=Ranks(0, 2)).way == replace(stored.way, threads=1)

    monkeypatch.setattr(run_plan, "Search", lambda *args, **kwargs: None)
    monkeypatch.setattr(run_plan, "find_plan", lambda *args, **kwargs: "a new plan")
    monkeypatch.setattr(run_plan, "read_plan", lambda folder: replace(stored, device="cuda"))
    assert settle(options) == "a new plan"
