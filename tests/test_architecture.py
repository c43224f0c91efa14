"""Imports go down the list of the README, are quick, and bring no warning."""

import ast
import subprocess
import sys
from pathlib import Path

import metaimplicit
import tasks

LAYERS = (
    ("params", "graph", "models", "normalization", "options"),
    ("problem", "iterate"),
    ("lifted",),
    ("operators",),
    ("solvers",),
    ("inner",),
    ("methods",),
    ("hypergradient",),
    ("learner", "diagnostics", "tuning", "optim"),
    ("training",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ROOT = Path(metaimplicit.__file__).parent


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def sources(package):
    return sorted(Path(package.__file__).parent.rglob("*.py"))


def test_imports_only_go_down():
    checked = 0
    for path in sources(metaimplicit):
        own = path.relative_to(ROOT).with_suffix("").parts[0]
        if own == "__init__":
            continue
        for name in imports(path):
            if name.startswith("metaimplicit."):
                other = name.split(".")[1]
                assert (
                    other == own or LEVEL[other] < LEVEL[own] or LEVEL[other] == LEVEL[own] == 0
                ), f"{path}: {name}"
                checked += 1
    assert checked > 50


def test_the_packages_do_not_know_each_other():
    for package, other in ((metaimplicit, "tasks"), (tasks, "metaimplicit")):
        assert not [
            p
            for p in sources(package)
            for name in imports(p)
            if name.split(".")[0] in (other, "scripts")
        ]


def test_one_module_imports_higher():
    importers = [
        p.name
        for p in sources(metaimplicit)
        if any(n.split(".")[0] == "higher" for n in imports(p))
    ]
    assert importers == ["differentiable.py"]


def test_import_is_quick_and_silent():
    code = (
        "import time, torch; began = time.perf_counter(); import metaimplicit, tasks; "
        "print(time.perf_counter() - began)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) < 3
    assert done.stderr == ""


def test_every_public_name_is_there_and_documented():
    for name in metaimplicit.__all__:
        assert getattr(metaimplicit, name).__doc__, name
