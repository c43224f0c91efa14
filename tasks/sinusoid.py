"""Few-shot regression of sine waves: the toy problem of MAML (Finn, Abbeel & Levine 2017, section 5.1)."""

from __future__ import annotations

import numpy as np
import torch

from tasks.episodes import Episodes, Splits
from tasks.pool import require_at_least_one

AMPLITUDE, PHASE, RANGE = (0.1, 5.0), (0.0, np.pi), (-5.0, 5.0)


class Sinusoid:
    """y = A sin(x - φ), with A ~ U[0.1, 5], φ ~ U[0, π] for each task and x ~ U[-5, 5] for each point.

    Inputs and targets are float32 `[tasks, shots, 1]` (query: `queries`); `labels` holds `amplitude` and `phase`
    (radians), float64 `[tasks]`. The splits share one distribution and differ in their random streams.

    Args:
        shots, queries: points of the support and query set, each ≥ 1 (ValueError).
        split: "train", "validation" or "test".
    """

    kind = "regression"
    input_shape = (1,)
    outputs = 1

    def __init__(self, *, shots: int, queries: int, split: str) -> None:
        require_at_least_one(shots=shots, queries=queries)
        self.shots, self.queries, self.name = shots, queries, f"sinusoid/{split}"

    def sample(self, tasks: int, rng: np.random.Generator) -> Episodes:
        """Draw `tasks` waves and their points, with `rng` alone."""
        amplitude = rng.uniform(*AMPLITUDE, size=tasks)
        phase = rng.uniform(*PHASE, size=tasks)
        x = rng.uniform(*RANGE, size=(tasks, self.shots + self.queries, 1))
        y = amplitude[:, None, None] * np.sin(x - phase[:, None, None])
        inputs, targets = torch.from_numpy(x).float(), torch.from_numpy(y).float()
        return Episodes(
            support=(inputs[:, : self.shots], targets[:, : self.shots]),
            query=(inputs[:, self.shots :], targets[:, self.shots :]),
            labels={"amplitude": torch.from_numpy(amplitude), "phase": torch.from_numpy(phase)},
        )


def load(*, ways: int = 1, shots: int, queries: int) -> Splits:
    """The three splits; `ways` is there for the common signature and has no meaning in regression."""
    train, validation, test = (
        Sinusoid(shots=shots, queries=queries, split=split)
        for split in ("train", "validation", "test")
    )
    return Splits(train, validation, test)
