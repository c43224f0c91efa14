"""The loop: resuming to the same bits, stopping before harm, files that are whole."""

import json
import math
from dataclasses import replace

import pytest
import torch

import tasks
from metaimplicit import GradientDescent, Implicit, MetaLearner, Nystrom
from metaimplicit.models import MLP
from metaimplicit.training import (
    Budget,
    NonFiniteError,
    Progress,
    cosine,
    fit,
    load_checkpoint,
    load_learner,
    read_metrics,
    save_checkpoint,
    write_atomically,
    write_json,
)


class Noise(torch.nn.Module):
    """Draws from torch's generator, so that a run depends on the random state too."""

    def forward(self, x):
        return x + 0.1 * torch.randn_like(x)


def setup(noisy=True, **options):
    torch.manual_seed(7)
    model = MLP(1, 1, hidden=(8,))
    if noisy:
        model = torch.nn.Sequential(Noise(), model)
    options = {
        "inner": GradientDescent(2, lr=0.01),
        "method": "unrolled",
        "learn": ("lr",),
    } | options
    learner = MetaLearner(model, torch.nn.functional.mse_loss, vectorize="vmap", **options)
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
    sampler = tasks.EpisodeSampler(
        tasks.load("sinusoid", shots=5, queries=5).train, tasks=4, seed=3
    )
    return learner, optimizer, sampler


def train(out, parts, steps=6, **options):
    return fit(*parts, out=out, budget=Budget(steps=steps), bar=False, **options)


def weights(parts):
    return {name: p.detach().clone() for name, p in parts[0].state_dict().items()}


class CrashError(Exception):
    pass


class Breaks:
    """A sampler that fails, or spoils its batch, at one position."""

    def __init__(self, sampler, at, spoil=None):
        self.sampler, self.at, self.spoil = sampler, at, spoil
        self.state_dict, self.load_state_dict = sampler.state_dict, sampler.load_state_dict

    def batches(self, count, workers=0, pin_memory=False):
        for episodes in self.sampler.batches(count, workers, pin_memory):
            if self.sampler.position == self.at:
                if self.spoil is None:
                    raise CrashError
                episodes = self.spoil(episodes)
            yield episodes


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_broken_off_and_resumed_comes_to_the_same_bits(tmp_path, workers):
    whole = setup()
    train(tmp_path / "whole", whole)
    *first, sampler = setup()
    with pytest.raises(
        CrashError
    ):  # at step 5: steps 4 (and its line) are lost, the checkpoint is of step 3
        train(
            tmp_path / "broken", (*first, Breaks(sampler, 5)), checkpoint_every=3, workers=workers
        )
    torch.manual_seed(12345)
    resumed = setup()
    with torch.no_grad():
        for p in resumed[0].parameters():
            p.fill_(math.nan)  # nothing of the new learner may survive
    progress = train(tmp_path / "broken", resumed, resume=True, workers=workers)
    assert progress.step == 6
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    lines = [
        [{**line, "seconds": 0} for line in read_metrics(tmp_path / run)]
        for run in ("whole", "broken")
    ]
    assert lines[0] == lines[1]
    assert [line["step"] for line in lines[1]] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_resumed_does_nothing_and_with_more_steps_goes_on(tmp_path):
    parts = setup()
    train(tmp_path, parts, steps=2)
    before = weights(parts)
    assert train(tmp_path, setup(), steps=2, resume=True).step == 2
    again = setup()
    assert train(tmp_path, again, steps=3, resume=True).step == 3
    assert again[2].position == 3
    assert any(not torch.equal(before[name], value) for name, value in weights(again).items())


def test_the_choice_between_vmap_and_the_loop_is_resumed(tmp_path):
    parts = setup()
    parts[0].vectorize = "loop"
    train(tmp_path, parts, steps=1)
    other = setup()
    other[0].vectorize = "auto"
    assert load_learner(tmp_path / "checkpoint.pt", other[0]).step == 1
    assert other[0].vectorize == "loop"


def spoiled_support(episodes):
    x, y = episodes.support
    return replace(
        episodes, support=(torch.where(torch.arange(len(x))[:, None, None] == 2, math.nan, x), y)
    )


def huge_targets(episodes):
    x, y = episodes.query
    return replace(episodes, query=(x, y * 1e30))  # its square overflows float32


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            spoiled_support,
            r"step 4: the support inputs hold NaN or Inf; .* checkpoint\.pt holds step 2",
        ),
        (huge_targets, r"step 4: the query loss is inf; .* checkpoint\.pt holds step 2"),
    ],
)
def test_bad_data_and_losses_stop_training_before_the_step(tmp_path, spoil, message):
    three = setup()
    train(tmp_path / "three", three, steps=3, schedule=lambda _: 1.0)
    *parts, sampler = setup()
    with pytest.raises(NonFiniteError, match=message):
        train(
            tmp_path / "run",
            (*parts, Breaks(sampler, 4, spoil)),
            checkpoint_every=2,
            schedule=lambda _: 1.0,
        )
    assert all(torch.equal(value, weights(three)[name]) for name, value in weights(parts).items())
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt", *setup()).step == 2


def test_a_meta_gradient_that_is_not_finite_stops_training_before_the_step(tmp_path):
    learner, optimizer, sampler = setup(noisy=False)
    start = weights((learner,))
    backward = learner.backward

    def poisoned(episodes):
        step = backward(episodes)
        learner.model[2].bias.grad = torch.tensor([math.inf])
        return step

    learner.backward = poisoned
    with pytest.raises(
        NonFiniteError, match=r"step 1: the meta-gradient is not finite \(model\.2\.bias\)"
    ):
        train(tmp_path, (learner, optimizer, sampler))
    assert all(torch.equal(value, start[name]) for name, value in weights((learner,)).items())
    assert load_learner(tmp_path / "checkpoint.pt", setup(noisy=False)[0]) == Progress(0, 0.0)


def test_clipping_bounds_the_meta_gradient_and_the_log_keeps_its_true_norm(tmp_path):
    learner, _, sampler = setup(noisy=False)
    start = weights((learner,))
    descent = torch.optim.SGD(learner.parameters(), lr=1.0)
    train(tmp_path, (learner, descent, sampler), steps=1, clip=0.01)
    moved = torch.cat(
        [(value - start[name]).flatten() for name, value in weights((learner,)).items()]
    ).norm()
    assert moved == pytest.approx(0.01, rel=1e-3)
    assert read_metrics(tmp_path)[0]["gradient_norm"] > 0.1


def test_the_outer_step_size_follows_the_share_of_the_budget(tmp_path):
    assert [cosine(x) for x in (0, 0.5, 1)] == pytest.approx([1, 0.5, 0], abs=1e-15)
    train(tmp_path, setup(), steps=4)
    rates = [line["learning_rate"] for line in read_metrics(tmp_path)]
    assert rates == pytest.approx([0.01 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)])


def test_budget_is_the_larger_of_both_shares():
    assert Budget(steps=100, minutes=2).spent(Progress(10, 60.0)) == 0.5
    assert Budget(steps=100, minutes=2).spent(Progress(80, 60.0)) == 0.8
    assert Budget(minutes=2).spent(Progress(10**9, 240.0)) == 1.0
    for bad, message in (
        ({}, "neither steps nor"),
        ({"steps": 0}, "steps: got 0"),
        ({"minutes": 0.0}, "minutes"),
    ):
        with pytest.raises(ValueError, match=message):
            Budget(**bad)


def test_a_time_limit_ends_training_with_a_checkpoint_and_a_validation(tmp_path):
    parts = setup()
    held_out = [parts[2][1000]]
    budget = Budget(minutes=0.5 / 60)
    progress = fit(
        *parts,
        out=tmp_path,
        budget=budget,
        bar=False,
        validation=lambda: held_out,
        validate_every=10**6,
    )
    assert progress.step >= 1
    assert progress.seconds >= 0.5
    assert load_learner(tmp_path / "checkpoint.pt", setup()[0]).step == progress.step
    last = read_metrics(tmp_path)[-1]
    assert (last["split"], last["step"]) == ("validation", progress.step)


def test_a_folder_with_a_run_is_refused(tmp_path):
    train(tmp_path, setup(), steps=1, config={"a": 1})
    kept = (tmp_path / "config.json").read_bytes()
    with pytest.raises(
        FileExistsError, match=r"holds a run already \(config.json, checkpoint.pt\).*--resume"
    ):
        train(tmp_path, setup(), steps=1, config={"a": 2})
    assert (tmp_path / "config.json").read_bytes() == kept


@pytest.mark.parametrize("bad", [{"validate_every": 0}, {"checkpoint_every": 0}, {"clip": 0.0}])
def test_numbers_out_of_range_are_named_before_anything_is_written(tmp_path, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        train(tmp_path / "run", setup(), **bad)
    assert not (tmp_path / "run").exists()


def test_a_crash_while_saving_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    parts, path = setup(), tmp_path / "checkpoint.pt"
    save_checkpoint(path, *parts, Progress(1, 1.0))

    def half(state, file):
        file.write(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(OSError, match="disk full"):
            save_checkpoint(path, *parts, Progress(2, 2.0))
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert load_checkpoint(path, *parts) == Progress(1, 1.0)


def test_json_is_strict_and_atomic(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": math.nan})
    write_atomically(tmp_path / "b", lambda file: file.write(b"b"))
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "b"]


def test_checkpoints_that_do_not_fit_are_explained(tmp_path):
    parts, path = setup(), tmp_path / "checkpoint.pt"
    with pytest.raises(FileNotFoundError, match="checkpoint: found no"):
        load_learner(path, parts[0])
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="is damaged or none of ours"):
        load_learner(path, parts[0])
    save_checkpoint(path, *parts, Progress())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is damaged or none of ours"):
        load_learner(path, parts[0])
    torch.save({"format": 0}, path)
    with pytest.raises(ValueError, match="has format 0, expected 1"):
        load_learner(path, parts[0])
    save_checkpoint(path, *parts, Progress())
    with pytest.raises(ValueError, match="does not fit the learner"):
        load_learner(path, setup(learn=())[0])


def test_a_run_whose_checkpoint_is_gone_is_not_begun_again(tmp_path):
    train(tmp_path, setup(), steps=2)
    (tmp_path / "checkpoint.pt").unlink()
    before = (tmp_path / "metrics.jsonl").read_text()
    with pytest.raises(
        ValueError, match=r"checkpoint\.pt is gone, but metrics\.jsonl holds steps made; restore it"
    ):
        train(tmp_path, setup(), steps=4, resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_generator_of_the_solver_goes_on_where_it_was(tmp_path):
    def parts():
        method = Implicit(Nystrom(rank=10, rho=2.0, generator=torch.Generator().manual_seed(5)))
        return setup(noisy=False, method=method, learn=(), proximal=1.0)

    whole, stopped, resumed = parts(), parts(), parts()
    train(tmp_path / "whole", whole, steps=6, schedule=lambda _: 1.0)
    train(tmp_path / "stopped", stopped, steps=3, schedule=lambda _: 1.0)
    train(tmp_path / "stopped", resumed, steps=6, schedule=lambda _: 1.0, resume=True)
    assert all(torch.equal(p, weights(resumed)[name]) for name, p in weights(whole).items())


def test_a_checkpoint_of_a_tuner_is_no_learners(tmp_path):
    torch.save({"format": 1, "tuner": {}, "progress": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match="holds no learner, but a tuner; use load_tuner"):
        load_learner(tmp_path / "checkpoint.pt", setup()[0])
