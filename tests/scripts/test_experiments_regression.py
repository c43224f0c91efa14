"""tune.py's regressions: group recovery by hand, group lasso's penalty, hypergradients beside the exact one."""

import json

import pytest
import torch
from experiments.base import execute
from experiments.group_lasso import GroupLasso, adjusted_rand, planted, recovery
from experiments.weight_decay import WeightDecay, best_step, compared_with

from metaimplicit.tuning import GroupStructure

TRUE = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])


def test_recovery_does_not_mind_what_groups_are_called():
    for names in ([0, 1, 2], [2, 0, 1], [4, 0, 3]):
        found = torch.tensor(names)[TRUE]
        assert recovery(found, TRUE) == 1.0
        assert adjusted_rand(found, TRUE) == 1.0


def test_recovery_by_hand():
    # groups 0 and 1 merged, two features of group 2 in a group of their own: 3 + 2 + 0 of 10 are matched, since
    # only one of two planted groups can have the merged one
    merged = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 2, 2])
    assert recovery(merged, TRUE) == 0.5
    # pairs together in both: C(3,2) + C(3,2) + 1 + 1 = 8; found 17, true 12, all 45
    assert adjusted_rand(merged, TRUE) == pytest.approx(
        (8 - 17 * 12 / 45) / ((17 + 12) / 2 - 17 * 12 / 45)
    )
    # greedy matching would give the first found group its best, 3, and leave 0 for the second: 2 + 3 beats it
    found, true = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1]), torch.tensor([0, 0, 0, 1, 1, 0, 0, 0])
    assert recovery(found, true) == 5 / 8
    assert recovery(torch.zeros(10, dtype=torch.int64), TRUE) == 0.4


def test_the_penalty_of_whole_memberships_is_group_lassos():
    w = torch.randn(7, 10, dtype=torch.float64)
    w[:3, :3] = 0.0  # where smoothing tells most
    meta = {"groups": torch.nn.functional.one_hot(TRUE).T.double()}
    plain = sum(w[:, group == TRUE].norm(dim=1).sum() for group in range(3))
    for smoothing in (1e-3, 1e-6, 1e-9):
        found = GroupStructure("w", 3, 0.7, smoothing).penalty({"w": w}, {}, meta)
        # √(x² + ε²) − x lies between 0 and ε for each of 21 norms
        assert 0 <= found - 0.7 * plain <= 0.7 * 21 * smoothing + 1e-12
    # shared alike by three groups: 3 ‖w/3‖ = ‖w‖
    found = GroupStructure("w", 3, 0.7, 1e-9).penalty(
        {"w": w}, {}, {"groups": torch.full_like(meta["groups"], 1 / 3)}
    )
    assert found.item() == pytest.approx(0.7 * w.norm(dim=1).sum().item(), rel=1e-8)


@pytest.mark.parametrize("bad", [{"groups": 1}, {"strength": -1.0}, {"smoothing": 0.0}])
def test_a_group_structure_out_of_range_is_refused(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"GroupStructure {name}: got"):
        GroupStructure(**{"parameter": "w", "groups": 2} | bad)


def test_planted_regressions_have_whole_groups_for_support():
    sizes = GroupLasso(noise=0.0, features=12, groups=4, active=2, regressions=9, points=30)
    data = planted(sizes, 3)
    assert data.groups.bincount().tolist() == [3, 3, 3, 3]
    w = torch.linalg.lstsq(data.train[0], data.train[1]).solution
    for support in w.abs() > 1e-8:
        groups = data.groups[support]
        assert groups.unique(return_counts=True)[1].tolist() == [3, 3]
    x, y = data.test
    torch.testing.assert_close(torch.einsum("tnp,tp->tn", x, w), y, rtol=0, atol=1e-8)


def test_cosine_and_norm_ratio():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert compared_with(exact, torch.tensor([-8.0, 6.0], dtype=torch.float64)) == (
        pytest.approx(0),
        pytest.approx(2),
    )
    assert compared_with(exact, -exact / 5) == (pytest.approx(-1), pytest.approx(0.2))


def test_dense_is_the_exact_hypergradient(tmp_path):
    row = WeightDecay(outer_steps=3, test=50).run(
        {"method": "dense", "seed": 0, "outer_lr": 1.0}, tmp_path
    )
    for key in ("cosines", "ratios"):
        assert row[key] == pytest.approx([1, 1, 1], abs=1e-12)
    assert len(row["losses"]) == 4
    assert row["losses"][-1] == row["loss"]


def test_the_best_step_is_validations_alone():
    losses = {0.1: (0.4, 0.5), 1.0: (0.2, 0.6), 3.0: (0.3, 0.7)}
    rows = [
        (
            {"method": "cg", "seed": seed, "outer_lr": lr},
            {"loss": values[seed], "test_loss": -lr, "test_accuracy": lr},
        )
        for lr, values in losses.items()
        for seed in (0, 1)
    ]
    assert best_step(rows, "cg") == 1.0
    other = [
        (case, row | {"test_loss": row["test_loss"] * -1, "test_accuracy": 0.0})
        for case, row in rows
    ]
    assert best_step(other, "cg") == 1.0
    diverged = [
        (case, row | {"loss": None} if case["outer_lr"] == 1.0 and case["seed"] else row)
        for case, row in rows
    ]
    assert best_step(diverged, "cg") == 0.1


def test_a_run_that_diverges_is_a_row(tmp_path):
    table = execute(
        WeightDecay(
            method=("dense",), seeds=1, outer_lrs=(1.0, 1e6), outer_steps=2, test=10, out=tmp_path
        )
    )
    assert json.loads((tmp_path / "dense-0-1000000.0" / "summary.json").read_text())["loss"] is None
    assert "| `dense` | 1 | 0.58" in table.partition("best")[2]


@pytest.mark.parametrize(
    ("experiment", "cases"),
    [
        (WeightDecay(quick=True, method=("none", "dense", "nystrom"), outer_lrs=(0.3, 1.0)), 5),
        (GroupLasso(quick=True, method=("oracle", "cg")), 2),
    ],
)
def test_quick_runs_leave_rows_a_table_and_a_plot(experiment, cases, tmp_path):
    from dataclasses import replace

    table = execute(replace(experiment, out=tmp_path))
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert len(rows) == cases
    assert (tmp_path / "table.md").read_text() == f"{table}\n"
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    for method in experiment.method:
        assert f"`{method}`" in table


def test_outer_steps_may_be_added_later(tmp_path):
    sizes = {"method": ("dense",), "seeds": 1, "outer_steps": 1, "test": 10, "out": tmp_path}
    execute(WeightDecay(outer_lrs=(1.0,), **sizes))
    before = (tmp_path / "dense-0-1.0" / "summary.json").stat().st_mtime_ns
    assert "of 1, 3, by" in execute(WeightDecay(outer_lrs=(1.0, 3.0), **sizes))
    assert (tmp_path / "dense-0-1.0" / "summary.json").stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="other options"):
        execute(WeightDecay(**sizes | {"outer_steps": 2}))


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        (WeightDecay(outer_lrs=()), "--outer-lrs: got"),
        (WeightDecay(outer_lrs=(1.0, 0.0)), "--outer-lrs: got"),
        (WeightDecay(outer_steps=0), "--outer-steps: got 0"),
        (GroupLasso(groups=1), "--groups: got 1"),
        (GroupLasso(active=6), "--active: got 6"),
        (GroupLasso(outer_steps=0), "--outer-steps: got 0"),
    ],
)
def test_bad_options_are_refused_before_any_run(experiment, message):
    with pytest.raises(ValueError, match=message):
        experiment.cases()
