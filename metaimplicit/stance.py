"""How compiled functions run in a block."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import Lock
from typing import Literal

import torch

Way = Literal["uncompiled", "unguarded"]


class _Stance:
    """The stance of torch, as the blocks of all threads want it.

    Torch keeps it once for the whole process. A block that wants functions uncompiled has its way
    over one that wants them unguarded. What was there before the first block is put back after the
    last, in whatever order they end.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._wanted: list[Way] = []
        self._before = ExitStack()

    @contextmanager
    def block(self, way: Way) -> Iterator[None]:
        """A block that wants one of the ways."""
        with self._lock:
            stance = self._set([*self._wanted, way])
            if not self._wanted:
                self._before.enter_context(stance)
            self._wanted.append(way)
        try:
            yield
        finally:
            self._leave(way)

    def _leave(self, way: Way) -> None:
        with self._lock:
            self._wanted.remove(way)
            if self._wanted:
                self._set(self._wanted)
            else:
                self._before.close()

    def _set(self, wanted: list[Way]) -> AbstractContextManager[None]:
        """Set the stance. As a context, what is returned puts the one before back at its end."""
        stance: AbstractContextManager[None]
        if "uncompiled" in wanted:
            stance = torch.compiler.set_stance("force_eager")
        else:
            stance = torch.compiler.set_stance(skip_guard_eval_unsafe=True)
        return stance


_stance = _Stance()


@contextmanager
def compiled_functions(way: Way) -> Iterator[None]:
    """A block in which compiled functions run in another way.

    Args:
        way: `"uncompiled"`: those that this thread calls. Where torch cannot tell threads apart, as
            in early versions, those of other threads as well. Or `"unguarded"`: torch does not
            check that a function still reads what it was compiled for, in no thread.

    Example:
        >>> def backend(graph, inputs):
        ...     raise RuntimeError("it is compiled")
        >>> double = torch.compile(lambda x: 2 * x, backend=backend)
        >>> with compiled_functions("uncompiled"):
        ...     double(torch.ones(1))
        tensor([2.])
    """
    block = _uncompiled() if way == "uncompiled" else _stance.block(way)
    # Torch takes neither from within a compiled function.
    torch.compiler.disable(block.__enter__)()
    try:
        yield
    finally:
        torch.compiler.disable(block.__exit__)(None, None, None)


def _uncompiled() -> AbstractContextManager[None]:
    """A block of this thread if torch has such, else of all threads."""
    in_this_thread = getattr(
        sys.modules.get("torch._dynamo.eval_frame"), "_use_eager_on_nested_compile", None
    )
    block: AbstractContextManager[None]
    block = _stance.block("uncompiled") if in_this_thread is None else in_this_thread()
    return block
