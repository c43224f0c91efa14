"""What a run ran on, for its config.json."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from metaimplicit.learner import MetaLearner
from metaimplicit.methods import Report


def describe(learner: MetaLearner, report: Report | None = None) -> dict[str, Any]:
    """What was chosen for a run, for JSON.

    Args:
        learner: The learner.
        report: The report of one of its steps, which says what the solver `Auto` chose.

    Returns:
        `"chosen"`: the vectorisation, the solver, and whether the features are evaluated once.
        `"parameters"`: the number of meta-parameters.

    Example:
        >>> from torch import nn
        >>> learner = MetaLearner(nn.Linear(2, 3), nn.functional.cross_entropy)
        >>> describe(learner)["parameters"]
        9
    """
    return {
        "chosen": {
            "vectorize": learner.vectorize,
            "solver": "" if report is None else report.chosen,
            "features": "" if report is None else report.features,
        },
        "parameters": sum(p.numel() for p in learner.parameters()),
    }


def describe_sitting(device: torch.device) -> dict[str, Any]:
    """What one sitting of a run runs on, for JSON.

    Args:
        device: Where the run computes.

    Returns:
        `"commit"`: that of the source tree, with "-dirty" if files differ from it, or None outside
        a git repository. `"versions"`: those of the packages, None for one that is not installed.
        `"threads"`: the number of CPU threads. `"device"`: its name.

    Example:
        >>> describe_sitting(torch.device("cpu"))["device"]
        'cpu'
    """
    packages = ("metaimplicit", "higher", "numpy")
    versions = {package: _version(package) for package in packages}
    on_cuda = device.type == "cuda"
    return {
        "commit": _commit(),
        "versions": versions
        | {"torch": str(torch.__version__), "python": platform.python_version()},
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if on_cuda else str(device),
    }


def changed_versions(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The versions, the commit among them, in which two sittings differ.

    Example:
        >>> before = {"commit": "a", "versions": {"torch": "2.6", "numpy": "2.0"}}
        >>> changed_versions(before, {"commit": "a", "versions": {"torch": "2.7", "numpy": "2.0"}})
        ['torch 2.6 → 2.7']
    """
    old = {"commit": before["commit"], **before["versions"]}
    new = {"commit": now["commit"], **now["versions"]}
    changed = [name for name in new if old.get(name) != new[name]]
    return [f"{name} {old.get(name)} → {new[name]}" for name in changed]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _commit() -> str | None:
    folder = str(Path(__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
