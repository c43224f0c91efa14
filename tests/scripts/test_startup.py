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
print(os.environ.get("OMP_WAIT_POLICY"), "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("program", "chosen", "expected"),
    [
        (SCRIPTS / "train.py", {}, "passive False"),
        (SCRIPTS / "train.py", {"OMP_WAIT_POLICY": "active"}, "active False"),
        (SCRIPTS / "tune.py", {}, "None False"),
        (SCRIPTS.parent / "train.py", {}, "None False"),
    ],
    ids=["chooses threads", "a choice of the user", "another script", "another program"],
)
def test_threads_wait_passively_where_their_number_is_chosen(program, chosen, expected):
    environment = {name: x for name, x in os.environ.items() if name != "OMP_WAIT_POLICY"}
    command = [sys.executable, "-c", PROGRAM, str(program)]
    result = subprocess.run(
        command,
        env=environment | {"PYTHONPATH": str(SCRIPTS)} | chosen,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == expected
