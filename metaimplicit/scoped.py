"""Settings of the whole process that hold while a block runs."""

from __future__ import annotations

from threading import Lock
from typing import Any, Protocol


class Settings(Protocol):
    """What a block changes."""

    @classmethod
    def read(cls) -> Any:
        """The present settings."""

    def apply(self) -> None:
        """Make these the present settings."""


class ScopedSettings:
    """A block in which settings hold, as `with scoped:`.

    They are as they were when the last thread leaves the block.

    Args:
        settings: The settings.

    Example:
        >>> class Volume(int):
        ...     present = 3
        ...     @classmethod
        ...     def read(cls):
        ...         return cls(Volume.present)
        ...     def apply(self):
        ...         Volume.present = int(self)
        >>> with ScopedSettings(Volume(11)):
        ...     Volume.present
        11
        >>> Volume.present
        3
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._before: Settings = settings
        self._lock = Lock()
        self._entered = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._entered == 0:
                self._before = self._settings.read()
                self._settings.apply()
            self._entered += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._entered -= 1
            if self._entered == 0:
                self._before.apply()
