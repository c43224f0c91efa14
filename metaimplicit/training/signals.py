"""Signals that ask a run to stop wait until it has finished its step and saved it."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class DeferredSignals:
    """Holds back SIGINT, SIGTERM and SIGHUP within a block, and sends the first on at its end.

    It then does what it would have done without the block: by default, SIGINT raises
    KeyboardInterrupt, and the others end the process. A second signal does so at once. A signal
    that was ignored before stays ignored, as SIGHUP under nohup. Outside the main thread, which
    alone receives signals, nothing is held back.

    Attributes:
        received: The number of the signal that waits. None if there is none. A block that sees one
            should save its work and end.

    Example:
        >>> steps = 0
        >>> try:
        ...     with DeferredSignals() as signals:
        ...         while signals.received is None:
        ...             steps += 1
        ...             if steps == 3:
        ...                 signal.raise_signal(signal.SIGINT)
        ... except KeyboardInterrupt:
        ...     print("stopped after", steps)
        stopped after 3
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._has_own = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> DeferredSignals:
        """Hold signals back from now on."""
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                # A handler that is None was set outside Python, which cannot set it again.
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Send the signal that waits."""
        self._restore_handlers()
        if self.received is not None:
            signal.raise_signal(self.received)

    def adopt(self, number: int) -> None:
        """Take over a signal that another process received, unless this one has received its own.

        Where a launcher sends a signal to all processes, its own is then no second one.
        """
        if self.received is None:
            self.received = number

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self._has_own:
            self._has_own = True
            self.adopt(number)
            return
        self._restore_handlers()
        self.received = None
        signal.raise_signal(number)

    def _restore_handlers(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
