"""The regressions of tune.py: planted groups, the group penalty, decays beside the exact ones."""

import json
from dataclasses import replace

import pytest
import torch
from experiments.group_lasso import GroupLasso
from experiments.planted_groups import adjusted_rand, recovery
from experiments.runner import execute
from experiments.runs import Run, Runs
from experiments.weight_decay import WeightDecay, best_step, cosine_and_ratio

from metaimplicit.tuning import GroupStructure

PLANTED = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])


@pytest.mark.parametrize("names", [[0, 1, 2], [2, 0, 1], [4, 0, 3]])
def test_recovery_does_not_depend_on_the_numbers_of_groups(names):
    renamed = torch.tensor(names)[PLANTED]
    assert recovery(renamed, PLANTED) == 1.0
    assert adjusted_rand(renamed, PLANTED) == 1.0


def test_recovery_by_hand():
    """Groups 0 and 1 are merged, and two features of group 2 have a group of their own.

    Only one planted group can have the merged one, so 3 + 2 + 0 features of 10 are matched. Pairs
    that are together in both: C(3,2) + C(3,2) + 1 + 1 = 8; learnt 17, planted 12, all 45.
    """
    merged = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 2, 2])
    assert recovery(merged, PLANTED) == 0.5
    expected = (8 - 17 * 12 / 45) / ((17 + 12) / 2 - 17 * 12 / 45)
    assert adjusted_rand(merged, PLANTED) == pytest.approx(expected)
    assert recovery(torch.zeros(10, dtype=torch.int64), PLANTED) == 0.4


def test_recovery_matches_better_than_greedily():
    """Greedy matching gives the first learnt group its best, 3, and leaves 0 for the second."""
    learnt = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
    planted = torch.tensor([0, 0, 0, 1, 1, 0, 0, 0])
    assert recovery(learnt, planted) == (2 + 3) / 8


@pytest.mark.parametrize("smoothing", [1e-3, 1e-6, 1e-9])
def test_the_penalty_of_whole_memberships_is_the_group_lasso(smoothing):
    """√(x² + ε²) − x lies between 0 and ε for each of 21 norms."""
    w = torch.randn(7, 10, dtype=torch.float64)
    w[:3, :3] = 0.0  # where the smoothing adds most
    meta = {"groups": torch.nn.functional.one_hot(PLANTED).T.double()}
    plain = sum(w[:, group == PLANTED].norm(dim=1).sum() for group in range(3))
    penalty = GroupStructure("w", 3, 0.7, smoothing).penalty({"w": w}, {}, meta)
    assert 0 <= penalty - 0.7 * plain <= 0.7 * 21 * smoothing + 1e-12


def test_the_penalty_of_equal_memberships_is_the_norm():
    """3 ‖w/3‖ = ‖w‖ where each feature belongs to three groups alike."""
    w = torch.randn(7, 10, dtype=torch.float64)
    meta = {"groups": torch.full((3, 10), 1 / 3, dtype=torch.float64)}
    penalty = GroupStructure("w", 3, 0.7, 1e-9).penalty({"w": w}, {}, meta)
    assert penalty.item() == pytest.approx(0.7 * w.norm(dim=1).sum().item(), rel=1e-8)


@pytest.mark.parametrize("bad", [{"groups": 1}, {"strength": -1.0}, {"smoothing": 0.0}])
def test_a_group_structure_out_of_range_is_refused(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"GroupStructure {name}: got"):
        GroupStructure(**{"parameter": "w", "groups": 2} | bad)


def test_planted_regressions_have_whole_groups_for_support():
    sizes = GroupLasso(noise=0.0, features=12, groups=4, active=2, regressions=9, points=30)
    data = sizes.data(3)
    assert data.groups.bincount().tolist() == [3, 3, 3, 3]
    w = torch.linalg.lstsq(data.train[0], data.train[1]).solution
    for support in w.abs() > 1e-8:
        _, counts = data.groups[support].unique(return_counts=True)
        assert counts.tolist() == [3, 3]
    x, y = data.test
    torch.testing.assert_close(torch.einsum("tnp,tp->tn", x, w), y, rtol=0, atol=1e-8)


def test_cosine_and_ratio_by_hand():
    exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
    orthogonal = torch.tensor([-8.0, 6.0], dtype=torch.float64)
    assert cosine_and_ratio(exact, orthogonal) == pytest.approx((0, 2))
    assert cosine_and_ratio(exact, -exact / 5) == pytest.approx((-1, 0.2))


def test_dense_is_the_exact_hypergradient(tmp_path):
    case = {"method": "dense", "seed": 0, "outer_lr": 1.0}
    row = WeightDecay(outer_steps=2, test=50).run(case, tmp_path)
    for key in ("cosines", "ratios"):
        assert row[key] == pytest.approx([1, 1], abs=1e-12)
    assert len(row["losses"]) == 3
    assert row["losses"][-1] == row["loss"]


def runs_at(losses):
    """Runs of two seeds at each outer step, whose test points prefer the largest step."""
    return Runs(
        Run(
            {"method": "cg", "seed": seed, "outer_lr": lr},
            {"loss": loss, "test_loss": -lr, "test_accuracy": lr},
        )
        for lr, by_seed in losses.items()
        for seed, loss in enumerate(by_seed)
    )


def test_the_best_step_has_the_lowest_validation_loss():
    assert best_step(runs_at({0.1: (0.4, 0.5), 1.0: (0.2, 0.6), 3.0: (0.3, 0.7)})) == 1.0


def test_the_best_step_is_not_one_at_which_a_run_diverged():
    assert best_step(runs_at({0.1: (0.4, 0.5), 1.0: (0.2, None), 3.0: (0.3, 0.7)})) == 0.1


def test_a_run_that_diverges_is_a_row(tmp_path):
    experiment = WeightDecay(
        method=("dense",),
        seeds=1,
        outer_lrs=(1.0, 1e6),
        outer_steps=2,
        test=10,
        out=tmp_path,
    )
    table = execute(experiment)
    summary = json.loads((tmp_path / "dense-0-1000000.0" / "summary.json").read_text())
    assert summary["loss"] is None
    assert "| `dense` | 1 | 0.58" in table.partition("best")[2]


@pytest.mark.pages
@pytest.mark.parametrize(
    ("experiment", "cases"),
    [
        (
            WeightDecay(
                quick=True,
                method=("none", "dense", "nystrom"),
                outer_lrs=(0.3, 1.0),
                outer_steps=1,
            ),
            5,
        ),
        (
            GroupLasso(
                quick=True,
                method=("oracle", "cg"),
                outer_steps=1,
                starts=1,
                smoothing=0.2,
                ridge=0.1,
            ),
            2,
        ),
    ],
    ids=["weight-decay", "group-lasso"],
)
def test_a_smoke_test_leaves_rows_a_table_and_a_plot(experiment, cases, tmp_path):
    table = execute(replace(experiment, out=tmp_path))
    assert len(json.loads((tmp_path / "rows.json").read_text())) == cases
    assert (tmp_path / "table.md").read_text() == f"{table}\n"
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    for method in experiment.method:
        assert f"`{method}`" in table


def test_the_papers_outer_step_is_left_out_if_it_does_not_run(tmp_path):
    options = {"method": ("none", "dense"), "seeds": 1, "outer_steps": 1, "test": 10}
    table = execute(WeightDecay(**options, outer_lrs=(0.3,), out=tmp_path))
    assert table.startswith("At each method's best outer step of 0.3,")
    assert "Hataya" not in table


def test_outer_steps_can_be_added_later(tmp_path):
    sizes = {"method": ("dense",), "seeds": 1, "outer_steps": 1, "test": 10, "out": tmp_path}
    execute(WeightDecay(outer_lrs=(1.0,), **sizes))
    summary = tmp_path / "dense-0-1.0" / "summary.json"
    before = summary.stat().st_mtime_ns
    assert "of 1, 3, by" in execute(WeightDecay(outer_lrs=(1.0, 3.0), **sizes))
    assert summary.stat().st_mtime_ns == before
    with pytest.raises(FileExistsError, match="other options"):
        execute(WeightDecay(**sizes | {"outer_steps": 2}))


@pytest.mark.parametrize(
    ("experiment", "message"),
    [
        (WeightDecay(outer_lrs=()), "--outer-lrs: got"),
        (WeightDecay(outer_lrs=(1.0, 0.0)), "--outer-lrs: got"),
        (WeightDecay(outer_steps=0), "--outer-steps: got 0"),
        (GroupLasso(groups=1), "--groups: got 1, expected from 2 to 10000"),
        (GroupLasso(groups=41), "--groups: got 41, expected from 2 to 40"),
        (GroupLasso(active=6), "--active: got 6, expected from 1 to 5"),
        (GroupLasso(outer_steps=0), "--outer-steps: got 0"),
    ],
)
def test_an_option_out_of_range_is_refused(experiment, message):
    with pytest.raises(ValueError, match=message):
        experiment.check_options()
