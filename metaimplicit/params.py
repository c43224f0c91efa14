"""Parameter dicts ↔ flat task-batched vectors, and choosing by name which parameters adapt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor

Params = dict[str, Tensor]
Adapt = Callable[[str], bool] | str | Iterable[str] | None


def flatten(params: Mapping[str, Tensor], batch: int = 1) -> Tensor:
    """One vector per task: `{name: [tasks, *shape]} -> [tasks, n]`, tensors in the dict's order.

    `batch` leading axes are kept (2 for `[k, tasks, *shape] -> [k, tasks, n]`).
    """
    return torch.cat(
        [p.flatten(batch) if p.dim() > batch else p.unsqueeze(-1) for p in params.values()], dim=-1
    )


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> Params:
    """The inverse of `flatten`: `[..., tasks, n] -> {name: [..., tasks, *shape]}` with the shapes of `like`."""
    batch = vector.shape[:-1]
    parts = torch.split(vector, [p[0].numel() for p in like.values()], dim=-1)
    return {
        name: part.reshape(*batch, *p.shape[1:])
        for part, (name, p) in zip(parts, like.items(), strict=True)
    }


def leaves(tensors: Mapping[str, Tensor]) -> Params:
    """The same values as fresh leaves of autograd that require gradients."""
    return {name: t.detach().requires_grad_() for name, t in tensors.items()}


def select(names: Iterable[str], adapt: Adapt) -> list[str]:
    """The names that `adapt` chooses: a predicate, a glob pattern or several (`"head.*"`), or None for all of them.

    Raises:
        ValueError: a pattern, or the predicate, matches no parameter.
    """
    names = list(names)
    if adapt is None:
        return names
    if callable(adapt):
        chosen = [name for name in names if adapt(name)]
        unmatched = [] if chosen else ["the predicate"]
    else:
        patterns = [adapt] if isinstance(adapt, str) else list(adapt)
        chosen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
        unmatched = (
            [p for p in patterns if not any(fnmatchcase(name, p) for name in names)]
            if patterns
            else ["[]"]
        )
    if unmatched:
        raise ValueError(
            f"adapt: {unmatched[0]!r} matches no parameter that requires grad; there are {names}"
        )
    return chosen
