"""What the experiments share that tune hyperparameters by one method after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from experiments.base import Experiment
from metaimplicit import Tuner
from metaimplicit.inner import InnerLoop
from metaimplicit.methods import METHODS, Method, known_options, make_method
from metaimplicit.tuning import TuningProblem


@dataclass(frozen=True)
class TuningExperiment(Experiment):
    """An experiment that compares methods of `metaimplicit.methods` with baselines."""

    # the values of --method that are not methods of `metaimplicit.methods`
    baselines: ClassVar[tuple[str, ...]] = ()

    @property
    def known_methods(self) -> tuple[str, ...]:
        """The baselines, and every method there is."""
        return (*self.baselines, *METHODS)

    def method_options(self, flag: str) -> dict[str, Any]:
        """Values for the options of a method, such as `rank`. Options it does not have are ignored.

        A value of None leaves the option at the method's own default.
        """
        return {}

    def make_method(self, flag: str) -> Method:
        """The method of a flag with the options of this experiment."""
        return make_method(flag, **known_options(flag, **self.method_options(flag)))

    def make_tuner(
        self,
        problem: TuningProblem,
        flag: str,
        *,
        inner: InnerLoop,
        optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
        warm_start: bool = True,
        schedule: Callable[[int], float] | None = None,
    ) -> Tuner:
        """A tuner that takes its hypergradients by the method of a flag. See `Tuner`."""
        return Tuner(
            problem.problem,
            problem.meta,
            inner=inner,
            method=self.make_method(flag),
            optimizer=optimizer,
            domains=problem.domains,
            warm_start=warm_start,
            schedule=schedule,
        )
