"""How a script ends if something is wrong: one line on standard error, and an exit code.

Exit codes:
    1: The run itself failed: a number is not finite, memory is short, a worker was killed.
    2: An option, a file or a disk must change before the run can work.
    130: The user interrupted it.

Each process of torchrun writes its own error. The first one alone writes that another is lost.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import sys
import traceback
from collections.abc import Callable
from typing import IO

from command_line.home import expand_home
from command_line.memory import limit_memory
from command_line.out import require_out_name
from command_line.ranks import count_processes, ignore_launcher, own_rank, require_one_process
from command_line.stop import exit_on_signals
from metaimplicit.learner import LostRanksError

REFUSED = (ValueError, OSError, OverflowError, ImportError)
FAILED = (FloatingPointError, MemoryError, RuntimeError)
DEBUG = "--debug"
LONGEST = 1000  # characters of a line

Main = Callable[[list[str]], object]


def handle_errors(main: Main, *, takes_ranks: bool = False) -> Callable[[list[str]], None]:
    """A `main` function that ends in one line if there is an error or a signal to stop.

    With --debug among the arguments, the trace comes before the line. `SystemExit` passes, so that
    `main` may end with an exit code of its own. Other exceptions than `REFUSED` and `FAILED` are
    mistakes of the program, and keep their trace. Unless it `takes_ranks`, several processes of
    torchrun are refused.
    """

    @functools.wraps(main)
    def handled(args: list[str]) -> None:
        open_streams()
        limit_memory()
        try:
            if not takes_ranks:
                require_one_process()
            require_out_name(args)
            with exit_on_signals():
                main(expand_home([arg for arg in args if arg != DEBUG]))
            sys.stdout.flush()
        except KeyboardInterrupt:
            end("stopped", code=130)
        except (*REFUSED, *FAILED) as raised:
            if DEBUG in args:
                traceback.print_exc()
            error = behind(raised)
            if isinstance(error, LostRanksError) and own_rank() > 0:
                ignore_launcher()
                sys.exit(1)  # as the first process says so
            # An unsupported operation is a ValueError and a RuntimeError: the model must change.
            end(f"error: {one_line(error)}", code=2 if isinstance(error, REFUSED) else 1)

    return handled


def end(line: str, *, code: int) -> None:
    """Write a line on standard error if that is possible, and exit."""
    ignore_launcher()
    if count_processes() > 1:
        line = f"rank {own_rank()}: {line}"
    with contextlib.suppress(OSError):
        sys.stderr.write(f"{line}\n")
    for stream in (sys.stdout, sys.stderr):
        discard_if_full(stream)
    sys.exit(code)


def behind(error: BaseException) -> BaseException:
    """The error that counts. On a full disk, torch.save raises a RuntimeError over the OSError."""
    hidden = error.__context__
    return hidden if isinstance(hidden, OSError) and hidden.errno == errno.ENOSPC else error


def one_line(error: BaseException) -> str:
    """The message of an error in one line.

    That of a worker process is a trace, whose last line counts.
    """
    lines = str(error).strip().splitlines()
    if any(line.startswith(("Original Traceback", "Traceback")) for line in lines):
        lines = lines[-1:]
    text = " ".join(" ".join(lines).split()) or type(error).__name__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} …"


def open_streams() -> None:
    """Give the process standard streams to which any text can be written.

    A closed stream is replaced by one that discards what it gets. If its file descriptor stayed
    free, the next file that is opened would get it, and with it the warnings of C libraries.
    Characters that a terminal does not have are written as escapes.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            _occupy(number)
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # open until the process ends
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def discard_if_full(stream: IO[str]) -> None:
    """Discard what a stream holds if it cannot be written, so that Python's exit does not fail."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())


def _occupy(number: int) -> None:
    """Open nothing on a file descriptor that is free."""
    try:
        os.fstat(number)
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        if nowhere != number:
            os.dup2(nowhere, number)
            os.close(nowhere)
