"""The layers of a model that have Kronecker factors, and what a forward pass records of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from metaimplicit.graph import find_leaves
from metaimplicit.operators.curvature import all_at_once
from metaimplicit.operators.layers import is_supported, layer_patches, reject_reads_outside
from metaimplicit.params import Params

ADVICE = "use optim.GaussNewton, or freeze it (requires_grad_(False))"


@dataclass(frozen=True)
class FactoredLayer:
    """A layer whose block of the Fisher matrix is G ⊗ A.

    Attributes:
        module: The layer.
        weight: The name of its weight in the model.
        bias: The name of its bias, if it has one that requires grad.
    """

    module: nn.Linear | nn.Conv2d
    weight: str
    bias: str | None


def find_factored_layers(
    model: nn.Module, trainable: Mapping[str, Tensor], *, others: str
) -> dict[str, FactoredLayer]:
    """The layers of a model that have Kronecker factors, by name.

    Args:
        model: The model.
        trainable: Its parameters that require grad, by name.
        others: What happens if a parameter is in no such layer. With `"raise"` that is an error,
            with `"gradient"` it is left out.

    Raises:
        ValueError: Two layers share a parameter, there is no layer with factors, or a parameter is
            in no such layer and `others` is `"raise"`.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1, bias=False))
        >>> layers = find_factored_layers(model, dict(model.named_parameters()), others="raise")
        >>> [(layer.weight, layer.bias) for layer in layers.values()]
        [('0.weight', '0.bias'), ('2.weight', None)]
    """
    layers: dict[str, FactoredLayer] = {}
    paths: dict[int, str] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        keys = [key for key, p in module.named_parameters(recurse=False) if p.requires_grad]
        if not keys:
            continue
        for key in keys:
            path = f"{prefix}{key}"
            first_path = paths.setdefault(id(module.get_parameter(key)), path)
            if first_path != path:
                raise ValueError(
                    f"KFAC: {first_path!r} and {path!r} are one parameter of two layers; {ADVICE}"
                )
        objection = _objection(module, keys)
        if objection and others == "raise":
            raise ValueError(
                f"KFAC: layer {name!r} ({type(module).__name__}): {objection}; {ADVICE}, or give "
                "it the plain gradient with others='gradient'"
            )
        if not objection and isinstance(module, (nn.Linear, nn.Conv2d)):
            bias = f"{prefix}bias" if f"{prefix}bias" in trainable else None
            layers[name] = FactoredLayer(module, f"{prefix}weight", bias)
    if not layers:
        raise ValueError(
            f"KFAC model: got no linear or 2-d convolutional layer that requires grad; {ADVICE}"
        )
    return layers


def _objection(module: nn.Module, keys: list[str]) -> str:
    """Why a layer with these parameters has no factors, or nothing if it has some."""
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return (
            "a recurrent layer uses its weights at every time step, so its block of F is no G ⊗ A"
        )
    if not isinstance(module, (nn.Linear, nn.Conv2d)):
        return "only linear and 2-d convolutional layers have a block G ⊗ A here"
    if not is_supported(module):
        return (
            "it is grouped, or its padding is not a number of zeros, "
            "or its class defines another forward"
        )
    unknown = sorted(set(keys) - {"weight", "bias"})
    if unknown:
        return f"{unknown[0]!r} is neither the weight nor the bias of such a layer"
    if "weight" not in keys:
        return f"{keys[0]!r} requires grad without a weight that does"
    return ""


@dataclass(frozen=True)
class LayerRecording:
    """What a forward pass leaves for the factors; `record` is the callback of `record_layers`.

    Attributes:
        inputs: The input of each layer, `{layer: [m, …]}`.
        shapes: The shape of each layer's output.
        input_edges: Where the inputs of layers stand in the graph.
        edges: Where each layer's output stands in the graph. An edge serves where the tensor would
            not, because an activation may change that in place.
    """

    inputs: Params = field(default_factory=dict)
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    input_edges: list[GradientEdge] = field(default_factory=list)
    edges: dict[str, GradientEdge] = field(default_factory=dict)

    def record(self, name: str, layer_input: Tensor, output: Tensor) -> None:
        """Note the input and the output of the layer `name`."""
        self.inputs[name] = layer_input.detach()
        self.shapes[name] = output.shape
        if layer_input.requires_grad:
            self.input_edges.append(get_gradient_edge(layer_input))
        if output.requires_grad:
            # Where an activation changes a view in place, its own edge leaves the graph.
            whole = output if output._base is None else output._base
            self.edges[name] = get_gradient_edge(whole)

    def reject_reads_outside(
        self, outputs: Tensor, layers: Mapping[str, FactoredLayer], trainable: Mapping[str, Tensor]
    ) -> None:
        """Raise ValueError if the model reads a parameter of a layer outside of it, too."""
        names = {layer.weight for layer in layers.values()}
        names |= {layer.bias for layer in layers.values() if layer.bias is not None}
        starts = [get_gradient_edge(outputs), *self.input_edges]
        own = {name: trainable[name] for name in names}
        reject_reads_outside(find_leaves(starts, own, ends=self.edges.values()), ADVICE)

    def output_gradients(self, outputs: Tensor, scores: Tensor) -> dict[str, Tensor]:
        """The gradients of sᵀ outputs in each layer's output, for each s of `scores`.

        Args:
            outputs: The model's outputs, with their graph, which is retained.
            scores: `[count, *outputs.shape]`.

        Returns:
            `{layer: [count, m, …]}`.

        Raises:
            ValueError: The outputs do not depend on a layer.
        """
        pull_back = partial(
            torch.autograd.grad,
            [outputs],
            list(self.edges.values()),
            retain_graph=True,
            allow_unused=True,
        )
        is_batched = len(scores) > 1
        gradients = all_at_once(pull_back, [scores]) if is_batched else pull_back([scores[0]])
        output_gradients = {}
        for name, gradient in zip(self.edges, gradients, strict=True):
            if gradient is not None:
                output_gradients[name] = gradient.reshape(len(scores), *self.shapes[name])
        unused = [name for name in self.inputs if name not in output_gradients]
        if unused:
            raise ValueError(f"KFAC: the outputs do not depend on layer {unused[0]!r}; {ADVICE}")
        return output_gradients

    def mixes_positions(
        self, outputs: Tensor, layers: Mapping[str, FactoredLayer], axis: int
    ) -> bool:
        """Whether a row of a layer reaches several positions among an example's outputs.

        If it reaches one alone, the gradient g of sᵀ outputs in this row is c g when s at that
        position becomes c s, whatever factor c others have.

        Args:
            outputs: The model's outputs z, `[m, …]`, with their graph, which is retained.
            layers: The layers by name.
            axis: That of z at a position, counted from the end.
        """
        z = outputs.detach().movedim(axis, -1)  # [m, *positions, d]
        if z[0].numel() == z.shape[-1]:
            return False
        generator = torch.Generator().manual_seed(0)
        s, factors = torch.randn(2, *z.shape, generator=generator, device="cpu").to(z)
        factors = factors[..., :1]  # one for each position
        gradients = self.output_gradients(outputs, torch.stack([s, factors * s]).movedim(-1, axis))
        known = factors.flatten().double().sort().values
        roundoff = torch.finfo(z.dtype).eps ** 0.5
        for name, layer in layers.items():
            x = self.inputs[name].unsqueeze(0)
            g = gradients[name].unsqueeze(1)  # a task axis
            _, (first, second) = layer_patches(layer.module, x, g, bias=False)
            first = first.flatten(0, -2).double()
            second = second.flatten(0, -2).double()
            size = first.norm(dim=-1)
            # In small rows, round-off is a larger part.
            is_large = size >= 0.1 * size.max()
            # The factor c of each row. If a row mixes positions, it is none of theirs.
            c = (first / size.unsqueeze(-1) * (second / size.unsqueeze(-1))).sum(-1)
            above = torch.searchsorted(known, c).clamp(max=len(known) - 1)
            nearest = torch.minimum((known[above] - c).abs(), (known[above - 1] - c).abs())
            if bool((is_large & (nearest > roundoff)).any()):
                return True
        return False
