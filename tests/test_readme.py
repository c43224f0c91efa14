"""What the README shows runs, what it links to exists, and what it lists is all there is."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from experiments import EXPERIMENTS
from torch import nn

import tasks
from metaimplicit import GradientDescent, tuning
from metaimplicit.methods import METHODS
from metaimplicit.operators import CURVATURES

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
METHODS_PAGE = ROOT / "scripts" / "METHODS.md"
RESULTS = ROOT / "scripts" / "RESULTS.md"


def blocks(text):
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)


def pairs(*sizes):
    """Inputs and labels of 3 classes."""
    return torch.randn(*sizes, 4), torch.randint(3, sizes)


@pytest.mark.parametrize(
    "code", blocks(README.read_text()), ids=lambda code: code.strip().splitlines()[0][:40]
)
def test_the_code_runs(code):
    """With the names that a reader would have: a model, its data, an optimiser."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 10))
    inputs, targets = pairs(6)
    data = {
        "x": torch.randn(8, 3),
        "y": torch.randn(8),
        "x_val": torch.randn(8, 3),
        "y_val": torch.randn(8),
    }
    names = {
        "torch": torch, "F": F, "GradientDescent": GradientDescent,
        "model": model, "inputs": inputs, "targets": targets, "data": data,
        "loader": [(inputs, targets)], "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "sampler": [SimpleNamespace(support=pairs(2, 6), query=pairs(2, 6))],
        "support_inputs": inputs, "support_targets": targets,
        "train_loader": [(inputs, targets)] * 3, "validation_loader": [pairs(6)],
    }  # fmt: skip
    exec(code, names)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("page", [README, METHODS_PAGE, RESULTS], ids=lambda page: page.name)
def test_its_links_lead_somewhere(page):
    found = [
        link
        for link in re.findall(r"\]\(([^)]+)\)", page.read_text())
        if not link.startswith("http")
    ]
    for link in found:
        path, _, anchor = link.partition("#")
        target = Path(os.path.normpath(page.parent / path)) if path else page
        assert target.exists(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.M)
            assert anchor in [
                re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads
            ], link
    assert found


def test_the_pages_list_every_method_task_variable_and_experiment():
    text = METHODS_PAGE.read_text()
    variables = [
        name
        for name, value in vars(tuning).items()
        if isinstance(value, type)
        and issubclass(value, tuning.Variable)
        and value is not tuning.Variable
    ]
    for name in (*METHODS, *CURVATURES, *tasks.FAMILIES, *variables):
        assert re.search(rf"^\| [^|]*`\W?{name}\W?`[^|]*\|", text, flags=re.M), (
            f"scripts/METHODS.md: got no row for {name!r}, expected one that begins with "
            f"| `{name}` | in the table of its kind; add that line"
        )
    for name in EXPERIMENTS:
        assert f"### {name}\n" in RESULTS.read_text(), (
            f"scripts/RESULTS.md: got no section for the experiment, expected '### {name}'; add it"
        )


def test_the_readme_is_short():
    assert 120 <= len(README.read_text().splitlines()) <= 150
