"""Few-shot regression of sine waves, MAML's toy problem (Finn et al. 2017, section 5.1)."""

from __future__ import annotations

import numpy as np
import torch

from tasks.episodes import SPLIT_NAMES, Episodes, Splits
from tasks.few_shot import require_at_least_one

KIND = "regression"
AMPLITUDE = (0.1, 5.0)
PHASE = (0.0, np.pi)  # radians
RANGE = (-5.0, 5.0)  # of the inputs


class Sinusoid:
    """Regression of y = A sin(x − φ) from a few points.

    For each task A ~ U[0.1, 5] and φ ~ U[0, π], and for each point x ~ U[−5, 5].

    Inputs and targets are float32 `[tasks, shots, 1]` (query: `queries`). `labels` holds
    `amplitude` and `phase` (in radians), float64 `[tasks]`. The splits share one distribution and
    differ in their random streams.

    Args:
        shots: The number of points of the support set, ≥ 1.
        queries: The number of points of the query set, ≥ 1.
        split: "train", "validation" or "test".

    Raises:
        ValueError: If there are no points.

    Example:
        >>> family = Sinusoid(shots=10, queries=5, split="train")
        >>> family.sample(3, np.random.default_rng(0)).support[0].shape
        torch.Size([3, 10, 1])
    """

    kind = KIND
    input_shape = (1,)
    outputs = 1

    def __init__(self, *, shots: int, queries: int, split: str) -> None:
        require_at_least_one(shots=shots, queries=queries)
        self.shots = shots
        self.queries = queries
        self.name = f"sinusoid/{split}"

    def sample(self, tasks: int, rng: np.random.Generator) -> Episodes:
        """Draw `tasks` waves and their points. Equal states of `rng` give equal tasks."""
        amplitude = rng.uniform(*AMPLITUDE, size=tasks)
        phase = rng.uniform(*PHASE, size=tasks)
        x = rng.uniform(*RANGE, size=(tasks, self.shots + self.queries, 1))
        y = amplitude[:, None, None] * np.sin(x - phase[:, None, None])

        inputs = torch.from_numpy(x).float()
        targets = torch.from_numpy(y).float()
        return Episodes(
            support=(inputs[:, : self.shots], targets[:, : self.shots]),
            query=(inputs[:, self.shots :], targets[:, self.shots :]),
            labels={
                "amplitude": torch.from_numpy(amplitude),
                "phase": torch.from_numpy(phase),
            },
        )


def load(*, ways: int = 1, shots: int, queries: int) -> Splits:
    """The three splits of `Sinusoid`.

    Args:
        ways: Has no meaning in regression. Every family takes it.
        shots: The number of points of a support set, ≥ 1.
        queries: The number of points of a query set, ≥ 1.

    Raises:
        ValueError: If there are no points.

    Example:
        >>> load(shots=10, queries=10).train.kind
        'regression'
    """
    families = [Sinusoid(shots=shots, queries=queries, split=split) for split in SPLIT_NAMES]
    return Splits(*families)
