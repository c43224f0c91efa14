"""What the losses need of φ and the data apart from θ, evaluated once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metaimplicit.data import DataEntries
from metaimplicit.graph import find_dependencies
from metaimplicit.mended import without_fast_path
from metaimplicit.methods import Gradients
from metaimplicit.methods.base import vector_jacobian_product
from metaimplicit.params import Params, leaves
from metaimplicit.problem import BilevelProblem, Stream
from metaimplicit.recomputation import mended_recomputation


@dataclass(frozen=True)
class Features:
    """c = features(φ, data), with its graph to φ and to the tensors of the data that require grad.

    The rest of the problem is solved at constant c, whose gradient then goes back by one backward
    pass. Without `features`, c is the data.

    Attributes:
        values: c, a pytree.
        sources: φ and the tensors of the data that require grad, leaves of autograd.
        entries: The latter, as entries of φ.
        function: What computed c. None if c is the data.

    Example:
        >>> problem = BilevelProblem(
        ...     init=lambda meta, c: {"w": torch.zeros(())},
        ...     inner_loss=lambda params, meta, c: (params["w"] - c).square(),
        ...     outer_loss=lambda params, meta, c: params["w"],
        ...     features=lambda meta, data: meta["scale"] * data,
        ... )
        >>> meta = {"scale": torch.tensor(2.0, requires_grad=True)}
        >>> Features.evaluate(problem, meta, torch.tensor(3.0)).values
        tensor(6., grad_fn=<MulBackward0>)
    """

    values: Any
    sources: Params
    entries: DataEntries
    function: Any = None

    @classmethod
    def evaluate(cls, problem: BilevelProblem, meta: Params, data: Any) -> Features:
        """Evaluate the features of a problem.

        Args:
            problem: The problem.
            meta: φ, leaves of autograd.
            data: The data of all tasks.

        Raises:
            ValueError: There are features of a `Stream`, which has no data that stay.
        """
        entries = DataEntries(data)
        tensors = leaves(entries.tensors)
        values = entries.restore(tensors)
        if problem.features is not None:
            if isinstance(data, Stream):
                raise ValueError(
                    "features: got a Stream, expected data that do not change along the inner "
                    "loop; evaluate the features in the losses"
                )
            with torch.enable_grad(), mended_recomputation, without_fast_path:
                values = problem.features(meta, values)
        return cls(values, {**meta, **tensors}, entries, problem.features)

    def find_sources(self, parts: Params) -> dict[str, set[str]]:
        """The names of the sources that each of some tensors of c depends on.

        Raises:
            ValueError: It depends on a tensor that requires grad and is no source.
        """
        return {
            name: find_dependencies([c], self.sources, functions=[self.function])
            for name, c in parts.items()
        }

    def pull_back(self, parts: Params, gradients: Mapping[str, Tensor | None]) -> Gradients:
        """(∂c/∂φ)ᵀ w, by one backward pass.

        Args:
            parts: Tensors of c, by name.
            gradients: w, by the same names. None is zero.

        Returns:
            A gradient for each of the sources, or None where no path leads to it.
        """
        vectors = {name: gradients[name] for name in parts}
        known = {name: v for name, v in vectors.items() if v is not None}
        variable = {name: parts[name] for name in known}
        return vector_jacobian_product(variable, self.sources, known)
