"""What the modules of a learner keep between two calls: their buffers, and what is no state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

from torch import Tensor, nn

from metaimplicit.normalization import tracked_layers
from metaimplicit.tensors import put_back_dead


@contextmanager
def reject_changed_tensors(learner: nn.Module, *, but_tracked: bool = False) -> Iterator[None]:
    """Check that no buffer or learnt parameter of a model or its losses changes within the block.

    Args:
        learner: What holds them, under the names that errors call them.
        but_tracked: Whether the running statistics of normalisation layers may change.

    Raises:
        ValueError: At the end of the block, if one was replaced or written to in place. The message
            names it. It takes the place of a RuntimeError within the block, because a tensor that
            vmap has left in a buffer cannot be read.

    Example:
        >>> import torch
        >>> learner = nn.ModuleDict({"loss": nn.Module()})
        >>> learner["loss"].register_buffer("count", torch.zeros(()))
        >>> with reject_changed_tensors(learner):
        ...     learner["loss"].count.add_(1)
        Traceback (most recent call last):
        ...
        ValueError: loss: a forward pass changed buffer 'count', so each task would see the ones \
before it; switch the module that changes it to evaluation mode
    """
    # The tensors themselves are kept, because the address of one that is gone may be used again.
    before = {name: (x, _version(x)) for name, x in _named_tensors(learner)}
    failure: RuntimeError | None = None
    try:
        yield
    except RuntimeError as error:
        failure = error
    tracked = tracked_layers(learner) if but_tracked else {}
    for name, x in _named_tensors(learner):
        is_parameter = isinstance(x, nn.Parameter)
        if not is_parameter and name.rpartition(".")[0] in tracked:
            continue
        if is_parameter and not x.requires_grad:
            continue  # no part of φ
        # A tensor that did not exist before (of a lazy module) has not changed.
        old, version = before.get(name, (x, _version(x)))
        if x is not old or _version(x) != version:
            part, _, path = name.partition(".")
            if is_parameter:
                raise ValueError(
                    f"{part}: a forward pass wrote to the parameter {path!r}, as nn.Embedding does "
                    "with max_norm, so that φ has moved; leave out what writes to it"
                ) from failure
            raise ValueError(
                f"{part}: a forward pass changed buffer {path!r}, so each task would see the "
                "ones before it; switch the module that changes it to evaluation mode"
            ) from failure
    if failure is not None:
        raise failure


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(module.named_buffers(), module.named_parameters())


def _version(tensor: Tensor) -> int | None:
    """How often a tensor was written to. None for one that does not count, of inference mode."""
    return None if tensor.is_inference() else tensor._version


@contextmanager
def restored_attributes(learner: nn.Module) -> Iterator[None]:
    """Put back attributes and buffers of modules in which a pass under vmap has left a tensor.

    Such a tensor is dead after vmap: it can be neither read nor saved. Modules with hooks, as of
    `torch.nn.utils.prune`, leave their weights, and others what they want to show.

    Args:
        learner: What holds the modules.

    Example:
        >>> import torch
        >>> layer = nn.Identity()
        >>> _ = layer.register_forward_hook(lambda layer, _, y: setattr(layer, "last", y))
        >>> with restored_attributes(layer):
        ...     _ = torch.vmap(layer)(torch.ones(2))
        >>> hasattr(layer, "last")
        False
    """
    holders = [x for module in learner.modules() for x in (vars(module), vars(module)["_buffers"])]
    before = [(holder, dict(holder)) for holder in holders]
    try:
        yield
    finally:
        for present, attributes in before:
            put_back_dead(present, attributes)
