"""Whether inner loops ended at a minimum, where implicit hypergradients are right."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

import torch
from torch import Tensor

from metaimplicit.methods import Report
from metaimplicit.training.panels import Line

MOST_LEFT = 0.5  # of the outer loss


def leftover_share(report: Report, loss: Tensor) -> Tensor | None:
    """The mean of |uᵀ ∂f/∂θ| over the tasks, beside |g|, where A u = ∂g/∂θ.

    To first order, it is the share by which the outer loss g would still change if the inner loop
    went on to its minimum.

    Args:
        report: The report of a hypergradient. Its `leftover` is `[tasks]`.
        loss: g, the mean outer loss, a scalar.

    Returns:
        A scalar. None if the method solves no system.

    Example:
        >>> report = Report("cg", torch.ones(2), torch.ones(2), leftover=torch.tensor([0.1, -0.3]))
        >>> leftover_share(report, torch.tensor(2.0))
        tensor(0.1000)
    """
    if report.leftover is None:
        return None
    return report.leftover.abs().mean() / loss.abs().clamp(min=torch.finfo(loss.dtype).tiny)


def describe_unsettled(lines: Sequence[Line]) -> str:
    """What is wrong if the inner loop ended far from its minimum in the last tenth of a run.

    Args:
        lines: Those of metrics.jsonl.

    Returns:
        Nothing if it did not, or if the method does not solve a system there.

    Example:
        >>> describe_unsettled([{"split": "train", "leftover": 2.4}])  # doctest: +ELLIPSIS
        'the inner loop ended far from a minimum, ... would still change by 240 % of itself ...'
        >>> describe_unsettled([{"split": "train", "leftover": 0.01}])
        ''
    """
    training = (line.get("leftover") for line in lines if line["split"] == "train")
    values = [share for share in training if share is not None]
    last = values[-max(len(values) // 10, 1) :]
    if not last or median(last) <= MOST_LEFT:
        return ""
    return (
        "the inner loop ended far from a minimum, where implicit hypergradients are inexact: the "
        f"outer loss would still change by {100 * median(last):.0f} % of itself on the way there; "
        "take a smaller inner step size or more inner steps"
    )
