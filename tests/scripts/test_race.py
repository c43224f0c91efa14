"""The race: its clock, its rows, its table, and the meta-gradients of the other libraries."""

import importlib
import json
from types import SimpleNamespace

import pytest
import race
import torch
import torch.nn.functional as F
from racing import Course, race_table
from racing.contender import Sizes
from racing.contenders import Entry
from racing.course import choose_threads, clock_times, run_race, train
from racing.report import fastest_line, minutes_to
from racing.with_higher import HigherMAML
from racing.with_learn2learn import learn2learn_anil, learn2learn_maml
from scripts.running import draw_nothing, error_line
from tasksets import import_learn2learn
from torch import nn
from torch.func import functional_call

from tasks import Episodes, EpisodeSampler, FewShot, ImagePool

CURVE = [(15, 0.5), (30, 0.9), (45, 0.949), (60, 0.96), (90, 0.94), (120, 0.975)]
COURSE = Course("glyphs", None, 1e-3, validation_tasks=3, test_tasks=2, threads=(1,), seed=0)


def make_row(contender, points):
    curve = [{"seconds": s, "steps": 2 * s, "accuracy": a} for s, a in points]
    return {
        "contender": contender,
        "chosen_threads": 2,
        "normalization": "each image alone",
        "curve": curve,
        "test": {"mean": 0.97, "interval_95": 0.004},
    }


def make_family(ways=2, queries=1):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (12, 1, 28, 28), generator=generator, dtype=torch.uint8)
    pool = ImagePool.from_sorted(images, counts=[4, 4, 4], names=["a", "b", "c"])
    return FewShot(pool, ways=ways, shots=1, queries=queries, name="noise/train")


class FakeContender:
    """Its steps take `seconds` on a clock of its own, and are counted in its state."""

    normalization = "each image alone"

    def __init__(self, clock, seconds):
        self.module = nn.Module()
        self.module.register_buffer("steps", torch.zeros(()))
        self.clock = clock
        self.seconds = seconds
        self.spent = []

    def step(self, episodes, *, spent):
        self.spent.append(spent)
        self.module.steps += 1
        self.clock.now += self.seconds


def test_the_minutes_to_a_level_are_those_of_the_first_validation_that_reaches_it():
    row = make_row("ridge", CURVE)
    minutes = [minutes_to(row["curve"], level) for level in (50, 90, 95, 97, 98)]
    assert minutes == [0.25, 0.5, 1.0, 2.0, None]
    line = race_table([row], limit=2).splitlines()[2]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:7] == ["ridge", "2", "240", "0.50", "1.00", "2.00", "> 2"]
    assert cells[7:] == ["97.50", "97.50", "97.00 ± 0.40", "each image alone"]


def test_the_fastest_of_ours_is_compared_with_the_fastest_peer():
    rows = [make_row("ridge", CURVE), make_row("cg", CURVE[:3])]
    assert fastest_line(rows, 95, 25) == "To 95 %: there is nothing to compare."
    slow = [(10 * s, a) for s, a in CURVE]
    rows += [make_row("higher", slow), make_row("learn2learn-maml", CURVE[:1])]
    expected = "To 95 %: ridge in 1.00 min, higher in 10.00 min, a ratio of 0.100."
    assert fastest_line(rows, 95, 25) == expected
    rows[2] = make_row("higher", slow[:3])
    assert fastest_line(rows, 95, 20).endswith("no peer in 20 min, a ratio below 0.050.")
    assert "none of ours gets there" in fastest_line(rows, 99, 20)


def test_the_clock_stands_while_it_validates_and_the_best_state_is_kept():
    clock = SimpleNamespace(now=0.0)
    contender = FakeContender(clock, seconds=4.0)
    accuracies = iter([0.5, 0.75, 0.75])

    def validate():
        clock.now += 1000.0
        return next(accuracies)

    curve, best = train(
        contender,
        EpisodeSampler(make_family(), tasks=1),
        validate,
        times=[10.0, 20.0, 22.0],
        name="fake",
        now=lambda: clock.now,
    )
    assert curve == [
        {"seconds": 12.0, "steps": 3, "accuracy": 0.5},
        {"seconds": 20.0, "steps": 5, "accuracy": 0.75},
        {"seconds": 24.0, "steps": 6, "accuracy": 0.75},
    ]
    assert best["steps"] == 5
    assert contender.spent == [4 * i / 22 for i in range(6)]


def test_validations_are_further_apart_after_three_minutes():
    times = clock_times(25 * 60.0)
    assert times[:3] == [15.0, 30.0, 45.0]
    assert times[10:14] == [165.0, 180.0, 240.0, 300.0]
    assert times[-1] == 1500.0
    assert len(times) == 34
    assert clock_times(1e-3) == [1e-3]


def test_the_faster_number_of_threads_is_taken(monkeypatch):
    clock = SimpleNamespace(now=0.0, threads=0)
    seconds = {1: 3.0, 2: 2.0, 4: 5.0}
    course_module = importlib.import_module("racing.course")
    monkeypatch.setattr(course_module, "set_up_cpu", lambda n: setattr(clock, "threads", n))
    entry = Entry(Sizes(1, 2, 1), lambda family: FakeContender(clock, seconds[clock.threads]))
    course = Course("glyphs", None, 1.0, 2, 2, threads=(1, 2, 4), seed=0)
    chosen, measured = choose_threads(
        "fake", entry, make_family(), course=course, now=lambda: clock.now
    )
    assert (chosen, measured) == (2, {"1": 3.0, "2": 2.0, "4": 5.0})


@pytest.fixture
def apart(monkeypatch, tmp_path):
    """Races that are recorded in place of being run, without learn2learn."""
    names = []

    def run_apart(function, contender, course, *, name):
        names.append(name)
        row = make_row(contender, CURVE)
        del row["contender"]
        return row

    monkeypatch.setattr(race, "run_apart", run_apart)
    spec = importlib.import_module("command_line.requirements")
    found = spec.find_spec
    monkeypatch.setattr(spec, "find_spec", lambda n: None if n == "learn2learn" else found(n))
    return names


@pytest.mark.drawn
def test_the_same_command_races_those_that_are_missing(apart, tmp_path, monkeypatch, capsys):
    args = ["--task=glyphs", "--minutes=2", f"--out={tmp_path}", "--contenders"]
    race.run_command([*args, "ridge"])
    draw_nothing(monkeypatch)
    race.run_command([*args, "ridge", "higher", "learn2learn-maml"])
    assert apart == ["ridge", "higher"]
    printed = capsys.readouterr().out
    reason = 'the race: found no package learn2learn; pip install -e ".[learn2learn]"'
    assert f"learn2learn-maml is left out: {reason}" in printed
    assert "| higher | 2 | 240 |" in printed
    stored = json.loads((tmp_path / "race.json").read_text())
    assert [row["contender"] for row in stored["rows"]] == ["ridge", "higher"]
    assert list(stored["left_out"]) == ["learn2learn-maml"]
    assert (tmp_path / "race.png").read_bytes().startswith(b"\x89PNG")
    race.run_command([*args, "ridge", "--seed=1"])
    assert apart == ["ridge", "higher", "ridge"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--contenders", "maml"], "--contenders: got maml, expected some of ridge, logistic"),
        (["--contenders", "learn2learn-anil"], "--contenders: none of them is installed"),
        (["--minutes=0"], "--minutes: got 0.0, expected from 1e-06"),
        (["--threads", "0"], "--threads: got 0, expected from 1 to"),
        (["--task=glyphs", "--data-root=x"], "glyphs: got option data_root"),
    ],
)
def test_a_wrong_command_leaves_nothing(apart, tmp_path, args, message, capsys):
    out = tmp_path / "out"
    assert message in error_line(race.run_command, [*args, f"--out={out}"], capsys)
    assert not out.exists()


def test_a_race_of_ours_ends_with_one_test():
    row = run_race("ridge", COURSE)
    (point,) = row["curve"]
    assert point["steps"] == 1
    assert 0.2 < point["accuracy"] <= 1.0
    assert row["test"]["interval_95"] >= 0
    assert row["normalization"] == "running statistics of the training images"
    assert row["chosen_threads"] == 1


def reference(network, adapted, task, *, steps, lr, shared=None):
    """The query loss and accuracy of one task by plain autograd.

    `network(params, inputs)` gives scores, `adapted` are the parameters that adapt, and `shared`
    makes features of support and queries together.
    """
    support, targets, queries, query_targets = task
    if shared is not None:
        features = shared(torch.cat([support, queries]))
        support, queries = features[: len(support)], features[len(support) :]
    params = dict(adapted)
    for _ in range(steps):
        loss = F.cross_entropy(network(params, support), targets)
        gradients = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = {n: p - lr * g for (n, p), g in zip(params.items(), gradients, strict=True)}
    scores = network(params, queries)
    right = scores.argmax(-1) == query_targets
    return F.cross_entropy(scores, query_targets), right.double().mean()


def check_contender(contender, network, adapted, *, factor, **options):
    """Its meta-gradient and its accuracies against `reference`, in float64."""
    episodes = EpisodeSampler(make_family(queries=3), tasks=2)[0]
    (support, targets), (queries, query_targets) = episodes.support, episodes.query
    parts = (support.double(), targets, queries.double(), query_targets)
    episodes = Episodes(parts[:2], parts[2:])
    tasks = [[part[i] for part in parts] for i in range(2)]
    results = [reference(network, adapted, task, **options) for task in tasks]
    parameters = list(contender.module.parameters())
    expected = torch.autograd.grad(factor * sum(loss for loss, _ in results), parameters)
    measured = contender.accuracies(episodes).double()
    accuracies = torch.stack([accuracy for _, accuracy in results])
    torch.testing.assert_close(measured, accuracies, rtol=0, atol=1e-6)
    contender.optimizer.step = lambda: None
    contender.step(episodes, spent=0.0)
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)


def test_highers_loop_has_the_meta_gradient_of_maml():
    torch.manual_seed(0)
    contender = HigherMAML(make_family())
    module = contender.module.double()
    check_contender(
        contender,
        lambda params, x: functional_call(module, params, (x,)),
        dict(module.named_parameters()),
        factor=1.0,
        steps=5,
        lr=0.1,
    )


@pytest.mark.learn2learn
@pytest.mark.parametrize("make", [learn2learn_maml, learn2learn_anil])
def test_learn2learns_loops_have_the_meta_gradients_of_maml_and_anil(make):
    import_learn2learn()
    torch.manual_seed(0)
    contender = make(make_family())
    contender.module.double()
    head = contender.maml.module
    is_maml = make is learn2learn_maml
    check_contender(
        contender,
        lambda params, x: functional_call(head, params, (x,)),
        dict(head.named_parameters()),
        factor=0.5,
        steps=1 if is_maml else 5,
        lr=0.5 if is_maml else 0.1,
        shared=contender.body,
    )
