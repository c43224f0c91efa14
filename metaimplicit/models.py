"""The networks of the few-shot literature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import gcd, prod

import torch
from torch import Tensor, nn

from metaimplicit.counts import check_count
from metaimplicit.normalization import BatchNorm

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky-relu": partial(nn.LeakyReLU, 0.1),
    "softplus": partial(nn.Softplus, beta=20.0),
    "gelu": nn.GELU,
}


def _group_norm(channels: int) -> nn.Module:
    groups = gcd(channels, 8)
    if groups == channels:
        # A group of one channel has no variance where the image is one pixel.
        groups = max(channels // 2, 1)
    return nn.GroupNorm(groups, channels)


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
        filters: The number of channels of every block, ≥ 1, or one number for each, such as
            (96, 192, 384, 512) (Bertinetto et al. 2019).
        blocks: The number of blocks, ≥ 1.
        strided: If True, convolutions of stride 2 halve the image, which is fast. If False, 2×2
            max-pooling does.
        activation: `"relu"`, as published, `"leaky-relu"`, of slope 0.1 where x < 0, or a smooth
            one, whose minima lie on no kinks: `"gelu"`, or `"softplus"`, log(1 + e^{20x})/20.
        norm: `"batch"`, the statistics of the set that it is called with, as in the published
            numbers of MAML (it is transductive); `"running"`, those of training, for a network
            whose convolutions do not adapt; `"group"` (8 groups at most, of two channels at least)
            or `"layer"`, those of each image.
        joined: How many of the last blocks the features come from, 1 … blocks. The network of R2D2
            joins two (Bertinetto et al. 2019).

    Attributes:
        head_name: The name of the linear layer.

    Raises:
        ValueError: `input_shape` is not that of an image, or too small for the blocks. A number is
            less than 1, or `joined` above `blocks`. The numbers of channels are not one for each
            block. The activation or the normalisation is unknown.

    Example:
        >>> import torch
        >>> net = ConvNet((1, 28, 28), outputs=5, filters=8)
        >>> net(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([3, 5])
    """

    head_name = "head"

    def __init__(
        self,
        input_shape: Sequence[int],
        outputs: int | None,
        *,
        filters: int | Sequence[int] = 64,
        blocks: int = 4,
        strided: bool = True,
        activation: str = "relu",
        norm: str = "batch",
        joined: int = 1,
    ) -> None:
        super().__init__()
        _check_arguments(input_shape, outputs, blocks, activation=activation, norm=norm)
        if not 1 <= joined <= blocks:
            raise ValueError(f"joined: got {joined}, expected from 1 to {blocks}, the blocks")
        channels, height, width = input_shape
        sizes: list[int] = []
        ends: list[int] = []
        layers: list[nn.Module] = []
        for block_channels in _channels_of_blocks(filters, blocks):
            stride = 2 if strided else 1
            layers.append(nn.Conv2d(channels, block_channels, 3, stride=stride, padding=1))
            layers.append(NORMS[norm](block_channels))
            after: list[nn.Module] = [ACTIVATIONS[activation]()]
            if not strided and activation == "gelu":
                after = [*after, nn.MaxPool2d(2)]
            elif not strided:
                # Monotone activations commute with the maximum, and have less to do after it.
                after = [nn.MaxPool2d(2), *after]
            layers += after
            # A convolution of stride 2 rounds half of an odd size up, pooling rounds it down.
            height = (height + 1) // 2 if strided else height // 2
            width = (width + 1) // 2 if strided else width // 2
            channels = block_channels
            sizes.append(channels * height * width)
            ends.append(len(layers))

        if min(height, width) < 1:
            raise ValueError(
                f"input_shape: got {tuple(input_shape)}, of which {blocks} poolings leave nothing, "
                f"expected at least {2**blocks} pixels a side; use fewer blocks or strided=True"
            )
        self.features = nn.Sequential(*layers)
        self.head = None if outputs is None else nn.Linear(sum(sizes[-joined:]), outputs)
        self._joined_after = ends[-joined:]

    def forward(self, x: Tensor) -> Tensor:
        """Images `[m, channels, height, width]` to outputs `[m, outputs]`."""
        parts = []
        for number, layer in enumerate(self.features, start=1):
            x = layer(x)
            if number in self._joined_after:
                parts.append(x.flatten(1))
        features = torch.cat(parts, dim=1)
        return features if self.head is None else self.head(features)


class ResidualBlock(nn.Module):
    """Three convolutions beside one, then 2×2 max-pooling: a block of `ResNet12`.

        y = pool(σ(N₃ C₃ σ(N₂ C₂ σ(N₁ C₁ x)) + N₀ C₀ x))

    with 3×3 convolutions C₁, C₂, C₃ and a 1×1 convolution C₀, all without a bias, normalisations N
    and the activation σ.

    Args:
        inputs: The channels of x, ≥ 1.
        outputs: The channels of y, ≥ 1.
        activation: One of `ACTIVATIONS`.
        norm: One of `NORMS`.

    Example:
        >>> import torch
        >>> ResidualBlock(3, 8, activation="relu", norm="group")(torch.zeros(2, 3, 7, 7)).shape
        torch.Size([2, 8, 3, 3])
    """

    def __init__(self, inputs: int, outputs: int, *, activation: str, norm: str) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (inputs, outputs, outputs):
            layers.append(nn.Conv2d(channels, outputs, 3, padding=1, bias=False))
            layers.append(NORMS[norm](outputs))
            layers.append(ACTIVATIONS[activation]())
        self.activation = layers.pop()  # It comes after the sum.
        self.layers = nn.Sequential(*layers)
        convolution = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.shortcut = nn.Sequential(convolution, NORMS[norm](outputs))
        self.pool = nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[m, inputs, height, width]` to `[m, outputs, height//2, width//2]`."""
        y: Tensor = self.pool(self.activation(self.layers(x) + self.shortcut(x)))
        return y


class ResNet12(nn.Module):
    """The few-shot ResNet-12 (Lee et al. 2019): four residual blocks, their mean, a linear layer.

    The mean over the last image makes the features, of which there are as many as channels. There
    is no dropout.

    Args:
        input_shape: `(channels, height, width)` of one image, of at least 16 × 16 pixels.
        outputs: As for `ConvNet`.
        filters: The number of channels of each of the four blocks, or one number for all, ≥ 1.
        activation: As for `ConvNet`.
        norm: As for `ConvNet`.

    Attributes:
        head_name: The name of the linear layer.

    Raises:
        ValueError: As for `ConvNet`.

    Example:
        >>> import torch
        >>> net = ResNet12((3, 32, 32), outputs=5, filters=(4, 8, 8, 16))
        >>> net(torch.zeros(2, 3, 32, 32)).shape, net.head.in_features
        (torch.Size([2, 5]), 16)
    """

    head_name = "head"

    def __init__(
        self,
        input_shape: Sequence[int],
        outputs: int | None,
        *,
        filters: int | Sequence[int] = (64, 160, 320, 640),
        activation: str = "leaky-relu",
        norm: str = "batch",
    ) -> None:
        super().__init__()
        _check_arguments(input_shape, outputs, blocks=4, activation=activation, norm=norm)
        if min(input_shape[1:]) < 2**4:
            raise ValueError(
                f"input_shape: got {tuple(input_shape)}, of which 4 poolings leave nothing, "
                "expected at least 16 pixels a side"
            )
        widths = [input_shape[0], *_channels_of_blocks(filters, blocks=4)]
        self.features = nn.Sequential(
            *(ResidualBlock(m, n, activation=activation, norm=norm) for m, n in pairwise(widths))
        )
        self.head = None if outputs is None else nn.Linear(widths[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[m, channels, height, width]` to outputs `[m, outputs]`."""
        features: Tensor = self.features(x).mean((-2, -1))
        return features if self.head is None else self.head(features)


class MLP(nn.Sequential):
    """Linear layers with ReLU between them. The default is the sinusoid network of MAML.

    Args:
        inputs: The size of one input, ≥ 1, or its shape. Inputs of several axes are flattened.
        outputs: The number of outputs for each input, ≥ 1. If None, the last hidden layer is the
            output, with its ReLU.
        hidden: The widths of the hidden layers, each ≥ 1. If empty, there is one linear layer.

    Attributes:
        head_name: The name of the layer of the outputs.

    Raises:
        ValueError: A width is less than 1.

    Example:
        >>> import torch
        >>> MLP(1, 2, hidden=(8,))(torch.zeros(3, 1)).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        inputs: int | Sequence[int],
        outputs: int | None,
        *,
        hidden: Sequence[int] = (40, 40),
    ) -> None:
        shape = (inputs,) if isinstance(inputs, int) else tuple(inputs)
        widths = [prod(shape), *hidden, *([] if outputs is None else [outputs])]
        if min(widths) < 1:
            raise ValueError(f"widths: got {widths}, expected each at least 1")
        layers: list[nn.Module] = [nn.Flatten()] if len(shape) > 1 else []
        for fan_in, fan_out in pairwise(widths):
            layers.append(nn.Linear(fan_in, fan_out))
            layers.append(nn.ReLU())
        if outputs is not None:
            layers.pop()  # There is no ReLU after the outputs.
        super().__init__(*layers)
        self.head_name = str(len(layers) if outputs is None else len(layers) - 1)


def _check_arguments(
    input_shape: Sequence[int],
    outputs: int | None,
    blocks: int,
    *,
    activation: str,
    norm: str,
) -> None:
    """Raise ValueError if an argument of a network for images is wrong."""
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise ValueError(
            f"input_shape: got {tuple(input_shape)}, expected (channels, height, width), each ≥ 1"
        )
    for name, number in {"outputs": outputs, "blocks": blocks}.items():
        if number is not None:
            check_count(name, number)
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation: got {activation!r}, expected one of {known}")
    if norm not in NORMS:
        raise ValueError(f"norm: got {norm!r}, expected one of {', '.join(NORMS)}")


def _channels_of_blocks(filters: int | Sequence[int], blocks: int) -> list[int]:
    """The number of channels of each block."""
    channels = list(filters) if isinstance(filters, Sequence) else [filters] * blocks
    if len(channels) != blocks:
        raise ValueError(
            f"filters: got {len(channels)} numbers, expected one for each of {blocks} blocks, or "
            "one for all"
        )
    for number in channels:
        check_count("filters", number)
    return channels
