"""`scripts/compare.py` on its smallest problem, and against other libraries."""

import json

import pytest
import torch
from compare import Settings, main
from comparison_report import split_panel, table
from pages import read_page
from problems import quadratic
from solver_cases import FACTORED_METHODS

from metaimplicit.diagnostics import comparable_methods, compare

AT_BUDGET = set(comparable_methods()) - FACTORED_METHODS


@pytest.mark.slow
def test_it_leaves_a_table_json_and_a_plot(tmp_path, capsys):
    main(Settings(problems=("logistic",), products=(3,), seeds=1, out=tmp_path))
    assert "3 products: auto / " in capsys.readouterr().out
    stored = json.loads((tmp_path / "problems.json").read_text())["found"]["logistic"]
    assert stored["size"] == 100
    assert {row["method"] for row in stored["rows"]} == AT_BUDGET
    assert (tmp_path / "errors.png").read_bytes().startswith(b"\x89PNG")
    page = read_page((tmp_path / "report.html").read_text())
    assert [title for title, _ in page.sections] == ["Problems", "Options", "Provenance"]
    assert page.images == len(split_panel("", {method: [] for method in AT_BUDGET}))


@pytest.mark.slow
def test_a_sketch_that_did_not_run_is_a_dash_in_the_table():
    """No sketch of a problem of 6 parameters has 7 columns."""
    small = quadratic(torch.linspace(1, 10, 6, dtype=torch.float64))
    comparison = compare(
        small.problem,
        small.meta,
        small.data,
        inner=small.inner,
        batched=small.batched,
        products=(3, 7),
        methods=["cg", "nystrom"],
        seeds=1,
    )
    assert "       —" in table("small", comparison)


def test_an_unknown_problem_is_refused(tmp_path):
    message = "--problems: got quadratics, expected some of quadratic-well"
    with pytest.raises(ValueError, match=message):
        main(Settings(problems=("quadratics",), out=tmp_path))


def test_other_libraries_are_compared_with_the_exact_values(tmp_path):
    main(Settings(peers=True, out=tmp_path))
    rows = json.loads((tmp_path / "peers.json").read_text())["found"]["errors"]
    assert len(rows) == 9
    page = read_page((tmp_path / "report.html").read_text())
    assert [title for title, _ in page.sections] == ["Other libraries", "Options", "Provenance"]
    assert all(row["ours"] < 1e-8 for row in rows)
    (higher,) = (row for row in rows if row["library"].startswith("higher"))
    # Its derivative in β₂ is wrong. If this fails, it has been repaired.
    assert higher["theirs"] > 0.1
