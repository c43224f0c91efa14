"""What every method reports of the inner loop."""

import pytest
import torch
from oracles import relative_error
from tanh_network import DATA, INITIAL, TASKS, network

from metaimplicit import METHODS, GradientDescent, Implicit, Proximal, hypergradient
from metaimplicit.methods import SAMA, FixedPoint

PROBLEM = network(Proximal(0.4))
BY_LAYERS = {"kfac", "ekfac"}  # for modules only, and rows of `Implicit` like others


def run(method, steps):
    inner = GradientDescent(steps=steps, lr=0.1)
    return hypergradient(PROBLEM, INITIAL, DATA, inner=inner, method=method, batched=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("flag", sorted(set(METHODS) - BY_LAYERS))
def test_the_inner_gradient_is_that_of_the_iterate_where_it_was_taken_last(flag):
    result = run(METHODS[flag], steps=2)
    at_the_end = isinstance(METHODS[flag], (Implicit, FixedPoint, SAMA))
    point = result.params if at_the_end else run("unrolled", steps=1).params
    gradient = torch.func.grad(lambda params, data: PROBLEM.inner_loss(params, INITIAL, data))
    gradients = torch.vmap(gradient)(point, DATA).values()
    expected = torch.cat([g.flatten(1) for g in gradients], dim=1).norm(dim=1)
    assert relative_error(result.report.inner_gradient_norm, expected) < 1e-10
    assert result.report.inner_steps.tolist() == [2] * TASKS
