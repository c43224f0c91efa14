"""A tuner's run on disk: its files, and that a killed run ends at the same bits."""

import json
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training.sinusoid_run import make_parts

import tasks
from metaimplicit import GradientDescent, Tuner, tuning_problem
from metaimplicit.methods import known_options, make_method
from metaimplicit.training import (
    CHECKPOINT,
    CONFIG,
    DamagedFileError,
    Progress,
    fit_tuner,
    load_tuner,
    read_metrics,
    save_checkpoint,
)
from metaimplicit.tuning import ClassWeights


def draw_batches(examples, seed):
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(examples, 4, generator=generator)
    return tasks.Batches(tasks.Examples(inputs, torch.arange(examples) % 3), 6, seed=0)


TRAIN = draw_batches(30, seed=0)
VALIDATION = draw_batches(12, seed=1)


class KilledError(Exception):
    pass


def make_tuner(method="nystrom-cg", **options):
    """A tuner of class weights, equal each time."""
    torch.manual_seed(0)
    problem, meta, domains = tuning_problem(nn.Linear(4, 3), F.cross_entropy, [ClassWeights(3)])
    return Tuner(
        problem,
        meta,
        inner=GradientDescent(steps=2, lr=0.5),
        method=make_method(method, **known_options(method, damping=1.0)),
        domains=domains,
        **options,
    )


def fit(tuner, out, steps=6, train=TRAIN, **options):
    return fit_tuner(tuner, train, VALIDATION, out=out, steps=steps, bar=False, **options)


def kill_after(steps):
    """A callback that raises at its call of this number."""
    calls = []

    def callback(_):
        calls.append(1)
        if len(calls) == steps:
            raise KilledError

    return callback


def validation_loss(params, meta):
    examples = VALIDATION.examples
    return float(F.cross_entropy(examples.inputs @ params["weight"].T, examples.targets))


def assert_same_weights(tuner, expected):
    assert torch.equal(tuner.meta["class_weights"], expected.meta["class_weights"])
    assert all(torch.equal(p, expected.params[name]) for name, p in tuner.params.items())


def test_a_run_leaves_its_files(tmp_path):
    config = {"method": "nystrom-cg"}
    progress = fit(make_tuner(), tmp_path, config=config, metric=validation_loss, every=2)
    assert progress.step == 6
    assert config.items() <= json.loads((tmp_path / CONFIG).read_text()).items()
    assert (tmp_path / CHECKPOINT).exists()
    assert list((tmp_path / "tensorboard").iterdir())
    lines = read_metrics(tmp_path)
    training = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in training] == [1, 2, 3, 4, 5, 6]
    names = {"loss", "gradient_norm", "residual", "inner_gradient_norm", "applied"}
    assert names <= set(training[0])
    assert [line["step"] for line in lines if line["split"] == "validation"] == [2, 4, 6]


@pytest.mark.parametrize("method", ["nystrom-cg", "soba", "f2sa", "real-time"])
def test_a_killed_run_that_is_resumed_ends_at_the_same_bits(tmp_path, method):
    torch.manual_seed(1)
    unbroken = make_tuner(method)
    fit(unbroken, tmp_path / "unbroken", steps=4)
    torch.manual_seed(1)
    out = tmp_path / "killed"
    with pytest.raises(KilledError):
        fit(make_tuner(method), out, steps=4, checkpoint_every=2, callback=kill_after(3))
    resumed = make_tuner(method)
    torch.manual_seed(2)
    fit(resumed, out, steps=4, checkpoint_every=2, resume=True)
    assert_same_weights(resumed, unbroken)
    steps = [line["step"] for line in read_metrics(out) if line["split"] == "train"]
    assert steps == [1, 2, 3, 4]


def test_a_resumed_run_draws_the_random_numbers_that_an_unbroken_one_does(tmp_path):
    """Those of torch, NumPy and Python: each has a feature of the inputs."""

    def noisy_batch(i):
        batch = TRAIN(i)
        noise = [
            torch.randn(6),
            torch.tensor(np.random.randn(6)),
            torch.full((6,), random.random()),
        ]
        noise = torch.stack([*noise, torch.zeros(6)], dim=1).float()
        return batch | {"inputs": batch["inputs"] + noise}

    def make_seeded_tuner(seed):
        tuner = make_tuner()
        for set_seed in (torch.manual_seed, np.random.seed, random.seed):
            set_seed(seed)
        return tuner

    options = {"steps": 4, "train": noisy_batch, "checkpoint_every": 1}
    unbroken = make_seeded_tuner(1)
    fit(unbroken, tmp_path / "unbroken", **options)
    with pytest.raises(KilledError):
        fit(make_seeded_tuner(1), tmp_path / "killed", callback=kill_after(2), **options)
    resumed = make_seeded_tuner(3)
    fit(resumed, tmp_path / "killed", resume=True, **options)
    assert_same_weights(resumed, unbroken)


def test_early_stopping_counts_on_after_a_kill(tmp_path):
    values = {1: 5.0, 2: 3.0, 3: 4.0, 4: 4.0, 5: 4.0}

    def staged_metric(tuner):
        return lambda params, meta: values[tuner.steps]

    def fit_to_stop(tuner, out, **options):
        fit(tuner, out, steps=10, metric=staged_metric(tuner), patience=3, **options)

    stopped = make_tuner()
    fit_to_stop(stopped, tmp_path / "stopped")
    assert stopped.steps == 5
    best = make_tuner()
    fit(best, tmp_path / "best", steps=2)
    assert torch.equal(stopped.meta["class_weights"], best.meta["class_weights"])

    out = tmp_path / "killed"
    with pytest.raises(KilledError):
        fit_to_stop(make_tuner(), out, checkpoint_every=1, callback=kill_after(4))
    resumed = make_tuner()
    fit_to_stop(resumed, out, resume=True)
    assert resumed.steps == 5
    assert torch.equal(resumed.meta["class_weights"], best.meta["class_weights"])
    again = make_tuner()
    fit_to_stop(again, out, resume=True)
    assert again.steps == 5


@pytest.mark.parametrize("kind", [np.float32, torch.tensor], ids=["float32", "tensor"])
def test_a_metric_of_numpy_or_torch_can_be_resumed(tmp_path, kind):
    def metric(params, meta):
        return kind(validation_loss(params, meta))

    unbroken = make_tuner()
    fit(unbroken, tmp_path / "unbroken", steps=4, metric=metric)
    fit(make_tuner(), tmp_path / "stopped", steps=2, metric=metric)
    resumed = make_tuner()
    fit(resumed, tmp_path / "stopped", steps=4, metric=metric, resume=True)
    assert_same_weights(resumed, unbroken)
    assert resumed.stopping.best == unbroken.stopping.best


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    fit(make_tuner(), tmp_path, steps=1, config={})
    with pytest.raises(FileExistsError, match="holds a run already"):
        fit(make_tuner(), tmp_path, steps=2)


def test_the_checkpoint_of_a_learner_and_a_damaged_one_are_refused(tmp_path):
    path = tmp_path / CHECKPOINT
    save_checkpoint(path, *make_parts(), Progress())
    with pytest.raises(ValueError, match="holds no tuner, but a learner"):
        load_tuner(path, make_tuner())
    path.write_bytes(b"no checkpoint")
    with pytest.raises(DamagedFileError, match="got no checksum at the end"):
        load_tuner(path, make_tuner())


def test_numbers_out_of_range_are_refused(tmp_path):
    with pytest.raises(ValueError, match="checkpoint_every: got 0"):
        fit(make_tuner(), tmp_path, checkpoint_every=0)
    with pytest.raises(ValueError, match="patience: got 0, expected at least 1"):
        fit(make_tuner(), tmp_path / "a", metric=validation_loss, patience=0)


def test_a_schedule_needs_a_float_step_size():
    problem, meta, _ = tuning_problem(nn.Linear(4, 3), F.cross_entropy, [ClassWeights(3)])
    inner = GradientDescent(lr=torch.tensor(0.1))
    with pytest.raises(ValueError, match="schedule: got one for"):
        Tuner(problem, meta, inner=inner, schedule=lambda step: 1.0)


def test_a_schedule_multiplies_the_step_size_of_the_outer_step_it_is_called_with():
    scheduled = make_tuner(schedule=lambda step: 1.0 if step == 0 else 0.5)
    by_hand = make_tuner()
    for step, lr in enumerate((0.5, 0.25)):
        batches = [TRAIN(3 * step + i) for i in range(3)]
        scheduled.step(batches, VALIDATION(step))
        by_hand.inner = GradientDescent(steps=2, lr=lr)
        by_hand.step(batches, VALIDATION(step))
    assert all(torch.equal(p, by_hand.params[name]) for name, p in scheduled.params.items())


def test_a_resumed_run_keeps_its_hyperparameters_and_says_which_ones_differ(tmp_path):
    fit(make_tuner(optimizer=partial(torch.optim.Adam, lr=0.1)), tmp_path, steps=3)
    tuner = make_tuner(optimizer=partial(torch.optim.Adam, lr=0.5))
    with pytest.warns(UserWarning, match=r"checkpoint.pt, .* \(lr is 0.1 there, 0.5 here\)"):
        fit(tuner, tmp_path, steps=6, resume=True)
    assert tuner.optimizer.param_groups[0]["lr"] == 0.1
