"""Dicts of parameters: as one vector for each task, as leaves of autograd, and chosen by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from functools import reduce

import torch
from torch import Tensor

Params = dict[str, Tensor]
Adapt = Callable[[str], bool] | str | Iterable[str] | None


def flatten(params: Mapping[str, Tensor], batch: int = 1) -> Tensor:
    """Concatenate parameters to one vector for each task, in the order of the dict.

    Args:
        params: `{name: [tasks, *shape]}`.
        batch: How many leading axes every tensor keeps. With 2, `{name: [k, tasks, *shape]}`
            becomes `[k, tasks, n]`.

    Returns:
        `[tasks, n]`, where n is the number of parameters of a task.

    Example:
        >>> flatten({"weight": torch.ones(1, 2, 2), "bias": torch.zeros(1)})
        tensor([[1., 1., 1., 1., 0.]])
    """
    parts = []
    for p in params.values():
        parts.append(p.flatten(batch) if p.dim() > batch else p.unsqueeze(-1))
    return torch.cat(parts, dim=-1)


def joint_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The type that tensors have as parts of one vector, as that of `flatten`.

    Example:
        >>> joint_dtype([torch.ones(2), torch.ones(1, dtype=torch.float64)])
        torch.float64
    """
    return reduce(torch.promote_types, (x.dtype for x in tensors))


def unflatten(vector: Tensor, like: Mapping[str, Tensor]) -> Params:
    """Split vectors into parameters: the inverse of `flatten`.

    Args:
        vector: `[..., tasks, n]`.
        like: `{name: [any, *shape]}`, which gives the names, their order and their shapes. The
            number of tasks is that of `vector`.

    Returns:
        `{name: [..., tasks, *shape]}`, views of `vector`, but copies of pairs of numbers, `[…, 2]`:
        `torch.view_as_complex` takes no view of them that begins anywhere.

    Example:
        >>> like = {"weight": torch.ones(1, 2, 2), "bias": torch.zeros(1)}
        >>> unflatten(torch.arange(5.0).unsqueeze(0), like)["bias"]
        tensor([4.])
    """
    batch = vector.shape[:-1]
    sizes = [p[0].numel() for p in like.values()]
    parts = torch.split(vector, sizes, dim=-1)
    params = {}
    for part, (name, p) in zip(parts, like.items(), strict=True):
        if p.dim() > 1 and p.shape[-1] == 2:
            part = part.clone(memory_format=torch.contiguous_format)
        params[name] = part.reshape(*batch, *p.shape[1:])
    return params


def detached(tensors: Mapping[str, Tensor]) -> Params:
    """The same values without a graph.

    Example:
        >>> detached({"w": torch.ones(2, requires_grad=True)})
        {'w': tensor([1., 1.])}
    """
    return {name: t.detach() for name, t in tensors.items()}


def leaves(tensors: Mapping[str, Tensor]) -> Params:
    """The same values, without a graph, as new leaves of autograd that require gradients.

    Example:
        >>> leaves({"w": torch.ones(2)})
        {'w': tensor([1., 1.], requires_grad=True)}
    """
    return {name: t.detach().requires_grad_() for name, t in tensors.items()}


def describe_misfit(params: Params, like: Params) -> str:
    """What differs in the names, types or shapes of two sets of parameters. Empty if nothing does.

    Example:
        >>> describe_misfit({"w": torch.ones(2)}, like={"w": torch.ones(3)})
        "got torch.float32 [2] for the parameter 'w', expected torch.float32 [3]"
    """
    for name in params | like:
        got, expected = (
            f"{p.dtype} {list(p.shape)}" if p is not None else "nothing"
            for p in (params.get(name), like.get(name))
        )
        if got != expected:
            return f"got {got} for the parameter {name!r}, expected {expected}"
    return ""


def floating_entry(tensors: Mapping[str, Tensor]) -> Tensor:
    """The first tensor of floating-point numbers, or else one of torch's default type.

    Example:
        >>> floating_entry({"count": torch.tensor(1), "w": torch.ones(1, dtype=torch.float64)})
        tensor([1.], dtype=torch.float64)
    """
    floating = (t for t in tensors.values() if t.is_floating_point())
    return next(floating, torch.zeros(()))


def select(names: Iterable[str], adapt: Adapt) -> list[str]:
    """The names that `adapt` chooses, in the order of `names`.

    Args:
        names: The names to choose from.
        adapt: A predicate of a name, or a glob pattern such as `"head.*"`, or several patterns.
            If None, all names are chosen.

    Raises:
        ValueError: A pattern matches no name, the predicate chooses none, or the list of patterns
            is empty.

    Example:
        >>> select(["body.weight", "head.weight", "head.bias"], "head.*")
        ['head.weight', 'head.bias']
    """
    names = list(names)
    if adapt is None:
        return names
    if callable(adapt):
        chosen = [name for name in names if adapt(name)]
        unmatched = [] if chosen else ["the predicate"]
    else:
        given = list(adapt) if isinstance(adapt, Iterable) else [adapt]
        patterns = [adapt] if isinstance(adapt, str) else given
        if not all(isinstance(p, str) for p in patterns):
            raise ValueError(
                f"adapt: got {adapt!r}, expected patterns of names, such as 'head.*', or a "
                f"predicate of a name; there are {names}"
            )
        matches = {p: [name for name in names if fnmatchcase(name, p)] for p in patterns}
        chosen = [name for name in names if any(name in m for m in matches.values())]
        unmatched = [p for p, matching in matches.items() if not matching]
        if not patterns:
            unmatched = ["[]"]
    if unmatched:
        raise ValueError(
            f"adapt: {unmatched[0]!r} matches no parameter that requires grad; there are {names}"
        )
    return chosen
