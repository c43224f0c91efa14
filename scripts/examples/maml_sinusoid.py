"""MAML on the sinusoid: learn an initialisation that fits a sine wave from ten points in one step.

python scripts/examples/maml_sinusoid.py        # about one minute on one core
"""

import torch
import torch.nn.functional as F

import tasks
from metaimplicit import GradientDescent, MetaLearner
from metaimplicit.models import MLP

META_STEPS = 3000


def main(meta_steps: int = META_STEPS) -> float:
    """Train, print the query error along the inner loop, and return the error after one step."""
    torch.manual_seed(0)
    splits = tasks.load("sinusoid", shots=10, queries=10)
    train = tasks.EpisodeSampler(splits.train, tasks=25, seed=0)
    test = tasks.EpisodeSampler(splits.test, tasks=600, seed=1)

    # One step of gradient descent inside; the meta-gradient is unrolled through it.
    learner = MetaLearner(
        MLP(1, 1, hidden=(40, 40)),
        F.mse_loss,
        inner=GradientDescent(steps=1, lr=0.01),
        method="unrolled",
        vectorize="vmap",
    )
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    print(f"the meta-gradient: {learner.check(train[0]).verdict}")

    for step in range(meta_steps):
        result = learner.backward(train[step])
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 500 == 0:
            print(f"meta-step {step + 1}: query error {result.loss.item():.3f}")

    losses, _ = learner.evaluate(test[0], steps=10)
    errors = losses.mean(dim=1)
    print(
        f"test error before adapting {errors[0]:.2f}, after 1 step {errors[1]:.2f}, "
        f"after 10 {errors[10]:.2f}"
    )
    return float(errors[1])


if __name__ == "__main__":
    main()
