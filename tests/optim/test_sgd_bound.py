"""The convergence theorem of SGD with a constant step size, over every outcome of the noise.

For f with an L-Lipschitz gradient, bounded below by f*, unbiased gradients of variance σ², batches
of b examples and 0 < α < 2/L:

    min_{k<K} E‖∇f(x_k)‖² ≤ 2 E[f(x₀) − f*]/((2 − Lα) α K) + L σ² α/((2 − Lα) b)

Here f = ½ xᵀHx, f* = 0, and the gradient of one example is Hx ± s, where both signs have the
probability ½, so σ² = ‖s‖². A row of the parameter is one of the 2^{bK} sequences of signs.
"""

import itertools

import pytest
import torch
from torch import nn

from metaimplicit import Hyperoptimizer
from metaimplicit.tuning.hyperoptimizers import SGD


def expected_square_norms(h, start, noise, *, alpha, steps, batch):
    """E‖∇f(x_k)‖² for k < K, by SGD on all outcomes at once."""
    outcomes = list(itertools.product((1.0, -1.0), repeat=steps * batch))
    signs = torch.tensor(outcomes, dtype=torch.float64).reshape(-1, steps, batch).mean(2)
    x = nn.Parameter(start.expand(len(signs), -1).clone())
    optimizer = Hyperoptimizer([x], SGD(alpha))
    squares = []
    for k in range(steps):
        optimizer.zero_grad()
        loss = 0.5 * (x @ h) * x + signs[:, k : k + 1] * noise * x
        loss.sum().backward()
        squares.append((x.detach() @ h).square().sum(1).mean().item())
        optimizer.step()
    return squares


def bound(h, start, noise, *, alpha, steps, batch):
    lipschitz = torch.linalg.eigvalsh(h).abs().max().item()
    denominator = 2 - lipschitz * alpha
    gap = 0.5 * (start @ h @ start).item()
    variance = noise.square().sum().item()
    from_start = 2 * gap / (denominator * alpha * steps)
    from_noise = lipschitz * variance * alpha / (denominator * batch)
    return from_start + from_noise


@pytest.mark.parametrize("batch", [1, 2])
def test_the_bound_holds_on_random_quadratics(batch):
    random = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(30):
        root = torch.randn(3, 3, generator=random, dtype=torch.float64)
        h = root @ root.T
        start, noise = torch.randn(2, 3, generator=random, dtype=torch.float64)
        share = 0.02 + 0.96 * torch.rand((), generator=random).item()
        alpha = share * 2 / torch.linalg.eigvalsh(h).max().item()
        for steps in (1, 2, 5):
            options = {"alpha": alpha, "steps": steps, "batch": batch}
            smallest = min(expected_square_norms(h, start, noise, **options))
            ratios.append(smallest / bound(h, start, noise, **options))
    assert max(ratios) <= 1
    # A bound twice as large, or half the noise, would not come as close.
    assert max(ratios) > 0.3


def test_the_bound_is_attained():
    """For f = ½Lx² and one step of 1/L without noise, both sides are L²x₀²."""
    h = torch.tensor([[4.0]], dtype=torch.float64)
    start = torch.tensor([1.5], dtype=torch.float64)
    noise = torch.zeros(1, dtype=torch.float64)
    options = {"alpha": 0.25, "steps": 1, "batch": 1}
    squares = expected_square_norms(h, start, noise, **options)
    assert squares == pytest.approx([36.0], rel=1e-15)
    assert bound(h, start, noise, **options) == pytest.approx(36.0, rel=1e-15)


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_noise_sets_the_floor(batch):
    """From the minimum, noise alone moves x: E‖∇f(x_1)‖² = α²‖Hs‖²/b."""
    root = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    h = root @ root.T
    noise = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    start = torch.zeros(3, dtype=torch.float64)
    squares = expected_square_norms(h, start, noise, alpha=0.05, steps=2, batch=batch)
    expected = 0.05**2 * (h @ noise).square().sum().item() / batch
    assert squares == pytest.approx([0.0, expected], rel=1e-12)
