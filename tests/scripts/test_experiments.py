"""What the experiments share: runs kept and not repeated, refusals before any work, tables."""

import json
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch
import tune
from experiments import EXPERIMENTS
from experiments.base import Experiment, execute, markdown, select, spread
from experiments.networks import class_accuracies, conv_net, train

import tasks


@dataclass(frozen=True)
class Sums(Experiment):
    """Of a number and the seed."""

    number: int = 10

    name: ClassVar[str] = "sums"
    baselines: ClassVar[tuple[str, ...]] = ("none",)
    compared: ClassVar[tuple[str, ...]] = ("none", "cg")
    ran: ClassVar[list] = []

    def quickened(self):
        return replace(self, seeds=1, number=1)

    def run(self, case, out):
        self.ran.append(case)
        return {"sum": self.number + case["seed"], "draw": torch.rand(()).item()}

    def table(self, rows):
        return markdown(
            ["method", "sum"], [[m, spread(select(rows, "sum", method=m))] for m in self.methods]
        )

    def plot(self, rows, figure):
        figure.subplots().plot([row["sum"] for _, row in rows])


@pytest.fixture
def ran():
    Sums.ran.clear()
    return Sums.ran


def test_runs_are_kept_and_not_repeated(tmp_path, ran):
    table = execute(Sums(out=tmp_path, seeds=2))
    assert (
        table == "| method | sum |\n| --- | --- |\n| none | 10.50 ± 0.71 |\n| cg | 10.50 ± 0.71 |"
    )
    assert len(ran) == 4
    (tmp_path / "cg-1" / "summary.json").unlink()  # a run that was killed
    assert execute(Sums(out=tmp_path, seeds=2)) == table
    assert ran[4:] == [{"method": "cg", "seed": 1}]
    execute(Sums(out=tmp_path, seeds=3, method=("cg",)))
    assert ran[5:] == [{"method": "cg", "seed": 2}]
    first = json.loads((tmp_path / "rows.json").read_text())[0]
    assert (first["case"], first["row"]["sum"]) == ({"method": "cg", "seed": 0}, 10)
    assert (tmp_path / "table.md").read_text().startswith("| method")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_draws_depend_on_the_seed_alone(tmp_path, ran):
    """And not on the runs before, as when a killed experiment goes on."""
    execute(Sums(out=tmp_path / "a", seeds=2))
    execute(Sums(out=tmp_path / "b", seeds=2, method=("cg",)))
    found = [
        json.loads((tmp_path / out / f"{case}/summary.json").read_text())["draw"]
        for out, case in (("a", "cg-0"), ("b", "cg-0"), ("a", "cg-1"), ("b", "cg-1"))
    ]
    assert found[0] == found[1] != found[2] == found[3]


def test_other_options_need_another_folder(tmp_path, ran):
    execute(Sums(out=tmp_path, seeds=1))
    with pytest.raises(
        FileExistsError, match=r"holds a run with other options.*name another folder"
    ):
        execute(Sums(out=tmp_path, seeds=1, number=11))
    assert len(ran) == 2


def test_bad_options_are_refused_before_any_run(tmp_path, ran):
    with pytest.raises(ValueError, match="--method: got steepest, expected some of none, unrolled"):
        execute(Sums(out=tmp_path, method=("cg", "steepest")))
    with pytest.raises(ValueError, match="--seeds: got 0"):
        execute(Sums(out=tmp_path, seeds=0))
    with pytest.raises(
        ValueError, match="--device: got 'gpu', expected auto, cpu or a CUDA device"
    ):
        execute(Sums(out=tmp_path, device="gpu"))
    with pytest.raises(ValueError, match=r"imbalance: got 0.5, expected a finite n_0 / n_last ≥ 1"):
        EXPERIMENTS["reweighting"](imbalance=(100.0, 0.5)).cases()
    with pytest.raises(ValueError, match="--inner-steps: got 0"):
        EXPERIMENTS["reweighting"](inner_steps=0).cases()
    assert not ran


def test_a_rehearsal_has_a_folder_of_its_own():
    assert Sums().folder.parts == ("runs", "tune", "sums")
    assert Sums(quick=True).folder.parts == ("runs", "tune", "sums-quick")


def test_spread_is_the_deviation_of_the_sample():
    assert spread([1.0, 3.0]) == "2.00 ± 1.41"
    assert spread([1.0], 3) == "1.000"
    assert spread([]) == "–"


def test_every_experiment_has_a_name_and_its_help(capsys):
    for name, kind in EXPERIMENTS.items():
        assert kind.name == name
        with pytest.raises(SystemExit) as stop:
            tune.main([name, "--help"])
        assert stop.value.code == 0
        assert "--quick" in capsys.readouterr().out


def examples(n, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return tasks.Examples(torch.rand(n, 3, 8, 8, generator=draw), torch.arange(n) % 2)


def test_accuracies_are_of_each_class():
    constant = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    with torch.no_grad():
        constant[1].weight.zero_()
        constant[1].bias.copy_(torch.tensor([0.0, 1.0]))
    assert class_accuracies(constant, examples(10)) == [0.0, 1.0]
    flipped = {"1.bias": torch.tensor([1.0, 0.0])}
    assert class_accuracies(constant, examples(10), flipped) == [1.0, 0.0]


def test_plain_training_is_that_of_the_tuner_without_weights():
    """Its batches, its schedule, its optimiser: the baseline differs in the weights alone."""
    from functools import partial

    import torch.nn.functional as F

    from metaimplicit import Proximal, TorchOptimizer, Tuner, tuning_problem
    from metaimplicit.tuning import ClassWeights

    plain, model = (conv_net(3, 2, (4, 4), seed=1) for _ in range(2))
    batches, decay = tasks.Batches(examples(20), 5, seed=0), 0.1
    sgd = torch.optim.SGD(plain.parameters(), lr=0.2, momentum=0.9, weight_decay=decay)
    train(plain, batches, 6, sgd, lambda step: 1.0 if step < 3 else 0.5)
    problem, meta, domains = tuning_problem(
        model, F.cross_entropy, [ClassWeights(2)], penalty=Proximal(decay, center="zero")
    )
    tuner = Tuner(
        problem,
        meta,
        inner=TorchOptimizer(torch.optim.SGD, steps=3, lr=0.2, momentum=0.9),
        method="cg",
        optimizer=partial(torch.optim.SGD, lr=0.0),
        domains=domains,
        schedule=lambda step: 1.0 if step < 1 else 0.5,
    )
    for step in range(2):
        tuner.step([batches(3 * step + i) for i in range(3)] + [batches(0)], batches(0))
    for name, p in plain.named_parameters():
        torch.testing.assert_close(tuner.params[name], p.detach(), rtol=1e-4, atol=1e-6)
