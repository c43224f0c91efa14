"""The Fisher matrix against its expectation, example by example, and against a divergence."""

import pytest
import torch
from oracles import dense, generator, relative_error
from small_classifier import (
    CLASSES,
    LABELS,
    LOSSES,
    PARAMS,
    POINTS,
    TARGETS,
    TASKS,
    X,
    loss_of,
    network,
    of_task,
    outputs,
)

from metaimplicit.operators import GGN, Fisher

LIKELIHOODS = ["softmax", "gaussian"]
HALF_SQUARE = CLASSES / 2  # makes the mean squared error the mean of ½‖z − y‖²


def negative_log_likelihood(likelihood, tasks=TASKS):
    loss, targets = LOSSES["cross-entropy" if likelihood == "softmax" else "squared error"]
    factor = 1.0 if likelihood == "softmax" else HALF_SQUARE
    return lambda z: factor * torch.vmap(loss)(z, targets[:tasks])


def fisher(expectation, likelihood="softmax", tasks=TASKS, **options):
    return Fisher(
        lambda params: torch.vmap(network)(params, X[:tasks]),
        negative_log_likelihood(likelihood, tasks),
        {name: p[:tasks] for name, p in PARAMS.items()},
        likelihood=likelihood,
        expectation=expectation,
        **options,
    )


def log_likelihood(likelihood, z, y):
    return torch.log_softmax(z, -1)[y] if likelihood == "softmax" else -0.5 * (z - y).square().sum()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_exact_matrix_is_the_gauss_newton_matrix_of_the_likelihood(likelihood):
    expected = dense(GGN(outputs, negative_log_likelihood(likelihood), PARAMS))
    assert relative_error(dense(fisher("exact", likelihood)), expected) < 1e-12


def test_the_exact_matrix_is_the_expectation_over_the_classes():
    """The mean over y of the outer products of ∂ log p(y|x)/∂θ, class by class."""
    matrix = dense(fisher("exact"))
    for task in range(TASKS):
        expected = 0
        for i in range(POINTS):
            theta, log_p = of_task(
                lambda p, t=task, i=i: torch.log_softmax(network(p, X[t]), -1)[i], task
            )
            scores = torch.func.jacrev(log_p)(theta)
            probabilities = log_p(theta).exp()
            expected = expected + scores.T @ torch.diag(probabilities) @ scores / POINTS
        assert relative_error(matrix[task], expected) < 1e-12


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_empirical_matrix_is_made_of_the_gradients_of_the_examples(likelihood):
    matrix = dense(fisher("empirical", likelihood))
    targets = LABELS if likelihood == "softmax" else TARGETS
    for task in range(TASKS):

        def log_likelihoods(params, t=task):
            pairs = zip(network(params, X[t]), targets[t], strict=True)
            return torch.stack([log_likelihood(likelihood, z, y) for z, y in pairs])

        theta, function = of_task(log_likelihoods, task)
        gradients = torch.func.jacrev(function)(theta)
        assert relative_error(matrix[task], gradients.T @ gradients / POINTS) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_the_sampled_matrix_is_made_of_its_draws_and_tends_to_the_exact_one(likelihood):
    def sampled(samples, seed, tasks=TASKS):
        options = {"samples": samples, "generator": generator(seed), "tasks": tasks}
        return dense(fisher("monte-carlo", likelihood, **options))

    few = sampled(2, seed=3)
    assert torch.equal(few, sampled(2, seed=3))
    assert torch.linalg.matrix_rank(few[0]) <= 2 * POINTS
    exact = dense(fisher("exact", likelihood, tasks=1))
    errors = [relative_error(sampled(samples, seed=0, tasks=1), exact) for samples in (40, 4000)]
    assert errors[1] < 0.03
    assert 4 < errors[0] / errors[1] < 25  # like 1/√samples


def test_it_is_the_hessian_of_the_symmetrised_divergence():
    """½(KL(p_θ‖p_θ+δ) + KL(p_θ+δ‖p_θ)) has the Hessian F at δ = 0."""
    matrix = dense(fisher("exact"))
    for task in range(TASKS):
        theta, log_p = of_task(lambda p, t=task: torch.log_softmax(network(p, X[t]), -1), task)

        def divergence(delta, theta=theta, log_p=log_p):
            here = log_p(theta)
            there = log_p(theta + delta)
            return 0.5 * ((here.exp() - there.exp()) * (here - there)).sum(-1).mean()

        expected = torch.func.hessian(divergence)(torch.zeros_like(theta))
        assert relative_error(matrix[task], expected) < 1e-8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "poisson"}, "Fisher likelihood: got 'poisson', expected one of softmax"),
        ({"expectation": "sampled"}, "Fisher expectation: got 'sampled', expected one of exact"),
        ({"samples": 0}, "Fisher samples: got 0, expected at least 1"),
    ],
)
def test_an_unknown_option_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Fisher(outputs, loss_of("cross-entropy"), PARAMS, **options)


def test_outputs_without_an_axis_of_examples_are_refused():
    message = r"Fisher outputs: got shape \(3, 7\), expected \[tasks, examples"
    with pytest.raises(ValueError, match=message):
        Fisher(lambda p: outputs(p).sum(-1), lambda z: z.square().mean(1), PARAMS)
