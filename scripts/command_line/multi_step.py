"""The option --multi-step-loss."""

from __future__ import annotations

from command_line.options import RunOptions
from metaimplicit import MetaLearner
from metaimplicit.methods import Unrolled

LEAST = 0.03  # of 1/T, before the losses of the first steps are left out


def anneal_losses(options: RunOptions, learner: MetaLearner, spent: float) -> None:
    """Weigh the query losses after each inner step, as --multi-step-loss asks for.

    Args:
        options: Those of the run.
        learner: Its learner, whose method is changed.
        spent: The share of the run that is over.

    Raises:
        ValueError: The method does not see the inner steps, or there are none.
    """
    if not options.multi_step_loss:
        return
    steps = learner.inner.steps
    if type(learner.method) is not Unrolled or steps < 1:
        raise ValueError(
            f"--multi-step-loss: got {options.multi_step_loss} with --method {options.method} "
            f"and {steps} inner steps, expected --method unrolled and at least one"
        )
    annealed = spent / options.multi_step_loss
    weights = multi_step_weights(steps, annealed)
    learner.method = Unrolled(iterates=True, weights=weights) if annealed < 1 else Unrolled()


def multi_step_weights(steps: int, annealed: float) -> tuple[float, ...]:
    """w_0 … w_T of the query losses at θ_0 … θ_T (MAML++; Antoniou et al. 2019, §4).

        w_0 = 0,   w_t = max(1 − a, 0.03)/T for 0 < t < T,   w_T = 1 − (w_1 + … + w_{T−1}).

    Args:
        steps: T ≥ 1.
        annealed: a, from 0, where all steps count alike, to 1.
    """
    early = max(1 - annealed, LEAST) / steps
    return (0.0, *[early] * (steps - 1), 1 - (steps - 1) * early)
