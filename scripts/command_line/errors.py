"""How a script ends if something is wrong: one line on standard error, and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

BAD_INPUT = (ValueError, FileNotFoundError, FileExistsError, FloatingPointError, ImportError)


@contextmanager
def exit_on(*errors: type[Exception], code: int) -> Iterator[None]:
    """End the process with this exit code if the block raises one of these errors."""
    try:
        yield
    except errors as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(code)
