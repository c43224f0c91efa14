"""Calls of a model on the inputs of a batch, and the outputs of what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from metaimplicit.functional import functional_call
from metaimplicit.normalization import reject_running_statistics, tracked_layers
from metaimplicit.params import Params
from metaimplicit.tensors import recordable
from metaimplicit.tuning.batches import NamedInputs
from metaimplicit.unsupported import shorten


class ModelCall:
    """The model as a function of its parameters and of the inputs of a batch.

    Inputs are handed over in the first of these ways that the signature of `forward` allows: a
    mapping by the names of its entries, a tuple or list element by element, anything (also one of
    these) as one argument. Where a batch has one entry beside its targets, that entry is the one
    argument.

    Args:
        model: The model. Parameters that are not given are constants.

    Example:
        >>> model = nn.Bilinear(2, 2, 1, bias=False)
        >>> call = ModelCall(model)
        >>> params = {"weight": torch.eye(2).unsqueeze(0)}
        >>> x = torch.tensor([[1.0, 2.0]])
        >>> call(params, (x, x)), call(params, {"input1": x, "input2": x})
        (tensor([[5.]]), tensor([[5.]]))
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._signature = inspect.signature(model.forward)
        self._tracking = list(tracked_layers(model).values())

    def __call__(self, params: Params, inputs: Any) -> Any:
        """What the model returns.

        Raises:
            ValueError: The model takes other inputs, or inputs of another dtype, or a batch norm
                has come to track running statistics, as by `model.train()`.
        """
        if any(layer.training for layer in self._tracking):
            reject_running_statistics(self.model)
        frozen = {
            name: recordable(p.detach())
            for name, p in self.model.named_parameters()
            if name not in params
        }
        positional, by_name = self._arguments(inputs)
        try:
            return functional_call(
                self.model,
                {**frozen, **params},
                positional,
                by_name,
            )
        except TypeError as error:
            if by_name or self._takes(*positional):
                raise
            raise ValueError(
                f"batch: got {type(inputs).__name__} as the inputs of a model that takes "
                f"{list(self._signature.parameters)}; write several inputs as "
                "((first, second), targets), since a tuple of three is (inputs, targets, index)"
            ) from error
        except RuntimeError as error:
            of_model = {p.dtype for p in self.model.parameters()}
            of_inputs = {x.dtype for x in tree_leaves(inputs) if _is_float(x)}
            if not of_inputs or of_inputs & of_model:
                raise
            raise ValueError(
                f"batch: got inputs of {_names(of_inputs)} for a model of {_names(of_model)}, "
                f"which it refuses ({shorten(error)}); convert the inputs or the model"
            ) from error

    def _arguments(self, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The positional arguments and those by name."""
        if isinstance(inputs, Mapping):
            if self._takes(**inputs):
                return (), dict(inputs)
            if isinstance(inputs, NamedInputs):
                return (self._lone_entry(inputs),), {}
        elif isinstance(inputs, (tuple, list)) and len(inputs) > 1 and self._takes(*inputs):
            return tuple(inputs), {}
        return (inputs,), {}

    def _lone_entry(self, inputs: NamedInputs) -> Any:
        if len(inputs) == 1:
            return next(iter(inputs.values()))
        raise ValueError(
            f"batch: got the inputs {sorted(inputs)} for a model that takes "
            f"{list(self._signature.parameters)}, expected entries of these names; leave out what "
            "the model does not take, or write the batch as (inputs, targets)"
        )

    def _takes(self, *positional: Any, **by_name: Any) -> bool:
        parameters = self._signature.parameters.values()
        # `forward(*args)` says nothing about how many inputs the model has.
        if positional[1:] and any(p.kind is p.VAR_POSITIONAL for p in parameters):
            return False
        try:
            self._signature.bind(*positional, **by_name)
        except TypeError:
            return False
        return True


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _names(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype) for dtype in dtypes))


def output_tensor(outputs: Any) -> Tensor:
    """The tensor in what a model returns: its entry `logits`, or else its first entry.

    Raises:
        ValueError: That is not a tensor.

    Example:
        >>> output_tensor((torch.ones(2), "hidden states"))
        tensor([1., 1.])
        >>> output_tensor({"loss": None, "logits": torch.zeros(2)})
        tensor([0., 0.])
    """
    if isinstance(outputs, Tensor):
        return outputs
    entries: Mapping[Any, Any] = {}
    if isinstance(outputs, Mapping):
        entries = outputs
    elif is_dataclass(outputs) and not isinstance(outputs, type):
        entries = {field.name: getattr(outputs, field.name) for field in fields(outputs)}
    elif hasattr(outputs, "_asdict"):
        entries = outputs._asdict()
    elif isinstance(outputs, (tuple, list)):
        entries = dict(enumerate(outputs))
    first = next(iter(entries.values()), None)
    tensor = entries.get("logits", first)
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"model: got a call that returns {type(outputs).__name__}, expected a tensor, or a "
            "tuple, mapping or dataclass whose entry `logits` or first entry is one; wrap the model"
        )
    return tensor
