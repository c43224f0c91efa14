"""The inputs and output gradients of layers, which Kronecker factors consist of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metaimplicit.params import Params

Layers = dict[str, nn.Linear | nn.Conv2d]  # by name
Call = Callable[[Params], Tensor]  # the outputs of one task's model
Lift = Callable[[Callable[[Call, Params], Any], Params], Any]  # a function over the task axis

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


@dataclass(frozen=True)
class ProbedPass:
    """A forward pass in which a zero, the probe, was added to the output of each layer.

    The gradient in a probe is the gradient in the layer's output.

    Attributes:
        outputs: The model's outputs, `[tasks, …]`, with the graph to the probes.
        inputs: Each layer's input, `{layer: [tasks, m, …]}`, without a graph.
        probes: `{layer: [tasks, m, …]}`.
    """

    outputs: Tensor
    inputs: Params
    probes: Params

    def output_gradients(self, scores: Tensor) -> Params:
        """The gradients of sᵀ outputs in each layer's output, for each s of `scores`.

        Args:
            scores: `[count, *outputs.shape]`.

        Returns:
            `{layer: [count, tasks, m, …]}`.
        """
        probes = list(self.probes.values())
        gradients = torch.autograd.grad(self.outputs, probes, scores, is_grads_batched=True)
        return dict(zip(self.probes, gradients, strict=True))


def record_with_probes(
    layers: Layers,
    lift: Lift,
    params: Params,
    *,
    advice: str,
) -> ProbedPass:
    """Run a model with a probe at the output of each layer. It runs twice, first for the shapes.

    Args:
        layers: The layers by name. The model calls each of them exactly once.
        lift: Runs a function of one task over the task axis: `(function, params)`, where
            `function(call, params)` receives the model as `call(params) -> outputs`.
        params: The point θ, `{name: [tasks, *shape]}`.
        advice: What to do, the end of an error's message.

    Raises:
        ValueError: A layer is called twice, or not at all.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> x = torch.ones(1, 3, 2)  # one task, three examples
        >>> def lift(function, params):
        ...     return function(lambda p: torch.func.functional_call(model, p, (x,)), params)
        >>> weight = {"weight": torch.ones(1, 2)}
        >>> recording = record_with_probes({"": model}, lift, weight, advice="freeze it")
        >>> recording.output_gradients(torch.ones(1, 1, 3, 1))[""].shape
        torch.Size([1, 1, 3, 1])
    """

    def layer_outputs(call: Call, own: Params) -> Params:
        outputs: Params = {}

        def record(name: str, _: Tensor, output: Tensor) -> None:
            outputs[name] = output

        record_layers(layers, lambda: call(own), record, advice=advice)
        return outputs

    def outputs_and_inputs(
        call: Call,
        both: Params,
    ) -> tuple[Tensor, Params]:
        inputs: Params = {}

        def record(
            name: str,
            layer_input: Tensor,
            output: Tensor,
        ) -> Tensor:
            inputs[name] = layer_input
            return output + both[f"probe {name}"]

        own = {name: both[name] for name in params}
        return record_layers(layers, lambda: call(own), record, advice=advice), inputs

    with torch.no_grad():
        shapes = lift(layer_outputs, params)
    probes = {name: torch.zeros_like(out).requires_grad_() for name, out in shapes.items()}
    with torch.enable_grad():
        both = params | {f"probe {name}": probe for name, probe in probes.items()}
        outputs, inputs = lift(outputs_and_inputs, both)
    return ProbedPass(outputs, {name: x.detach() for name, x in inputs.items()}, probes)


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


def second_moments(
    a: Tensor,
    g: Tensor,
    examples: int,
) -> tuple[Tensor, Tensor]:
    """The Kronecker factors A = E[ā āᵀ] and G = Σ g gᵀ/examples of a layer.

    Args:
        a: ā, `[tasks, m, R, in (+ 1)]`. The mean is over m and R.
        g: Output gradients, `[count, tasks, m, R, out]`. The sum is over all axes but the tasks'.
        examples: The number of examples.

    Returns:
        A `[tasks, in (+ 1), in (+ 1)]` and G `[tasks, out, out]`.

    Example:
        >>> A, G = second_moments(torch.ones(1, 4, 1, 2), torch.ones(1, 1, 4, 1, 1), examples=4)
        >>> A.tolist(), G.tolist()
        ([[[1.0, 1.0], [1.0, 1.0]]], [[[1.0]]])
    """
    inputs = a.flatten(1, 2)
    gradients = g.transpose(0, 1).flatten(1, 3)
    return inputs.mT @ inputs / inputs.shape[1], gradients.mT @ gradients / examples
