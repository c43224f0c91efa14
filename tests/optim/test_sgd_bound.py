"""The convergence theorem of SGD with a constant step size, its expectations taken over every outcome of the noise.

For f with an L-Lipschitz gradient, bounded below by f*, gradients unbiased with variance σ², batches of b, 0 < α < 2/L:

    min_{k<K} E‖∇f(x_k)‖² ≤ 2 E[f(x₀) − f*]/((2 − Lα) α K) + L σ² α/((2 − Lα) b)

Here f = ½ xᵀHx, f* = 0, and the gradient of one example is Hx ± s, either sign with probability ½, so σ² = ‖s‖². A row
of the parameter is one of the 2^{bK} sequences of signs.
"""

import itertools

import pytest
import torch
from torch import nn

from metaimplicit import Hyperoptimizer
from metaimplicit.tuning.hyperoptimizers import SGD


def run(h, start, noise, alpha, steps, batch):
    """(E‖∇f(x_k)‖² for k < K), by SGD on all outcomes at once."""
    signs = torch.tensor(
        list(itertools.product((1.0, -1.0), repeat=steps * batch)), dtype=torch.float64
    )
    signs = signs.reshape(-1, steps, batch).mean(2)
    x = nn.Parameter(start.expand(len(signs), -1).clone())
    optimizer, squares = Hyperoptimizer([x], SGD(alpha)), []
    for k in range(steps):
        optimizer.zero_grad()
        (0.5 * ((x @ h) * x).sum() + ((signs[:, k : k + 1] * noise) * x).sum()).backward()
        squares.append((x.detach() @ h).square().sum(1).mean().item())
        optimizer.step()
    return squares


def bound(h, start, noise, alpha, steps, batch):
    smooth = torch.linalg.eigvalsh(h).abs().max().item()
    rest = 2 - smooth * alpha
    gap = 0.5 * (start @ h @ start).item()
    return 2 * gap / (rest * alpha * steps) + smooth * noise.square().sum().item() * alpha / (
        rest * batch
    )


@pytest.mark.parametrize("batch", [1, 2])
def test_the_bound_holds_on_random_quadratics(batch):
    draws, ratios = torch.Generator().manual_seed(0), []
    for _ in range(30):
        root = torch.randn(3, 3, generator=draws, dtype=torch.float64)
        h, start, noise = root @ root.T, *torch.randn(2, 3, generator=draws, dtype=torch.float64)
        alpha = (
            2
            / torch.linalg.eigvalsh(h).max().item()
            * (0.02 + 0.96 * torch.rand((), generator=draws).item())
        )
        for steps in (1, 2, 5):
            found = min(run(h, start, noise, alpha, steps, batch))
            ratios.append(found / bound(h, start, noise, alpha, steps, batch))
    assert max(ratios) <= 1
    assert max(ratios) > 0.3  # so that a bound twice as large, or half the noise, is no accident


def test_it_is_attained():
    """f = ½Lx², one step of 1/L without noise: both sides are L²x₀²."""
    h, start = torch.tensor([[4.0]], dtype=torch.float64), torch.tensor([1.5], dtype=torch.float64)
    nothing = torch.zeros(1, dtype=torch.float64)
    found = run(h, start, nothing, 0.25, 1, 1)
    assert found == pytest.approx([36.0], rel=1e-15)
    assert bound(h, start, nothing, 0.25, 1, 1) == pytest.approx(36.0, rel=1e-15)


def test_noise_sets_the_floor():
    """At rest but for the noise the moments are known: E‖∇f(x_1)‖² = α²‖Hs‖²/b."""
    root = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h, noise = root @ root.T, torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    for batch in (1, 2, 4):
        squares = run(h, torch.zeros(3, dtype=torch.float64), noise, 0.05, 2, batch)
        assert squares == pytest.approx(
            [0.0, 0.05**2 * (h @ noise).square().sum().item() / batch], rel=1e-12
        )
