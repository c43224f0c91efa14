"""Checks of batches of tasks, with and without a head that is fitted to them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from metaimplicit.learner.checks import TargetCheck
from metaimplicit.learner.episodes import Episode, Pair, check_pair
from metaimplicit.learner.head_targets import check_every_class, count_outputs
from metaimplicit.learner.losses import TaskLoss
from metaimplicit.learner.targets import Classes


class BatchChecks:
    """Checks a batch of tasks against what the losses do with it.

    A head has as many outputs as the support sets of a batch have classes.

    Args:
        call: The model as it is, `inputs of one task -> outputs`.
        make_support_loss: Makes the loss of the support set as it is, on the CPU.
        make_query_loss: Likewise for the query set.
        read_support_loss: Returns the loss of the support set as it was given.
        read_query_loss: Likewise for the query set.
        head_type: Tells the type of the outputs of a head that is fitted to the support sets. If
            None, there is no head.

    Example:
        >>> def make_loss():
        ...     return torch.nn.functional.cross_entropy
        >>> def head_type():
        ...     return torch.float32
        >>> checks = BatchChecks(lambda x: x, make_loss, make_loss, head_type=head_type)
        >>> pair = Pair(torch.zeros(1, 2, 3), torch.tensor([[0, 1]]))
        >>> checks.check_episodes(Episode(pair, pair))
        Classes(leaf=0, axis=1, size=2, all_count=True)
    """

    def __init__(
        self,
        call: Callable[[Any], Tensor],
        make_support_loss: Callable[[], TaskLoss],
        make_query_loss: Callable[[], TaskLoss],
        *,
        read_support_loss: Callable[[], TaskLoss] | None = None,
        read_query_loss: Callable[[], TaskLoss] | None = None,
        head_type: Callable[[], torch.dtype] | None = None,
    ) -> None:
        self._support = TargetCheck(call, make_support_loss, read_support_loss)
        self._query = TargetCheck(call, make_query_loss, read_query_loss)
        self._make_query_loss = make_query_loss
        self._read_query_loss = read_query_loss
        self._head_type = head_type
        self._by_outputs: dict[tuple[int, torch.dtype], TargetCheck] = {}

    def check_support(self, name: str, pair: Pair) -> None:
        """Check a batch of support sets, called `name` in errors.

        Raises:
            ValueError: As `TargetCheck`, or a head cannot be fitted to the targets.
        """
        if self._head_type is None:
            self._support(name, pair)
            return
        check_pair(name, pair)
        count_outputs(pair.targets)
        check_every_class(name, pair.targets)

    def check_episodes(self, data: Episode) -> Classes | None:
        """Check a batch of tasks, and find where the loss of its query sets reads classes.

        Raises:
            ValueError: As `TargetCheck`, or a head cannot be fitted to the targets.
        """
        self.check_support("episodes.support", data.support)
        check = self._query
        if self._head_type is not None:
            outputs = count_outputs(data.support.targets)
            check = self._check_of(outputs, self._head_type())
        return check("episodes.query", data.query)

    def _check_of(self, outputs: int, dtype: torch.dtype) -> TargetCheck:
        """The check of query sets for a head with this number of outputs, of this type."""
        key = (outputs, dtype)
        if key not in self._by_outputs:
            call = partial(_zeros, outputs=outputs, dtype=dtype)
            self._by_outputs[key] = TargetCheck(call, self._make_query_loss, self._read_query_loss)
        return self._by_outputs[key]


def _zeros(inputs: Any, *, outputs: int, dtype: torch.dtype) -> Tensor:
    """Zeros in the place of a head's outputs for the inputs of a task."""
    first = tree_leaves(inputs)[0]
    return torch.zeros(len(first), outputs, dtype=dtype, device=first.device)
