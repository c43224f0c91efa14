"""The curvature that the tuner chooses for a model, against a dense solve."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

from metaimplicit import CG, GradientDescent, Implicit, Tuner, tuning_problem
from metaimplicit.tuning import WeightDecay


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.label = nn.Linear(4, 3)
        self.box = nn.Linear(4, 2)

    def forward(self, x):
        return {"label": self.label(x), "box": self.box(x)}


def loss_of_heads(outputs, targets):
    boxes = F.mse_loss(outputs["box"], targets["box"])
    return F.cross_entropy(outputs["label"], targets["label"]) + boxes


def test_the_default_curvature_of_several_outputs_is_the_hessian():
    """λ has the hypergradient −θᵀ H⁻¹ ∂g/∂θ with H = ∂²f/∂θ² + λI, at θ after one step."""
    torch.manual_seed(0)
    model = Heads().double()
    x = torch.randn(6, 4, dtype=torch.float64)
    batch = (x, {"label": torch.arange(6) % 3, "box": x[:, :2]})
    problem, meta, _ = tuning_problem(model, loss_of_heads, [WeightDecay(start=0.1)])
    inner = GradientDescent(steps=1, lr=0.1)
    tuner = Tuner(problem, meta, inner=inner, method=Implicit(CG(max_steps=60, tol=1e-13)))
    first = tuner.step(batch, batch)
    assert first.report.curvature == "hessian"

    names = [name for name, _ in model.named_parameters()]

    def loss(*params):
        outputs = functional_call(model, dict(zip(names, params, strict=True)), x)
        return loss_of_heads(outputs, batch[1])

    start = list(model.parameters())
    slopes = torch.autograd.grad(loss(*start), start)
    theta = [(p - 0.1 * (g + 0.1 * p)).detach() for p, g in zip(start, slopes, strict=True)]
    blocks = torch.autograd.functional.hessian(loss, tuple(theta))
    sizes = [p.numel() for p in theta]
    rows = [
        torch.cat([b.reshape(n, -1) for b in row], 1) for n, row in zip(sizes, blocks, strict=True)
    ]
    matrix = torch.cat(rows) + 0.1 * torch.eye(sum(sizes), dtype=torch.float64)
    slope = torch.cat([g.flatten() for g in torch.autograd.functional.jacobian(loss, tuple(theta))])
    flat = torch.cat([p.flatten() for p in theta])
    assert first.norm == pytest.approx(
        abs(flat @ torch.linalg.solve(matrix, slope)).item(), rel=1e-8
    )

    named = Implicit(CG(), curvature="gauss-newton")
    with pytest.raises(ValueError, match="outputs: got dict, expected one tensor; use curvature="):
        Tuner(problem, meta, inner=inner, method=named).step(batch, batch)
