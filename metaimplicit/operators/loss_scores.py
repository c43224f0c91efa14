"""What Kronecker factors take from a loss: its scores at the outputs, and the examples' weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from metaimplicit.operators.cut import cut_before_log_softmax
from metaimplicit.operators.likelihood import Expectation, Likelihood
from metaimplicit.operators.likelihood_inference import Otherwise, infer_likelihood
from metaimplicit.operators.output_loss import (
    Checked,
    OutputLoss,
    output_gradient,
    random_outputs,
)

MAX_SCORES = 1024  # the most backward passes of one batch


class LossScores(NamedTuple):
    """What Kronecker factors take from a loss at the outputs of a model.

    Args:
        scores: `[count, *z.shape]`.
        weights: The weights of the examples, `[tasks, m, …]`, of sum 1 for each task.
        probes: s and √w s of random s, `[2, *z.shape]`. Their gradients in a layer show the weights
            of its rows. None if all examples weigh the same.
    """

    scores: Tensor
    weights: Tensor
    probes: Tensor | None


def loss_scores(
    loss: OutputLoss,
    z: Tensor,
    *,
    owner: str,
    likelihood: Likelihood | None,
    expectation: Expectation,
    checked: Checked,
    strict: bool = True,
    samples: int = 1,
    generator: torch.Generator | None = None,
    mixes_positions: Callable[[int], bool] | None = None,
) -> LossScores:
    """The scores of a loss at the outputs of a model, and the weights of its examples.

    Args:
        loss: ℓ, `[tasks, …] -> [tasks]`.
        z: The outputs, `[tasks, m, …]`, without a graph.
        owner: As in `infer_likelihood`.
        likelihood: As in `infer_likelihood`.
        expectation: As in `OutputLikelihood.scores`.
        checked: As in `infer_likelihood`.
        strict: Whether a loss of no such likelihood is refused. If False, the diagonal of ∂²ℓ/∂z²
            takes the place of F.
        samples: As in `OutputLikelihood.scores`.
        generator: As in `OutputLikelihood.scores`.
        mixes_positions: Whether a row of a layer reaches several positions among an example's
            outputs, as a function of their axis. If so, each position has its scores to itself.
            Drawn scores do without, because those of two positions are independent.

    Raises:
        ValueError: The loss is −log p of no such likelihood, or there are more than 1024 scores.

    Example:
        >>> scores, weights, probes = loss_scores(
        ...     lambda z: z.square().mean((1, 2)),
        ...     torch.zeros(1, 4, 1),
        ...     owner="KFAC",
        ...     likelihood=None,
        ...     expectation="exact",
        ...     checked={},
        ... )
        >>> scores.square().sum(0).squeeze(), weights
        (tensor([0.5000, 0.5000, 0.5000, 0.5000]), tensor([[0.2500, 0.2500, 0.2500, 0.2500]]))
        >>> probes is None
        True
    """
    cut = cut_before_log_softmax(loss, z, checked)
    if strict and cut.left_out is not None:
        cut.left_out.warn(owner)
    loss = cut.loss
    otherwise: Otherwise = "raise" if strict else "diagonal"
    slope = None
    if expectation == "empirical":
        otherwise = "mean"
        slope = output_gradient(loss, z)[1].detach()
    inferred = infer_likelihood(
        loss,
        z,
        owner=owner,
        likelihood=likelihood,
        checked=checked,
        otherwise=otherwise,
    )
    scores = inferred.scores(
        expectation,
        slope=slope,
        samples=samples,
        generator=generator,
    )
    weights = inferred.example_weights()
    axis = inferred.family.axis
    if mixes_positions is not None and expectation != "monte-carlo" and mixes_positions(axis):
        scores = _separate_positions(scores, axis, owner)
    probes = None
    if not _is_uniform(weights):
        s = random_outputs(z, seed=0)
        probes = torch.stack([s, weights.sqrt().unsqueeze(axis) * s])
    return LossScores(scores, weights, probes)


def _is_uniform(weights: Tensor) -> bool:
    """Whether all examples of a task weigh the same, up to rounding."""
    rows = weights.flatten(1)
    roundoff = torch.finfo(weights.dtype).eps ** 0.5
    return bool((rows.amax(1) - rows.amin(1) <= roundoff * rows.amax(1)).all())


def _separate_positions(scores: Tensor, axis: int, owner: str) -> Tensor:
    """Each score once for every position among an example's outputs, and zero at the others."""
    by_position = scores.movedim(axis, -1)  # [count, tasks, m, *positions, d]
    flat = by_position.flatten(3, -2)
    count = flat.shape[3] * len(flat)
    if count > MAX_SCORES:
        raise ValueError(
            f"{owner} expectation: a row of a layer of this model reaches several positions of "
            f"its outputs, which takes {count} backward passes, expected at most {MAX_SCORES}; "
            "use expectation='monte-carlo'"
        )
    unit = torch.eye(flat.shape[3], dtype=scores.dtype, device=scores.device)
    separate = unit.reshape(len(unit), 1, 1, 1, len(unit), 1) * flat
    return separate.reshape(count, *by_position.shape[1:]).movedim(-1, axis)
