"""Outputs at which a loss is tried, which do not depend on the model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from metaimplicit.task_axis import map_tensors
from metaimplicit.tensors import is_transformed
from metaimplicit.tuning.example_losses import align

FREQUENCIES = (math.sqrt(2), math.sqrt(3), math.sqrt(5), math.sqrt(7))


class TrialOutputs:
    """Numbers between 0.2 and 0.8, shaped as the outputs, valid as scores and as probabilities.

    No two examples, classes or positions are alike, so that a loss shows what it does with each.
    They are z = ½ + 0.3 sin(Σ_d ω_d k_d) at the index (k₁, k₂, …), with ω = √2, √3, …

    Example:
        >>> TrialOutputs()(torch.zeros(2, 2, dtype=torch.float64), order=1)
        tensor([[0.5000, 0.7961],
                [0.7963, 0.4986]], dtype=torch.float64)
    """

    def __init__(self) -> None:
        self._kept: dict[Any, Tensor] = {}

    def __call__(self, outputs: Any, order: int, *, widen: bool = True) -> Any:
        """A pytree like the outputs.

        Args:
            outputs: What the model returned.
            order: 1; 2 for (1 − z)², in which the largest output is the smallest; 3 for
                1000 (z − ½), which is beyond any margin; or 4 for its negative.
            widen: Whether half precision becomes single precision.
        """

        def replace(z: Tensor) -> Tensor:
            if not z.is_floating_point():
                return z
            dtype = torch.promote_types(z.dtype, torch.float32) if widen else z.dtype
            return self._waves(z, dtype, order)

        return map_tensors(replace, outputs)

    def _waves(self, like: Tensor, dtype: torch.dtype, order: int) -> Tensor:
        key = (like.shape, dtype, like.device, order)
        if key in self._kept:
            return self._kept[key]
        phase = torch.zeros((), dtype=dtype, device=like.device)
        for axis, size in enumerate(like.shape):
            steps = torch.arange(size, dtype=dtype, device=like.device)
            frequency = FREQUENCIES[axis % len(FREQUENCIES)]
            phase = phase + align(frequency * steps, like.dim() - axis)
        waves = 0.5 + 0.3 * phase.sin()
        if order == 2:
            waves = (1 - waves).square()
        elif order in (3, 4):
            waves = 1000 * (waves - 0.5) * (1 if order == 3 else -1)
        if len(self._kept) >= 16:
            self._kept.clear()
        # Large tensors are made again, and those of a transform must not outlive it.
        if waves.numel() <= 2**16 and not is_transformed(waves):
            self._kept[key] = waves
        return waves


def of_one_task(tree: Any) -> Any:
    """The first entry along every axis that vmap hides, without any transform.

    Example:
        >>> torch.vmap(lambda x: of_one_task(x).sum() + 0 * x)(torch.tensor([1.0, 2.0]))
        tensor([1., 1.])
    """

    def plain(x: Tensor) -> Tensor:
        while is_transformed(x):
            axis = torch._C._functorch.maybe_get_bdim(x)
            x = torch._C._functorch.get_unwrapped(x)
            x = x if axis < 0 else x.select(axis, 0)
        primal: Tensor = forward_ad.unpack_dual(x).primal
        return primal

    return map_tensors(plain, tree)
