"""A tuner's run on disk: what it leaves, and that a killed one comes to the same bits."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tasks
from metaimplicit import GradientDescent, Tuner, tuning_problem
from metaimplicit.methods import known_options, make_method
from metaimplicit.training import CHECKPOINT, CONFIG, fit_tuner, read_metrics, save_checkpoint
from metaimplicit.training.checkpoint import Progress
from metaimplicit.tuning import ClassWeights


class KilledError(Exception):
    pass


def examples(n, seed):
    draw = torch.Generator().manual_seed(seed)
    return tasks.Examples(torch.randn(n, 4, generator=draw), torch.arange(n) % 3)


TRAIN, VALIDATION = (
    tasks.Batches(examples(30, 0), 6, seed=0),
    tasks.Batches(examples(12, 1), 6, seed=0),
)


def tuner(method="nystrom-cg", **options):
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


def fit(made, out, steps=6, **options):
    return fit_tuner(made, TRAIN, VALIDATION, out=out, steps=steps, bar=False, **options)


def kill_at(step):
    def callback(_):
        calls.append(1)
        if len(calls) == step:
            raise KilledError

    calls = []
    return callback


def metric(params, meta):
    return float(
        F.cross_entropy(
            VALIDATION.examples.inputs @ params["weight"].T, VALIDATION.examples.targets
        )
    )


def test_a_run_leaves_its_files(tmp_path):
    progress = fit(tuner(), tmp_path, config={"method": "nystrom-cg"}, metric=metric, every=2)
    assert progress.step == 6
    assert json.loads((tmp_path / CONFIG).read_text()) == {"method": "nystrom-cg"}
    assert (tmp_path / CHECKPOINT).exists()
    assert list((tmp_path / "tensorboard").iterdir())
    lines = read_metrics(tmp_path)
    train = [line for line in lines if line["split"] == "train"]
    assert [line["step"] for line in train] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "gradient_norm", "residual", "inner_gradient_norm", "applied"} <= set(train[0])
    assert [line["step"] for line in lines if line["split"] == "validation"] == [2, 4, 6]


@pytest.mark.parametrize("method", ["nystrom-cg", "soba", "f2sa", "real-time"])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, method):
    torch.manual_seed(1)
    whole = tuner(method)
    fit(whole, tmp_path / "whole")
    torch.manual_seed(1)
    with pytest.raises(KilledError):
        fit(tuner(method), tmp_path / "killed", checkpoint_every=2, callback=kill_at(5))
    resumed = tuner(method)
    torch.manual_seed(2)
    fit(resumed, tmp_path / "killed", checkpoint_every=2, resume=True)
    assert torch.equal(resumed.meta["class_weights"], whole.meta["class_weights"])
    assert all(torch.equal(p, whole.params[name]) for name, p in resumed.params.items())
    steps = [line["step"] for line in read_metrics(tmp_path / "killed") if line["split"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_random_numbers_go_on_where_they_were(tmp_path):
    def noisy(i):
        batch = TRAIN(i)
        return batch | {"inputs": batch["inputs"] + torch.randn(6, 4)}

    def run(made, out, **options):
        fit_tuner(
            made,
            noisy,
            VALIDATION,
            out=tmp_path / out,
            steps=4,
            bar=False,
            checkpoint_every=1,
            **options,
        )

    whole = tuner()
    run(whole, "whole")
    with pytest.raises(KilledError):
        run(tuner(), "killed", callback=kill_at(2))
    resumed = tuner()
    torch.manual_seed(3)
    run(resumed, "killed", resume=True)
    assert torch.equal(resumed.meta["class_weights"], whole.meta["class_weights"])


def test_early_stopping_survives_a_kill(tmp_path):
    values = {1: 5.0, 2: 3.0, 3: 4.0, 4: 4.0, 5: 4.0}

    def staged(made):
        return lambda params, meta: values[made.steps]

    whole = tuner()
    fit(whole, tmp_path / "whole", steps=10, metric=staged(whole), patience=3)
    assert whole.steps == 5
    two = tuner()
    fit(two, tmp_path / "two", steps=2)
    assert torch.equal(whole.meta["class_weights"], two.meta["class_weights"])

    first = tuner()
    with pytest.raises(KilledError):
        fit(
            first,
            tmp_path / "killed",
            steps=10,
            metric=staged(first),
            patience=3,
            checkpoint_every=1,
            callback=kill_at(4),
        )
    resumed = tuner()
    fit(resumed, tmp_path / "killed", steps=10, metric=staged(resumed), patience=3, resume=True)
    assert resumed.steps == 5
    assert torch.equal(resumed.meta["class_weights"], two.meta["class_weights"])
    again = tuner()
    fit(again, tmp_path / "killed", steps=10, metric=staged(again), patience=3, resume=True)
    assert again.steps == 5


def test_a_folder_that_holds_a_run_is_refused(tmp_path):
    fit(tuner(), tmp_path, steps=1, config={})
    with pytest.raises(FileExistsError, match="holds a run already"):
        fit(tuner(), tmp_path, steps=2)


def test_other_checkpoints_are_refused(tmp_path):
    from metaimplicit import MetaLearner

    class Sampler:
        def state_dict(self):
            return {}

    learner = MetaLearner(
        nn.Linear(4, 3), F.cross_entropy, inner=GradientDescent(), method="unrolled"
    )
    optimizer = torch.optim.Adam(learner.parameters())
    save_checkpoint(tmp_path / CHECKPOINT, learner, optimizer, Sampler(), Progress())
    with pytest.raises(ValueError, match="holds no tuner, but a learner"):
        fit(tuner(), tmp_path, resume=True)
    (tmp_path / CHECKPOINT).write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="is damaged or none of ours"):
        fit(tuner(), tmp_path, resume=True)


def test_bad_numbers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="checkpoint_every: got 0"):
        fit(tuner(), tmp_path, checkpoint_every=0)
    with pytest.raises(ValueError, match="patience: got 0, expected at least 1"):
        fit(tuner(), tmp_path / "a", metric=metric, patience=0)
    problem, meta, _ = tuning_problem(nn.Linear(4, 3), F.cross_entropy, [ClassWeights(3)])
    with pytest.raises(ValueError, match="schedule: got one for"):
        Tuner(problem, meta, inner=GradientDescent(lr=torch.tensor(0.1)), schedule=lambda step: 1.0)


def test_a_schedule_multiplies_the_step_size():
    """Its outer step n is one of the step size it names."""
    scheduled = tuner(schedule=lambda step: 1.0 if step == 0 else 0.5)
    by_hand = tuner()
    for step, lr in enumerate((0.5, 0.25)):
        batches = [TRAIN(3 * step + i) for i in range(3)]
        scheduled.step(batches, VALIDATION(step))
        by_hand.inner = GradientDescent(steps=2, lr=lr)
        by_hand.step(batches, VALIDATION(step))
    assert all(torch.equal(p, by_hand.params[name]) for name, p in scheduled.params.items())
