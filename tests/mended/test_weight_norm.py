"""Second derivatives of weight normalisation, which torch gets wrong, against differences."""

import pytest
import torch
from torch import nn

from metaimplicit.mended import mended_derivatives


def make(layer, old_style):
    layer = layer.double()
    if old_style:
        with pytest.warns(FutureWarning):
            return nn.utils.weight_norm(layer)
    return nn.utils.parametrizations.weight_norm(layer)


@pytest.mark.parametrize("old_style", [False, True], ids=["parametrization", "hook"])
@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (lambda: nn.Linear(3, 2), torch.randn(4, 3)),
        (lambda: nn.Conv1d(2, 3, 2), torch.randn(2, 2, 5)),
        (lambda: nn.ConvTranspose1d(2, 3, 2), torch.randn(2, 2, 5)),
        (lambda: nn.Conv2d(1, 2, 2), torch.randn(2, 1, 3, 3)),
    ],
    ids=["linear", "conv1d", "transposed", "conv2d"],
)
def test_the_second_derivative_is_that_of_differences(layer, x, old_style):
    model = make(layer(), old_style)
    names = [name for name, p in model.named_parameters() if p.numel() > 3]
    values = dict(model.named_parameters())
    (name,) = [n for n in names if values[n].dim() > 1 and values[n].squeeze().dim() > 0][-1:]
    point = values[name].detach()
    direction = torch.randn_like(point)

    def gradient(p, create_graph=False):
        p = p.requires_grad_() if p.is_leaf else p
        with mended_derivatives:
            outputs = torch.func.functional_call(model, {name: p}, (x.double(),))
        return torch.autograd.grad(outputs.sin().sum(), p, create_graph=create_graph)[0]

    variable = point.clone().requires_grad_()
    product = torch.autograd.grad(gradient(variable, create_graph=True), variable, direction)[0]
    h = 1e-5
    slope = (gradient(point + h * direction) - gradient(point - h * direction)) / (2 * h)
    assert (product - slope).norm() < 1e-6 * slope.norm()


def test_values_are_those_of_torch():
    v = torch.randn(3, 2, 4).double()
    for dim, shape in ((0, (3, 1, 1)), (1, (1, 2, 1)), (-2, (1, 2, 1)), (-1, ())):
        g = torch.rand(shape).double() + 0.5
        with mended_derivatives:
            mended = torch._weight_norm(v, g, dim)
        assert torch.allclose(mended, torch._weight_norm(v, g, dim), rtol=1e-14)
