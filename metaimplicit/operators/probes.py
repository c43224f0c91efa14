"""The gradients in the outputs of a model's layers, over the task axis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from metaimplicit.graph import find_dependencies
from metaimplicit.operators.curvature import all_at_once
from metaimplicit.operators.layers import (
    Layers,
    parameters_of,
    record_layers,
    reject_reads_outside,
)
from metaimplicit.operators.output_loss import Checked
from metaimplicit.params import Params

Call = Callable[[Params], Tensor]  # the outputs of one task's model
Lift = Callable[[Callable[[Call, Params], Any], Params], Any]  # a function over the task axis


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
        pull_back = partial(
            torch.autograd.grad,
            [self.outputs],
            list(self.probes.values()),
            retain_graph=True,
        )
        gradients = all_at_once(pull_back, [scores])
        return {name: g for name, g in zip(self.probes, gradients, strict=True) if g is not None}


def record_with_probes(
    layers: Layers,
    lift: Lift,
    params: Params,
    *,
    advice: str,
    checked: Checked,
) -> ProbedPass:
    """Run a model with a probe at the output of each layer.

    It runs once more before, for the shapes of the probes, if these are not known. If the batch has
    another size than the last one, a run with probes of the old shapes is given up first.

    Args:
        layers: The layers by name. The model calls each of them exactly once.
        lift: Runs a function of one task over the task axis: `(function, params)`, where
            `function(call, params)` receives the model as `call(params) -> outputs`.
        params: The point θ, `{name: [tasks, *shape]}`.
        advice: What to do, the end of an error's message.
        checked: Where the shapes are kept for the next call.

    Raises:
        ValueError: A layer is called twice, or not at all. A parameter of a layer is read outside
            of it, too.

    Example:
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.ones(1, 3, 2)  # one task, three examples
        >>> def lift(function, params):
        ...     return function(lambda p: torch.func.functional_call(model, p, (x,)), params)
        >>> weight = {"weight": torch.ones(1, 2)}
        >>> recording = record_with_probes({"": model}, lift, weight, advice="", checked={})
        >>> recording.output_gradients(torch.ones(1, 1, 3, 1))[""].shape
        torch.Size([1, 1, 3, 1])
    """

    def parts(call: Call, own: Params) -> tuple[Params, list[Tensor]]:
        """The layers' outputs, and what the model computes between the layers."""
        outputs: Params = {}
        between: list[Tensor] = []

        def record(name: str, layer_input: Tensor, output: Tensor) -> Tensor:
            outputs[name] = output.detach()
            between.append(layer_input)
            return outputs[name]

        between.append(record_layers(layers, lambda: call(own), record, advice=advice))
        return outputs, between

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
            probe = both[f"probe {name}"]
            if probe.shape != output.shape:
                raise _ShapeError
            return output + probe

        own = {name: both[name] for name in params}
        return record_layers(layers, lambda: call(own), record, advice=advice), inputs

    def run(shapes: dict[str, torch.Size]) -> ProbedPass:
        probes = {name: first.new_zeros(shape).requires_grad_() for name, shape in shapes.items()}
        with torch.enable_grad():
            both = params | {f"probe {name}": probe for name, probe in probes.items()}
            outputs, inputs = lift(outputs_and_inputs, both)
        return ProbedPass(outputs, {name: x.detach() for name, x in inputs.items()}, probes)

    first = next(iter(params.values()))
    key = ("layer outputs", len(first), tuple(layers))
    if key in checked:
        try:
            return run(checked[key])
        except _ShapeError:  # the batch differs in size from the one before
            pass
    with torch.enable_grad():
        own = {name: p.detach().requires_grad_() for name, p in params.items()}
        outputs, between = lift(parts, own)
    factored = {name: own[name] for name in parameters_of(layers) if name in own}
    reject_reads_outside(find_dependencies(between, factored), advice)
    checked[key] = {name: output.shape for name, output in outputs.items()}
    return run(checked[key])


class _ShapeError(Exception):
    """The outputs of the layers do not have the shapes that they had."""
