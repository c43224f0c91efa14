"""Complex numbers in a `MetaLearner`: refused as parameters, and taken as inputs and outputs."""

import pytest
import torch
from torch import nn

from metaimplicit import GradientDescent, Implicit, MetaLearner

LR = 0.1


class Spectrum(nn.Module):
    """A model with real parameters and complex outputs, (a + ib) x."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.real = nn.Linear(3, 2, bias=False, dtype=dtype)
        self.imag = nn.Linear(3, 2, bias=False, dtype=dtype)

    def forward(self, x):
        return torch.complex(self.real(x), self.imag(x))


def squared_error(outputs, targets):
    return (outputs - targets).abs().square().mean()


@pytest.mark.parametrize("adapt", [None, "bias"])
def test_complex_parameters_are_refused(adapt):
    model = nn.Linear(2, 3, dtype=torch.cfloat)
    with pytest.raises(ValueError, match=r"parameter 'weight' in torch\.complex64"):
        MetaLearner(model, squared_error, adapt=adapt)


@pytest.mark.parametrize("targets", [torch.complex128, torch.int64], ids=str)
def test_complex_outputs_are_no_scores_of_classes(targets):
    torch.manual_seed(0)
    model = Spectrum()
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    y = torch.ones(2, 4, 2).to(targets)
    step = MetaLearner(model, squared_error, inner=GradientDescent(steps=1, lr=LR)).backward(
        ((x, y), (x, y))
    )
    assert step.accuracy is None

    theta = [p.detach().requires_grad_() for p in model.parameters()]
    losses = []
    for inputs, target in zip(x, y, strict=True):
        loss = squared_error(torch.complex(inputs @ theta[0].T, inputs @ theta[1].T), target)
        slopes = torch.autograd.grad(loss, theta, create_graph=True)
        real, imag = (p - LR * slope for p, slope in zip(theta, slopes, strict=True))
        losses.append(squared_error(torch.complex(inputs @ real.T, inputs @ imag.T), target))
    expected = torch.autograd.grad(torch.stack(losses).mean(), theta)
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-10, atol=1e-12)


class Filter(nn.Module):
    """A filter of frequencies, whose complex numbers are pairs of real ones."""

    def __init__(self, to_complex):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1, dtype=torch.float64)
        self.pairs = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))
        self.to_complex = to_complex

    def forward(self, x):
        spectrum = torch.fft.rfft(x, dim=1) * self.to_complex(self.pairs)
        return self.layer(torch.fft.irfft(spectrum, n=4, dim=1))


@pytest.mark.parametrize(
    ("method", "vectorize"),
    [
        *(("dense", "vmap"), ("cg", "loop"), ("sama", "vmap"), ("forward", "vmap")),
        pytest.param(Implicit(products="finite-differences"), "loop", id="differences"),
    ],
)
def test_pairs_of_parameters_may_be_viewed_as_complex_numbers(method, vectorize):
    x = torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    task = (x, x.sum(2, keepdim=True).sin())

    def gradients(to_complex):
        options = {"method": method, "proximal": 0.5, "vectorize": vectorize}
        inner = GradientDescent(steps=2, lr=LR)
        learner = MetaLearner(Filter(to_complex), squared_error, inner=inner, **options)
        learner.backward((task, task))
        return [p.grad for p in learner.model.parameters()]

    expected = gradients(lambda pairs: torch.complex(pairs[..., 0], pairs[..., 1]))
    for actual, right in zip(gradients(torch.view_as_complex), expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-6, atol=1e-9)
