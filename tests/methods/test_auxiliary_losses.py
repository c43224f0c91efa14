"""A loss that reads more of a model than its outputs has no Gauss–Newton matrix of the outputs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from metaimplicit import CG, GradientDescent, Implicit, MetaLearner
from metaimplicit.operators import Fisher

pytestmark = pytest.mark.usefixtures("float64")

X = torch.randn(2, 10, 4, dtype=torch.float64)
Y = (torch.arange(10) % 5).repeat(2, 1)
EPISODES = ((X, Y), (X.flip(1), Y))
STRENGTH = 5.0
STEPS = 20


class Auxiliary(nn.Module):
    """Leaves the penalty of its features in an attribute."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 3)
        self.head = nn.Linear(3, 5)

    def forward(self, x):
        z = torch.tanh(self.body(x))
        self.penalty = z.square().mean()
        return self.head(z)


def make_learner(model, curvature, vectorize):
    return MetaLearner(
        model,
        lambda z, y: F.cross_entropy(z, y) + model.penalty,
        inner=GradientDescent(steps=STEPS, lr=0.18),
        proximal=STRENGTH,
        method=Implicit(CG(max_steps=200, tol=1e-13), curvature=curvature),
        vectorize=vectorize,
    )


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
@pytest.mark.parametrize("curvature", ["gauss-newton", Fisher, "diagonal"])
def test_a_curvature_of_the_outputs_is_refused(curvature, vectorize):
    learner = make_learner(Auxiliary(), curvature, vectorize)
    learner.inner = GradientDescent(steps=1)
    message = r"loss: it depends on 'body.*' beside the outputs .* use curvature='hessian'"
    with pytest.raises(ValueError, match=message):
        learner.backward(EPISODES)


@pytest.mark.parametrize("vectorize", ["vmap", "loop"])
def test_the_hessian_is_that_of_the_whole_loss(vectorize):
    """λ (H + λI)⁻¹ ∂g/∂θ at the argmin, from a dense Hessian of f as one function of θ."""
    model = Auxiliary()
    make_learner(model, "hessian", vectorize).backward(EPISODES)
    names = [name for name, _ in model.named_parameters()]
    phi = nn.utils.parameters_to_vector(model.parameters()).detach()

    def loss_at(vector, x, y):
        parts = vector.split([p.numel() for p in model.parameters()])
        shaped = [v.view_as(p) for v, p in zip(parts, model.parameters(), strict=True)]
        z = torch.func.functional_call(model, dict(zip(names, shaped, strict=True)), (x,))
        return F.cross_entropy(z, y) + model.penalty

    expected = torch.zeros_like(phi)
    for x, query in zip(X, X.flip(1), strict=True):
        theta = phi
        for _ in range(STEPS):
            slope = torch.func.grad(loss_at)(theta, x, Y[0]) + STRENGTH * (theta - phi)
            theta = theta - 0.18 * slope
        hessian = torch.autograd.functional.hessian(lambda t, x=x: loss_at(t, x, Y[0]), theta)
        hessian = hessian + STRENGTH * torch.eye(len(phi))
        v = torch.func.grad(loss_at)(theta, query, Y[0])
        expected += STRENGTH * torch.linalg.solve(hessian, v) / 2
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert (got - expected).norm() / expected.norm() < 1e-9
