"""Batch normalisation for few-shot networks, and checks for it in the networks of others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class BatchNorm(nn.Module):
    """y = γ (x − mean x)/√(var x + ε) + β for each channel, over the set that it is called with.

    It equals `nn.BatchNorm2d(channels, eps, track_running_stats=False)`. It is transductive: the
    prediction for one query depends on the other queries, as in the published numbers of MAML. It
    consists of plain operations, because their double backward under vmap is about a quarter faster
    than that of torch's fused kernel.

    Args:
        channels: The size of dimension 1 of the inputs.
        eps: ε > 0.

    Attributes:
        weight: γ, `[channels]`, initially 1.
        bias: β, `[channels]`, initially 0.

    Example:
        >>> images = torch.arange(4.0).reshape(1, 1, 2, 2)
        >>> outputs = BatchNorm(channels=1)(images)
        >>> round(outputs.mean().item(), 3), round(outputs.square().mean().item(), 3)
        (0.0, 1.0)
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Inputs `[m, channels, height, width]` to outputs of the same shape."""
        centred = x - x.mean((0, 2, 3), keepdim=True)
        variance = centred.square().mean((0, 2, 3), keepdim=True)
        scale = torch.rsqrt(variance + self.eps) * self.weight[:, None, None]
        return centred * scale + self.bias[:, None, None]


def is_transductive(model: nn.Module) -> bool:
    """Whether the prediction for one input depends on the other inputs of its set.

    This is so if a module of the model is batch normalisation that uses the statistics of its
    inputs: `BatchNorm`, or one of torch's with `track_running_stats=False`.

    Example:
        >>> is_transductive(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
        False
        >>> is_transductive(nn.BatchNorm1d(2, track_running_stats=False))
        True
    """
    return any(_uses_batch_statistics(module) for module in model.modules())


def reject_running_statistics(model: nn.Module) -> None:
    """Check that no normalisation layer would update running statistics in a forward pass.

    Layers in evaluation mode do not update them, so they pass.

    Raises:
        ValueError: A layer is in training mode and has `track_running_stats=True`. The message
            names the layer.

    Example:
        >>> reject_running_statistics(nn.BatchNorm1d(2).eval())
    """
    for name, module in tracked_layers(model).items():
        if module.training:
            raise ValueError(
                f"model: {name!r} ({type(module).__name__}) tracks running statistics, which "
                "adaptation would mix between tasks and iterates, expected a layer without them; "
                "build it with track_running_stats=False, use GroupNorm, or call model.eval()"
            )


def tracked_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The normalisation layers that track running statistics, by name.

    Example:
        >>> list(tracked_layers(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))))
        ['1']
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.track_running_stats
    }


@contextmanager
def running_statistics(model: nn.Module) -> Iterator[None]:
    """Let layers that track running statistics use them, and not those of their inputs.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with running_statistics(norm):
        ...     norm.training
        False
        >>> norm.training
        True
    """
    layers = [layer for layer in tracked_layers(model).values() if layer.training]
    for layer in layers:
        layer.training = False
    try:
        yield
    finally:
        for layer in layers:
            layer.training = True


def describe_normalization(model: nn.Module) -> str:
    """Which images enter the normalisation of a model at test, for a summary.

    Example:
        >>> describe_normalization(nn.BatchNorm2d(2))
        'running statistics of the training images'
        >>> describe_normalization(nn.GroupNorm(1, 2))
        'each image alone'
    """
    parts = []
    if is_transductive(model):
        parts.append("all images of a set of a task")
    if tracked_layers(model):
        parts.append("running statistics of the training images")
    return ", and ".join(parts) or "each image alone"


def _uses_batch_statistics(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return not module.track_running_stats
    return isinstance(module, BatchNorm)
