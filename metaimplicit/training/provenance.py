"""What a run ran on, for its config.json."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from metaimplicit.learner import MetaLearner
from metaimplicit.methods import Report


def describe(learner: MetaLearner, report: Report | None = None) -> dict[str, Any]:
    """What was chosen for a run, and the versions it ran with, for JSON.

    Args:
        learner: The learner, on its device.
        report: The report of one of its steps, which says what the solver `Auto` chose.

    Returns:
        `"chosen"`: the vectorisation, the device, the number of threads, the solver, and whether
        the features are evaluated once.
        `"parameters"`: the number of meta-parameters. `"versions"`: those of the packages, None
        for one that is not installed. `"commit"`: that of the source tree, with "-dirty" if files
        differ from it, or None outside a git repository.

    Example:
        >>> from torch import nn
        >>> learner = MetaLearner(nn.Linear(2, 3), nn.functional.cross_entropy)
        >>> describe(learner)["parameters"]
        9
    """
    device = next(learner.parameters()).device
    on_cuda = device.type == "cuda"
    packages = ("metaimplicit", "higher", "numpy")
    versions = {package: _version(package) for package in packages}
    return {
        "chosen": {
            "vectorize": learner.vectorize,
            "device": torch.cuda.get_device_name(device) if on_cuda else str(device),
            "threads": torch.get_num_threads(),
            "solver": "" if report is None else report.chosen,
            "features": "" if report is None else report.features,
        },
        "parameters": sum(p.numel() for p in learner.parameters()),
        "versions": versions
        | {"torch": str(torch.__version__), "python": platform.python_version()},
        "commit": _commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    folder = str(Path(__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
