"""The options --multi-step-loss and --first-order-share: methods that change as a run goes on."""

from __future__ import annotations

from dataclasses import replace

from command_line.build import build_method
from command_line.options import RunOptions
from metaimplicit import MetaLearner
from metaimplicit.learner.learnable import REACH
from metaimplicit.methods import FirstOrder, Unrolled

LEAST = 0.03  # of 1/T, before the losses of the first steps are left out


def anneal_method(options: RunOptions, learner: MetaLearner, spent: float) -> None:
    """Give the learner the method of a part of the run, as MAML++ does (Antoniou et al. 2019, §4).

    With --multi-step-loss, the query losses after all inner steps count at first. With
    --first-order-share, derivatives are of first order at first.

    Args:
        options: Those of the run.
        learner: Its learner, whose method is changed.
        spent: The share of the run that is over.

    Raises:
        ValueError: The method does not see the inner steps, or there are none. Or both are given.
            Or an inner number is learnt, which derivatives of first order do not reach.
    """
    if options.first_order_share:
        _anneal_order(options, learner, spent)
    elif options.multi_step_loss:
        _anneal_losses(options, learner, spent)


def _anneal_order(options: RunOptions, learner: MetaLearner, spent: float) -> None:
    if options.method != "unrolled" or options.multi_step_loss:
        raise ValueError(
            f"--first-order-share: got {options.first_order_share} with --method {options.method} "
            f"and --multi-step-loss {options.multi_step_loss}, expected --method unrolled and no "
            "multi-step loss"
        )
    # The temperature of a head acts on the start, which derivatives of first order reach.
    unreached = [item for item in options.learn if item.partition("=")[0] in REACH]
    if unreached:
        raise ValueError(
            f"--first-order-share: got {options.first_order_share} with --learn "
            f"{' '.join(unreached)}, which derivatives of first order do not reach, expected one "
            "of the two; leave out the other"
        )
    is_first_order = spent < options.first_order_share
    learner.method = FirstOrder() if is_first_order else build_method(options)


def _anneal_losses(options: RunOptions, learner: MetaLearner, spent: float) -> None:
    steps = learner.inner.steps
    if type(learner.method) is not Unrolled or steps < 1:
        raise ValueError(
            f"--multi-step-loss: got {options.multi_step_loss} with --method {options.method} "
            f"and {steps} inner steps, expected --method unrolled and at least one"
        )
    annealed = spent / options.multi_step_loss
    weights = multi_step_weights(steps, annealed) if annealed < 1 else None
    learner.method = replace(learner.method, iterates=annealed < 1, weights=weights)


def multi_step_weights(steps: int, annealed: float) -> tuple[float, ...]:
    """w_0 … w_T of the query losses at θ_0 … θ_T.

        w_0 = 0,   w_t = max(1 − a, 0.03)/T for 0 < t < T,   w_T = 1 − (w_1 + … + w_{T−1}).

    Args:
        steps: T ≥ 1.
        annealed: a, from 0, where all steps count alike, to 1.
    """
    early = max(1 - annealed, LEAST) / steps
    return (0.0, *[early] * (steps - 1), 1 - (steps - 1) * early)
