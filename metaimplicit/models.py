"""The networks of the few-shot literature, ready to be adapted: no buffers, no state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "softplus": partial(nn.Softplus, beta=20.0),
    "gelu": nn.GELU,
}


class BatchNorm(nn.Module):
    """y = γ (x − mean x)/√(var x + ε) + β per channel, over the set it is given: inputs `[m, channels, height, width]`.

    Equal to `nn.BatchNorm2d(channels, eps, track_running_stats=False)`. It is transductive: on a query set each
    prediction depends on the other queries, as in MAML's published numbers. Written out in plain operations because
    their double backward under vmap is about a quarter faster than the fused kernel's.

    Args:
        channels: the size of dimension 1.
        eps: ε > 0.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean((0, 2, 3), keepdim=True)
        variance = centred.square().mean((0, 2, 3), keepdim=True)
        scale = torch.rsqrt(variance + self.eps) * self.weight[:, None, None]
        return centred * scale + self.bias[:, None, None]


class ConvNet(nn.Module):
    """The few-shot conv net (Vinyals et al. 2016): blocks of 3×3 convolution, `BatchNorm`, activation; a linear layer.

    Transductive, through `BatchNorm`.

    Args:
        input_shape: `(channels, height, width)` of one image.
        outputs: numbers out for each image: the ways.
        filters: channels of every block.
        blocks: how many, ≥ 1; each halves the image.
        strided: halve by convolutions of stride 2, faster; else by 2×2 max-pooling.
        activation: "relu", as published; "gelu" or "softplus", log(1 + e^{20x})/20, whose minima lie on no kinks.

    Raises:
        ValueError: an input that is not an image, or too small for the blocks; an unknown activation.
    """

    def __init__(
        self,
        input_shape: Sequence[int],
        outputs: int,
        *,
        filters: int = 64,
        blocks: int = 4,
        strided: bool = True,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if len(input_shape) != 3:
            raise ValueError(
                f"input_shape: got {tuple(input_shape)}, expected (channels, height, width)"
            )
        for name, number in {"outputs": outputs, "filters": filters, "blocks": blocks}.items():
            if number < 1:
                raise ValueError(f"{name}: got {number}, expected at least 1")
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)}"
            )
        channels, height, width = input_shape
        layers: list[nn.Module] = []
        for _ in range(blocks):
            layers += [
                nn.Conv2d(channels, filters, 3, stride=2 if strided else 1, padding=1),
                BatchNorm(filters),
                ACTIVATIONS[activation](),
            ]
            if not strided:
                layers.append(nn.MaxPool2d(2))
            height, width = (
                ((height + 1) // 2, (width + 1) // 2) if strided else (height // 2, width // 2)
            )
            channels = filters
        if min(height, width) < 1:
            raise ValueError(
                f"input_shape: got {tuple(input_shape)}, which {blocks} poolings leave nothing of, expected at least "
                f"{2**blocks} pixels a side; use fewer blocks or strided=True"
            )
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(channels * height * width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Images `[m, channels, height, width]` to `[m, outputs]`."""
        logits: Tensor = self.head(self.features(x).flatten(1))
        return logits


class MLP(nn.Sequential):
    """Linear layers with ReLU between them, `[m, inputs]` to `[m, outputs]`; 40-40 is MAML's sinusoid network.

    Args:
        inputs, outputs: widths at the ends, ≥ 1.
        hidden: widths between.
    """

    def __init__(self, inputs: int, outputs: int, *, hidden: Sequence[int] = (40, 40)) -> None:
        widths = [inputs, *hidden, outputs]
        if min(widths) < 1:
            raise ValueError(f"widths: got {widths}, expected each at least 1")
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(*layers[:-1])


def is_transductive(model: nn.Module) -> bool:
    """Whether predictions on a set depend on the whole set: batch-norm on the batch's own statistics."""
    return any(
        isinstance(m, BatchNorm)
        or (isinstance(m, nn.modules.batchnorm._BatchNorm) and not m.track_running_stats)
        for m in model.modules()
    )


def check_norms(model: nn.Module) -> None:
    """ValueError for a normalisation that updates running statistics in its forward pass."""
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.modules.batchnorm._NormBase)
            and module.training
            and module.track_running_stats
        ):
            raise ValueError(
                f"model: {name!r} ({type(module).__name__}) tracks running statistics, which adaptation would mix "
                "between tasks and iterates; build it with track_running_stats=False, use GroupNorm, or call "
                "model.eval()"
            )
