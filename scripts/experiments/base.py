"""What an experiment of tune.py is: options, cases, what a run does, a table and a plot."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from command_line import find_device
from command_line.ranges import Seeds, Threads, check_ranges
from matplotlib.figure import Figure

import tasks
from experiments.runs import Case, Row, Runs


@dataclass(frozen=True)
class Experiment(ABC):
    """The options that every experiment has.

    The fields of a subclass are further options of its command line.
    """

    method: tuple[str, ...] = ()
    """Methods to compare, baselines included. If none is given, the default ones run."""
    seeds: Seeds = 3
    """Number of runs of each case. Their seeds are 0, 1, 2, …"""
    data_root: Path | None = None
    """Folder with the data. If it is not given, the data are downloaded."""
    out: Path | None = None
    """Folder for the results, by default runs/tune/EXPERIMENT. Runs in it are not repeated."""
    device: str = "auto"
    """Device to run on: cpu, cuda, cuda:1, …; auto is CUDA if there is a CUDA device, else cpu."""
    threads: Threads = None
    """Number of CPU threads. If it is not given, torch chooses."""
    quick: bool = False
    """Run a smoke test: options left at their defaults take their smallest values."""

    # the word for the experiment on the command line
    name: ClassVar[str]
    # the methods that are compared unless --method names others
    default_methods: ClassVar[tuple[str, ...]]
    # options that only say which cases there are; they may differ between calls that share a folder
    case_options: ClassVar[tuple[str, ...]] = ()
    # the function of `tasks` that reads the images
    image_set: ClassVar[str] = ""
    # the values of a smoke test
    quick_options: ClassVar[dict[str, Any]] = {}

    @abstractmethod
    def run(self, case: Case, out: Path) -> Row:
        """Run one case. Its row must be JSON; files may be left in the folder `out`."""

    @abstractmethod
    def table(self, runs: Runs) -> str:
        """The results in Markdown."""

    @abstractmethod
    def plot(self, runs: Runs, figure: Figure) -> None:
        """Draw the results."""

    def data_of(self, case: Case) -> dict[str, str]:
        """What identifies the data that a run reads, wherever they lie. Empty if there are none.

        A stored run of other data is not taken for this one.
        """
        return self.data_digests

    @cached_property
    def data_digests(self) -> dict[str, str]:
        """The digests of the data, by name."""
        if not self.image_set:
            return {}
        training, *_ = getattr(tasks, self.image_set)(self.data_root)
        return {"images": training.digest}

    def cases(self) -> list[Case]:
        """The cases to run, in order: every method for every seed."""
        return [{"method": m, "seed": seed} for seed in range(self.seeds) for m in self.methods]

    def check_options(self) -> None:
        """Raise ValueError for an option that is out of range. Subclasses check their own, too."""
        check_ranges(self)
        find_device(self.device)
        unknown = [method for method in self.method if method not in self.known_methods]
        if unknown:
            known = ", ".join(self.known_methods)
            raise ValueError(f"--method: got {', '.join(unknown)}, expected some of {known}")

    def check_range(self, *options: str, low: float = 1, high: float = math.inf) -> None:
        """Raise ValueError for the first of these options outside [low, high]. None is allowed."""
        for option in options:
            value = getattr(self, option)
            if value is not None and not low <= value <= high:
                expected = f"at least {low}" if high == math.inf else f"from {low} to {high}"
                flag = option.replace("_", "-")
                raise ValueError(f"--{flag}: got {value}, expected {expected}")

    @property
    def known_methods(self) -> tuple[str, ...]:
        """The methods that --method may name."""
        return self.default_methods

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods to compare."""
        return self.method or self.default_methods

    @property
    def folder(self) -> Path:
        """The folder for the results."""
        name = f"{self.name}-quick" if self.quick else self.name
        return self.out or Path("runs", "tune", name)

    @property
    def torch_device(self) -> torch.device:
        """The device that --device names."""
        return find_device(self.device)

    def case_folder(self, case: Case) -> Path:
        """The folder of one run, named after the values of its case."""
        return self.folder / "-".join(str(value) for value in case.values())

    def smoke_test_version(self) -> Experiment:
        """This experiment with `quick_options` and one seed where options have their defaults."""
        defaults = {field.name: field.default for field in fields(self)}
        smallest = {"seeds": 1, **self.quick_options}
        changes = {
            option: value
            for option, value in smallest.items()
            if getattr(self, option) == defaults[option]
        }
        return replace(self, **changes)
