"""The problems and the studies of compare.py, and the panels of its plots."""

from itertools import pairwise

import pytest
import torch
from compare import Settings, main
from comparison_report import records_against_rho, split_panel
from problems import drifting_systems, logistic, quadratic
from studies import (
    Variant,
    compare_with_exact,
    count_definite,
    solve_in_turn,
    take_hypergradient,
    tune,
)

from metaimplicit import Dense, Implicit, Neumann
from metaimplicit.solvers import Lanczos

EXACT = Implicit(Dense())


def test_a_quadratic_starts_at_its_argmin_and_has_its_spectrum():
    spectrum = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64)
    instance = quadratic(spectrum, damping=0.25)
    torch.testing.assert_close(torch.linalg.eigvalsh(instance.data), spectrum)
    star = instance.problem.init(instance.meta, instance.data)
    theta = star["theta"].clone().requires_grad_()
    loss = instance.problem.inner_loss
    value = loss.loss(loss.outputs({"theta": theta}, instance.meta, None), None)
    value = value + loss.penalty({"theta": theta}, instance.meta)
    (gradient,) = torch.autograd.grad(value, theta)
    assert gradient.norm() < 1e-14


def test_systems_drift_by_their_norms_from_the_condition_1000():
    systems = [instance.data for instance in drifting_systems(1e-2, count=3, n=20)]
    values = torch.linalg.eigvalsh(systems[0][0])
    assert (values[-1] / values[0]).item() == pytest.approx(1000, rel=1e-6)
    for (a, b), (next_a, next_b) in pairwise(systems):
        a_step = torch.linalg.matrix_norm(next_a - a, 2) / torch.linalg.matrix_norm(a, 2)
        b_step = (next_b - b).norm() / b.norm()
        assert (a_step.item(), b_step.item()) == pytest.approx((1e-2, 1e-2))


def test_systems_are_counted_up_to_the_first_that_is_indefinite():
    systems = list(drifting_systems(1e-2, count=4, n=20))
    definite = [bool(torch.linalg.eigvalsh(system.data[0])[0] > 0) for system in systems]
    assert definite[0]
    assert count_definite(systems) == [*definite, False].index(False)
    assert count_definite(systems[:1]) == 1


def test_a_warm_start_saves_products_on_systems_that_barely_drift():
    """All systems are solved to 1e-6; every cold solve takes the products of the first."""
    systems = list(drifting_systems(1e-9, count=3, n=20))
    products, worst = solve_in_turn(systems, Lanczos(99))
    assert worst < 1e-6
    assert products[1] < products[0]
    cold, _ = solve_in_turn(systems[1:2], Lanczos(99))
    assert cold == products[:1]


def test_the_exact_hypergradient_has_no_error():
    scores = compare_with_exact(logistic(), EXACT, seed=0)
    assert scores == {"error": 0.0, "cosine": pytest.approx(1.0), "norm": 1.0}


def test_one_term_of_neumann_has_the_direction_of_the_right_hand_side():
    """One term is s v: its length is proportional to the step s, its direction is not exact."""
    short = compare_with_exact(logistic(), Implicit(Neumann(1, scale=0.01)), seed=0)
    long = compare_with_exact(logistic(), Implicit(Neumann(1, scale=0.02)), seed=0)
    assert long["norm"] == pytest.approx(2 * short["norm"])
    assert long["cosine"] == pytest.approx(short["cosine"])
    assert long["cosine"] < 1


def test_outer_steps_are_those_of_sgd_with_momentum():
    instance = logistic()
    variant = Variant("exact", EXACT, k=100, outer_lr=3.0)
    decay = instance.meta["decay"].clone()
    sgd = torch.optim.SGD([decay], lr=3.0, momentum=0.9)
    for _ in range(2):
        decay.grad = take_hypergradient(instance, EXACT, decay).grads["decay"]
        sgd.step()
    expected = take_hypergradient(instance, EXACT, decay).outer_loss.item()
    assert tune(instance, variant, seed=0, steps=2) == pytest.approx(expected, rel=1e-12)


def test_lines_without_rho_are_horizontal():
    records = [
        {"method": "exact ×1", "k": 100, "rho": None, "error": 0.0, "loss": 0.5},
        {"method": "cg", "k": 5, "rho": None, "error": 0.1, "loss": 0.6},
        {"method": "cg", "k": 10, "rho": None, "error": 0.2, "loss": 0.7},
        {"method": "nystrom", "k": 5, "rho": 0.1, "error": 0.3, "loss": 0.8},
    ]
    assert records_against_rho(records, "error", 5) == {
        "cg": [(0.01, 0.1), (1.0, 0.1)],
        "nystrom": [(0.1, 0.3)],
    }
    assert set(records_against_rho(records, "loss", 10)) == {"exact ×1", "cg"}


def test_a_panel_with_too_many_lines_is_split_and_auto_is_in_each_part():
    lines = {f"solver-{i}": [(1.0, 10.0**-i)] for i in range(10)} | {"auto": [(1.0, 0.5)]}
    panels = split_panel("digits", lines)
    assert [len(panel.lines) for panel in panels] == [6, 6]
    assert all("auto" in panel.lines for panel in panels)
    assert panels[0].limits == panels[1].limits
    (whole,) = split_panel("digits", {"cg": [(1.0, 0.5), (2.0, float("nan"))]})
    assert whole.lines == {"cg": [(1.0, 0.5)]}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drift": True, "peers": True}, "--drift, --peers: got several studies, expected one"),
        ({"threads": 0}, "--threads: got 0, expected from 1 to "),
        ({"products": (10, 0)}, "--products: got 0, expected from 1 to 10000"),
        ({"products": ()}, "--products: got none, expected at least one"),
        ({"problems": ("quadratics",)}, "--problems: got quadratics, expected some of quadratic-w"),
    ],
)
def test_a_setting_out_of_range_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        main(Settings(out=tmp_path / "out", **options))
    assert not (tmp_path / "out").exists()
