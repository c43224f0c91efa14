"""Does a learner that evaluates its body once compute what the whole model does?"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from metaimplicit.features import Features
from metaimplicit.lifted import LiftedProblem
from metaimplicit.params import Params, leaves
from metaimplicit.problem import BilevelProblem
from metaimplicit.random_state import NoticedDraws
from metaimplicit.unsupported import shorten
from metaimplicit.vectorization.comparison import (
    choose_tasks,
    largest_difference,
    unit_roundoff,
)
from metaimplicit.vectorization.evaluations import Groups, weighted_sum


def body_objection(once: BilevelProblem, whole: BilevelProblem, meta: Params, data: Any) -> str:
    """What differs if the features are evaluated once, at most two tasks one after the other.

    A head or a loss may read what a body leaves elsewhere than in its output: in an attribute, or
    in a dict that a hook fills. The losses and their derivatives are compared away from θ_0.

    Args:
        once: The problem whose features are those of the body.
        whole: The same problem, whose losses call all of the model.
        meta: φ.
        data: The data of all tasks.

    Returns:
        The difference in words. Empty if there is none, if the losses draw random numbers, or if
        `whole` raises an error, which other checks explain.
    """
    chosen = choose_tasks(data, at_most=2)
    draws = NoticedDraws()
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with draws:
                expected = _evaluate(whole, meta, chosen)
        except Exception:
            return ""
        if draws.found:
            return ""
        try:
            got = _evaluate(once, meta, chosen)
        except Exception as error:
            return f"at features that were evaluated before, a loss fails: {shorten(error)}"
    difference = largest_difference(expected, got)
    eps = unit_roundoff([*tree_leaves(expected), *meta.values()])
    if difference.size <= 3 * math.sqrt(eps):
        return ""
    return f"it would change {difference.where}: the head or a loss reads more than the features"


def _evaluate(problem: BilevelProblem, meta: Params, data: Any) -> Groups:
    """The losses f and g `[tasks]`, and the derivatives of a weighted sum of them, at a moved θ."""
    phi = leaves(meta)
    features = Features.evaluate(problem, phi, data)
    lifted = LiftedProblem(
        replace(problem, features=None),
        features.values,
        batched=True,
        vectorize="loop",
    )
    # As for a hypergradient, the losses see constant features, and φ by itself.
    parts = lifted.entries.tensors
    variables = {**leaves(meta), **leaves(parts)}
    start = lifted.init(variables)
    theta = leaves({name: p + 0.5 * p.abs() + 0.1 for name, p in start.items()})
    f = lifted.inner(theta, variables, lifted.data)
    g, _ = lifted.outer(theta, variables, lifted.data)

    # A parameter of θ may be called as one of φ.
    seen = {name: x for name, x in variables.items() if x.requires_grad}
    targets = [*theta.values(), *seen.values()]
    slopes = torch.autograd.grad(weighted_sum([f, g]), targets, allow_unused=True)
    of_theta = dict(zip(theta, slopes[: len(theta)], strict=True))
    of_seen = dict(zip(seen, slopes[len(theta) :], strict=True))
    through_features = features.pull_back(parts, {name: of_seen[name] for name in parts})
    of_phi = {}
    for name in phi:
        terms = [x for x in (of_seen.get(name), through_features.get(name)) if x is not None]
        if terms:
            of_phi[name] = torch.stack([x.to_dense() for x in terms]).sum(0, keepdim=True)
    return {
        "the support loss": {"": f},
        "the query loss": {"": g},
        "a derivative": {name: x for name, x in of_theta.items() if x is not None},
        "a derivative in φ": of_phi,
    }
