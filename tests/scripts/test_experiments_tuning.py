"""Step sizes of SGD on MNIST, and the decay of a logistic regression."""

import gc
import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from experiments.logistic import LogisticRegression
from experiments.regularization import Regularization
from experiments.runner import execute
from experiments.runs import Run, Runs
from experiments.searches import Trial, descend_by_hoag
from experiments.sgd_loop import live_tensor_bytes
from experiments.step_size import StepSize

import tasks
from metaimplicit.training import read_sealed_json

pytest.importorskip("sklearn")
STEP_SIZE = StepSize(
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
CANCER = Regularization(data=("breast-cancer",), device="cpu")


@pytest.mark.usefixtures("blob_mnist")
@pytest.mark.parametrize("method", ["unrolled", "forward", "real-time"])
def test_the_hypergradients_of_step_size_and_momentum_agree(method):
    assert STEP_SIZE.difference(method, 0, STEP_SIZE.data(0)) < 1e-12


@pytest.fixture
def few_objects():
    """Python's garbage collector looks through new objects only, which takes no time."""
    gc.collect()
    gc.freeze()


@pytest.mark.slow
@pytest.mark.usefixtures("blob_mnist", "few_objects")
def test_memory_is_flat_in_the_steps_for_forward_mode_and_real_time_tuning():
    experiment = replace(STEP_SIZE, horizon=10)
    data = experiment.data(0)
    forward = experiment.memory_of_loops("forward", 0, data)
    unrolled = experiment.memory_of_loops("unrolled", 0, data)
    assert forward["20"] == pytest.approx(forward["2"], rel=0.01)
    assert unrolled["20"] > 3 * unrolled["2"]
    _, row = replace(experiment, horizon=4, steps=40).tune("real-time", 0, data)
    assert row["memory"]["40"] == pytest.approx(row["memory"]["4"], rel=0.01)


def test_live_tensors_are_counted_once_by_storage(few_objects):
    before = live_tensor_bytes()
    tensor = torch.zeros(1000)
    view = tensor[:10]
    assert live_tensor_bytes() - before == 4000
    del tensor
    assert live_tensor_bytes() - before == 4000
    del view
    assert live_tensor_bytes() == before


@pytest.mark.slow
@pytest.mark.usefixtures("blob_mnist", "few_objects")
def test_a_smoke_test_of_step_size_leaves_trajectories(tmp_path):
    table = execute(StepSize(quick=True, steps=6, out=tmp_path, device="cpu"))
    entries = json.loads((tmp_path / "rows.json").read_text())
    rows = {entry["case"]["method"]: entry["row"] for entry in entries}
    assert set(rows) == {"none", "unrolled", "forward", "real-time"}
    assert rows["none"]["lr"] == 0.001
    assert [point[0] for point in rows["real-time"]["trajectory"]] == [2, 4, 6]
    both = zip(rows["forward"]["trajectory"], rows["unrolled"]["trajectory"], strict=True)
    for forward, unrolled in both:
        assert forward == pytest.approx(unrolled, rel=1e-4)
    assert table.count("\n") == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"period": 3}, r"--period, --horizon, --steps: got 3, 8, 24, expected .* a multiple"),
        ({"horizon": 25}, "--period, --horizon, --steps: got 2, 25, 24"),
        ({"method": ("cg",)}, "--method: got cg, expected some of none, unrolled"),
    ],
)
def test_step_size_refuses_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        replace(STEP_SIZE, **options).check_options()


def test_a_point_that_hoag_takes_back_is_no_trial(monkeypatch):
    points = iter([0.0, -1.0, -2.0])
    accepted = iter([True, False, True])

    class ScriptedHOAG:
        def __init__(self, *_, **__):
            pass

        @property
        def meta(self):
            return {"log_decay": torch.tensor(next(points))}

        def step(self):
            report = SimpleNamespace(inner_steps=torch.tensor([2]), products=3)
            return SimpleNamespace(accepted=next(accepted), report=report)

    monkeypatch.setattr("experiments.searches.HOAG", ScriptedHOAG)
    regression = CANCER.regression(*CANCER.split_data("breast-cancer", 0))
    trials = list(descend_by_hoag(regression, 3, start=1.0, tolerance=0.1))
    assert trials == [Trial(0.0, 2, 3), Trial(0.0, 2, 3), Trial(-2.0, 2, 3)]


@pytest.fixture(scope="module")
def searches():
    """The rows of all methods on one split."""
    pytest.importorskip("optuna")
    experiment = replace(CANCER, start=(1.0,), low=1e-2, high=1e2, grid=5, solves=4, seeds=1)
    runs = Runs(Run(case, experiment.run(case, None)) for case in experiment.cases())
    return experiment, {case["method"]: row for case, row in runs}, runs


def test_searches_count_their_solves(searches):
    experiment, rows, _ = searches
    assert set(rows) == set(experiment.default_methods)
    for method, row in rows.items():
        assert row["solves"] == len(row["curve"]) == (4 if method == "hoag" else 5)
        assert row["evaluations"] >= row["solves"]
        assert (row["products"] > 0) == (method == "hoag")
        assert all(abs(point) <= math.log(1e2) + 1e-12 for point in row["points"])
    assert rows["grid-warm"]["evaluations"] < rows["grid"]["evaluations"]


def test_the_loss_of_a_search_is_its_best_so_far(searches):
    _, rows, _ = searches
    for method, row in rows.items():
        losses = [loss for _, loss in row["curve"]]
        assert row["loss"] == losses[-1]
        assert method == "hoag" or losses == sorted(losses, reverse=True)


def test_the_grid_is_equidistant_and_its_order_does_not_change_its_losses(searches):
    _, rows, _ = searches
    expected = [math.log(10.0**exponent) for exponent in range(-2, 3)]
    assert rows["grid"]["points"] == pytest.approx(expected)
    assert rows["grid"]["points"] == rows["grid-warm"]["points"][::-1]
    assert rows["grid"]["loss"] == pytest.approx(rows["grid-warm"]["loss"], rel=1e-5)


def test_tpe_depends_on_its_seed_alone(searches):
    experiment, rows, _ = searches
    again = experiment.run({"method": "tpe", "data": "breast-cancer", "seed": 0}, None)
    assert again["points"] == rows["tpe"]["points"]


def test_the_table_has_the_distance_from_the_grid(searches):
    experiment, rows, runs = searches
    gap = (rows["hoag"]["loss"] - rows["grid"]["loss"]) / rows["grid"]["loss"]
    hoag = experiment.table(runs).splitlines()[2]
    assert hoag.startswith("| breast-cancer | `hoag` from 1 |")
    assert f"| {gap:+.1e} |" in hoag


def test_a_solution_is_stationary():
    inputs, targets = torch.randn(30, 3, dtype=torch.float64), torch.arange(30) % 2
    data = tasks.Examples(inputs, targets)
    regression = LogisticRegression(data, data, classes=2, low=1e-3, high=1e3, tol=1e-8)
    solution = regression.solution(math.log(0.1))
    w, b = (solution[name].requires_grad_() for name in ("weight", "bias"))
    penalty = 0.05 * (w.square().sum() + b.square().sum())
    f = F.cross_entropy(inputs @ w.T + b, targets) + penalty
    assert all(gradient.norm() < 1e-8 for gradient in torch.autograd.grad(f, [w, b]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": ("iris",)}, "--data: got iris, expected some of breast-cancer, digits"),
        ({"low": 0.0}, "--low, --high: got 0.0 and 1000.0, expected 0 < low < high"),
        ({"start": (1e4,)}, "--start: got 10000.0, expected a number from --low"),
        ({"grid": 1}, "--grid: got 1, expected from 2 to 10000"),
        ({"solves": 0}, "--solves: got 0, expected from 1 to 10000"),
        ({"method": ("cg",)}, "--method: got cg, expected some of hoag, grid"),
    ],
)
def test_regularization_refuses_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        replace(CANCER, **options).check_options()


def test_options_that_ask_for_no_run_are_refused(tmp_path):
    with pytest.raises(ValueError, match="got options that ask for no run, expected a value"):
        execute(replace(CANCER, data=(), out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_one_folder_takes_further_sets_and_starts(tmp_path):
    small = replace(
        CANCER, method=("grid",), start=(1.0,), low=1.0, grid=2, seeds=1, tol=1e-2, out=tmp_path
    )
    execute(small)
    row = (tmp_path / "grid-breast-cancer-0" / "summary.json").read_bytes()
    table = execute(replace(small, data=("digits", "breast-cancer"), start=(2.0,)))
    assert (tmp_path / "grid-breast-cancer-0" / "summary.json").read_bytes() == row
    assert "| digits | `grid` |" in table
    assert "| breast-cancer | `grid` |" in table


def test_a_run_of_other_data_under_the_same_path_is_refused(tmp_path):
    file = tmp_path / "set.svm"

    def write(threshold):
        inputs = torch.linspace(-1, 1, 40)
        file.write_text("".join(f"{int(x > threshold)} 1:{x:.3f} 2:1\n" for x in inputs.tolist()))

    small = replace(CANCER, data=(), libsvm=file, method=("grid",), low=1.0, grid=2, seeds=1)
    small = replace(small, start=(1.0,), tol=1e-2, out=tmp_path / "runs")
    write(0.0)
    table = execute(small)
    write(0.0)
    assert execute(replace(small)) == table
    write(0.5)
    with pytest.raises(FileExistsError, match=r"a run with other options .*data is"):
        execute(replace(small))
    both = replace(small, data=("breast-cancer",), out=tmp_path / "both")
    execute(both)
    config = tmp_path / "both" / "grid-breast-cancer-0" / "config.json"
    assert read_sealed_json(config)["data"] == {}


def test_a_missing_package_is_named(monkeypatch):
    small = replace(CANCER, low=1.0, grid=2)
    case = {"method": "tpe", "data": "breast-cancer", "seed": 0}
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ImportError, match=r'tpe: found no optuna .*pip install -e "\.\[tune\]"'):
        small.run(case, None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        ImportError, match=r'breast-cancer: found no scikit-learn .*pip install -e "\.\[tune\]"'
    ):
        small.run(case | {"method": "grid"}, None)
