"""The inputs and output gradients of layers, which Kronecker factors consist of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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

    # These hooks go first, because those of the user may change the output.
    handles = [
        layer.register_forward_hook(make_hook(name), with_kwargs=True, prepend=True)
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


def parameters_of(layers: Iterable[str]) -> set[str]:
    """The names that the weights and biases of layers have in the model.

    Example:
        >>> sorted(parameters_of(["head"]))
        ['head.bias', 'head.weight']
    """
    prefixes = [f"{name}." if name else "" for name in layers]
    return {f"{prefix}{own}" for prefix in prefixes for own in ("weight", "bias")}


def reject_reads_outside(names: Iterable[str], advice: str) -> None:
    """Raise ValueError if there is a parameter that the model reads outside of its layer, too.

    Example:
        >>> reject_reads_outside([], "freeze it")
    """
    for name in sorted(names):
        raise ValueError(
            f"KFAC: {name!r} is read outside of its layer, too, so its block of F is no G ⊗ A; "
            f"{advice}"
        )


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

    Raises:
        ValueError: The layer was called without an axis of examples.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> a, g = layer_patches(layer, torch.ones(1, 4, 2), torch.ones(1, 1, 4, 3), bias=True)
        >>> a.shape, g.shape
        (torch.Size([1, 4, 1, 3]), torch.Size([1, 1, 4, 1, 3]))
    """
    axes = 5 if isinstance(layer, nn.Conv2d) else 3
    if inputs.dim() < axes:
        raise ValueError(
            f"KFAC: got an input of shape {tuple(inputs.shape[1:])} to {layer}, expected a row for "
            "each example; expand it to the examples, or freeze the layer"
        )
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


def ordered_weights(weights: Tensor, probes: Tensor) -> Tensor:
    """The weight of each row of a layer, in the order in which the layer sees the examples.

    A layer may see its rows in another order than the loss, as one that has the sequence first. If
    row r reaches the outputs of example i alone, its gradients of √w s and of s have the ratio √wᵢ.
    If it reaches several, the ratio is a mean of their weights.

    Args:
        weights: The weights of the examples, `[tasks, m, …]`, of sum 1 for each task.
        probes: The gradients of s and √w s in the layer's outputs, `[2, tasks, m, R, out]`.

    Returns:
        `[tasks, m, R]`, of sum 1. In the order of the loss if that explains the ratios.

    Example:
        >>> probes = torch.tensor([1.0, 0.0]).sqrt() * torch.ones(1, 2)  # the second row first
        >>> probes = torch.stack([torch.ones(1, 2), probes]).reshape(2, 1, 2, 1, 1)
        >>> ordered_weights(torch.tensor([[0.0, 1.0]]), probes).flatten()
        tensor([1., 0.])
    """
    plain, weighted = probes.square().sum(-1)
    eps = torch.finfo(plain.dtype).eps
    is_reached = plain > eps * plain.amax((1, 2), keepdim=True)
    ratio = torch.where(is_reached, weighted / plain, 0.0)
    scale = ratio[0].numel() / weights[0].numel()  # the sum of the rows' weights
    roundoff = eps**0.5 * weights.flatten(1).amax(1).reshape(-1, 1, 1)

    def error(guess: Tensor) -> Tensor:
        return torch.where(is_reached, (ratio - scale * guess).abs(), 0.0)

    in_order = row_weights(weights, ratio.unsqueeze(-1))
    if bool((error(in_order) <= roundoff).all()):
        return in_order

    nearest = _nearest(weights.flatten(1), ratio.flatten(1)).reshape_as(ratio)
    if bool((error(nearest / scale) > roundoff).any()):
        # Rows reach several examples. The order is then the one that is closest to the ratios.
        guesses = [in_order]
        if weights.dim() == 3:
            guesses.append(row_weights(weights.mT, ratio.unsqueeze(-1)))
        guesses.append(torch.full_like(ratio, 1 / ratio[0].numel()))
        distances = [float((plain * error(guess).square()).sum()) for guess in guesses]
        best = distances.index(min(distances))
        if best < len(guesses) - 1:
            return guesses[best]

    # What the rows that nothing reaches share is the rest.
    missing = (scale - ratio.sum((1, 2), keepdim=True)).clamp(min=0)
    count = (~is_reached).sum((1, 2), keepdim=True).clamp(min=1)
    ratio = torch.where(is_reached, ratio, missing / count)
    return ratio / ratio.sum((1, 2), keepdim=True)


def _nearest(values: Tensor, x: Tensor) -> Tensor:
    """The nearest of the `values` of each task, `[tasks, n]` and `[tasks, k] -> [tasks, k]`."""
    values = values.sort(1).values
    above = torch.searchsorted(values, x.contiguous()).clamp(max=values.shape[1] - 1)
    below = (above - 1).clamp(min=0)
    upper = values.gather(1, above)
    lower = values.gather(1, below)
    return torch.where(upper - x < x - lower, upper, lower)


def second_moments(
    a: Tensor, g: Tensor, weights: Tensor, probes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The Kronecker factors A = Σ ω ā āᵀ and G = Σ g gᵀ of a layer.

    Args:
        a: ā, `[tasks, m, R, in (+ 1)]`.
        g: Output gradients, `[count, tasks, m, R, out]`, of scores that contain the weights of the
            examples. The sum is over all axes but the tasks'.
        weights: Those of the examples, `[tasks, m, …]`, of sum 1.
        probes: As in `ordered_weights`, which are ω then. If None, ω are the `row_weights`.

    Returns:
        A `[tasks, in (+ 1), in (+ 1)]` and G `[tasks, out, out]`.

    Example:
        >>> a, g = torch.ones(1, 4, 1, 2), torch.full((1, 1, 4, 1, 1), 0.5)
        >>> A, G = second_moments(a, g, weights=torch.full((1, 4), 0.25))
        >>> A.tolist(), G.tolist()
        ([[[1.0, 1.0], [1.0, 1.0]]], [[[1.0]]])
    """
    rows = row_weights(weights, a) if probes is None else ordered_weights(weights, probes)
    weighted = rows.unsqueeze(-1) * a
    gradients = g.transpose(0, 1).flatten(1, 3)
    return weighted.flatten(1, 2).mT @ a.flatten(1, 2), gradients.mT @ gradients
