"""Hyper-cleaning and distillation on made-up images: what is found, who is trained on what, gradients in the pixels."""

from dataclasses import replace

import pytest
import torch
from experiments.base import execute
from experiments.distillation import Distillation
from experiments.hyper_cleaning import HyperCleaning, detection

import tasks
from metaimplicit import GradientDescent, hypergradient
from metaimplicit.problem import Stream


@pytest.fixture(autouse=True)
def digits(monkeypatch):
    """Ten noisy blobs in MNIST's place, 40 images a class to train on and 11 to test."""
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randint(0, 200, (10, 1, 28, 28), generator=generator)

    def draw(each):
        targets = torch.arange(10).repeat(each)
        noise = torch.randint(0, 56, (10 * each, 1, 28, 28), generator=generator)
        return tasks.Examples((prototypes[targets] + noise).to(torch.uint8), targets)

    both = draw(40), draw(11)
    monkeypatch.setattr(tasks, "mnist", lambda data_root=None: both)


def test_detection_by_hand():
    wrong = torch.tensor([True, True, True, False, False, False, False, False])
    found = torch.tensor([True, True, False, True, False, False, False, True])
    assert detection(found, wrong) == pytest.approx(
        {"precision": 1 / 2, "recall": 2 / 3, "f1": 4 / 7}
    )
    none = dict.fromkeys(("precision", "recall", "f1"), 0.0)
    nothing = torch.zeros_like(wrong)
    assert detection(nothing, wrong) == none  # none found
    assert detection(~wrong, wrong) == none  # none of them right
    assert detection(nothing, nothing) == none
    assert detection(wrong, wrong) == dict.fromkeys(none, 1.0)


def test_baselines_are_trained_on_their_own_sets(tmp_path):
    cleaning = HyperCleaning(
        training=12, validation=8, share=0.25, steps=1, inner_steps=1, device="cpu"
    )
    _, wrong, validation, _ = cleaning.data(0)
    assert int(wrong.sum()) == 30
    assert validation.counts() == [8] * 10
    sizes = {
        m: cleaning.run({"method": m, "seed": 0}, tmp_path)["examples"] for m in cleaning.baselines
    }
    assert sizes == {"none": 120, "none+validation": 200, "clean": 90, "clean+validation": 170}


def test_corrupted_labels_are_those_that_differ():
    clean, corrupted = (
        HyperCleaning(training=12, validation=8, share=s, device="cpu").data(1) for s in (0.0, 0.5)
    )
    assert torch.equal(clean[0].inputs, corrupted[0].inputs)
    assert torch.equal(clean[0].targets != corrupted[0].targets, corrupted[1])
    assert torch.equal(clean[2].targets, corrupted[2].targets)  # the validation set stays clean


@pytest.mark.parametrize("method", ["cg", "truncated"])
def test_wrong_labels_lose_weight(tmp_path, method):
    """The blobs are separable, the decay large: every label is judged rightly, whichever way the gradient is taken."""
    cleaning = HyperCleaning(
        training=12, validation=8, steps=6, inner_steps=20, decay=1.0, outer_lr=0.5, device="cpu"
    )
    row = cleaning.run({"method": method, "seed": 0}, tmp_path)
    assert row["f1"] == row["precision"] == row["recall"] == 1
    assert row["curve"][-1] == [6, 1.0]
    assert [sum(row["histogram"][name]) for name in ("right", "wrong")] == [60, 60]


def test_distillation_gradient_reaches_the_pixels():
    """In float64 the unrolled gradient in one pixel is that of central differences, 1e-6 of it (h = 1e-5)."""
    distillation = Distillation(network="mlp", inner_steps=3, device="cpu")
    whole, _ = distillation.data()
    whole = tasks.Examples(whole.inputs.double(), whole.targets)
    images, labels = distillation.real(whole, 0)
    problem = distillation.problem(images, labels, 0).problem
    batch = tasks.Batches(whole, 20, 0)(0)
    data = Stream(lambda t: distillation.starts(images, labels, 0)(0) if t < 3 else batch)

    def at(synthetic):
        inner = GradientDescent(steps=3, lr=distillation.lr, momentum=0.9)
        return hypergradient(
            problem, {"synthetic": synthetic}, data, inner=inner, method="unrolled"
        )

    step = torch.zeros_like(images)
    step[3, 0, 14, 14] = 1e-5
    difference = (at(images + step).outer_loss - at(images - step).outer_loss) / 2e-5
    slope = at(images).grads["synthetic"][3, 0, 14, 14]
    assert slope.abs() > 1e-6
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-12)


def test_distillation_starts_anew_from_an_initialisation_of_its_own():
    drawn, fixed = (Distillation(start=start, inner_steps=3) for start in ("drawn", "fixed"))
    images, labels = drawn.real(drawn.data()[0], 0)
    for kind, same in ((drawn, False), (fixed, True)):
        problem, starts = kind.problem(images, labels, 2).problem, kind.starts(images, labels, 2)
        first, still, second = (problem.init({}, starts(i))["1.weight"] for i in (0, 3, 4))
        assert torch.equal(first, still)  # the four batches of one outer step
        assert torch.equal(first, second) == same


def test_real_images_class_by_class():
    distillation = Distillation(images=3, device="cpu")
    whole, _ = distillation.data()
    drawn, labels = distillation.real(whole, 0)
    mean, _ = distillation.real(whole, 0, mean=True)
    assert labels.tolist() == [c for c in range(10) for _ in range(3)]
    for image, label in zip(drawn, labels, strict=True):
        of_class = whole.inputs[whole.targets == label]
        assert (of_class == image).flatten(1).all(1).any()
    of_class = mean[labels == 4]
    sizes = torch.tensor([14.0, 14.0, 12.0]).view(3, 1, 1, 1)
    whole_mean = whole.inputs[whole.targets == 4].mean(0)
    torch.testing.assert_close((sizes * of_class).sum(0) / 40, whole_mean)


@pytest.mark.parametrize(
    "experiment",
    [
        HyperCleaning(quick=True, device="cpu"),
        Distillation(quick=True, device="cpu", network="lenet", images=2),
    ],
    ids=lambda experiment: experiment.name,
)
@pytest.mark.filterwarnings("ignore:Nystrom ended with:RuntimeWarning")  # at three columns
def test_a_rehearsal_leaves_rows_and_plots(tmp_path, experiment):
    experiment = replace(experiment, out=tmp_path)
    table = execute(experiment)
    assert (tmp_path / "plot.png").stat().st_size > 0
    assert (tmp_path / "table.md").read_text() == f"{table}\n"
    methods = experiment.quickened().methods
    assert len(table.splitlines()) == 2 + len(methods)
    for method in methods:
        assert (tmp_path / f"{method}-0" / "summary.json").exists()
        assert (tmp_path / f"{method}-0" / "images.png").exists() == isinstance(
            experiment, Distillation
        )
    assert execute(experiment) == table  # from the rows that are there
