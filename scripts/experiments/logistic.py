"""Logistic regression with an ℓ₂ penalty, as a function of the penalty's strength."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

import tasks
from metaimplicit import LBFGS, FromMeta, Proximal, tuning_problem
from metaimplicit.lifted import LiftedProblem
from metaimplicit.params import Params
from metaimplicit.tuning import Box, Scalar, TuningProblem

MOST_EVALUATIONS = 20_000  # of the gradient, in one solve


class LogisticRegression:
    """θ*(λ) = argmin mean cross-entropy + λ/2 ‖θ‖², θ = (W, b), and its validation loss.

    Solutions are kept, so that asking for one again costs nothing.

    Args:
        train: The examples to fit.
        validation: The examples of the validation loss.
        classes: Number of classes.
        low: The smallest λ.
        high: The largest λ.
        tol: Gradient norm at which a solve ends.

    Attributes:
        low: log of the smallest λ.
        high: log of the largest λ.
        model: The linear layer, with zero weights.
        problem: The bilevel problem of φ = log λ, which is called "log_decay".
    """

    def __init__(
        self,
        train: tasks.Examples,
        validation: tasks.Examples,
        *,
        classes: int,
        low: float,
        high: float,
        tol: float,
    ) -> None:
        self.train = train
        self.validation = validation
        self.low = math.log(low)
        self.high = math.log(high)
        self.tol = tol
        self.model = nn.Linear(train.inputs.shape[1], classes).to(train.inputs)
        for p in self.model.parameters():
            nn.init.zeros_(p)
        log_decay = Scalar("log_decay", self.low, Box(self.low, self.high))
        self.problem: TuningProblem = tuning_problem(
            self.model,
            F.cross_entropy,
            [log_decay],
            penalty=Proximal(FromMeta("log_decay", torch.exp), center="zero"),
        )
        self._solutions: dict[float, Params] = {}

    def solve(self, log_decay: float, start: float | None = None) -> int:
        """Solve at log λ = `log_decay` by L-BFGS.

        Args:
            log_decay: Where to solve.
            start: A log λ whose solution to start from. If None, the solve starts from zero.

        Returns:
            The number of gradient evaluations.

        Raises:
            FloatingPointError: The solve ended above the tolerance.
        """
        meta = {"log_decay": self.problem.meta["log_decay"].new_tensor(log_decay)}
        batch = tasks.Batches(self.train, None, 0)(0)
        lifted = LiftedProblem(self.problem.problem, batch, batched=False)
        begin = lifted.init(meta)
        if start is not None:
            begin = {name: p[None] for name, p in self._solutions[start].items()}
        result = LBFGS(steps=MOST_EVALUATIONS, tol=self.tol).run(
            lambda params, t: lifted.inner(params, meta, batch),
            begin,
            meta,
            differentiated_steps=0,
        )
        norm = float(result.gradient_norm)
        if not norm <= self.tol:
            raise FloatingPointError(
                f"λ = {math.exp(log_decay):.3g}: got a gradient of norm {norm:.1e} from L-BFGS, "
                f"expected {self.tol:.1e}; raise --tol, or --low"
            )
        self._solutions[log_decay] = {name: p[0] for name, p in result.params.items()}
        return int(result.steps)

    def solution(self, log_decay: float) -> Params:
        """θ* at log λ = `log_decay`, solved now if it is not known yet."""
        if log_decay not in self._solutions:
            self.solve(log_decay)
        return self._solutions[log_decay]

    def validation_loss(self, log_decay: float) -> float:
        """The mean cross-entropy of θ* on the validation examples."""
        batch = tasks.Batches(self.validation, None, 0)(0)
        with torch.no_grad():
            return float(self.problem.problem.outer_loss(self.solution(log_decay), {}, batch))
