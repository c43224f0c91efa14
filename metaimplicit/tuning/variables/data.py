"""Hyperparameters that make the training inputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaimplicit.params import Params
from metaimplicit.tensors import recordable
from metaimplicit.tuning.batches import Batch, NamedInputs, batch_entry
from metaimplicit.tuning.domains import Domain, Positive
from metaimplicit.tuning.variables.base import Variable, check_choice, example_index, prototype


@dataclass(frozen=True)
class Augmentation(Variable):
    """Random contrast, brightness and noise: xᵢ ↦ (1 + c u₂ᵢ)(xᵢ − x̄ᵢ) + x̄ᵢ + b u₁ᵢ + n εᵢ.

    u₁ᵢ, u₂ᵢ and the elements of εᵢ are standard normal, and x̄ᵢ is the mean of xᵢ. The draws depend
    on nothing but the batch's `"index"`, so that an inner loop can be replayed.

    Args:
        start: The value of each strength, b, c and n, to start from, > 0.
        kinds: Those of `"noise"`, `"brightness"` and `"contrast"` that are used. The strength of
            KIND is `meta["augmentation.KIND"]`.

    Raises:
        ValueError: A kind is unknown. On running: the inputs are integers, or the number of an
            example is negative.

    Example:
        >>> variable = Augmentation(kinds=("brightness",))
        >>> batch = {"inputs": torch.zeros(2, 3), "index": torch.tensor([7, 8])}
        >>> brighter = variable.inputs({"augmentation.brightness": torch.tensor(0.1)}, batch)
        >>> brighter.shape, bool((brighter[:, 0] == brighter[:, 1]).all())
        (torch.Size([2, 3]), True)
    """

    start: float = 0.1
    kinds: tuple[str, ...] = ("noise", "brightness", "contrast")

    def __post_init__(self) -> None:
        for kind in self.kinds:
            check_choice("kinds", kind, ("noise", "brightness", "contrast"))

    def meta(self, params: Params) -> Params:
        """A scalar `"augmentation.KIND"` for each kind."""
        like = prototype(params)
        return {f"augmentation.{kind}": like.new_tensor(self.start) for kind in self.kinds}

    def domains(self, names: Iterable[str]) -> dict[str, Domain]:
        """Positive numbers."""
        return dict.fromkeys(names, Positive())

    def inputs(self, meta: Params, batch: Batch) -> Any:
        """The augmented inputs, `[m, *shape]`, under their name if the batch has one for them.

        Raises:
            ValueError: The batch has no `"index"`, or a negative number there, or its inputs are
                not one tensor of real numbers.
        """
        inputs = batch_entry(batch, "inputs")
        index = example_index(self, batch)
        if isinstance(inputs, Tensor):
            return self._augment(inputs, meta, index)
        if isinstance(inputs, NamedInputs) and len(inputs) == 1:
            [(name, x)] = inputs.items()
            return NamedInputs({name: self._augment(x, meta, index)})
        raise ValueError(f"Augmentation: got {type(inputs).__name__} as inputs, expected a tensor")

    def _augment(self, x: Tensor, meta: Params, index: Tensor) -> Tensor:
        if not (x.is_floating_point() or x.is_complex()):
            raise ValueError(
                f"Augmentation: got inputs of {x.dtype}, expected real numbers, which normal draws "
                "can be added to; convert the inputs before, as by x.float() / 255"
            )
        numbers = _as_list(index.flatten())
        if min(numbers, default=0) < 0:
            raise ValueError(f"Augmentation: got the number {min(numbers)}, expected numbers ≥ 0")
        generator = np.random.default_rng(numbers)
        one_each = (len(x), *[1] * (x.dim() - 1))
        # All three are drawn, in this order, so that no kind depends on which others are used.
        shapes = {"brightness": one_each, "contrast": one_each, "noise": x.shape}
        draws = {kind: generator.standard_normal(shape) for kind, shape in shapes.items()}
        scaled = {
            kind: meta[f"augmentation.{kind}"] * torch.from_numpy(draws[kind]).to(x)
            for kind in self.kinds
        }
        if "contrast" in scaled:
            mean = x.unsqueeze(-1).flatten(1).mean(1).reshape(one_each)
            x = x + scaled["contrast"] * (x - mean)
        for kind in ("brightness", "noise"):
            if kind in scaled:
                x = x + scaled[kind]
        return x


def _as_list(index: Tensor) -> list[int]:
    try:
        numbers: list[int] = index.tolist()
    except RuntimeError:  # under torch.func, older versions read single numbers alone
        numbers = [int(i) for i in index]
    return numbers


@dataclass(frozen=True, eq=False)
class SyntheticData(Variable):
    """The training inputs themselves, `meta["synthetic"]`: dataset distillation (Wang et al. 2018).

    The training batch is not looked at.

    Args:
        data: The inputs to start from, `[n, *shape]`.
        labels: Their labels, `[n]`, on the model's device. They are constant.

    Raises:
        ValueError: One is no tensor, or there are not as many labels as inputs.

    Example:
        >>> distilled = SyntheticData(torch.zeros(2, 5), torch.tensor([0, 1]))
        >>> distilled.meta({"w": torch.ones(3)})["synthetic"].shape
        torch.Size([2, 5])
    """

    data: Tensor
    labels: Tensor

    makes_examples = True

    def __post_init__(self) -> None:
        for name, tensor in (("data", self.data), ("labels", self.labels)):
            if not isinstance(tensor, Tensor):
                raise ValueError(
                    f"SyntheticData {name}: got {type(tensor).__name__}, expected a tensor; "
                    "convert it by torch.as_tensor"
                )
            if not tensor.dim():
                raise ValueError(
                    f"SyntheticData {name}: got a tensor without axes, expected [n, …], with one "
                    "entry for each example"
                )
        if len(self.data) != len(self.labels):
            raise ValueError(
                f"SyntheticData labels: got {len(self.labels)}, expected {len(self.data)}, "
                "one for each input"
            )

    def meta(self, params: Params) -> Params:
        """`{"synthetic": [n, *shape]}`.

        Raises:
            ValueError: The labels are on another device than the model.
        """
        like = prototype(params)
        if self.labels.device != like.device:
            raise ValueError(
                f"SyntheticData labels: got them on {self.labels.device}, expected on {like.device}"
            )
        return {"synthetic": self.data.to(like)}

    def inputs(self, meta: Params, batch: Batch) -> Tensor:
        """The synthetic inputs, `[n, *shape]`."""
        return meta["synthetic"]

    def targets(self, batch: Batch) -> Tensor:
        """The labels, `[n]`."""
        labels: Tensor = recordable(self.labels)
        return labels
