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
        has_head: Whether a head is fitted to the support sets.

    Example:
        >>> def make_loss():
        ...     return torch.nn.functional.cross_entropy
        >>> checks = BatchChecks(lambda inputs: inputs, make_loss, make_loss, has_head=True)
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
        has_head: bool,
    ) -> None:
        self._support = TargetCheck(call, make_support_loss)
        self._query = TargetCheck(call, make_query_loss)
        self._make_query_loss = make_query_loss
        self._has_head = has_head
        self._by_outputs: dict[int, TargetCheck] = {}

    def check_support(self, name: str, pair: Pair) -> None:
        """Check a batch of support sets, called `name` in errors.

        Raises:
            ValueError: As `TargetCheck`, or a head cannot be fitted to the targets.
        """
        if not self._has_head:
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
        if self._has_head:
            check = self._check_of(count_outputs(data.support.targets))
        return check("episodes.query", data.query)

    def _check_of(self, outputs: int) -> TargetCheck:
        """The check of query sets for a head with this number of outputs."""
        if outputs not in self._by_outputs:
            call = partial(_zeros, outputs=outputs)
            self._by_outputs[outputs] = TargetCheck(call, self._make_query_loss)
        return self._by_outputs[outputs]


def _zeros(inputs: Any, *, outputs: int) -> Tensor:
    """Zeros in the place of a head's outputs for the inputs of a task."""
    first = tree_leaves(inputs)[0]
    return torch.zeros(len(first), outputs, device=first.device)
