"""Rows are stored when they are done; the same command again only makes those that are missing."""

import errno
import json
import os

import benchmark
import compare
import pytest
import studies
from command_line import RowFile
from scripts.running import error_line

from metaimplicit.diagnostics.compare import Comparison, Row


def stored_rows(path):
    return json.loads(path.read_text())["rows"]


def test_a_row_is_made_once_for_its_case(tmp_path):
    path = tmp_path / "a" / "rows.json"
    calls = []

    def make():
        calls.append(len(calls))
        return {"value": len(calls)}

    case = {"method": "cg", "steps": [4, 16]}
    assert RowFile(path).read_or_make(case, make) == case | {"value": 1}
    assert RowFile(path).read_or_make(case, make) == case | {"value": 1}
    other = {"method": "cg", "steps": [4]}
    assert RowFile(path).read_or_make(other, make) == other | {"value": 2}
    assert stored_rows(path) == [case | {"value": 1}, other | {"value": 2}]
    assert RowFile(None).read_or_make(case, make) == case | {"value": 3}


def test_rows_that_another_process_stores_meanwhile_are_kept(tmp_path):
    path = tmp_path / "rows.json"
    mine, other = RowFile(path), RowFile(path)

    def make():
        other.read_or_make({"n": 2}, dict)
        return {}

    mine.read_or_make({"n": 1}, make)
    other.read_or_make({"n": 3}, dict)
    assert stored_rows(path) == [{"n": 2}, {"n": 1}, {"n": 3}]


@pytest.mark.parametrize("text", ["[]", '{"rows": {}}', '{"rows": [1]}', '{"a": 1}'])
def test_a_file_without_rows_is_refused_and_kept(tmp_path, text):
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="which holds no rows, expected a new file or one with"):
        RowFile(path)
    assert path.read_text() == text


def test_a_disk_that_is_full_keeps_the_rows_before(tmp_path, monkeypatch):
    path = tmp_path / "rows.json"
    rows = RowFile(path)
    rows.read_or_make({"n": 1}, dict)

    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        rows.read_or_make({"n": 2}, dict)
    assert list(tmp_path.iterdir()) == [path]
    assert stored_rows(path) == [{"n": 1}]


def test_benchmark_measures_what_is_missing(tmp_path, monkeypatch, capsys):
    measured = []

    def measure_apart(settings, method, inner_steps):
        if len(measured) == 2:
            raise RuntimeError("the process was killed")
        measured.append((method, inner_steps))
        return {"mebibytes": 2.0 * inner_steps, "seconds": 1.0}

    monkeypatch.setattr(benchmark, "measure_apart", measure_apart)
    out = tmp_path / "rows.json"
    args = ["--methods", "cg", "unrolled", "--inner-steps", "4", "8", "--out", str(out)]
    with pytest.raises(SystemExit) as stop:
        benchmark.run_command(args)
    assert stop.value.code == 1
    assert [(row["method"], row["inner_steps"]) for row in stored_rows(out)] == measured
    assert measured == [("cg", 4), ("cg", 8)]

    monkeypatch.setattr(benchmark, "measure_apart", lambda *case: {"mebibytes": 1, "seconds": 2})
    capsys.readouterr()
    benchmark.run_command(args)
    assert len(stored_rows(out)) == 4
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["cg", "8", "16.0", "2.00", "1.000"]
    assert lines[4].split() == ["unrolled", "8", "1.0", "1.00", "2.000"]


def test_compare_measures_what_is_missing(tmp_path, monkeypatch, capsys):
    measured = []

    def run(instance, settings):
        measured.append(settings.products)
        rows = [Row("cg", k, 0.5, 1.0, 0.1, "CONVERGED", 1.0, 1.0) for k in settings.products]
        return Comparison(rows, 3, 1, "hessian", 0.9, 1.0, 2.0, 0.0)

    monkeypatch.setattr(compare, "run", run)
    args = ["--problems", "logistic", "--seeds=1", f"--out={tmp_path}", "--products"]
    compare.run_command([*args, "3"])
    first = capsys.readouterr().out
    compare.run_command([*args, "3"])
    assert capsys.readouterr().out == first
    assert measured == [(3,)]
    compare.run_command([*args, "4"])
    compare.run_command([*args, "3"])
    assert measured == [(3,), (4,)]
    assert len(stored_rows(tmp_path / "rows.json")) == 2


def test_the_studies_measure_what_is_missing(tmp_path, monkeypatch):
    record = {"error": 0.1, "cosine": 1.0, "norm": 1.0, "loss": 0.5, "std": 0.0}
    shares = {"cg": 1.0, "lanczos": 1.0}
    drift = {"drift": 1.0, "definite": 1, "method": "a", "shares": shares, "all": 1.0, "worst": 1.0}
    monkeypatch.setattr(studies, "measure_variant", lambda variant, count: record)
    monkeypatch.setattr(studies, "measure_drift", lambda size: {"records": [drift]})

    def run_both():
        rows = RowFile(tmp_path / "rows.json")
        return studies.study_robustness(2, rows), studies.study_drift(rows)

    robustness, drifts = run_both()
    assert len(robustness) == len(studies.robustness_variants())
    assert robustness[0]["method"] == "exact ×1"
    assert drifts == [drift] * 3

    def refuse(*case):
        raise AssertionError("a row is made again")

    monkeypatch.setattr(studies, "measure_variant", refuse)
    monkeypatch.setattr(studies, "measure_drift", refuse)
    assert run_both() == (robustness, drifts)


def test_one_data_set_has_no_deviation(monkeypatch, capsys):
    first = {"error": 0.1, "cosine": 1.0, "norm": 1.0}
    monkeypatch.setattr(studies, "compare_with_exact", lambda *case: first)
    monkeypatch.setattr(studies, "tune", lambda instance, variant, seed: float(seed))
    variants = studies.robustness_variants()[:2]
    monkeypatch.setattr(studies, "robustness_variants", lambda: variants)
    (record, *_) = studies.study_robustness(1, RowFile(None))
    assert (record["loss"], record["std"]) == (1.0, None)
    assert "±" not in capsys.readouterr().out
    (record, *_) = studies.study_robustness(3, RowFile(None))
    assert (record["loss"], record["std"]) == (2.0, 1.0)
    assert "2.0000 ± 1.0000" in capsys.readouterr().out


def test_an_unknown_problem_leaves_no_folder(tmp_path, capsys):
    out = tmp_path / "out"
    line = error_line(compare.run_command, ["--problems=x", f"--out={out}"], capsys)
    assert line.startswith("error: --problems: got x, expected some of")
    assert not out.exists()
