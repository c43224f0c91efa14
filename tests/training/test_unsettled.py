"""What a run says where its inner loops end far from a minimum."""

import pytest
import torch

from metaimplicit import BilevelProblem, Dense, GradientDescent, Implicit, hypergradient
from metaimplicit.training import describe_unsettled
from metaimplicit.training.health_section import health_section
from metaimplicit.training.unsettled import leftover_share

A = torch.tensor([2.0, 5.0], dtype=torch.float64)


def line(share, split="train"):
    return {"split": split, "step": 1, "leftover": share}


@pytest.mark.parametrize("steps", [1, 3])
def test_the_share_that_is_left_is_what_a_newton_step_changes(steps):
    """f = ½ Σ a (θ − φ)², whose minimum is φ, and g = Σ cθ, which is linear."""
    phi = torch.tensor([1.0, -2.0], dtype=torch.float64)
    c = torch.tensor([3.0, 0.5], dtype=torch.float64)
    problem = BilevelProblem(
        init=lambda meta, data: {"w": torch.zeros(2, dtype=torch.float64)},
        inner_loss=lambda params, meta, data: (A * (params["w"] - meta["phi"]).square()).sum() / 2,
        outer_loss=lambda params, meta, data: (c * params["w"]).sum(),
    )
    inner = GradientDescent(steps=steps, lr=0.1)
    result = hypergradient(problem, {"phi": phi}, None, inner=inner, method=Implicit(Dense()))
    left = (c * (phi - result.params["w"])).sum().abs() / result.outer_loss.abs()
    assert leftover_share(result.report, result.outer_loss).item() == pytest.approx(left.item())


def test_a_method_without_a_solve_has_no_share():
    problem = BilevelProblem(
        init=lambda meta, data: {"w": meta["phi"]},
        inner_loss=lambda params, meta, data: params["w"].square(),
        outer_loss=lambda params, meta, data: params["w"],
    )
    meta = {"phi": torch.tensor(1.0)}
    inner = GradientDescent(steps=1, lr=0.1)
    result = hypergradient(problem, meta, None, inner=inner, method="unrolled")
    assert leftover_share(result.report, result.outer_loss) is None
    assert describe_unsettled([line(None)]) == ""


def test_the_median_of_the_last_tenth_of_training_counts():
    early = [line(9.0)] * 90
    assert describe_unsettled(early + [line(0.4)] * 10 + [line(9.0, split="validation")]) == ""
    message = describe_unsettled(early + [line(0.8)] * 6 + [line(0.1)] * 4)
    assert "change by 80 % of itself" in message
    assert describe_unsettled([]) == ""


def test_the_section_on_the_health_of_runs_names_those_that_are_unsettled():
    page = str(health_section({"good": [line(0.1)], "bad": [line(0.9)]}))
    assert "bad: the inner loop ended far from a minimum" in page
    assert "good: the inner" not in page
