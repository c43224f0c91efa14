"""Methods that take differences hold weights that read the losses where the inner loop ended."""

import pytest
import torch
from torch.testing import assert_close

from metaimplicit import BilevelProblem, Composite, GradientDescent, Proximal
from metaimplicit.hypergradient import hypergradient
from metaimplicit.methods import SAMA, Implicit, ValueFunction
from metaimplicit.solvers import CG

pytestmark = pytest.mark.usefixtures("float64")
RATE = 0.25
DECAY = 2.0


def losses_of(outputs, data):
    return (outputs - data["y"]).square()


def of_losses(meta, losses, data):
    return torch.sigmoid(meta["slope"] * losses + meta["shift"])


def of_shares(meta, losses, data):
    low, high = losses.min(), losses.max()
    return torch.sigmoid(meta["slope"] * (losses - low) / (high - low) + meta["shift"])


def make_problem(weights_of):
    return BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(3)},
        inner_loss=Composite(
            outputs=lambda params, meta, data: data["x"] @ params["w"],
            loss=losses_of,
            weights=weights_of,
            penalty=Proximal(DECAY, center="zero"),
        ),
        outer_loss=lambda params, meta, data: (data["q"] @ params["w"] - 1).square().mean(),
    )


INNER = GradientDescent(steps=50, lr=RATE)


def make_tasks():
    return {"x": torch.randn(2, 5, 3), "y": torch.randn(2, 5), "q": torch.randn(2, 4, 3)}


def make_meta():
    return {"slope": torch.tensor(-0.7), "shift": torch.tensor(0.4)}


def dense_derivatives(meta, task, weights_of=of_losses):
    """A, ∂²f/∂θ∂φ and ∂g/∂θ of one task at its θ*, with the weights' losses held there."""
    w = torch.zeros(3)
    phi = torch.stack([meta["slope"], meta["shift"]])

    def gradient(w, phi, center):
        numbers = dict(zip(meta, phi, strict=True))
        weights = weights_of(numbers, losses_of(task["x"] @ center, task), task)
        return 2 * task["x"].T @ (weights * (task["x"] @ w - task["y"])) / 5 + DECAY * w

    for _ in range(INNER.steps):
        w = w - RATE * gradient(w, phi, w)
    a = torch.func.jacrev(gradient, 0)(w, phi, w)
    mixed = torch.func.jacrev(gradient, 1)(w, phi, w)
    v = 2 * task["q"].T @ (task["q"] @ w - 1) / 4
    return a, mixed, v


def implicit_gradient(a, mixed, v):
    return -mixed.T @ torch.linalg.solve(a, v)


def one_step_gradient(a, mixed, v):
    return -RATE * mixed.T @ v


@pytest.mark.parametrize(
    ("method", "formula", "tolerance"),
    [
        (Implicit(CG(20)), implicit_gradient, 1e-9),
        (Implicit(CG(20), products="finite-differences"), implicit_gradient, 1e-7),
        (ValueFunction(strength=1e5), implicit_gradient, 1e-4),
        (SAMA(), one_step_gradient, 1e-7),
    ],
    ids=lambda value: getattr(value, "flag", ""),
)
@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_a_displaced_parameter_leaves_the_weights(method, formula, tolerance, vectorize):
    meta = make_meta()
    tasks = make_tasks()
    got = hypergradient(
        make_problem(of_losses),
        meta,
        tasks,
        inner=INNER,
        method=method,
        batched=True,
        vectorize=vectorize,
    ).grads
    of_tasks = [
        formula(*dense_derivatives(meta, {name: x[i] for name, x in tasks.items()}))
        for i in range(2)
    ]
    expected = torch.stack(of_tasks).mean(0)
    assert_close(
        torch.stack([got[name] for name in meta]), expected, rtol=tolerance, atol=tolerance * 1e-2
    )


@pytest.mark.parametrize("weights_of", [of_losses, of_shares])
def test_a_loop_without_tasks_leaves_the_weights_too(weights_of):
    meta = make_meta()
    task = {name: x[0] for name, x in make_tasks().items()}
    method = Implicit(CG(20), products="finite-differences")
    got = hypergradient(make_problem(weights_of), meta, task, inner=INNER, method=method).grads
    expected = implicit_gradient(*dense_derivatives(meta, task, weights_of))
    assert_close(torch.stack([got[name] for name in meta]), expected, rtol=1e-7, atol=1e-9)
