"""What the experiments share: the runner, checks of options, tables, training."""

import json
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
import tune
from experiments import EXPERIMENTS
from experiments.base import Experiment
from experiments.hyper_cleaning import HyperCleaning
from experiments.networks import class_accuracies, conv_net, train
from experiments.runner import execute
from experiments.runs import METHOD, Run, Runs, case_value, markdown_table, mean, median, spread
from figures import panels
from pages import read_page

import tasks
from metaimplicit import Proximal, TorchOptimizer, Tuner, tuning_problem
from metaimplicit.training.rotation import write_checkpoint
from metaimplicit.tuning import ClassWeights


@dataclass(frozen=True)
class Sums(Experiment):
    """The sum of a number and the seed."""

    number: int = 10
    ran: list = field(default_factory=list, compare=False)

    name = "sums"
    default_methods = ("none", "cg")
    case_options = ("ran",)
    quick_options: ClassVar[dict] = {"number": 1}

    def check_options(self):
        super().check_options()
        self.check_range("number", high=20)

    def run(self, case, out):
        self.ran.append(case)
        return {"sum": self.number + case["seed"], "draw": torch.rand(()).item()}

    def table(self, runs):
        return markdown_table({"method": METHOD, "sum": mean("sum")}, runs.groups("method"))

    def plot(self, runs, figure):
        figure.subplots().plot(runs.values("sum"))


def rows_in(folder):
    return json.loads((folder / "rows.json").read_text())


def test_a_run_whose_results_are_there_is_not_repeated(tmp_path):
    sums = Sums(out=tmp_path, seeds=2)
    table = execute(sums)
    assert table.splitlines() == [
        "| method | sum |",
        "| --- | --- |",
        "| `none` | 10.50 ± 0.71 |",
        "| `cg` | 10.50 ± 0.71 |",
    ]
    assert len(sums.ran) == 4
    (tmp_path / "cg-1" / "summary.json").unlink()  # as if the run had been killed
    assert execute(sums) == table
    assert sums.ran[4:] == [{"method": "cg", "seed": 1}]
    more = Sums(out=tmp_path, seeds=3, method=("cg",))
    execute(more)
    assert more.ran == [{"method": "cg", "seed": 2}]


def test_a_case_that_is_asked_for_twice_counts_once(tmp_path):
    table = execute(Sums(out=tmp_path, seeds=2, method=("cg", "none", "cg")))
    assert table == execute(Sums(out=tmp_path, seeds=2, method=("cg", "none")))
    assert "| `cg` | 10.50 ± 0.71 |" in table
    assert len(rows_in(tmp_path)) == 4


@pytest.mark.drawn
def test_the_folder_has_the_rows_the_table_and_the_plot(tmp_path):
    table = execute(Sums(out=tmp_path, seeds=1))
    first = rows_in(tmp_path)[0]
    assert first["case"] == {"method": "none", "seed": 0}
    assert first["row"]["sum"] == 10
    assert first["row"]["seconds"] > 0
    assert (tmp_path / "table.md").read_text() == f"{table}\n"
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    page = read_page((tmp_path / "report.html").read_text())
    titles = ["Results", "Plot", "Hypergradient", "Runs", "Memory and time"]
    assert [title for title, _ in page.sections] == [*titles, "Options", "Provenance"]
    assert page.images == 1
    assert "none 10.00" in page.text


def test_random_draws_depend_on_the_seed_alone(tmp_path):
    execute(Sums(out=tmp_path / "all", seeds=2))
    execute(Sums(out=tmp_path / "cg", seeds=2, method=("cg",)))

    def draws(folder):
        rows = rows_in(tmp_path / folder)
        return [entry["row"]["draw"] for entry in rows if entry["case"]["method"] == "cg"]

    assert draws("all") == draws("cg")
    assert draws("cg")[0] != draws("cg")[1]


def test_other_options_need_another_folder(tmp_path):
    execute(Sums(out=tmp_path, seeds=1))
    other = Sums(out=tmp_path, seeds=1, number=11)
    message = r"a run with other options \(number is \d+ there, 11 here\), .*name another folder"
    with pytest.raises(FileExistsError, match=message):
        execute(other)
    assert not other.ran


def test_a_run_that_saved_no_step_gives_its_place_to_one_with_other_options(tmp_path):
    first = Sums(out=tmp_path, seeds=1, method=("cg",))
    folder = first.case_folder(first.cases()[0])
    execute(first)
    (folder / "summary.json").unlink()
    state = {"progress": {"step": 0}, "identity": {}, "rng": {}}
    write_checkpoint(folder / "checkpoint.pt", state)
    other = Sums(out=tmp_path, seeds=1, method=("cg",), number=11)
    execute(other)
    assert other.ran

    (folder / "summary.json").unlink()
    write_checkpoint(folder / "checkpoint.pt", state | {"progress": {"step": 1}})
    with pytest.raises(FileExistsError, match=r"a run with other options"):
        execute(first)


def test_a_run_that_left_no_result_does_not_block_its_name(tmp_path):
    execute(Sums(out=tmp_path, seeds=1, method=("cg",)))
    (tmp_path / "cg-0" / "summary.json").unlink()  # as if the run had been killed
    execute(Sums(out=tmp_path, seeds=1, method=("cg",), number=11))
    assert rows_in(tmp_path)[0]["row"]["sum"] == 11


def test_an_edited_row_and_an_edited_config_are_noticed(tmp_path):
    execute(Sums(out=tmp_path, seeds=1, method=("cg",)))
    for name in ("summary.json", "config.json"):
        path = tmp_path / "cg-0" / name
        text = path.read_text()
        path.write_text(text.replace("10", "11"))
        with pytest.raises(ValueError, match=rf"{name}: got a file that was changed or damaged"):
            execute(Sums(out=tmp_path, seeds=1, method=("cg",)))
        path.write_text(text)


def test_a_run_says_what_it_ran_on(tmp_path):
    execute(Sums(out=tmp_path, seeds=1, method=("cg",)))
    (sitting,) = json.loads((tmp_path / "cg-0" / "config.json").read_text())["sittings"]
    assert sitting["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": ("cg", "steepest")}, "--method: got steepest, expected some of none, cg"),
        ({"seeds": 0}, "--seeds: got 0, expected from 1 to 1000"),
        ({"threads": 0}, "--threads: got 0, expected from 1 to "),
        ({"number": 21}, "--number: got 21, expected from 1 to 20"),
        ({"device": "gpu"}, "--device: got 'gpu', expected auto, cpu or a CUDA device"),
    ],
)
def test_an_option_out_of_range_is_refused_before_any_run(tmp_path, options, message):
    sums = Sums(out=tmp_path / "out", **options)
    with pytest.raises(ValueError, match=message):
        execute(sums)
    assert not sums.ran
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"imbalance": (100.0, 0.5)}, r"imbalance: got 0.5, expected a finite n_0 / n_last ≥ 1"),
        ({"inner_steps": 0}, "--inner-steps: got 0, expected from 1 to 100000"),
        ({"inner_steps": 2001}, "--inner-steps: got 2001, expected from 1 to 2000"),
        ({"method": ("sgd",)}, r"--method: got sgd, expected some of none, none\+validation"),
    ],
)
def test_reweighting_refuses_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        EXPERIMENTS["reweighting"](**options).check_options()


def test_a_smoke_test_has_smaller_options_unless_they_are_given():
    small = Sums(quick=True).smoke_test_version()
    assert (small.number, small.seeds) == (1, 1)
    given = Sums(quick=True, number=5, seeds=2).smoke_test_version()
    assert (given.number, given.seeds) == (5, 2)


def test_a_smoke_test_has_a_folder_of_its_own():
    assert Sums().folder.parts == ("runs", "tune", "sums")
    assert Sums(quick=True).folder.parts == ("runs", "tune", "sums-quick")


def test_a_method_gets_the_options_that_it_has():
    cleaning = HyperCleaning(solver_steps=7, rank=3, rho=0.5, lr=0.25, penalty=2.0)
    assert cleaning.make_method("cg").solver.max_steps == 7
    assert cleaning.make_method("nystrom").solver.rank == 3
    assert cleaning.make_method("nystrom").solver.rho == 0.5
    assert cleaning.make_method("truncated").steps == 7
    assert cleaning.make_method("f2sa").strength == 2.0
    assert cleaning.make_method("amigo").solver.steps == 7
    assert cleaning.make_method("soba").solver.steps == 1
    assert cleaning.make_method("t1-t2").solver.steps == 1
    assert cleaning.make_method("t1-t2").solver.scale == 0.25


def test_cells_of_a_table():
    rows = ({"loss": 0.01, "ms": 1.0}, {"loss": 0.03, "ms": 2.0}, {"loss": None})
    runs = Runs(Run({"seed": seed, "lr": 0.1}, row) for seed, row in enumerate(rows))
    assert case_value("lr", "{:g}")(runs) == "0.1"
    assert mean("loss", 1, scale=100)(runs) == "2.0 ± 1.4 (1 of 3 diverged)"
    assert mean("loss")(runs.where(seed=2)) == "diverged"
    assert mean("accuracy")(runs) == "–"
    assert median("ms", 1)(runs) == "1.5"
    assert median("accuracy")(runs) == "–"
    assert runs.where(seed=3) == []


def test_spread_has_the_deviation_of_the_sample():
    assert spread([1.0, 3.0]) == "2.00 ± 1.41"
    assert spread([1.0], 3) == "1.000"
    assert spread([]) == "–"


def test_panels_are_as_few_and_as_equal_as_possible():
    assert [len(panel) for panel in panels(range(9))] == [5, 4]
    assert [len(panel) for panel in panels(range(8))] == [8]
    assert [len(panel) for panel in panels(range(17))] == [6, 6, 5]
    assert panels([]) == []


def test_every_experiment_has_a_name_and_help(capsys):
    for name, kind in EXPERIMENTS.items():
        assert kind.name == name
        with pytest.raises(SystemExit) as stop:
            tune.main([name, "--help"])
        assert stop.value.code == 0
        assert "--quick" in capsys.readouterr().out


def random_examples(n):
    generator = torch.Generator().manual_seed(0)
    return tasks.Examples(torch.rand(n, 3, 8, 8, generator=generator), torch.arange(n) % 2)


def test_accuracies_are_those_of_each_class():
    constant = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    with torch.no_grad():
        constant[1].weight.zero_()
        constant[1].bias.copy_(torch.tensor([0.0, 1.0]))
    examples = random_examples(10)
    assert class_accuracies(constant, examples) == [0.0, 1.0]
    flipped = {"1.bias": torch.tensor([1.0, 0.0])}
    assert class_accuracies(constant, examples, flipped) == [1.0, 0.0]


def test_plain_training_is_that_of_a_tuner_whose_weights_stay_one():
    """The baseline has the batches, the schedule and the optimiser of the tuner's inner loops."""
    plain, model = (conv_net(3, 2, filters=(4, 4), seed=1) for _ in range(2))
    batches = tasks.Batches(random_examples(20), 5, seed=0)
    decay = 0.1
    sgd = torch.optim.SGD(plain.parameters(), lr=0.2, momentum=0.9, weight_decay=decay)
    train(plain, batches, steps=6, optimizer=sgd, schedule=lambda step: 1.0 if step < 3 else 0.5)
    problem, meta, domains = tuning_problem(
        model,
        F.cross_entropy,
        [ClassWeights(2)],
        penalty=Proximal(decay, center="zero"),
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
        inner = [batches(3 * step + i) for i in range(3)]
        tuner.step([*inner, batches(0)], batches(0))
    for name, p in plain.named_parameters():
        torch.testing.assert_close(tuner.params[name], p.detach(), rtol=1e-4, atol=1e-6)
