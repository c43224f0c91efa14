"""What the plots of a run show. Matplotlib draws them; here its figures are read."""

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from training.sinusoid_run import make_sampler

from metaimplicit import GradientDescent, MetaLearner
from metaimplicit.models import MLP
from metaimplicit.training import (
    Evaluation,
    Progress,
    plot_adaptation,
    plot_curves,
    predict_curves,
    write_sealed_json,
)
from metaimplicit.training.log import RunLog
from metaimplicit.training.panels import draw_progress

NUMBERS = ("loss", "accuracy")


@pytest.fixture
def figures(monkeypatch):
    """The figures that are saved."""
    saved = []
    save = Figure.savefig

    def keep(figure, *args, **options):
        saved.append(figure)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return saved


def legend_texts(figure):
    (legend,) = figure.legends
    return [text.get_text() for text in legend.get_texts()]


def assert_legend_is_outside_the_panels(figure):
    (legend,) = figure.legends
    box = legend.get_window_extent()
    assert not any(box.overlaps(ax.get_window_extent()) for ax in figure.axes)


def test_the_adaptation_plot_shows_the_metric_after_each_number_of_steps(tmp_path, figures):
    evaluation = Evaluation(torch.rand(3, 4).double(), None, steps=(0, 3, 7))
    plot_adaptation(tmp_path, evaluation)
    (line,) = figures[0].axes[0].lines
    assert line.get_xdata().tolist() == [0, 3, 7]
    assert line.get_ydata().tolist() == pytest.approx(evaluation.losses.mean(1).tolist())
    assert (tmp_path / "adaptation.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_adaptation_plot_shows_fits_in_a_panel_for_each_task(tmp_path, figures):
    learner = MetaLearner(MLP(1, 1), F.mse_loss, inner=GradientDescent(2, lr=0.01))
    episodes = make_sampler(tasks_per_batch=3, seed=1)[0]
    fits = predict_curves(learner, episodes, steps=2)
    expected = learner.adapt(episodes.support, steps=2, batched=True)(
        fits.grid[:, None].expand(3, -1, 1)
    )
    torch.testing.assert_close(fits.after, expected.squeeze(-1).detach(), rtol=0, atol=0)
    assert fits.grid[0] == episodes.query[0].min()

    evaluation = Evaluation(torch.rand(3, 4), None, steps=(0, 1, 2))
    plot_adaptation(tmp_path, evaluation, fits=fits)
    _, *panels = figures[0].axes
    for task, ax in enumerate(panels):
        _, before, after, support = ax.lines
        assert before.get_ydata().tolist() == fits.before[task].tolist()
        assert after.get_ydata().tolist() == fits.after[task].tolist()
        assert support.get_xdata().tolist() == fits.support.inputs[task].tolist()
    assert legend_texts(figures[0]) == ["truth", "before adaptation", "after 2 steps", "support"]
    assert_legend_is_outside_the_panels(figures[0])


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["accuracy", "loss"])
def test_the_curves_show_training_with_its_running_mean_and_validation(tmp_path, figures, metric):
    def line(step, split):
        values = {"loss": 1.0 / step, "accuracy": step / 200 if metric == "accuracy" else None}
        return {"step": step, "seconds": 2.0 * step, "split": split, **values}

    lines = [line(step, "train") for step in range(1, 101)]
    lines += [line(50, "validation"), line(100, "validation")]
    write_sealed_json(tmp_path / "config.json", {"run": "a"})
    with RunLog(tmp_path, Progress(), "a", total=None, bar=False) as log:
        for entry in lines:
            progress = Progress(entry["step"], entry["seconds"], lines=lines.index(entry))
            log.write(entry["split"], progress, {name: entry[name] for name in NUMBERS})
    plot_curves(tmp_path)

    by_step, by_time = figures[0].axes
    _, mean, validation = by_step.lines
    assert list(mean.get_xdata()) == list(range(2, 101))
    values = [entry[metric] for entry in lines[:100]]
    expected = (values[0] + values[1]) / 2
    assert mean.get_ydata()[0] == pytest.approx(expected, rel=1e-6)
    assert list(validation.get_xdata()) == [50, 100]
    assert list(by_time.lines[2].get_xdata()) == [100.0, 200.0]
    assert by_step.get_ylabel() == f"query {metric}"
    assert legend_texts(figures[0]) == ["training, mean of 2 steps", "validation"]
    assert_legend_is_outside_the_panels(figures[0])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("losses", "scale"), [((0.0, 0.0), "linear"), ((0.0, 2.0), "log")])
def test_losses_of_zero_have_no_logarithmic_axis(losses, scale):
    """Those of a task with one class are zero. Matplotlib warned of them."""
    ax = Figure().subplots()
    lines = [{"split": "train", "step": s, "loss": loss} for s, loss in enumerate(losses, start=1)]
    draw_progress(ax, lines, x="step", y="loss")
    ax.figure.canvas.draw()
    assert ax.get_yscale() == scale
