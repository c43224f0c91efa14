"""Hyper-cleaning and distillation on made-up images."""

from dataclasses import replace

import pytest
import torch
from experiments.distillation import CLASSES, Distillation, class_means
from experiments.hyper_cleaning import HyperCleaning, detection
from experiments.runner import execute
from scripts.running import draw_nothing

import tasks
from metaimplicit import GradientDescent, hypergradient
from metaimplicit.problem import Stream

pytestmark = pytest.mark.usefixtures("blob_mnist")


def test_detection_by_hand():
    wrong = torch.tensor([True, True, True, False, False, False, False, False])
    marked = torch.tensor([True, True, False, True, False, False, False, True])
    expected = {"precision": 1 / 2, "recall": 2 / 3, "f1": 4 / 7}
    assert detection(marked, wrong) == pytest.approx(expected)


def test_detection_is_zero_without_a_hit_and_one_without_an_error():
    wrong = torch.tensor([True, True, False, False])
    nothing = torch.zeros(4, dtype=torch.bool)
    zero = {"precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert detection(nothing, wrong) == zero
    assert detection(~wrong, wrong) == zero
    assert detection(nothing, nothing) == zero
    assert detection(wrong, wrong) == {"precision": 1.0, "recall": 1.0, "f1": 1.0}


def test_each_baseline_is_trained_on_its_own_set(tmp_path):
    cleaning = HyperCleaning(
        training=12,
        validation=8,
        share=0.25,
        steps=1,
        inner_steps=1,
        device="cpu",
    )
    split, wrong = cleaning.data(0)
    assert int(wrong.sum()) == 30
    assert split.validation.counts() == [8] * 10
    sizes = {
        method: cleaning.run({"method": method, "seed": 0}, tmp_path)["examples"]
        for method in cleaning.baselines
    }
    assert sizes == {"none": 120, "none+validation": 200, "clean": 90, "clean+validation": 170}


def test_wrong_labels_are_those_that_were_changed():
    sizes = {"training": 12, "validation": 8, "device": "cpu"}
    clean, _ = HyperCleaning(share=0.0, **sizes).data(1)
    corrupted, wrong = HyperCleaning(share=0.5, **sizes).data(1)
    assert torch.equal(clean.train.inputs, corrupted.train.inputs)
    assert torch.equal(clean.train.targets != corrupted.train.targets, wrong)
    assert torch.equal(clean.validation.targets, corrupted.validation.targets)


def test_all_labels_may_be_wrong_but_for_the_baselines_on_the_right_ones(tmp_path):
    sizes = {"training": 12, "validation": 8, "steps": 6, "inner_steps": 20, "device": "cpu"}
    cleaning = HyperCleaning(share=1.0, decay=1.0, outer_lr=2.0, **sizes)
    row = cleaning.run({"method": "cg", "seed": 0}, tmp_path)
    assert row["recall"] == 1.0
    assert row["retrained"] > 0.9  # it is trained on the validation set alone
    with pytest.raises(ValueError, match="--share: got 1 with --method clean, which trains on"):
        cleaning.check_options()
    replace(cleaning, method=("none", "cg")).check_options()


def test_every_wrong_label_loses_its_weight(tmp_path):
    """The blobs are separable and the decay is large: no label is misjudged."""
    cleaning = HyperCleaning(
        training=12,
        validation=8,
        steps=6,
        inner_steps=20,
        decay=1.0,
        outer_lr=0.5,
        device="cpu",
    )
    row = cleaning.run({"method": "truncated", "seed": 0}, tmp_path)
    assert row["f1"] == row["precision"] == row["recall"] == 1
    assert row["curve"][-1] == [6, 1.0]
    assert [sum(row["histogram"][name]) for name in ("right", "wrong")] == [60, 60]


def test_the_hypergradient_of_a_pixel_is_its_central_difference():
    """In float64, h = 1e-5: the unrolled gradient of one pixel agrees to 1e-6 of it."""
    distillation = Distillation(network="mlp", inner_steps=3, device="cpu")
    whole, _ = distillation.data()
    whole = tasks.Examples(whole.inputs.double(), whole.targets)
    images = distillation.real(whole, 0)
    problem = distillation.problem(images, 0).problem
    training = distillation.training_batches(images, 0)
    validation = tasks.Batches(whole, 20, 0)(0)

    def at(synthetic):
        return hypergradient(
            problem,
            {"synthetic": synthetic},
            Stream(lambda t: training(0) if t < 3 else validation),
            inner=GradientDescent(steps=3, lr=distillation.lr, momentum=0.9),
            method="unrolled",
        )

    step = torch.zeros_like(images.inputs)
    step[3, 0, 14, 14] = 1e-5
    above, below = at(images.inputs + step), at(images.inputs - step)
    difference = (above.outer_loss - below.outer_loss) / 2e-5
    slope = at(images.inputs).grads["synthetic"][3, 0, 14, 14]
    assert slope.abs() > 1e-6
    torch.testing.assert_close(slope, difference, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize(("start", "is_fixed"), [("drawn", False), ("fixed", True)])
def test_each_outer_step_has_an_initialisation_of_its_own_unless_it_is_fixed(start, is_fixed):
    distillation = Distillation(start=start, inner_steps=3)
    images = distillation.real(distillation.data()[0], 0)
    problem = distillation.problem(images, 2).problem
    batches = distillation.training_batches(images, 2)
    weights = [problem.init({}, batches(i))["1.weight"] for i in (0, 3, 4)]
    # Batches 0 … 3 are those of the first outer step: three inner steps, and the curvature.
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2]) == is_fixed


def test_real_images_are_of_their_class_and_means_of_its_parts():
    distillation = Distillation(images=3, device="cpu")
    whole, _ = distillation.data()
    real = distillation.real(whole, 0)
    means = class_means(whole, 3)
    assert real.labels.tolist() == [c for c in range(CLASSES) for _ in range(3)]
    assert torch.equal(means.labels, real.labels)
    for image, label in zip(real.inputs, real.labels, strict=True):
        of_class = whole.inputs[whole.targets == label]
        assert (of_class == image).flatten(1).all(1).any()
    # 40 images in parts of 14, 14 and 12
    sizes = torch.tensor([14.0, 14.0, 12.0]).view(3, 1, 1, 1)
    class_mean = whole.inputs[whole.targets == 4].mean(0)
    torch.testing.assert_close((sizes * means.inputs[means.labels == 4]).sum(0) / 40, class_mean)


@pytest.mark.pages
@pytest.mark.slow
@pytest.mark.parametrize(
    "experiment",
    [
        HyperCleaning(quick=True, device="cpu", steps=1),
        Distillation(quick=True, device="cpu", network="lenet", steps=1, inner_steps=2),
    ],
    ids=lambda experiment: experiment.name,
)
@pytest.mark.filterwarnings("ignore:Nystrom ended with:RuntimeWarning")  # at three columns
def test_a_smoke_test_leaves_rows_and_plots(tmp_path, monkeypatch, experiment):
    experiment = replace(experiment, out=tmp_path)
    table = execute(experiment)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    methods = experiment.smoke_test_version().methods
    assert len(table.splitlines()) == 2 + len(methods)
    for method in methods:
        folder = tmp_path / f"{method}-0"
        assert (folder / "summary.json").exists()
        assert (folder / "images.png").exists() == isinstance(experiment, Distillation)
    draw_nothing(monkeypatch)
    assert execute(experiment) == table  # from the rows that are there
