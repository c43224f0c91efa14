"""Methods that change as a run goes on, as those of MAML++ do."""

import pytest
import torch
from command_line import RunOptions, anneal_method, build_learner, default_options
from command_line.annealing import multi_step_weights
from scripts.running import SMALL, load_main

import tasks
from metaimplicit.methods import FirstOrder, Unrolled
from metaimplicit.training import read_metrics


def weights_by_hand(steps, epoch, epochs):
    """As the code of Antoniou et al. (2019) computes them, for θ_1 … θ_T."""
    weights = [1 / steps] * steps
    decay = 1 / steps / epochs
    least = 0.03 / steps
    for i in range(steps - 1):
        weights[i] = max(weights[i] - epoch * decay, least)
    weights[-1] = min(weights[-1] + epoch * (steps - 1) * decay, 1 - (steps - 1) * least)
    return weights


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_weights_are_those_of_maml_plus_plus(steps):
    for epoch in range(16):
        first, *others = multi_step_weights(steps, epoch / 15)
        assert first == 0
        assert others == pytest.approx(weights_by_hand(steps, epoch, 15), rel=1e-12)
        assert sum(others) == pytest.approx(1, rel=1e-12)


def make_learner(**options):
    options = RunOptions(task="sinusoid", method="unrolled", proximal=0.0, device="cpu", **options)
    family = tasks.load("sinusoid", shots=3, queries=4).train
    torch.manual_seed(0)
    learner = build_learner(options, family).double()
    return options, learner, tasks.EpisodeSampler(family, tasks=2)[0]


def test_the_loss_of_a_step_is_weighed_over_the_inner_steps():
    options, learner, episodes = make_learner(inner_steps=3, multi_step_loss=0.5, inner_lr=0.01)
    pairs = [tuple(x.double() for x in pair) for pair in (episodes.support, episodes.query)]
    # After 1/4 of the run, the weights of the first two are half of what they were.
    anneal_method(options, learner, spent=0.25)
    step = learner.backward(pairs)
    losses, _ = learner.evaluate(pairs)
    _, first, second, last = losses.mean(1)
    assert (step.loss - (first / 6 + second / 6 + 2 * last / 3)).abs() <= 1e-12
    anneal_method(options, learner, spent=0.5)
    assert learner.method == Unrolled()
    assert (learner.backward(pairs).loss - last).abs() <= 1e-12


def test_derivatives_are_of_first_order_for_a_share_of_the_run():
    options, learner, episodes = make_learner(inner_steps=3, first_order_share=0.3)
    pairs = [tuple(x.double() for x in pair) for pair in (episodes.support, episodes.query)]
    for spent, method in ((0.0, FirstOrder()), (0.29, FirstOrder()), (0.3, Unrolled())):
        anneal_method(options, learner, spent=spent)
        gradients = []
        for chosen in (learner.method, method):
            learner.method = chosen
            learner.zero_grad()
            learner.backward(pairs)
            gradients.append(torch.cat([p.grad.flatten() for p in learner.parameters()]))
        assert torch.equal(*gradients)
        assert learner.method == method


@pytest.mark.parametrize("flag", ["multi_step_loss", "first_order_share"])
def test_the_options_of_the_method_stay(flag):
    replayed = {"memory": "replay"}
    options, learner, _ = make_learner(inner_steps=3, method_options=replayed, **{flag: 0.3})
    anneal_method(options, learner, spent=0.0)
    weighted = Unrolled(memory="replay", iterates=True, weights=multi_step_weights(3, 0.0))
    assert learner.method == (weighted if flag == "multi_step_loss" else FirstOrder())
    anneal_method(options, learner, spent=0.3)
    assert learner.method == Unrolled(memory="replay")


@pytest.mark.parametrize(
    "other", [{"method": "cg"}, {"method": "unrolled", "multi_step_loss": 0.1}]
)
def test_an_order_that_cannot_be_annealed_is_refused(other):
    _, learner, _ = make_learner(inner_steps=3)
    options = RunOptions(first_order_share=0.5, **other)
    with pytest.raises(ValueError, match=r"--first-order-share: got 0\.5 with --method"):
        anneal_method(options, learner, spent=0.0)


def test_numbers_that_first_order_does_not_reach_are_not_learnt_beside_it():
    options, learner, _ = make_learner(inner_steps=3, first_order_share=0.5, learn=("lr",))
    message = r"--first-order-share: got 0\.5 with --learn lr, which .* do not reach"
    with pytest.raises(ValueError, match=message):
        anneal_method(options, learner, spent=0.0)


def test_without_the_option_the_method_stays():
    options, learner, _ = make_learner(inner_steps=3)
    method = learner.method
    anneal_method(options, learner, spent=0.0)
    assert learner.method is method


@pytest.mark.parametrize("method", ["cg", "first-order"])
def test_methods_that_see_no_inner_steps_are_refused(method):
    options = default_options("sinusoid", method)
    learner = build_learner(options, tasks.load("sinusoid").train)
    options = RunOptions(method=method, multi_step_loss=0.1)
    with pytest.raises(ValueError, match=f"--multi-step-loss: got 0.1 with --method {method} and"):
        anneal_method(options, learner, spent=0.0)


@pytest.mark.slow
def test_a_run_trains_by_the_weights_of_its_progress(tmp_path):
    train = load_main("train")
    losses = {}
    for share in (0, 0.3):
        out = tmp_path / str(share)
        train([*SMALL, "--inner-steps=2", f"--multi-step-loss={share}", f"--out={out}"])
        rows = [row for row in read_metrics(out) if row["split"] == "train"]
        losses[share] = [row["loss"] for row in rows]
    # The loss after one inner step is larger, and counts half at the first meta-step alone.
    assert losses[0][0] < losses[0.3][0]
    assert losses[0][1:] == pytest.approx(losses[0.3][1:], rel=0.02)
