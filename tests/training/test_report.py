"""The page of a run: what it shows, what it escapes, and that it needs nothing but itself."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from pages import read_page
from scripts.running import draw_nothing
from torch import nn
from training.sinusoid_run import make_parts, make_sampler, train

from metaimplicit import GradientDescent, MetaLearner
from metaimplicit.training import (
    Evaluation,
    Progress,
    evaluate,
    leave_page,
    make_run_page,
    plot_adaptation,
    predict_classes,
    predict_curves,
    read_metrics,
    write_sealed_json,
)
from metaimplicit.training.episode_sections import confusion_section, episodes_section
from metaimplicit.training.health_section import health_section
from metaimplicit.training.log import RunLog
from metaimplicit.training.page import element, make_page, note
from metaimplicit.training.predictions import Confusion

HOSTILE = "$\\frac</title><script>alert(1)</script><img src=http://x.y/z onerror='a()'>&\udcff"
FIRST = ["Curves", "Adaptation"]
LAST = ["Hypergradient", "Memory and time", "Options", "Provenance"]
NUMBERS = (
    "loss",
    "residual",
    "inner_gradient_norm",
    "leftover",
    "gradient_norm",
    "hessian_residual",
)


def episodes(tasks, *, ways=3, shots=1, queries=2, size=8, channels=1):
    """Tasks whose classes are patterns under noise. Their classes are numbered from 10 on."""

    def draw(count):
        targets = torch.arange(ways).repeat_interleave(count).expand(tasks, -1)
        noise = torch.rand(tasks, ways * count, channels, size, size)
        noise[..., 0, 0] = targets[..., None].float()
        return noise, targets

    classes = torch.stack([10 + torch.randperm(5 + ways)[:ways] for _ in range(tasks)])
    return SimpleNamespace(support=draw(shots), query=draw(queries), labels={"classes": classes})


def make_learner(inputs=64, ways=3):
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(inputs, ways))
    inner = GradientDescent(2, lr=0.1)
    return MetaLearner(model, F.cross_entropy, inner=inner, vectorize="loop")


def log_run(out, steps=20, *, accuracy=True, validated=True):
    config = {"run": "a", "options": {"task": HOSTILE, "hidden": [4, 4]}, "classes": {"test": "1"}}
    sitting = {"commit": "abc-dirty", "versions": {"torch": "2"}, "threads": 1, "device": "cpu"}
    config["sittings"] = [sitting | {"from_step": 0, "to_step": None}]
    write_sealed_json(out / "config.json", config)
    progress = Progress()
    with RunLog(out, progress, "a", total=None, bar=False) as log:
        for step in range(1, steps + 1):
            progress.step = step
            progress.seconds = 2.0 * step
            values = dict.fromkeys(NUMBERS, step / 10)
            log.write("train", progress, values | {"accuracy": 0.5 if accuracy else None})
        if validated:
            log.write("validation", progress, {"loss": 1.0, "accuracy": 0.6 if accuracy else None})


@pytest.fixture(scope="module")
def classified():
    """The predictions for ten tasks, and the test that they belong to."""
    torch.manual_seed(0)
    learner = make_learner()
    batches = [episodes(4) for _ in range(3)]
    names = {number: f"{HOSTILE} {number}" for number in range(10, 18)}
    predictions = predict_classes(learner, batches, steps=2, tasks=10, names=names)
    return predictions, evaluate(learner, batches, steps=2, tasks=10), learner


def test_predictions_are_those_that_the_test_measured(classified):
    predictions, evaluation, learner = classified
    torch.testing.assert_close(
        predictions.accuracies, evaluation.accuracies[-1], rtol=1e-6, atol=0, check_dtype=False
    )
    assert learner.training
    accuracies = [float(predictions.accuracies[task]) for task in predictions.episodes]
    assert accuracies[0] == min(predictions.accuracies)
    assert accuracies[-1] == max(predictions.accuracies)


@pytest.mark.parametrize(
    ("loss", "ignored"),
    [(F.cross_entropy, -100), (nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0, 1.0])), 0)],
)
def test_queries_that_the_loss_ignores_are_neither_right_nor_wrong(loss, ignored):
    torch.manual_seed(0)
    inputs = torch.randn(4, 9, 2)
    targets = torch.arange(3).repeat(3).expand(4, -1)
    partly_ignored = torch.where(targets == 0, ignored, targets)
    pairs = {"support": (inputs, targets), "query": (torch.randn(4, 9, 2), partly_ignored)}
    batch = SimpleNamespace(**pairs, labels={"classes": torch.tensor([7, 8, 9]).expand(4, -1)})
    learner = MetaLearner(nn.Linear(2, 3), loss)
    predictions = predict_classes(learner, [batch], steps=3, tasks=4)
    expected = evaluate(learner, [batch], steps=[3]).accuracies[0]
    torch.testing.assert_close(predictions.accuracies, expected.float(), rtol=1e-6, atol=0)
    assert torch.equal(predictions.is_counted, targets != 0)
    assert torch.equal(predictions.wrong, ~predictions.right & (targets != 0))
    counts = Confusion.of(predictions).counts
    assert counts.sum(1).tolist() == [0, 12, 12]  # of the classes 7, 8 and 9
    text = episodes_section(predictions)
    assert "of 6 right" in text
    assert "of 9 right" not in text


def test_queries_without_a_choice_are_counted_as_wrong_and_named(classified):
    predictions, *_ = classified
    probabilities = predictions.probabilities.clone()
    probabilities[:, 0] = torch.nan
    undecided = replace(predictions, probabilities=probabilities)
    missing = f"For 10 of {undecided.targets.numel()} queries the learner chose no class"
    sections = {"Episodes": episodes_section(undecided), "Confusion": confusion_section(undecided)}
    page = read_page(make_page("x", note("-"), sections))
    for name, text in page.sections:
        assert missing in text, name
        assert "nan" not in text.lower().replace("nan. they count as wrong", "")
    assert dict(page.sections)["Episodes"].count("✗ no choice") == len(undecided.episodes)
    whole = dict(
        read_page(make_page("x", note("-"), {"E": episodes_section(predictions)})).sections
    )
    assert "chose no class" not in whole["E"]


def test_predictions_of_more_tasks_than_there_are_are_refused():
    pair = (torch.randn(2, 3, 1), torch.zeros(2, 3, dtype=torch.long))
    learner = MetaLearner(nn.Linear(1, 2), F.cross_entropy)
    with pytest.raises(ValueError, match="tasks: got 5, but the 2 batches have 4 tasks; ask for"):
        predict_classes(learner, [(pair, pair)] * 2, steps=1, tasks=5)


def test_predictions_need_tasks_of_one_shape():
    def task(queries):
        return [(torch.randn(n, 1), torch.zeros(n, dtype=torch.long)) for n in (3, queries)]

    ragged = [task(4), task(5)]
    learner = MetaLearner(nn.Linear(1, 2), F.cross_entropy)
    with pytest.raises(ValueError, match="episodes: got 2 tasks of different shapes"):
        predict_classes(learner, [ragged], steps=1, tasks=2)
    with pytest.raises(ValueError, match="episodes: got 2 tasks of different shapes"):
        predict_curves(learner, ragged, steps=1)
    regression, *_ = make_parts(noisy=False)
    sampler = make_sampler(tasks_per_batch=2, seed=1)
    with pytest.raises(ValueError, match=r"outputs \(2, 5, 1\) and targets \(2, 5, 1\), expected"):
        predict_classes(regression, sampler, steps=1, tasks=2)


def test_curves_are_predicted_without_dropout():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Dropout(0.5), nn.Linear(20, 1))
    learner = MetaLearner(model, F.mse_loss)
    batch = make_sampler(tasks_per_batch=2, seed=1)[0]
    first = predict_curves(learner, batch, steps=1)
    assert learner.training
    learner.eval()
    second = predict_curves(learner, batch, steps=1)
    assert torch.equal(first.before, second.before)
    assert torch.equal(first.after, second.after)


def test_confusions_are_those_of_a_plain_loop(classified):
    predictions, *_ = classified
    confusion = Confusion.of(predictions)
    numbers = confusion.numbers.tolist()
    counts = torch.zeros_like(confusion.counts)
    chances = torch.zeros_like(confusion.counts)
    for task, classes in enumerate(predictions.classes.tolist()):
        for query, target in enumerate(predictions.targets[task].tolist()):
            row = numbers.index(classes[target])
            counts[row, numbers.index(classes[int(predictions.choices[task, query])])] += 1
            for other in classes:
                chances[row, numbers.index(other)] += 1
    assert torch.equal(confusion.counts, counts)
    assert torch.equal(confusion.chances, chances)


def test_the_page_of_a_classification_has_every_section_and_escapes_names(tmp_path, classified):
    predictions, evaluation, _ = classified
    log_run(tmp_path)
    path = tmp_path / "report.html"
    summary = {"peak_memory_mib": 100.0, "test_seconds": 75.0, "transductive": True}
    leave_page(
        path,
        lambda: make_run_page(
            tmp_path,
            title=HOSTILE,
            summary=summary,
            evaluation=evaluation,
            predictions=predictions,
        ),
    )
    page = read_page(path.read_text())
    sections = dict(page.sections)
    assert list(sections) == ["Accuracy", *FIRST, "Episodes", "Confusion", *LAST]
    assert "<script>alert(1)</script>" in sections["Episodes"]  # as text
    assert "<script" not in path.read_text()
    mean = 100 * float(evaluation.accuracies[-1].mean())
    assert f"{mean:.2f} ±" in sections["Accuracy"]
    assert "transductive yes" in " ".join(sections["Accuracy"].split())
    assert sections["Episodes"].count("✗") == 1 + sum(
        int((~predictions.right[task]).sum()) for task in predictions.episodes
    )
    assert "1 min 15 s" in sections["Memory and time"]
    assert "4, 4" in sections["Options"]
    assert "abc-dirty" in sections["Provenance"]
    per_task = 3 + 6
    assert page.images > per_task * len(predictions.episodes)


def test_the_page_of_a_regression_shows_fits(tmp_path, monkeypatch):
    draw_nothing(monkeypatch, pages=True)
    log_run(tmp_path, accuracy=False, validated=False)
    learner, *_ = make_parts(noisy=False)
    batch = make_sampler(tasks_per_batch=2, seed=1)[0]
    evaluation = evaluate(learner, [batch], steps=1)
    fits = predict_curves(learner, batch, steps=1)
    page = read_page(make_run_page(tmp_path, title="sinusoid", evaluation=evaluation, fits=fits))
    sections = dict(page.sections)
    assert list(sections) == ["Error", *FIRST, "Fits", *LAST]
    assert "This run was not validated." in sections["Curves"]
    assert "after 1 inner step:" in sections["Error"]


def test_the_time_of_a_step_is_that_without_the_validation_before_it(tmp_path, monkeypatch):
    draw_nothing(monkeypatch, pages=True)
    log_run(tmp_path, steps=1)
    progress = Progress()
    with RunLog(tmp_path, progress, "a", total=None, bar=False) as log:
        for step in range(1, 5):
            progress.step = step
            progress.seconds += 3.0
            log.write("train", progress, dict.fromkeys(NUMBERS, 1.0))
            progress.seconds += 60.0
            log.write("validation", progress, {"loss": 1.0, "accuracy": 0.5})
    sections = dict(read_page(make_run_page(tmp_path, title="x")).sections)
    assert "median time of an outer step 3.0 s" in sections["Memory and time"]


def test_losses_and_fits_that_are_not_finite_are_drawn(tmp_path):
    learner = MetaLearner(nn.Linear(1, 1), F.mse_loss, inner=GradientDescent(3, lr=1e20))
    batch = make_sampler(tasks_per_batch=2, seed=1)[0]
    evaluation = evaluate(learner, [batch], steps=3)
    fits = predict_curves(learner, batch, steps=3)
    assert not fits.after.isfinite().any()
    page = read_page(make_run_page(tmp_path, title="sinusoid", evaluation=evaluation, fits=fits))
    assert "nan ± nan" in page.text
    assert page.images == 4
    plot_adaptation(tmp_path, evaluation, fits=fits)
    assert (tmp_path / "adaptation.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_of_a_run_with_a_metric_shows_it_under_this_name_and_without_percent(
    tmp_path, monkeypatch
):
    draw_nothing(monkeypatch, pages=True)
    parts = make_parts(noisy=False, metric=F.l1_loss)
    batch = make_sampler(tasks_per_batch=2, seed=1)[0]
    train(tmp_path, parts, steps=2, validation=lambda: [batch])
    assert [(line["metric"] > 0, "accuracy" in line) for line in read_metrics(tmp_path)] == [
        (True, False)
    ] * 3
    evaluation = evaluate(parts.learner, [batch], steps=1)
    page = read_page(make_run_page(tmp_path, title="x", evaluation=evaluation))
    sections = dict(page.sections)
    assert list(sections) == ["Metric", *FIRST, *LAST]
    mean = float(evaluation.accuracies[-1].mean())
    assert f"{mean:.4f} ±" in sections["Metric"]
    assert "The last metric is" in sections["Curves"]
    assert "ccuracy" not in page.text


def test_a_folder_without_files_gives_a_page_that_says_so(tmp_path):
    page = read_page(make_run_page(tmp_path, title="nothing"))
    assert [title for title, _ in page.sections] == ["Accuracy", "Curves", *LAST]
    assert "This run has not been tested." in page.text
    assert page.images == 0


def test_the_page_shows_what_a_caller_put_into_the_config_whatever_its_types(tmp_path):
    config = {"options": "quick", "chosen": "by hand", "parameters": "all", "lr": 0.5}
    write_sealed_json(tmp_path / "config.json", config)
    text = read_page(make_run_page(tmp_path, title="run")).text
    assert "options quick" in text
    assert "lr 0.5" in text
    assert "chosen by hand" in text
    assert "meta-parameters all" in text or "all meta-parameters" in text


def test_a_page_of_many_noisy_photographs_stays_small():
    batch = episodes(2, ways=20, shots=4, queries=7, size=84, channels=3)
    learner = make_learner(inputs=3 * 84 * 84, ways=20)
    predictions = predict_classes(learner, [batch], steps=0, tasks=2)
    text = make_page("photographs", note("-"), {"Episodes": episodes_section(predictions)})
    page = read_page(text)
    assert page.images == 2 * 8 * (3 + 6)
    assert page.sizes == {(64, 64)}
    assert len(text) < 1_000_000
    assert "the 8 of 20 classes with most errors" in page.text


def test_of_many_queries_the_wrong_ones_are_shown():
    batch = episodes(1, ways=2, queries=7)
    predictions = predict_classes(make_learner(ways=2), [batch], steps=0, tasks=1)
    says = predictions.targets.clone()
    says[:, [5, 6, 13]] = 1 - says[:, [5, 6, 13]]
    predictions = replace(predictions, probabilities=F.one_hot(says, 2).float())
    text = make_page("x", note("-"), {"Episodes": episodes_section(predictions)})
    page = read_page(text)
    assert page.images == 2 * (1 + 6)
    assert page.text.count("✗") == 1 + 3  # the first one is explained


def test_inputs_that_are_no_images_and_classes_without_names_read_well(tmp_path):
    pairs = (torch.randn(2, 3, 64), torch.arange(3).expand(2, -1))
    batch = SimpleNamespace(support=pairs, query=pairs)
    predictions = predict_classes(make_learner(), [batch], steps=1, tasks=2)
    evaluation = Evaluation(torch.rand(1, 2), predictions.accuracies[None], steps=(1,))
    page = read_page(
        make_run_page(tmp_path, title="x", evaluation=evaluation, predictions=predictions)
    )
    sections = dict(page.sections)
    assert "features" in sections["Episodes"]
    assert "way 2" in sections["Episodes"]
    assert "is unknown" in sections["Confusion"]


def test_the_health_of_one_run_has_medians_of_its_first_and_last_tenth():
    lines = [{"split": "train", "step": step, "residual": 1.0 * step} for step in range(1, 31)]
    page = read_page(make_page("x", note("-"), {"Health": health_section({"": lines})}))
    assert "residual of the solve 2 29 30" in page.text
    assert page.images == 1
    without = read_page(
        make_page("x", note("-"), {"Health": health_section({"": [lines[0] | {"residual": None}]})})
    )
    assert "No step of training was logged." in without.text


def test_the_health_of_several_runs_has_a_line_for_each():
    one, other = (
        [{"split": "train", "step": s, "gradient_norm": scale * s} for s in (1, 2)]
        for scale in (1.0, 5.0)
    )
    section = health_section({"cg-0": one, HOSTILE: other})
    page = read_page(make_page("x", note("-"), {"Health": section}))
    assert "cg-0 2" in page.text
    assert "10 Medians" in page.text
    assert "solves no linear system" in page.text


def test_a_page_that_cannot_be_made_is_a_warning_and_keeps_the_old_one(tmp_path):
    path = tmp_path / "report.html"
    leave_page(path, lambda: "old")

    def fail():
        raise RuntimeError("no memory")

    with pytest.warns(UserWarning, match=r"report\.html could not be written \(RuntimeError: no"):
        leave_page(path, fail)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_attributes_are_escaped():
    assert element("p", title='"><b>') == '<p title="&quot;&gt;&lt;b&gt;"></p>'
