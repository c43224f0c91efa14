"""Memory against inner steps, as resident size of fresh processes: flat for implicit methods, linear for unrolling."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the resident size from /proc")
def test_memory_is_flat_for_implicit_methods_and_linear_for_unrolling(tmp_path):
    options = ["--methods", "cg", "unrolled", "--inner-steps", "4", "16", "64", "--tasks", "4", "--repeats", "0"]
    subprocess.run(
        [sys.executable, ROOT / "scripts" / "benchmark.py", *options, "--out", tmp_path / "memory.json"],
        check=True,
        cwd=ROOT,
        capture_output=True,
    )
    rows = json.loads((tmp_path / "memory.json").read_text())["rows"]
    memory = {(row["method"], row["inner_steps"]): row["mebibytes"] for row in rows}
    assert memory["cg", 64] < 1.05 * memory["cg", 4]
    for more, fewer in ((16, 4), (64, 16)):
        slope = (memory["unrolled", more] - memory["unrolled", fewer]) / (more - fewer)
        assert slope == pytest.approx((memory["unrolled", 64] - memory["unrolled", 4]) / 60, rel=0.2)
        assert slope > 0.1 * memory["cg", 4]
