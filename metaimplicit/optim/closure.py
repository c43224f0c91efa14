"""A closure that can be called again, as a function of the model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from metaimplicit.functional import functional_call
from metaimplicit.mended import mended_derivatives
from metaimplicit.random_state import RandomState
from metaimplicit.recomputation import mended_recomputation
from metaimplicit.unsupported import explain_unsupported

Closure = Callable[[], Any]

explain_torch_errors = explain_unsupported(
    "an optimiser of torch.optim, which needs first derivatives only"
)


class ReplayedClosure:
    """A closure as a function of the model's parameters. Every call repeats the first one.

    It is made just before the first call, which runs with the model's buffers and the global random
    generators, and leaves them as a forward pass does. Later calls run with the buffers and the
    random numbers of the time when it was made, and change neither. So dropout draws one mask for
    all evaluations of a step.

    Args:
        model: The model that the closure calls.
        closure: A function without arguments.
        device: The device of the parameters. Its random numbers are replayed beside the CPU's.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
        >>> replay = ReplayedClosure(model, lambda: model(torch.ones(1, 4)), torch.device("cpu"))
        >>> torch.equal(replay(), replay())  # one mask
        True
        >>> replay({"0.weight": torch.zeros(3, 4), "0.bias": torch.zeros(3)})
        tensor([[0., 0., 0.]])
    """

    def __init__(self, model: nn.Module, closure: Closure, device: torch.device) -> None:
        self._module = _ClosureModule(model, closure)
        self._device = device
        self._was_called = False
        self._buffers = {f"model.{name}": b.clone() for name, b in model.named_buffers()}
        self._random_state = RandomState.read(device)

    def __call__(self, params: Mapping[str, Tensor] | None = None) -> Any:
        """What the closure returns.

        Args:
            params: Tensors to use as the model's parameters, `{name: [*shape]}`. A parameter that
                is not among them is the model's own. If None, all are.
        """
        swapped = {f"model.{name}": p for name, p in (params or {}).items()}
        if not self._was_called:
            self._was_called = True
            return self._run(swapped)

        swapped |= {name: b.clone() for name, b in self._buffers.items()}
        current = RandomState.read(self._device)
        self._random_state.restore()
        try:
            return self._run(swapped)
        finally:
            current.restore()

    def _run(self, swapped: Mapping[str, Tensor]) -> Any:
        with fresh_casts(), mended_recomputation, mended_derivatives:
            return functional_call(self._module, dict(swapped), ())


@contextmanager
def fresh_casts() -> Iterator[None]:
    """Let autocast forget the parameters that it has cast, before the block and after it.

    For as long as autocast is on, it keeps those of a model in its short type: as they were when a
    forward pass read them first, and without a graph if that pass had none.

    Example:
        >>> layer, x = nn.Linear(1, 1), torch.ones(1, 1)
        >>> with torch.autocast("cpu", torch.bfloat16):
        ...     before = layer(x)
        ...     with torch.no_grad():
        ...         _ = layer.weight.add_(1)
        ...     with fresh_casts():
        ...         print(torch.equal(layer(x), before))
        False
    """
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


@contextmanager
def explain_freed_graph() -> Iterator[None]:
    """Say what to do if the block goes back through a graph that the closure has freed.

    Raises:
        ValueError: It does.

    Example:
        >>> x = torch.ones(1, requires_grad=True)
        >>> y = x.square()
        >>> y.backward()
        >>> with explain_freed_graph():
        ...     y.backward()
        Traceback (most recent call last):
        ValueError: closure: it has freed its graph; do not call backward() in it, because step() \
does
    """
    try:
        yield
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise ValueError(
            "closure: it has freed its graph; do not call backward() in it, because step() does"
        ) from error


class _ClosureModule(nn.Module):
    """A module around the model that calls the closure, so that parameters can be swapped in it."""

    def __init__(self, model: nn.Module, closure: Closure) -> None:
        super().__init__()
        self.model = model
        self.closure = closure

    def forward(self) -> Any:
        return self.closure()
