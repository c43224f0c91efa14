"""What every script does before it imports torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
PROGRAM = """
import os, sys
sys.argv = [sys.argv[1]]
import startup
print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("program", "chosen", "expected"),
    [
        (SCRIPTS / "train.py", {}, "passive 0 False"),
        (SCRIPTS / "train.py", {"OMP_WAIT_POLICY": "active"}, "active 0 False"),
        (SCRIPTS.parent / "other.py", {}, "None None False"),
    ],
    ids=["a script", "a choice of the user", "another program"],
)
def test_the_threads_of_a_script_wait_passively(program, chosen, expected):
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", PROGRAM, str(program)]
    result = subprocess.run(
        command,
        env=environment | {"PYTHONPATH": str(SCRIPTS)} | chosen,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == expected
