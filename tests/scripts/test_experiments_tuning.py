"""The experiments of tune.py on step sizes and on regularisation, at their smallest."""

import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from experiments import EXPERIMENTS
from experiments.base import execute
from experiments.logistic import Judge
from experiments.regularization import Regularization
from experiments.step_size import StepSize
from experiments.tables import newsgroups, split, svmlight

import tasks

pytest.importorskip("sklearn")


def digits(n, seed):
    """As MNIST gives them, but noise: 10 classes, n of each."""
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randint(0, 256, (10 * n, 1, 28, 28), generator=draw, dtype=torch.uint8)
    return tasks.Examples(inputs, torch.arange(10).repeat(n))


@pytest.fixture
def noise(monkeypatch):
    monkeypatch.setattr(tasks, "mnist", lambda root: (digits(20, 0), digits(2, 1)))
    return StepSize(
        hidden=4,
        training=10,
        validation=5,
        test=20,
        batch=8,
        steps=24,
        horizon=8,
        period=2,
        device="cpu",
    )


@pytest.mark.parametrize("method", ["unrolled", "forward", "real-time"])
def test_the_hypergradients_of_step_size_and_momentum_agree(method, noise):
    train, validation, _ = noise._data(0)
    judge = tasks.Batches(validation, None, 0)(0)
    assert noise.difference(method, 0, tasks.Batches(train, 8, 0), judge) < 1e-12


def test_memory_is_flat_in_the_steps_of_forward_mode_and_real_time(noise):
    small = StepSize(**{**vars(noise), "horizon": 10, "period": 5, "steps": 100})
    train, validation, _ = small._data(0)
    batches, judge = tasks.Batches(train, 8, 0), tasks.Batches(validation, None, 0)(0)
    peaks = {method: small._memory(method, 0, batches, judge) for method in ("forward", "unrolled")}
    assert peaks["forward"]["20"] == pytest.approx(peaks["forward"]["2"], rel=0.01)
    assert peaks["unrolled"]["20"] > 3 * peaks["unrolled"]["2"]
    found = small._tuned("real-time", 0, batches, judge)[1]["memory"]
    assert found["100"] == pytest.approx(found["10"], rel=0.01)


def test_step_size_rehearses(noise, tmp_path):
    table = execute(StepSize(quick=True, out=tmp_path / "out", device="cpu"))
    rows = {
        entry["case"]["method"]: entry["row"]
        for entry in json.loads((tmp_path / "out" / "rows.json").read_text())
    }
    assert set(rows) == {"none", "unrolled", "forward", "real-time"}
    assert rows["none"]["lr"] == 0.001
    assert [point[0] for point in rows["real-time"]["trajectory"]] == list(range(2, 21, 2))
    for one, other in zip(
        rows["forward"]["trajectory"], rows["unrolled"]["trajectory"], strict=True
    ):
        assert one == pytest.approx(other, rel=1e-4)
    assert table.count("\n") == 5
    with pytest.raises(
        ValueError, match=r"--period, --horizon, --steps: got 3, 8, 24, expected .* a multiple"
    ):
        StepSize(**{**vars(noise), "period": 3}).cases()
    with pytest.raises(ValueError, match="--method: got cg, expected some of none, unrolled"):
        StepSize(method=("cg",)).cases()


def test_a_point_that_hoag_takes_back_is_none_of_its_trials(monkeypatch):
    looked, kept = iter([0.0, -1.0, -2.0]), iter([True, False, True])

    class Scripted:
        def __init__(self, *_, **__):
            pass

        @property
        def meta(self):
            return {"log_decay": torch.tensor(next(looked))}

        def step(self):
            return SimpleNamespace(
                accepted=next(kept),
                report=SimpleNamespace(inner_steps=torch.tensor([2]), products=3),
            )

    monkeypatch.setattr("experiments.regularization.HOAG", Scripted)
    small = Regularization(data=("breast-cancer",), solves=3, device="cpu")
    judge = Judge(*small._data("breast-cancer", 0)[:2], classes=2, low=1e-2, high=1e2, tol=1e-3)
    assert list(small._hoag(judge, 1.0)) == [(0.0, 2, 3), (0.0, 2, 3), (-2.0, 2, 3)]


def test_searches_count_their_solves_and_find_the_same(tmp_path):
    pytest.importorskip("optuna")
    small = Regularization(
        data=("breast-cancer",), start=(1.0,), low=1e-2, high=1e2, grid=5, solves=4, device="cpu"
    )
    rows = {
        method: small.run(
            {"method": method, "data": "breast-cancer", "seed": 0, "start": 1.0}, tmp_path
        )
        for method in small.methods
    }
    for method, row in rows.items():
        assert row["solves"] == len(row["curve"]) == (4 if method == "hoag" else 5)
        assert row["evaluations"] >= row["solves"]
        assert (row["products"] > 0) == (method == "hoag")
        losses = [loss for _, loss in row["curve"]]
        assert row["loss"] == losses[-1]
        assert method == "hoag" or losses == sorted(losses, reverse=True)
        assert all(abs(point) <= math.log(1e2) + 1e-12 for point in row["points"])
    assert rows["grid"]["points"] == pytest.approx([math.log(10.0**k) for k in range(-2, 3)])
    assert rows["grid"]["points"] == rows["grid-warm"]["points"][::-1]
    assert rows["grid"]["loss"] == pytest.approx(rows["grid-warm"]["loss"], rel=1e-5)
    assert rows["grid-warm"]["evaluations"] < rows["grid"]["evaluations"]
    again = small.run({"method": "tpe", "data": "breast-cancer", "seed": 0}, tmp_path)
    assert again["points"] == rows["tpe"]["points"]
    table = small.table(
        [({"method": m, "data": "breast-cancer", "seed": 0}, row) for m, row in rows.items()]
    )
    gap = (rows["hoag"]["loss"] - rows["grid"]["loss"]) / rows["grid"]["loss"]
    assert f"{gap:+.1e}" in table.splitlines()[2]


def test_the_solution_is_stationary(tmp_path):
    torch.manual_seed(0)
    inputs, targets = torch.randn(30, 3, dtype=torch.float64), torch.arange(30) % 2
    data = tasks.Examples(inputs, targets)
    judge = Judge(data, data, 2, 1e-3, 1e3, 1e-8)
    at = math.log(0.1)
    w, b = (judge.solution(at)[name].requires_grad_() for name in ("weight", "bias"))
    f = torch.nn.functional.cross_entropy(inputs @ w.T + b, targets) + 0.05 * (
        w.square().sum() + b.square().sum()
    )
    assert all(g.norm() < 1e-8 for g in torch.autograd.grad(f, [w, b]))


def test_a_file_of_libsvm_is_read(tmp_path, monkeypatch):
    path = tmp_path / "tiny"
    path.write_text(
        "\n".join(f"{'+1' if i % 2 else '-1'} 1:{i} 3:{i * i}" for i in range(16)) + "\n"
    )
    found = svmlight(path)
    assert found.targets.tolist() == [i % 2 for i in range(16)]
    assert found.inputs[3].tolist() == [3.0, 0.0, 9.0]
    parts = split(found, 0)
    assert [len(part) for part in parts] == [8, 4, 4]
    assert parts[0].inputs.shape == (8, 2)  # the second feature is always 0
    assert parts[0].inputs.mean(0).abs().max() < 1e-12
    assert parts[0].inputs.std(0, correction=0).tolist() == pytest.approx([1, 1])
    table = execute(
        Regularization(
            libsvm=path, data=(), quick=True, method=("hoag", "grid"), out=tmp_path / "out"
        )
    )
    assert "| breast-cancer |" in table
    assert "| tiny | `hoag` from 1 |" in table
    path.write_text("1 1:x\n2 1:3\n")
    with pytest.raises(
        ValueError,
        match=r"tiny: got a file that cannot be read .*, expected lines 'label index:value",
    ):
        svmlight(path)
    path.write_text("".join(f"{i % 2} 1000000000:1\n" for i in range(16)))
    with pytest.raises(
        ValueError,
        match=r"got 16 examples of 1000000000 features, 119.2 GiB as a dense table, expected",
    ):
        svmlight(path)
    path.write_text("".join(f"{i}.5 1:1\n" for i in range(16)))
    with pytest.raises(
        ValueError, match="targets: got 16 values for 16 examples, expected a few classes"
    ):
        svmlight(path)


def test_a_folder_of_texts_is_read(tmp_path):
    for name, words in {"cats": "purr whiskers purr", "dogs": "bark fetch"}.items():
        (tmp_path / "news" / name).mkdir(parents=True)
        for i in range(6):
            (tmp_path / "news" / name / str(i)).write_text(f"{words} caf\u00e9", encoding="latin-1")
    found = newsgroups(tmp_path / "news", 4)
    assert (found.inputs.shape, found.inputs.dtype) == ((12, 4), torch.float64)
    assert found.counts() == [6, 6]
    assert found.inputs.norm(dim=1).tolist() == pytest.approx([1] * 12)
    whole, parts = Regularization(newsgroups=tmp_path / "news", device="cpu"), None
    parts = whole._data("news", 0)
    assert float(parts[0].inputs.min()) == 0  # not standardised
    with pytest.raises(
        FileNotFoundError,
        match=r"--newsgroups: got .*cats, expected a folder with a folder of texts",
    ):
        newsgroups(tmp_path / "news" / "cats", 4)


def test_bad_options_are_refused(tmp_path):
    for options, error, message in [
        ({"libsvm": tmp_path / "none"}, FileNotFoundError, r"--libsvm: found nothing at .*none"),
        (
            {"newsgroups": tmp_path / "none"},
            FileNotFoundError,
            r"--newsgroups: found nothing at .*none",
        ),
        (
            {"data": ("iris",)},
            ValueError,
            r"--data: got iris, expected some of breast-cancer, digits",
        ),
        ({"low": 0.0}, ValueError, r"--low, --high: got 0.0 and 1000.0, expected 0 < low < high"),
        ({"start": (1e4,)}, ValueError, r"--start: got 10000.0, expected a number from --low"),
        ({"grid": 1}, ValueError, r"--grid, --solves: got 1 and 20"),
        ({"method": ("cg",)}, ValueError, r"--method: got cg, expected some of hoag, grid"),
    ]:
        with pytest.raises(error, match=message):
            Regularization(**options).cases()


def test_what_is_missing_is_named(monkeypatch, tmp_path):
    small = Regularization(data=("breast-cancer",), low=1.0, grid=2, device="cpu")
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r'tpe: found no optuna .*pip install -e "\.\[tune\]"'):
        small.run({"method": "tpe", "data": "breast-cancer", "seed": 0}, tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        ImportError, match=r'breast-cancer: found no scikit-learn .*pip install -e "\.\[tune\]"'
    ):
        small.run({"method": "grid", "data": "breast-cancer", "seed": 0}, tmp_path)


def test_both_are_commands():
    assert {"step-size", "regularization"} <= set(EXPERIMENTS)
