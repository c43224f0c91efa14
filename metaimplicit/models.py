"""The networks of the few-shot literature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import gcd

from torch import Tensor, nn

from metaimplicit.normalization import BatchNorm

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "softplus": partial(nn.Softplus, beta=20.0),
    "gelu": nn.GELU,
}


def _group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(gcd(channels, 8), channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": BatchNorm,
    "running": nn.BatchNorm2d,
    "group": _group_norm,
    "layer": partial(nn.GroupNorm, 1),
}


class ConvNet(nn.Module):
    """The few-shot convolutional network (Vinyals et al. 2016).

    It consists of blocks of 3×3 convolution, normalisation and activation, each of which halves the
    image, and a linear layer.

    Args:
        input_shape: `(channels, height, width)` of one image.
        outputs: The number of outputs for each image, ≥ 1: the ways of a task. If None, there is no
            linear layer, and the outputs are the features.
        filters: The number of channels of every block, ≥ 1.
        blocks: The number of blocks, ≥ 1.
        strided: If True, convolutions of stride 2 halve the image, which is fast. If False, 2×2
            max-pooling does.
        activation: `"relu"`, as published, or a smooth one, whose minima lie on no kinks: `"gelu"`,
            or `"softplus"`, log(1 + e^{20x})/20.
        norm: `"batch"`, the statistics of the set that it is called with, as in the published
            numbers of MAML (it is transductive); `"running"`, those of training, for a network
            whose convolutions do not adapt; `"group"` (8 groups at most) or `"layer"`, those of
            each image.

    Raises:
        ValueError: `input_shape` is not that of an image, or too small for the blocks. A number is
            less than 1. The activation or the normalisation is unknown.

    Example:
        >>> import torch
        >>> net = ConvNet((1, 28, 28), outputs=5, filters=8)
        >>> net(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        outputs: int | None,
        *,
        filters: int = 64,
        blocks: int = 4,
        strided: bool = True,
        activation: str = "relu",
        norm: str = "batch",
    ) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ValueError(
                f"input_shape: got {tuple(input_shape)}, expected (channels, height, width)"
            )
        for name, number in {"outputs": outputs, "filters": filters, "blocks": blocks}.items():
            if number is not None and number < 1:
                raise ValueError(f"{name}: got {number}, expected at least 1")
        if activation not in ACTIVATIONS:
            known = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation: got {activation!r}, expected one of {known}")
        if norm not in NORMS:
            raise ValueError(f"norm: got {norm!r}, expected one of {', '.join(NORMS)}")

        channels, height, width = input_shape
        layers: list[nn.Module] = []
        for _ in range(blocks):
            stride = 2 if strided else 1
            layers.append(nn.Conv2d(channels, filters, 3, stride=stride, padding=1))
            layers.append(NORMS[norm](filters))
            layers.append(ACTIVATIONS[activation]())
            if not strided:
                layers.append(nn.MaxPool2d(2))
            # A convolution of stride 2 rounds half of an odd size up, pooling rounds it down.
            height = (height + 1) // 2 if strided else height // 2
            width = (width + 1) // 2 if strided else width // 2
            channels = filters

        if min(height, width) < 1:
            raise ValueError(
                f"input_shape: got {tuple(input_shape)}, of which {blocks} poolings leave nothing, "
                f"expected at least {2**blocks} pixels a side; use fewer blocks or strided=True"
            )
        self.features = nn.Sequential(*layers)
        self.head = None if outputs is None else nn.Linear(channels * height * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[m, channels, height, width]` to outputs `[m, outputs]`."""
        features: Tensor = self.features(x).flatten(1)
        return features if self.head is None else self.head(features)


class MLP(nn.Sequential):
    """Linear layers with ReLU between them. The default is the sinusoid network of MAML.

    Args:
        inputs: The size of one input, ≥ 1.
        outputs: The number of outputs for each input, ≥ 1. If None, the last hidden layer is the
            output, with its ReLU.
        hidden: The widths of the hidden layers, each ≥ 1. If empty, there is one linear layer.

    Raises:
        ValueError: A width is less than 1.

    Example:
        >>> import torch
        >>> MLP(1, 2, hidden=(8,))(torch.zeros(3, 1)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self, inputs: int, outputs: int | None, *, hidden: Sequence[int] = (40, 40)
    ) -> None:
        widths = [inputs, *hidden, *([] if outputs is None else [outputs])]
        if min(widths) < 1:
            raise ValueError(f"widths: got {widths}, expected each at least 1")
        layers: list[nn.Module] = []
        for fan_in, fan_out in pairwise(widths):
            layers.append(nn.Linear(fan_in, fan_out))
            layers.append(nn.ReLU())
        super().__init__(*(layers if outputs is None else layers[:-1]))  # no ReLU after the outputs
