"""Modules whose vmap gives something else than a loop."""

import torch
from torch import nn
from torch.nn import functional as F


def is_vmapped(x):
    return torch._C._functorch.is_batchedtensor(x)


class WrongValue(nn.Module):
    """Half of its input under vmap."""

    def forward(self, x):
        return x / 2 if is_vmapped(x) else x


class OfFirstTask(torch.autograd.Function):
    """The identity, whose batching rule keeps the values of the first task alone."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return g

    @staticmethod
    def vmap(info, in_dims, x):
        y = torch.zeros_like(x.movedim(in_dims[0], 0))
        y[0] = x.movedim(in_dims[0], 0)[0]
        return y, 0


class WrongFunction(nn.Module):
    def forward(self, x):
        return OfFirstTask.apply(x)


class _SquareByVmap(torch.autograd.Function):
    """x², whose batching rule has a wrong gradient (order 1) or a wrong second one (order 2)."""

    @staticmethod
    def forward(x, order):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.order = inputs[1]

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return 2 * x * g, None

    @staticmethod
    def vmap(info, in_dims, x, order):
        if order == 1:
            return x.detach() ** 2 + 1.5 * x.detach() * (x - x.detach()), in_dims[0]
        away = x - x.detach()  # zero, with a gradient
        return x * x + away * away * away.detach().add(1), in_dims[0]


class WrongGradient(nn.Module):
    """Squares; its gradient is wrong under vmap."""

    def forward(self, x):
        return _SquareByVmap.apply(x, 1)


class WrongSecondDerivative(nn.Module):
    """Squares; its second derivative is wrong under vmap."""

    def forward(self, x):
        return _SquareByVmap.apply(x, 2)


class WrongParameter(nn.Module):
    """A scale whose gradient is lost under vmap."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        return x * (self.scale.detach() if is_vmapped(x) else self.scale)


class WrongWord(nn.Module):
    """Loses word 4 under vmap."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 6))

    def forward(self, words):
        rows = F.embedding(words, self.weight).mean(-2)
        lost = (words == 4).any(-1, keepdim=True)
        return torch.where(lost, 0.0, rows) if is_vmapped(words) else rows


@torch.library.custom_op("metaimplicit_tests::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


double.register_autograd(lambda ctx, g: 2 * g)
double.register_vmap(lambda info, in_dims, x: (3 * x, in_dims[0]))


class WrongOperator(nn.Module):
    """An operator of the user's with a wrong batching rule."""

    def forward(self, x):
        return double(x)
