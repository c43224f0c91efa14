"""Imported first by every script: from here on, signals and warnings are one line.

Where the number of threads is chosen by the clock, they wait for one another asleep.

The other imports take seconds, in which a signal ends the script at once. Later,
`command_line.handle_errors` takes over, under which what was computed is saved.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import warnings
from pathlib import Path
from types import FrameType

CHOOSE_THREADS = ("train.py", "evaluate.py")


def exit_at_once(number: int, frame: FrameType | None) -> None:
    """Write a line, and exit with 128 + the number of the signal. There is nothing to save yet."""
    if os.environ.get("RANK", "0") == "0":  # of the processes of torchrun
        line = f"stopped by {signal.Signals(number).name}; run the same command again\n"
        os.write(2, line.encode())
    os._exit(128 + number)


def is_script() -> bool:
    """Whether this process runs one of the scripts, rather than a test or a worker of a script."""
    in_scripts = Path(sys.argv[0]).resolve().parent == Path(__file__).resolve().parent
    return in_scripts and multiprocessing.parent_process() is None


def wait_passively() -> None:
    """Let threads that wait for one another sleep, unless the user has chosen otherwise.

    By default they spin, which takes the time of other processes, and of their own last thread. It
    has to be chosen before torch is imported.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def ignore_signals() -> None:
    """The work is done, and a signal would end the process without a line."""
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop, signal.SIG_IGN)


if is_script():
    if Path(sys.argv[0]).name in CHOOSE_THREADS:
        wait_passively()
    atexit.register(ignore_signals)
    # without the place in the code that a warning comes from
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(stop) != signal.SIG_IGN:
            signal.signal(stop, exit_at_once)
