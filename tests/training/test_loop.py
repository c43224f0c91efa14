"""`fit`: it resumes to the same bits, and stops before numbers that are not finite do harm."""

import math
from dataclasses import replace

import pytest
import torch
from scripts.running import draw_nothing
from training.sinusoid_run import assert_same_weights, make_parts, no_decay, train, weights

from metaimplicit import Implicit, MetaLearner, Nystrom
from metaimplicit.training import (
    Budget,
    NonFiniteError,
    Progress,
    evaluate,
    fit,
    leave_page,
    load_checkpoint,
    load_learner,
    load_pretrained,
    make_run_page,
    plot_curves,
    read_metrics,
    save_checkpoint,
)
from metaimplicit.training.run_folder import RunFolder


class CrashError(Exception):
    pass


class FaultySampler:
    """A sampler that crashes at one position, or returns a spoilt batch there."""

    def __init__(self, sampler, at, spoil=None):
        self.sampler = sampler
        self.at = at
        self.spoil = spoil
        self.state_dict = sampler.state_dict
        self.load_state_dict = sampler.load_state_dict

    def batches(self, count, workers=0, pin_memory=False):
        for episodes in self.sampler.batches(count, workers, pin_memory):
            if self.sampler.position == self.at:
                if self.spoil is None:
                    raise CrashError
                episodes = self.spoil(episodes)
            yield episodes


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The folder of a run of six steps, and its weights at the end."""
    out = tmp_path_factory.mktemp("unbroken")
    parts = make_parts()
    train(out, parts)
    return out, weights(parts.learner)


@pytest.fixture(scope="module")
def after_three_steps(tmp_path_factory):
    """The weights after three steps of a constant step size."""
    parts = make_parts()
    train(tmp_path_factory.mktemp("three-steps"), parts, steps=3, schedule=no_decay)
    return weights(parts.learner)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_a_crashed_run_that_is_resumed_ends_at_the_same_bits(tmp_path, unbroken, workers):
    unbroken_out, expected = unbroken
    # The crash at step 5 loses step 4 and its line, because the last checkpoint is of step 3.
    learner, optimizer, sampler = make_parts()
    crashing = (learner, optimizer, FaultySampler(sampler, at=5))
    out = tmp_path / "crashed"
    with pytest.raises(CrashError):
        train(out, crashing, checkpoint_every=3, workers=workers)

    torch.manual_seed(12345)
    resumed = make_parts()
    with torch.no_grad():
        for p in resumed.learner.parameters():
            p.fill_(math.nan)  # nothing of the new learner may survive
    progress = train(out, resumed, resume=True, workers=workers)
    assert progress.step == 6
    assert_same_weights(resumed.learner, expected)

    def lines(run):
        return [{**line, "seconds": 0} for line in read_metrics(run)]

    assert lines(out) == lines(unbroken_out)
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4, 5, 6]


def test_what_is_called_before_a_step_knows_how_much_of_the_budget_is_spent(tmp_path):
    learner, optimizer, sampler = make_parts()
    spent = []
    crashing = (learner, optimizer, FaultySampler(sampler, at=3))
    with pytest.raises(CrashError):
        train(tmp_path, crashing, steps=4, checkpoint_every=1, before_step=spent.append)
    assert spent == [0, 0.25, 0.5]
    train(tmp_path, make_parts(), steps=4, resume=True, before_step=spent.append)
    assert spent == [0, 0.25, 0.5, 0.5, 0.75]


@pytest.mark.slow
def test_the_generator_of_a_solver_continues_where_it_was(tmp_path):
    def make_sketched_parts():
        generator = torch.Generator().manual_seed(5)
        method = Implicit(Nystrom(rank=10, rho=2.0, generator=generator))
        return make_parts(noisy=False, method=method, learn=(), proximal=1.0)

    unbroken = make_sketched_parts()
    train(tmp_path / "unbroken", unbroken, steps=4, schedule=no_decay)
    train(tmp_path / "stopped", make_sketched_parts(), steps=2, schedule=no_decay)
    resumed = make_sketched_parts()
    train(tmp_path / "stopped", resumed, steps=4, schedule=no_decay, resume=True)
    assert_same_weights(resumed.learner, unbroken.learner)


def test_a_finished_run_that_is_resumed_does_nothing_unless_it_has_more_steps(tmp_path):
    first = make_parts()
    train(tmp_path, first, steps=2)
    assert train(tmp_path, make_parts(), steps=2, resume=True).step == 2
    longer = make_parts()
    assert train(tmp_path, longer, steps=3, resume=True).step == 3
    assert longer.sampler.position == 3
    before = weights(first.learner)
    assert any(not torch.equal(before[name], x) for name, x in weights(longer.learner).items())


def spoil_support(episodes):
    inputs, targets = episodes.support
    task = torch.arange(len(inputs))[:, None, None]
    return replace(episodes, support=(torch.where(task == 2, math.nan, inputs), targets))


def spoil_targets(episodes):
    inputs, targets = episodes.query
    return replace(episodes, query=(inputs, targets * 1e30))  # its square overflows float32


def enlarge_targets(episodes):
    inputs, targets = episodes.query
    return replace(episodes, query=(inputs, torch.full_like(targets, 3e38)))  # their sum is inf


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_support, r"step 4: the support inputs hold NaN or Inf; .*\.pt holds step 2"),
        (spoil_targets, r"step 4: the query loss is inf; .*\.pt holds step 2"),
        (enlarge_targets, r"step 4: the query loss is inf; .*\.pt holds step 2"),
    ],
)
def test_bad_data_and_losses_stop_training_before_the_step(
    tmp_path, after_three_steps, spoil, message
):
    learner, optimizer, sampler = make_parts()
    spoilt = (learner, optimizer, FaultySampler(sampler, at=4, spoil=spoil))
    with pytest.raises(NonFiniteError, match=message):
        train(tmp_path / "run", spoilt, checkpoint_every=2, schedule=no_decay)
    assert_same_weights(learner, after_three_steps)
    assert load_checkpoint(tmp_path / "run" / "checkpoint.pt", *make_parts()).step == 2


def test_a_meta_gradient_that_is_not_finite_stops_training_before_the_step(tmp_path):
    learner, optimizer, sampler = make_parts(noisy=False)
    start = weights(learner)
    backward = learner.backward

    def spoilt_backward(episodes):
        step = backward(episodes)
        learner.model[2].bias.grad = torch.tensor([math.inf])
        return step

    learner.backward = spoilt_backward
    message = r"step 1: the meta-gradient is not finite \(model\.2\.bias\)"
    with pytest.raises(NonFiniteError, match=message):
        train(tmp_path, (learner, optimizer, sampler))
    assert_same_weights(learner, start)
    other = make_parts(noisy=False).learner
    assert load_learner(tmp_path / "checkpoint.pt", other) == Progress(0, 0.0)


def test_clipping_bounds_the_meta_gradient_and_the_log_has_its_norm_before(tmp_path):
    learner, _, sampler = make_parts(noisy=False)
    start = weights(learner)
    descent = torch.optim.SGD(learner.parameters(), lr=1.0)
    train(tmp_path, (learner, descent, sampler), steps=1, clip=0.01)
    moves = [(value - start[name]).flatten() for name, value in weights(learner).items()]
    assert torch.cat(moves).norm() == pytest.approx(0.01, rel=1e-3)
    assert read_metrics(tmp_path)[0]["gradient_norm"] > 0.1


def test_the_norm_and_the_clipping_are_over_the_parameters_that_the_optimiser_moves(tmp_path):
    learner, _, sampler = make_parts(noisy=False)
    head = dict(learner.model[2].named_parameters())
    before = {name: p.detach().clone() for name, p in head.items()}
    learner.backward(next(make_parts(noisy=False).sampler.batches(1)))
    expected = torch.stack([p.grad.norm() for p in head.values()]).norm().item()

    # The gradients that are there now enter neither.
    descent = torch.optim.SGD(head.values(), lr=1.0)
    train(tmp_path, (learner, descent, sampler), steps=1, clip=0.01)
    assert read_metrics(tmp_path)[0]["gradient_norm"] == pytest.approx(expected, rel=1e-6)
    moves = [(p.detach() - before[name]).flatten() for name, p in head.items()]
    assert torch.cat(moves).norm() == pytest.approx(0.01, rel=1e-3)


def test_the_outer_step_size_follows_the_share_of_the_budget_that_is_spent(tmp_path):
    train(tmp_path, make_parts(), steps=4)
    rates = [line["learning_rate"] for line in read_metrics(tmp_path)]
    assert rates == pytest.approx([0.01 * (1 + math.cos(math.pi * k / 4)) / 2 for k in range(4)])


def test_a_learning_rate_that_is_set_between_two_runs_is_that_of_the_second(tmp_path):
    learner, optimizer, sampler = make_parts()
    train(tmp_path / "first", (learner, optimizer, sampler), steps=2)
    (group,) = optimizer.param_groups
    assert (group["lr"], "initial_lr" in group) == (0.01, False)
    group["lr"] = 1e-5
    train(tmp_path / "second", (learner, optimizer, sampler), steps=2, schedule=no_decay)
    assert [line["learning_rate"] for line in read_metrics(tmp_path / "second")] == [1e-5, 1e-5]


def test_a_learning_rate_that_a_scheduler_of_torch_has_lowered_is_that_of_the_run(tmp_path):
    learner, optimizer, sampler = make_parts()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    optimizer.step()
    scheduler.step()
    train(tmp_path, (learner, optimizer, sampler), steps=2, schedule=no_decay)
    assert [line["learning_rate"] for line in read_metrics(tmp_path)] == pytest.approx([1e-3] * 2)
    (group,) = optimizer.param_groups
    assert (group["lr"], group["initial_lr"]) == (pytest.approx(1e-3), 0.01)
    scheduler.step()
    assert group["lr"] == pytest.approx(1e-4)


def test_a_scheduler_of_torch_before_a_step_is_refused(tmp_path):
    learner, optimizer, sampler = make_parts()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    def halve(spent):
        if spent > 0:
            scheduler.step()

    message = r"before_step: changed a learning rate from 0\.01 to 0\.005, expected it to stay"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, (learner, optimizer, sampler), before_step=halve)


def test_a_group_that_is_added_before_a_step_is_trained_and_scheduled(tmp_path):
    learner, _, sampler = make_parts(noisy=False)
    first, *others = learner.parameters()
    optimizer = torch.optim.SGD([first], lr=0.01)
    before = [p.detach().clone() for p in others]

    def add(spent):
        if spent == 0.5:
            optimizer.add_param_group({"params": others, "lr": 0.1})

    train(tmp_path, (learner, optimizer, sampler), steps=4, before_step=add)
    assert not any(torch.equal(p, old) for p, old in zip(others, before, strict=True))
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.1]
    assert not any("initial_lr" in group for group in optimizer.param_groups)


def test_the_steps_of_a_sampler_that_ends_are_saved(tmp_path, unbroken):
    learner, optimizer, sampler = make_parts()

    class ShortSampler(FaultySampler):
        def batches(self, count, workers=0, pin_memory=False):
            return list(self.sampler.batches(2, workers, pin_memory))

    message = "sampler: its batches ended at step 2, which checkpoint.pt holds, expected as many"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, (learner, optimizer, ShortSampler(sampler, at=None)))
    resumed = make_parts()
    train(tmp_path, resumed, resume=True)
    _, expected = unbroken
    assert_same_weights(resumed.learner, expected)


def test_a_scheduled_learning_rate_is_put_back_when_a_run_fails_and_when_it_is_resumed(tmp_path):
    learner, optimizer, sampler = make_parts()
    with pytest.raises(CrashError):
        train(tmp_path, (learner, optimizer, FaultySampler(sampler, at=3)), checkpoint_every=1)
    resumed = make_parts()
    train(tmp_path, resumed, resume=True)
    for group in (*optimizer.param_groups, *resumed.optimizer.param_groups):
        assert (group["lr"], "initial_lr" in group) == (0.01, False)


def test_a_resumed_run_keeps_its_hyperparameters_and_says_which_ones_differ(tmp_path):
    train(tmp_path, make_parts(), steps=2, schedule=no_decay)
    learner, _, sampler = make_parts()
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-4, betas=(0.5, 0.999))
    rates = r"lr is 0\.01 there, 0\.0001 here"
    betas = r"betas is \(0\.9, 0\.999\) there, \(0\.5, 0\.999\) here"
    with pytest.warns(UserWarning, match=rf"checkpoint\.pt.* \({rates}; {betas}\)"):
        train(tmp_path, (learner, optimizer, sampler), steps=4, schedule=no_decay, resume=True)
    assert {line["learning_rate"] for line in read_metrics(tmp_path)} == {0.01}


def test_a_run_of_another_optimiser_is_refused(tmp_path):
    """Adam and RAdam have slots of the same names, and would take steps of neither."""
    train(tmp_path, make_parts(), steps=2)
    learner, _, sampler = make_parts()
    before = weights(learner)
    optimizer = torch.optim.RAdam(learner.parameters(), lr=0.01)
    with pytest.raises(ValueError, match="optimizer: got RAdam, expected Adam, whose state this"):
        train(tmp_path, (learner, optimizer, sampler), steps=4, resume=True)
    assert_same_weights(learner, before)


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda sampler: sampler[7], "validation: got one batch, expected several; put it into a"),
        (lambda sampler: sampler, "validation: got EpisodeSampler, which has no end, expected a n"),
        (lambda sampler: None, "validation: got NoneType, expected batches of episodes"),
        (lambda sampler: iter(()), "validation: got no batch; return a new iterator at each call"),
    ],
    ids=["one batch", "no end", "None", "nothing"],
)
def test_a_validation_without_batches_is_named_and_no_step_is_lost(tmp_path, draw, message):
    learner, optimizer, sampler = make_parts()
    with pytest.raises(ValueError, match=message):
        fit(
            learner,
            optimizer,
            sampler,
            out=tmp_path,
            budget=Budget(steps=4),
            bar=False,
            validation=lambda: draw(sampler),
            validate_every=2,
        )
    assert load_learner(tmp_path / "checkpoint.pt", make_parts().learner).step == 2


@pytest.mark.parametrize("schedule", [no_decay, math.cos])
def test_equal_hyperparameters_are_resumed_without_a_warning(tmp_path, recwarn, schedule):
    train(tmp_path, make_parts(), steps=2, schedule=schedule)
    train(tmp_path, make_parts(), steps=4, schedule=schedule, resume=True)
    assert not [str(w.message) for w in recwarn if "optimizer" in str(w.message)]


@pytest.mark.slow
def test_a_time_limit_ends_training_with_a_checkpoint_and_a_validation(tmp_path):
    learner, optimizer, sampler = make_parts()
    progress = fit(
        learner,
        optimizer,
        sampler,
        out=tmp_path,
        budget=Budget(minutes=0.1 / 60),
        bar=False,
        validation=lambda: [sampler[1000]],
        validate_every=10**6,
    )
    assert progress.step >= 1
    assert progress.seconds >= 0.1
    other = make_parts().learner
    assert load_learner(tmp_path / "checkpoint.pt", other).step == progress.step
    last = read_metrics(tmp_path)[-1]
    assert (last["split"], last["step"]) == ("validation", progress.step)


@pytest.mark.slow
def test_a_run_whose_validation_failed_is_resumed_to_the_same_bits(tmp_path):
    """Its tasks are drawn from torch's generator, whose state before them is the one of the run."""

    def run(out, fails, **options):
        parts = make_parts()

        def validation():
            x = torch.randn(2, 5, 1)
            if fails:
                raise CrashError
            return [((x, x.sin()), (x, x.cos()))]

        train(out, parts, steps=4, validation=validation, validate_every=2, **options)
        return parts.learner

    whole = run(tmp_path / "whole", fails=False)
    with pytest.raises(CrashError):
        run(tmp_path / "broken", fails=True)
    resumed = run(tmp_path / "broken", fails=False, resume=True)
    assert_same_weights(resumed, whole)
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / name) if line["split"] == "validation"]
        for name in ("whole", "broken")
    ]
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]


def test_a_validation_that_is_not_finite_is_warned_of(tmp_path):
    learner, optimizer, sampler = make_parts()
    spoilt = spoil_support(sampler[1000])
    with pytest.warns(RuntimeWarning, match="the validation loss is not finite"):
        fit(
            learner,
            optimizer,
            sampler,
            out=tmp_path,
            budget=Budget(steps=1),
            bar=False,
            validation=lambda: [spoilt],
        )
    assert read_metrics(tmp_path)[-1]["loss"] is None


def test_a_folder_with_a_run_is_refused_and_stays_as_it_is(tmp_path):
    train(tmp_path, make_parts(), steps=1, config={"a": 1})
    config = (tmp_path / "config.json").read_bytes()
    message = r"holds a run already \(checkpoint.pt, .*metrics.jsonl\).*--resume"
    with pytest.raises(FileExistsError, match=message):
        train(tmp_path, make_parts(), steps=1, config={"a": 2})
    assert (tmp_path / "config.json").read_bytes() == config


def test_a_run_whose_checkpoint_is_gone_is_not_started_again(tmp_path):
    train(tmp_path, make_parts(), steps=2)
    for checkpoint in tmp_path.glob("checkpoint*.pt"):
        checkpoint.unlink()
    metrics = (tmp_path / "metrics.jsonl").read_text()
    message = r"checkpoint\.pt is gone, but metrics\.jsonl holds steps of a run; restore the"
    with pytest.raises(ValueError, match=message):
        train(tmp_path, make_parts(), steps=4, resume=True)
    assert (tmp_path / "metrics.jsonl").read_text() == metrics


@pytest.mark.parametrize("bad", [{"validate_every": 0}, {"checkpoint_every": 0}, {"clip": 0.0}])
def test_numbers_out_of_range_are_refused_before_anything_is_written(tmp_path, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        train(tmp_path / "run", make_parts(), **bad)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"budget": 10}, r"budget: got 10, expected a Budget, such as Budget\(steps=1000\)"),
        ({"sampler": [1]}, "sampler: got list, which has no batches and no state_dict and no load"),
        ({"validation": [1]}, "validation: got list, expected a function that draws the batches"),
        ({"schedule": 0.1}, "schedule: got float, expected a function of the share of the budget"),
        ({"before_step": 1}, "before_step: got int, expected a function of the share of the bu"),
        ({"config": 1}, "config: got int, expected a dict, or None"),
        ({"ranks": 2}, r"ranks: got int, expected Ranks.of_group\(\), or None"),
        (
            {"validate_every": 1.5},
            "validate_every: got 1.5, expected a whole number, at least 1",
        ),
        ({"workers": -1}, "workers: got -1, expected at least 0"),
        ({"workers": 1.5}, "workers: got 1.5, expected a whole number, at least 0"),
        (
            {"optimizer": make_parts().optimizer},
            "optimizer: got one that moves no parameter of the learner",
        ),
    ],
)
def test_what_cannot_train_is_refused_before_anything_is_written(tmp_path, bad, message):
    arguments = {**make_parts()._asdict(), "budget": Budget(steps=1), **bad}
    with pytest.raises(ValueError, match=message):
        fit(**arguments, out=tmp_path / "run", bar=False)
    assert not (tmp_path / "run").exists()


def test_an_optimizer_of_more_than_the_learner_is_refused(tmp_path):
    """What is no part of the learner would be in no checkpoint."""
    parts = make_parts()._asdict()
    gain = torch.nn.Parameter(torch.ones(3))
    parts["optimizer"] = torch.optim.SGD([*parts["learner"].parameters(), gain], lr=0.1)
    with pytest.raises(ValueError, match="optimizer: got 1 parameters that are not the learner's"):
        fit(**parts, out=tmp_path / "run", budget=Budget(steps=1), bar=False)
    assert not (tmp_path / "run").exists()


def test_an_optimizer_that_needs_a_closure_is_refused(tmp_path):
    parts = make_parts()._asdict()
    parts["optimizer"] = torch.optim.LBFGS(parts["learner"].parameters())
    with pytest.raises(
        ValueError, match=r"optimizer: got LBFGS, .*expected one that steps by a gr"
    ):
        fit(**parts, budget=Budget(steps=1), out=tmp_path / "run", bar=False)
    assert not (tmp_path / "run").exists()


def test_paths_may_be_strings(tmp_path, monkeypatch):
    draw_nothing(monkeypatch, pages=True)
    parts = make_parts()
    out = f"{tmp_path}/a b"
    train(out, parts, steps=2)
    train(out, make_parts(), steps=2, resume=True)
    assert len(read_metrics(out)) == 2
    path = f"{out}/checkpoint.pt"
    other = make_parts()
    assert load_learner(path, other.learner).step == 2
    with pytest.raises(ValueError, match="select: got 'first', expected 'last' or 'best'"):
        load_learner(path, other.learner, select="first")
    assert_same_weights(parts.learner, other.learner)
    progress = load_checkpoint(path, *other)
    save_checkpoint(f"{out}/copy.pt", *other, progress)
    assert load_pretrained(out, other.learner.model, head="1.3").left_out == []
    with RunFolder(out, resume=True) as folder:
        assert folder.has_checkpoint
    plot_curves(out)
    leave_page(f"{out}/report.html", lambda: make_run_page(out, title="run"))
    assert (tmp_path / "a b" / "report.html").exists()


class Repeated:
    """A sampler of the same batch again and again."""

    def __init__(self, episodes):
        self.episodes = episodes

    def batches(self, count, workers=0, pin_memory=False):
        return (self.episodes for _ in range(count))

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def draw_set(examples):
    return torch.randn(examples, 1), torch.randn(examples, 1)


def stacked_sets(tasks):
    return tuple(torch.stack(x) for x in zip(*[draw_set(5) for _ in range(tasks)], strict=True))


BATCHES = {
    "a dict": lambda: {"train": stacked_sets(3), "test": stacked_sets(3)},
    "a pair": lambda: (stacked_sets(3), stacked_sets(3)),
    "named inputs": lambda: [
        tuple(({"input": x}, y) for x, y in (draw_set(4), draw_set(4))) for _ in range(3)
    ],
    "tasks of different sizes": lambda: [(draw_set(n), draw_set(4)) for n in (2, 3, 5)],
}


@pytest.mark.parametrize("name", BATCHES)
def test_training_takes_the_batches_that_the_learner_takes(tmp_path, name):
    learner = MetaLearner(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss)
    optimizer = torch.optim.Adam(learner.parameters())
    episodes = BATCHES[name]()
    fit(
        learner,
        optimizer,
        Repeated(episodes),
        out=tmp_path,
        budget=Budget(steps=2),
        validation=lambda: [episodes],
        bar=False,
    )
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 2]
    assert evaluate(learner, [episodes, episodes], steps=[1]).losses.shape == (1, 6)


@pytest.mark.parametrize("name", BATCHES)
def test_batches_of_any_form_are_searched_for_nan(tmp_path, name):
    learner = MetaLearner(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss)
    optimizer = torch.optim.Adam(learner.parameters())
    episodes = torch.utils._pytree.tree_map(lambda x: x.fill_(math.nan), BATCHES[name]())
    with pytest.raises(NonFiniteError, match="step 1: the support inputs hold NaN or Inf"):
        fit(
            learner,
            optimizer,
            Repeated(episodes),
            out=tmp_path,
            budget=Budget(steps=2),
            bar=False,
        )
