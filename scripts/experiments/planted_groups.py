"""Regressions whose supports are whole groups of features, and scores of the groups learnt."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Points = tuple[Tensor, Tensor]  # X [regressions, points, features] and y [regressions, points]


@dataclass(frozen=True)
class PlantedRegressions:
    """Regressions y_t = X_t w_t + noise, and the groups that their supports share.

    Attributes:
        groups: The group of each feature, `[features]`.
        train: Points to fit.
        validation: Other points of the same regressions.
        test: Other points again.
    """

    groups: Tensor
    train: Points
    validation: Points
    test: Points


def plant_regressions(
    seed: int,
    *,
    groups: int,
    features: int,
    regressions: int,
    active: int,
    points: tuple[int, int, int],
    noise: float,
) -> PlantedRegressions:
    """Draw regressions in float64. Inputs and the weights in the support are standard normal.

    Args:
        seed: Seed of all draws.
        groups: Number of groups. Their sizes are equal, or differ by one.
        features: Number of features.
        regressions: Number of regressions.
        active: Number of groups in the support of a regression. They are drawn uniformly.
        points: Numbers of training, validation and test points of each regression.
        noise: Standard deviation of the noise.

    Example:
        >>> sizes = {"groups": 2, "features": 4, "regressions": 3, "active": 1, "noise": 0.0}
        >>> data = plant_regressions(0, points=(5, 6, 7), **sizes)
        >>> data.groups.bincount().tolist(), tuple(data.test[0].shape)
        ([2, 2], (3, 7, 4))
    """
    draw = torch.Generator().manual_seed(seed)
    group = (torch.arange(features) % groups)[torch.randperm(features, generator=draw)]
    chosen = torch.rand(regressions, groups, generator=draw).argsort(1)[:, :active]
    is_active = torch.zeros(regressions, groups, dtype=torch.float64).scatter_(1, chosen, 1.0)
    normal = torch.randn(
        regressions,
        features,
        generator=draw,
        dtype=torch.float64,
    )
    weights = is_active[:, group] * normal

    def draw_points(n: int) -> Points:
        x = torch.randn(
            regressions,
            n,
            features,
            generator=draw,
            dtype=torch.float64,
        )
        error = noise * torch.randn(
            regressions,
            n,
            generator=draw,
            dtype=torch.float64,
        )
        return x, torch.einsum("tnp,tp->tn", x, weights) + error

    train, validation, test = (draw_points(n) for n in points)
    return PlantedRegressions(group, train, validation, test)


def recovery(learnt: Tensor, true: Tensor) -> float:
    """The share of features in the right group, after the best one-to-one matching of groups.

    Args:
        learnt: The group of each feature that was learnt, int64 `[features]`.
        true: The planted group of each feature, int64 `[features]`.

    Example:
        >>> recovery(torch.tensor([1, 1, 0, 0]), torch.tensor([0, 0, 1, 0]))
        0.75
    """
    from scipy.optimize import linear_sum_assignment

    counts = contingency(learnt, true)
    rows, columns = linear_sum_assignment(counts.numpy(), maximize=True)
    return float(counts[rows, columns].sum() / len(true))


def adjusted_rand(learnt: Tensor, true: Tensor) -> float:
    """The adjusted Rand index (Hubert & Arabie 1985) of two partitions of the features.

        (S − E) / (½ (A + B) − E),    E = A B / (all pairs)

    S counts the pairs of features that share a group in both partitions, A and B those that share
    one in the first and in the second. The index is 1 for equal partitions. It is 0 on average for
    random ones.

    Args:
        learnt: The group of each feature that was learnt, int64 `[features]`.
        true: The planted group of each feature, int64 `[features]`.

    Example:
        >>> adjusted_rand(torch.tensor([1, 1, 0, 0]), torch.tensor([0, 0, 1, 1]))
        1.0
    """
    counts = contingency(learnt, true)
    shared = pairs(counts)
    in_true = pairs(counts.sum(0))
    in_learnt = pairs(counts.sum(1))
    expected = in_true * in_learnt / pairs(counts.sum())
    most = (in_true + in_learnt) / 2
    return 1.0 if most == expected else (shared - expected) / (most - expected)


def pairs(counts: Tensor) -> float:
    """Σ n (n − 1)/2, the number of pairs within groups of these sizes."""
    return float((counts * (counts - 1) / 2).sum())


def contingency(learnt: Tensor, true: Tensor) -> Tensor:
    """How many features each pair of groups shares, float64 `[learnt groups, true groups]`."""
    counts = torch.zeros(int(learnt.max()) + 1, int(true.max()) + 1, dtype=torch.float64)
    ones = torch.ones(len(true), dtype=torch.float64)
    return counts.index_put_((learnt, true), ones, accumulate=True)
