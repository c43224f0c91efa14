"""The choice between vmap and a loop over the tasks, by the clock."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

from metaimplicit.lifted import Vectorize
from metaimplicit.methods import Method
from metaimplicit.random_state import restored_host_state

REPEATS = 2  # calls of each, of which the faster counts: the first may warm caches


def choose_vectorize(run: Callable[[Vectorize], Tensor]) -> Vectorize:
    """Time `run("loop")` and `run("vmap")`, twice each, and return the faster.

    Warnings are not shown, as the run that follows shows them.

    Args:
        run: The computation. It returns a scalar tensor, which is read to wait for the device.

    Returns:
        The other one if either raises RuntimeError. Vmap does for an operation without a batching
        rule, and a loop does for a compiled module, which torch does not use under vmap.

    Raises:
        RuntimeError: From the loop, if both raise one.

    Example:
        >>> import time
        >>> def run(vectorize):
        ...     time.sleep(0.01 if vectorize == "loop" else 0.0)
        ...     return torch.tensor(0.0)
        >>> choose_vectorize(run)
        'vmap'
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            loop = _shortest_time(run, "loop")
        except RuntimeError:
            with suppress(RuntimeError):
                run("vmap")
                return "vmap"
            raise
        try:
            vmap = _shortest_time(run, "vmap")
        except RuntimeError:
            return "loop"
    return "vmap" if vmap <= loop else "loop"


@contextmanager
def preserve_random_state(method: Method, *, cuda: bool) -> Iterator[None]:
    """Put the random state and that of the method's solver back at the end.

    Args:
        method: The method whose solver may draw from a generator.
        cuda: Whether the states of all CUDA devices are put back too.

    Example:
        >>> from metaimplicit.methods import Unrolled
        >>> state = torch.get_rng_state()
        >>> with preserve_random_state(Unrolled(), cuda=False):
        ...     _ = torch.rand(3)
        >>> torch.equal(state, torch.get_rng_state())
        True
    """
    generator = solver_generator(method)
    state = None if generator is None else generator.get_state()
    devices = range(torch.cuda.device_count()) if cuda else []
    try:
        with torch.random.fork_rng(devices=devices), restored_host_state():
            yield
    finally:
        if generator is not None and state is not None:
            generator.set_state(state)


def solver_generator(method: Method) -> torch.Generator | None:
    """The generator that a method's solver draws from. None if it draws from torch's, or does not.

    Example:
        >>> from metaimplicit.methods import METHODS
        >>> solver_generator(METHODS["nystrom"]) is None
        True
    """
    solver = getattr(method, "solver", None)
    generator: torch.Generator | None = getattr(solver, "generator", None)
    return generator


def _shortest_time(run: Callable[[Vectorize], Tensor], vectorize: Vectorize) -> float:
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        float(run(vectorize))  # reading a number waits for the device
        seconds.append(time.perf_counter() - start)
    return min(seconds)
