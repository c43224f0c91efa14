"""Runs the command lines of scripts/ as a user does, but in this process."""

import importlib.util
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = [
    "--task=sinusoid",
    "--steps=3",
    "--test-episodes=10",
    "--validation-episodes=10",
    "--test-steps=2",
    "--meta-batch=4",
    "--vectorize=vmap",
]


def draw_nothing(monkeypatch, *, pages=False):
    """Drawings are blank from here on. Unless `pages`, pages are empty, and no fit is predicted."""
    blank = Image.new("L", (1, 1))
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, **_: blank.save(file, "png"))
    if pages:
        return
    for module in ("command_line.report", "experiments.runner"):
        monkeypatch.setattr(f"{module}.leave_page", lambda path, make: path.write_text(""))
    monkeypatch.setattr("command_line.testing.predict_curves", lambda *args: None)


def load_main(name):
    """The `main` function of a script."""
    spec = importlib.util.spec_from_file_location(f"script_{name}", SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclass looks up its annotations
    spec.loader.exec_module(module)
    return module.main


def error_line(main, args, capsys):
    """The one line on standard error of a command that ends with exit code 2."""
    with pytest.raises(SystemExit) as exit_:
        main([str(arg) for arg in args])
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line
