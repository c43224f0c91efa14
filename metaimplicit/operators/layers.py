"""The inputs and output gradients of layers, which Kronecker factors consist of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layers = dict[str, nn.Linear | nn.Conv2d]  # by name

Result = TypeVar("Result")
Record = Callable[[str, Tensor, Tensor], Tensor | None]
Hook = Callable[[nn.Module, tuple[Tensor, ...], dict[str, Tensor], Tensor], Tensor | None]


def record_layers(
    layers: Mapping[str, nn.Module],
    function: Callable[[], Result],
    record: Record,
    advice: str,
) -> Result:
    """Call `function` while hooks show the input and the output of each layer to `record`.

    The hooks are removed when it returns or raises.

    Args:
        layers: The layers by name. `function` must call each of them exactly once.
        function: It calls the model.
        record: `(name, input, output)`, called for each layer. If it returns a tensor, that
            replaces the output.
        advice: What to do, the end of an error's message.

    Returns:
        The result of `function`.

    Raises:
        ValueError: A layer is called twice, or not at all.

    Example:
        >>> layer = nn.Identity()
        >>> seen = {}
        >>> def record(name, layer_input, output):
        ...     seen[name] = layer_input
        >>> record_layers({"body": layer}, lambda: layer(torch.ones(2)), record, "freeze it")
        tensor([1., 1.])
        >>> seen
        {'body': tensor([1., 1.])}
    """
    called: set[str] = set()

    def make_hook(name: str) -> Hook:
        def hook(
            _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], output: Tensor
        ) -> Tensor | None:
            if name in called:
                raise ValueError(f"KFAC: layer {name!r} is called twice, expected once; {advice}")
            called.add(name)
            layer_input = (*args, *kwargs.values())[0]
            return record(name, layer_input, output)

        return hook

    handles = [
        layer.register_forward_hook(make_hook(name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        result = function()
    finally:
        for handle in handles:
            handle.remove()
    missing = sorted(set(layers) - called)
    if missing:
        raise ValueError(f"KFAC: layer {missing[0]!r} adapts but is not called; {advice}")
    return result


def is_supported(layer: nn.Module) -> bool:
    """Whether a layer has a Kronecker-factored block.

    It has one if its forward pass is that of torch's `Linear` or `Conv2d`, without groups, and with
    a number of zeros as its padding.

    Example:
        >>> is_supported(nn.Linear(2, 3))
        True
        >>> is_supported(nn.Conv2d(4, 4, 3, groups=2))
        False
    """
    if type(layer).forward not in (nn.Linear.forward, nn.Conv2d.forward):
        return False
    if not isinstance(layer, nn.Conv2d):
        return True
    pads_zeros = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    return layer.groups == 1 and pads_zeros


def layer_patches(
    layer: nn.Linear | nn.Conv2d, inputs: Tensor, gradients: Tensor, bias: bool
) -> tuple[Tensor, Tensor]:
    """The inputs and output gradients of a layer at each of its R positions.

    A convolution has a position for each output pixel, and its input there is a patch. A linear
    layer has one position for each row of an example's input.

    Args:
        layer: A layer that `is_supported`.
        inputs: The layer's inputs, `[tasks, m, …]`.
        gradients: Gradients in its outputs, `[count, tasks, m, …]`.
        bias: Whether ā ends with a 1, which multiplies the bias.

    Returns:
        ā `[tasks, m, R, in (+ 1)]` and g `[count, tasks, m, R, out]`.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> a, g = layer_patches(layer, torch.ones(1, 4, 2), torch.ones(1, 1, 4, 3), bias=True)
        >>> a.shape, g.shape
        (torch.Size([1, 4, 1, 3]), torch.Size([1, 1, 4, 1, 3]))
    """
    tasks, m = inputs.shape[:2]
    if isinstance(layer, nn.Conv2d):
        padding: Any = layer.padding
        patches = F.unfold(
            inputs.flatten(0, 1),
            kernel_size=layer.kernel_size,
            dilation=layer.dilation,
            padding=padding,
            stride=layer.stride,
        )
        a = patches.mT.reshape(tasks, m, patches.shape[-1], -1)
        g = gradients.flatten(4).mT
    else:
        a = inputs.reshape(tasks, m, -1, inputs.shape[-1])
        g = gradients.reshape(*gradients.shape[:3], -1, layer.out_features)
    if bias:
        a = torch.cat([a, torch.ones_like(a[..., :1])], dim=-1)
    return a, g


def row_weights(weights: Tensor, a: Tensor) -> Tensor:
    """The weight of each row of ā in A = E[ā āᵀ], which is that of its example. Their sum is 1.

    Args:
        weights: The weights of the examples, `[tasks, m, …]`, ≥ 0, of sum 1 for each task. Further
            axes are those of the positions in an example, such as the tokens of a sequence.
        a: ā of a layer, `[tasks, m, R, in (+ 1)]`. The R positions share out those of `weights`.

    Returns:
        `[tasks, m, R]`. If the layer sees another number of examples than the loss does, as a layer
        that runs on pairs, every row weighs the same.

    Example:
        >>> row_weights(torch.tensor([[0.25, 0.75]]), torch.ones(1, 2, 2, 5)).tolist()
        [[[0.125, 0.125], [0.375, 0.375]]]
    """
    tasks, m, positions, _ = a.shape
    if weights.shape[1] == m:
        by_position = weights.reshape(tasks, m, -1)
        count = by_position.shape[2]
        if count == positions:
            return by_position
        return F.adaptive_avg_pool1d(by_position, positions) * (count / positions)
    if weights[0].numel() == m * positions:
        return weights.reshape(tasks, m, positions)
    return torch.full_like(a[..., 0], 1 / (m * positions))


def second_moments(a: Tensor, g: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The Kronecker factors A = Σ ω ā āᵀ and G = Σ g gᵀ of a layer.

    Args:
        a: ā, `[tasks, m, R, in (+ 1)]`.
        g: Output gradients, `[count, tasks, m, R, out]`, of scores that contain the weights of the
            examples. The sum is over all axes but the tasks'.
        weights: Those of the examples, `[tasks, m, …]`, of sum 1; ω are their `row_weights`.

    Returns:
        A `[tasks, in (+ 1), in (+ 1)]` and G `[tasks, out, out]`.

    Example:
        >>> a, g = torch.ones(1, 4, 1, 2), torch.full((1, 1, 4, 1, 1), 0.5)
        >>> A, G = second_moments(a, g, weights=torch.full((1, 4), 0.25))
        >>> A.tolist(), G.tolist()
        ([[[1.0, 1.0], [1.0, 1.0]]], [[[1.0]]])
    """
    weighted = row_weights(weights, a).unsqueeze(-1) * a
    gradients = g.transpose(0, 1).flatten(1, 3)
    return weighted.flatten(1, 2).mT @ a.flatten(1, 2), gradients.mT @ gradients
