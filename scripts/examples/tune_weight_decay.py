"""Tune a weight decay for every layer while the model trains.

python scripts/examples/tune_weight_decay.py    # about ten seconds
"""

import torch
import torch.nn.functional as F
from torch import nn

from metaimplicit import CG, Implicit, TorchOptimizer, Tuner, tuning_problem
from metaimplicit.tuning import WeightDecay


def main(outer_steps: int = 100) -> float:
    """Train with learnt decays, print them, and return the validation loss."""
    torch.manual_seed(0)
    inputs = torch.randn(60, 30)
    targets = inputs[:, :3].sum(dim=1, keepdim=True) + 0.5 * torch.randn(60, 1)
    train = inputs[:30], targets[:30]
    validation = inputs[30:], targets[30:]

    model = nn.Sequential(nn.Linear(30, 16), nn.Tanh(), nn.Linear(16, 1))
    problem, meta, domains = tuning_problem(
        model, F.mse_loss, [WeightDecay(start=1e-3, scope="tensor")]
    )

    # Ten inner steps of SGD, then one step of Adam on the decays, and so on from there.
    tuner = Tuner(
        problem,
        meta,
        domains=domains,
        inner=TorchOptimizer(torch.optim.SGD, steps=10, lr=0.05, momentum=0.9),
        method=Implicit(CG(max_steps=10), damping=0.1),
        optimizer=lambda free: torch.optim.Adam(free, lr=0.1),
    )

    for step in range(outer_steps):
        result = tuner.step(train, validation)
        if (step + 1) % 25 == 0:
            print(f"outer step {step + 1}: validation loss {result.outer_loss:.3f}")
    for name, decay in tuner.meta.items():
        print(f"{name}: {decay.item():.4f}")
    return result.outer_loss


if __name__ == "__main__":
    main()
