"""Logistic regression with an ℓ₂ penalty, solved as often as a search asks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

import tasks
from metaimplicit import LBFGS, Box, FromMeta, Proximal, tuning_problem
from metaimplicit.lifted import LiftedProblem
from metaimplicit.params import Params
from metaimplicit.tuning import Scalar, TuningProblem

MOST = 20_000  # gradient evaluations of a solve


class Judge:
    """Logistic regression on one split, as a function of log λ; remembers what it solved."""

    def __init__(
        self,
        train: tasks.Examples,
        validation: tasks.Examples,
        classes: int,
        low: float,
        high: float,
        tol: float,
    ) -> None:
        self.train, self.validation, self.tol = train, validation, tol
        model = nn.Linear(train.inputs.shape[1], classes).to(train.inputs)
        for p in model.parameters():
            nn.init.zeros_(p)
        self.model = model
        decay = Proximal(FromMeta("log_decay", torch.exp), center="zero")
        bounds = Box(math.log(low), math.log(high))
        self.problem: TuningProblem = tuning_problem(
            model, F.cross_entropy, [Scalar("log_decay", bounds.low, bounds)], penalty=decay
        )
        self._solutions: dict[float, Params] = {}

    def solve(self, point: float, start: float | None = None) -> int:
        """Solve at log λ = `point`, from zero or the solution at `start`; returns the gradient evaluations made."""
        meta = {"log_decay": self.problem.meta["log_decay"].new_tensor(point)}
        batch = tasks.Batches(self.train, None, 0)(0)
        lifted = LiftedProblem(self.problem.problem, batch, batched=False)
        begin = lifted.init(meta)
        if start is not None:
            begin = {name: p[None] for name, p in self._solutions[start].items()}
        found = LBFGS(steps=MOST, tol=self.tol).run(
            lambda p, t: lifted.inner(p, meta, batch), begin, meta, differentiated_steps=0
        )
        if not float(found.gradient_norm) <= self.tol:
            raise FloatingPointError(
                f"λ = {math.exp(point):.3g}: L-BFGS stopped at a gradient of norm {float(found.gradient_norm):.1e}, "
                f"expected {self.tol:.1e}; raise --tol, or --low"
            )
        self._solutions[point] = {name: p[0] for name, p in found.params.items()}
        return int(found.steps)

    def solution(self, point: float) -> Params:
        """θ* there."""
        if point not in self._solutions:
            self.solve(point)
        return self._solutions[point]

    def loss(self, point: float) -> float:
        """The validation loss there."""
        batch = tasks.Batches(self.validation, None, 0)(0)
        with torch.no_grad():
            return float(self.problem.problem.outer_loss(self.solution(point), {}, batch))
