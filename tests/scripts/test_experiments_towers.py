"""Towers on images and text: the networks, schedules and splits by hand, the same descent as torch's, divergence."""

import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from experiments.base import execute
from experiments.char_tower import CharLSTM, CharTower, side_by_side
from experiments.cifar_tower import Block, CifarTower, resnet20
from experiments.small_cifar import shrunk
from experiments.towers import EVERY, descend, step_decay
from torch import nn

import tasks
from metaimplicit import Hyperoptimizer
from metaimplicit.tuning import Positive, Real
from metaimplicit.tuning.hyperoptimizers import SGD, Adam

CIFAR = CifarTower(quick=True, device="cpu")
CHAR = CharTower(quick=True, device="cpu")
START = {"lr": 0.1, "momentum": 0.9, "seed": 0}


@pytest.fixture(autouse=True)
def images(monkeypatch):
    """Noise in CIFAR-10's place, 20 images a class to train on and 11 to test."""
    draws = torch.Generator().manual_seed(0)

    def draw(each):
        inputs = torch.randint(0, 256, (10 * each, 3, 32, 32), generator=draws).to(torch.uint8)
        return tasks.Examples(inputs, torch.arange(10).repeat(each))

    both = draw(20), draw(11)
    monkeypatch.setattr(tasks, "cifar10", lambda data_root=None: both)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("".join(chr(97 + i * i % 23) for i in range(2000)) + "é", encoding="utf-8")
    return path


def test_resnet20_is_that_of_he_et_al():
    """19 convolutions and a linear layer: 269,722 parameters, shortcuts without any."""
    model = resnet20(0)
    assert sum(p.numel() for p in model.parameters()) == 269_722
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 20
    sizes = []
    for module in model:
        if isinstance(module, Block):
            module.register_forward_hook(
                lambda module, inputs, output: sizes.append(tuple(output.shape[1:]))
            )
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [(16, 32, 32)] * 3 + [(32, 16, 16)] * 3 + [(64, 8, 8)] * 3
    first, again, other = (resnet20(seed)[0].weight for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("width", [4, 8])
def test_shortcuts_take_every_other_pixel_and_pad_with_zeros(width):
    block = Block(4, width).double()
    nn.init.zeros_(block.body[-1].weight)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    expected = F.relu(x)[:, :, :: width // 4, :: width // 4]
    found = block(x)
    assert torch.equal(found[:, :4], expected)
    assert not found[:, 4:].any()


def test_squares_are_averaged():
    image = torch.tensor(
        [[0, 10, 1, 1], [20, 30, 2, 3], [9, 9, 255, 255], [9, 9, 255, 255]], dtype=torch.uint8
    )
    found = shrunk(tasks.Examples(image.expand(1, 3, 4, 4), torch.zeros(1)), 2)
    assert found.inputs.tolist() == [[[[15, 2], [9, 255]]] * 3]  # 7/4 is nearer to 2


def test_step_decay_at_half_and_three_quarters():
    assert [step_decay(step, 8) for step in range(8)] == pytest.approx(
        [1] * 4 + [0.1] * 2 + [0.01] * 2
    )
    assert [step_decay(step, 5) for step in range(5)] == pytest.approx([1, 1, 1, 0.1, 0.01])
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    row = descend(
        torch.optim.SGD([p], 0.5), lambda step: p.sum(), 40, 1, lambda step: step_decay(step, 40)
    )
    assert row["curve"]["step"] == [10, 20, 30, 40]
    assert row["curve"]["lr"] == pytest.approx([0.5, 0.5, 0.05, 0.005])
    assert p.item() == pytest.approx(-0.5 * (20 + 10 * 0.1 + 10 * 0.01))


def test_descent_tells_the_means_of_losses():
    p = nn.Parameter(torch.zeros(1))
    row = descend(torch.optim.SGD([p], 0.0), lambda step: 0 * p.sum() + step**2, 25, 3)
    squares = [step**2 for step in range(25)]
    means = [sum(squares[a : a + EVERY]) / len(squares[a : a + EVERY]) for a in (0, 10, 20)]
    assert row["curve"]["loss"] == pytest.approx(means)
    assert row["loss"] == pytest.approx((22**2 + 23**2 + 24**2) / 3)
    assert row["diverged"] is None


def test_divergence_is_told_with_its_step():
    p = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    row = descend(
        torch.optim.SGD([p], 0.1), lambda step: p.sum() * (math.nan if step == 13 else 1), 40, 1
    )
    assert (row["diverged"], row["loss"], row["curve"]["step"]) == (13, None, [10])
    assert row["learnt"] == {"lr": pytest.approx(0.1), "momentum": 0}
    hasty = SGD(
        0.1, optimizer=SGD(1.0), domains={"lr": Real()}
    )  # lr ← 0.1 − (−1)·(gradient · gradient before)
    row = descend(Hyperoptimizer([p], hasty), lambda step: p.sum() * (-1) ** step, 40, 1)
    assert (row["diverged"], row["loss"]) == (1, None)
    assert "SGD lr: got -0.9" in row["reason"]
    json.dumps(row, allow_nan=False)


def cifar_loss(model):
    def loss(step):
        draws = torch.Generator().manual_seed(step)
        inputs = torch.randn(8, 3, 8, 8, generator=draws, dtype=torch.float64)
        return F.cross_entropy(model(inputs), torch.arange(8))

    return loss


def char_loss(model):
    text = torch.randint(5, (3, 40), generator=torch.Generator().manual_seed(0))
    return lambda step: model.loss(text, 4 * step, 4, None)[0]


@pytest.mark.parametrize(
    ("experiment", "network", "loss", "level"),
    [
        (CIFAR, lambda: resnet20(0), cifar_loss, SGD(0.1, momentum=0.9, weight_decay=1e-4)),
        (CHAR, lambda: CharLSTM(5, 3, 4, 1), char_loss, Adam(0.1)),
    ],
    ids=["cifar", "char"],
)
def test_a_tower_of_one_level_is_the_plain_optimizer(experiment, network, loss, level):
    """In float64, five steps, to 1e-9 of each tensor."""
    ends = []
    for build in (
        lambda p: experiment.optimizer(START | {"method": "plain"}, p),
        lambda p: Hyperoptimizer(p, level),
    ):
        torch.manual_seed(0)
        model = network().double()
        row = descend(build(model.parameters()), loss(model), 5, 2)
        ends.append((list(model.parameters()), row["loss"], row["curve"]["loss"]))
    (plain, *losses), (tower, *others) = ends
    torch.testing.assert_close(tower, plain, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(others, losses, rtol=1e-6, atol=0)  # noted in float32


def test_towers_of_the_methods():
    p = [torch.ones(3, requires_grad=True)]
    found = {m: CIFAR.optimizer(START | {"method": m}, p) for m in CIFAR.compared}
    assert type(found["plain"]) is type(found["step-decay"]) is torch.optim.SGD
    assert found["plain"].defaults["weight_decay"] == CIFAR.decay
    assert found["tower"].tower == SGD(
        0.1,
        momentum=0.9,
        weight_decay=1e-4,
        optimizer=SGD(CIFAR.outer_sgd),
        domains={"lr": Positive()},
    )
    assert found["tower-adam"].tower.optimizer == Adam(CIFAR.outer_adam)
    assert set(found["tower"].tower.granularity) == {"lr", "momentum"}
    assert found["tower-adam"].tower.domain("lr") == Positive()
    assert CHAR.optimizer(START | {"method": "tower"}, p).tower == Adam(
        0.1, optimizer=SGD(CHAR.outer_sgd)
    )


def test_text_is_split_by_position(text):
    char = CharTower(text=text, streams=3, window=5, device="cpu")
    train, validation, characters = char.data()
    whole = text.read_text(encoding="utf-8")
    assert characters == "".join(sorted(set(whole)))
    assert (train.shape, validation.shape) == ((3, 600), (3, 67))  # of 1800 and 201 characters
    assert ["".join(characters[i] for i in row) for row in train] == [
        whole[:600],
        whole[600:1200],
        whole[1200:1800],
    ]
    assert "".join(characters[i] for i in validation.flatten()) == whole[1800:]
    assert side_by_side(torch.arange(11), 3).tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_the_default_text_is_pythons_help():
    train, validation, characters = CHAR.data()
    assert train.numel() > 300_000
    assert train.shape[0] == validation.shape[0] == 32
    assert set("abcXYZ019 \n") <= set(characters)


def test_bits_of_a_text():
    """log₂ of the number of characters where all are as likely; whatever the windows, as the state is carried."""
    model = CharLSTM(8, 3, 4, 2).double()
    text = torch.randint(8, (3, 21))
    bits = model.bits(text, 20)
    assert [model.bits(text, window) for window in (1, 6, 50)] == pytest.approx(
        [bits] * 3, rel=1e-12
    )
    loss, state = model.loss(text, 0, 6, None)
    scores = model.scores(model.lstm(model.embedding(text[:, :6]))[0]).log_softmax(-1)
    following = [scores[stream, t, text[stream, t + 1]] for stream in range(3) for t in range(6)]
    torch.testing.assert_close(loss, -sum(following) / 18, rtol=1e-12, atol=0)
    assert not any(part.requires_grad for part in state)
    model.scores.weight.data.zero_()
    model.scores.bias.data.zero_()
    assert model.bits(text, 4) == pytest.approx(3, rel=1e-12)


def test_the_state_is_carried_to_the_end_of_the_text_and_no_further(tmp_path, text, monkeypatch):
    calls, loss = [], CharLSTM.loss

    def noted(self, text, begin, size, state):
        found = loss(self, text, begin, size, state)
        calls.append((begin, size, state is None))
        return found

    monkeypatch.setattr(CharLSTM, "loss", noted)
    char = CharTower(
        text=text, streams=3, window=250, hidden=2, embedding=2, epochs=2, device="cpu"
    )
    row = char.run({"method": "plain", "lr": 0.1, "seed": 0}, tmp_path)
    assert calls == [(0, 250, True), (250, 250, False)] * 2 + [
        (0, 66, True)
    ]  # the last of validation
    assert row["perplexity"] == pytest.approx(2 ** row["bits"])


def test_bad_options_are_refused_before_any_run(tmp_path, text):
    for options, message in [
        (
            {"method": ("cg",)},
            "--method: got cg, expected some of plain, step-decay, tower, tower-adam",
        ),
        ({"epochs": 0}, "--epochs: got 0, expected at least 1"),
        ({"side": 12}, "--side: got 12, expected one of 4, 8, 16, 32"),
        ({"batch": 5001}, "--batch: got 5001, expected from 1 to 5000"),
        ({"images": 0}, "--images: got 0"),
        (
            {"start": ((0.1, 1.0),)},
            "--start: got momentum 1.0, expected a positive number, below 1",
        ),
        ({"outer_sgd": -1.0}, "SGD lr: got -1.0"),
        ({"start": ()}, "--start: got none"),
    ]:
        with pytest.raises(ValueError, match=message):
            execute(replace(CifarTower(out=tmp_path / "cifar", device="cpu"), **options))
    short, latin = tmp_path / "short.txt", tmp_path / "latin.txt"
    short.write_text("a" * 200)
    latin.write_bytes("é".encode("latin-1") * 9000)
    for options, kind, message in [
        ({"text": tmp_path / "none.txt"}, FileNotFoundError, r"--text: found no file .*none.txt"),
        ({"text": short}, ValueError, "--text: got 200 characters, expected about 2312 or more"),
        ({"text": latin}, ValueError, "--text: .*latin.txt: got bytes that are not UTF-8"),
        ({"hidden": 0}, ValueError, "--hidden: got 0, expected at least 1"),
        ({"start": (0.0,)}, ValueError, "--start: got lr 0.0, expected a positive number"),
    ]:
        with pytest.raises(kind, match=message):
            execute(replace(CharTower(out=tmp_path / "char", device="cpu"), **options))
    assert not (tmp_path / "cifar").exists()
    assert not (tmp_path / "char").exists()


def test_diverged_runs_are_rows_of_the_table():
    char = CharTower(start=(0.1,), method=("plain", "tower"))
    good = {
        "diverged": None,
        "bits": 2.0,
        "perplexity": 4.0,
        "loss": 1.0,
        "learnt": {"lr": 0.1},
        "ms": 7.0,
    }
    bad = good | {"diverged": 13, "bits": None, "perplexity": None, "loss": None}
    rows = [
        ({"method": method, "seed": seed, "lr": 0.1}, row)
        for method, seed, row in [
            ("plain", 0, bad),
            ("plain", 1, bad),
            ("tower", 0, good),
            ("tower", 1, bad),
        ]
    ]
    plain, tower = char.table(rows).splitlines()[2:]
    assert plain == "| 0.1 | `plain` | diverged | diverged | diverged | – | 7 |"
    failed = "(1 of 2 diverged)"
    assert tower == f"| 0.1 | `tower` | 2.000 {failed} | 4.00 {failed} | 1.000 {failed} | 0.1 | 7 |"


@pytest.mark.parametrize("kind", ["cifar-tower", "char-tower"])
def test_a_rehearsal_leaves_rows_and_plots(tmp_path, text, kind):
    short = {"text": text, "window": 32} if kind == "char-tower" else {}
    experiment = replace({"cifar-tower": CIFAR, "char-tower": CHAR}[kind], out=tmp_path / "out")
    small = replace(experiment.quickened(), quick=False, **short)
    table = execute(small)
    methods = small.compared
    assert len(table.splitlines()) == 2 + len(methods) * len(small.starts)
    assert (small.folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    rows = [entry["row"] for entry in json.loads((small.folder / "rows.json").read_text())]
    for case, row in zip(small.cases(), rows, strict=True):
        assert row["diverged"] is None
        assert row["learnt"]["lr"] == row["curve"]["lr"][-1]
        if case["method"].startswith("tower"):
            assert row["levels"][0] == row["learnt"]
            assert set(row["learnt"]) == set(
                small.optimizer(case, [torch.ones(1, requires_grad=True)]).tower.granularity
            )
            assert row["learnt"]["lr"] != case["lr"]
    assert execute(small) == table  # from the rows that are there
