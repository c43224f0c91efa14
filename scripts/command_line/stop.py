"""How a script ends if a signal asks it to: one line on standard error, and 128 + the number."""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import FrameType
from typing import Any

from command_line.ranks import ignore_launcher, own_rank
from metaimplicit.training import STOP_SIGNALS


class Stopped(SystemExit):  # as SystemExit, it is no error
    """A signal asked the script to stop. The exit code is 128 + its number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number).name


@contextlib.contextmanager
def exit_on_signals() -> Iterator[None]:
    """Within the block, SIGINT, SIGTERM and SIGHUP end the script by raising `Stopped`.

    `fit` and `fit_tuner` delay them until a step is saved. A signal that was ignored before stays
    ignored, as SIGHUP under nohup. Outside the main thread, nothing changes.
    """
    before = {}
    hook = sys.unraisablehook
    if threading.current_thread() is threading.main_thread():
        sys.unraisablehook = partial(_send_again, hook)
        for number in STOP_SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, _raise_stopped)
    try:
        with explain_stop("run the same command again"):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


@contextlib.contextmanager
def explain_stop(advice: str) -> Iterator[None]:
    """If a signal stops the block, write one line with an advice, once, in the first process."""
    try:
        yield
    except Stopped as stop:
        ignore_launcher()
        with contextlib.suppress(OSError):  # as the terminal may be gone
            if own_rank() == 0:
                sys.stderr.write(f"stopped by {stop.signal}; {advice}\n")
        sys.exit(stop.code)


def _raise_stopped(number: int, frame: FrameType | None) -> None:
    if _is_within(_send_again, frame):
        _send_soon(number)
        return
    raise Stopped(number)


def _send_again(
    hook: Callable[[sys.UnraisableHookArgs], Any], unraisable: sys.UnraisableHookArgs
) -> None:
    """Send a signal again that arrived within a finaliser, where Python drops what is raised.

    Here, it would be dropped as well. What else is dropped is for the hook.
    """
    stop = unraisable.exc_value
    if isinstance(stop, Stopped):
        _send_soon(signal.Signals[stop.signal])
    else:
        hook(unraisable)


def _send_soon(number: int) -> None:
    """Send a signal from another thread, a moment later."""

    def send() -> None:
        time.sleep(0.01)
        os.kill(os.getpid(), number)

    _thread.start_new_thread(send, ())  # `threading` would wait here for the start


def _is_within(function: Callable[..., Any], frame: FrameType | None) -> bool:
    """Whether a frame is one of a function, or of what it calls."""
    while frame is not None:
        if frame.f_code is function.__code__:
            return True
        frame = frame.f_back
    return False
