"""What a validation is called, and which validation of a run is the best."""

from __future__ import annotations

import math
from typing import Literal, get_args

from metaimplicit.learner import MetaLearner
from metaimplicit.training.log import Values

Best = Literal["lowest loss", "highest metric", "lowest metric"]


def selection_rule(learner: MetaLearner, best: Best | None) -> Best | None:
    """How the best validation is selected: by `best`, or by the loss if there is only a metric.

    Of a metric, nobody but the user knows which way is better.

    Returns:
        The rule for `score`. None stands for the highest accuracy, or the lowest loss where there
        is no accuracy.

    Raises:
        ValueError: `best` has another value.
    """
    if best is not None and best not in get_args(Best):
        names = ", ".join(map(repr, get_args(Best)))
        raise ValueError(f"best: got {best!r}, expected {names} or None")
    if best is None and learner.metric is not None:
        return "lowest loss"
    return best


def score(validation: Values, rule: Best | None) -> float:
    """The number by which a validation is selected, of which more is better.

    A loss of None, one that was not finite, is worse than every number.

    Args:
        validation: `"loss"`, and `"metric"` or `"accuracy"` if the learner measures one.
        rule: What counts. If None, the accuracy, or the lowest loss where there is none.

    Raises:
        ValueError: The rule asks for a metric, and there is neither a metric nor an accuracy.

    Example:
        >>> score({"loss": 2.0, "metric": 0.5}, "lowest metric")
        -0.5
    """
    loss = validation["loss"]
    metric = validation.get("metric", validation.get("accuracy"))
    if rule == "lowest loss" or (rule is None and metric is None):
        return -math.inf if loss is None else -loss
    if metric is None:
        raise ValueError(
            f"best: got {rule!r}, but the learner measures neither a metric nor an accuracy, "
            "expected 'lowest loss' or None; or give the learner a metric"
        )
    return -metric if rule == "lowest metric" else metric
