"""An optimiser that learns its own step size: the training loop stays as it is.

python scripts/examples/self_tuning_optimizer.py    # a few seconds
"""

import torch
import torch.nn.functional as F
from torch import nn

from metaimplicit import Hyperoptimizer, Positive
from metaimplicit.tuning.hyperoptimizers import SGD, Adam


def train(optimizer_name: str, steps: int) -> float:
    """The last training loss from a step size that is a thousand times too small."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 1))
    inputs = torch.randn(256, 10)
    targets = inputs.square().sum(dim=1, keepdim=True) / 10
    optimizer: torch.optim.Optimizer
    if optimizer_name == "plain SGD":
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    else:
        # SGD whose log lr is moved by Adam, with the gradient through the last update.
        level = SGD(1e-4, optimizer=Adam(0.1), domains={"lr": Positive()})
        optimizer = Hyperoptimizer(model.parameters(), level)

    for _ in range(steps):
        loss = F.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    lr = float(optimizer.param_groups[0]["lr"])
    print(f"{optimizer_name}: loss {loss.item():.4f}, step size {lr:.1e}")
    return loss.item()


def main(steps: int = 500) -> tuple[float, float]:
    """The losses of plain SGD and of SGD that tunes itself."""
    return train("plain SGD", steps), train("self-tuning SGD", steps)


if __name__ == "__main__":
    main()
