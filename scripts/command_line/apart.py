"""Calls in a process of their own, which nothing before them has warmed up or filled."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, TypeVar

Result = TypeVar("Result")
PATIENCE = 10.0  # seconds in which a process that has sent its result may clean up


def run_apart(function: Callable[..., Result], *args: Any, name: str) -> Result:
    """What a function returns or raises in a fresh process, which ends with the call.

    Args:
        function: A function of a module.
        args: Its arguments, which are pickled, as the result is.
        name: What is run, for the error.

    Raises:
        RuntimeError: The process was killed.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_send_result,
        args=(sender, function, args),
        daemon=True,
    )
    process.start()
    sender.close()
    try:
        # A pool would wait for ever for a process that was killed. A pipe ends.
        result: Result | Exception = receiver.recv()
    except EOFError:
        raise RuntimeError(
            f"{name}: the process that measured was killed; lower the sizes if memory was short"
        ) from None
    else:
        process.join(PATIENCE)
    finally:
        process.kill()
        process.join()
    if isinstance(result, Exception):
        raise result
    return result


def _send_result(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits ends this one
    try:
        sender.send(function(*args))
    except Exception as error:
        sender.send(error)
