"""Scalars for TensorBoard."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any


class Board:
    """Writes the scalars of one sitting of a run to an event file.

    It does what `torch.utils.tensorboard.SummaryWriter` does, but in the calling thread. So an
    error, such as that of a full disk, is raised here, and nothing waits for a thread that ended.

    Args:
        folder: The folder of event files. It is made if it does not exist.
        purge_step: TensorBoard hides what earlier files hold from this step on.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     board = Board(Path(folder), purge_step=1)
        ...     board.add_scalars({"train/loss": 0.5}, step=1)
        ...     board.close()
        ...     [path.name.split(".")[:3] for path in Path(folder).iterdir()]
        [['events', 'out', 'tfevents']]
    """

    def __init__(self, folder: Path, *, purge_step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._make_event = Event
        self._make_summary = Summary
        folder.mkdir(parents=True, exist_ok=True)
        now = time.time()
        # The name has to be new, for files of the same second as well.
        name = f"events.out.tfevents.{int(now)}.{socket.gethostname()}.{os.getpid()}"
        count = len(list(folder.glob(f"{name}.*")))
        self._writer = RecordWriter((folder / f"{name}.{count}").open("xb"))
        self._write(file_version="brain.Event:2")
        self._write(step=purge_step, session_log=SessionLog(status=SessionLog.START))

    def add_scalars(self, values: dict[str, float], step: int) -> None:
        """Write numbers by name, of one step."""
        scalars = [
            self._make_summary.Value(tag=name, simple_value=value) for name, value in values.items()
        ]
        self._write(step=step, summary=self._make_summary(value=scalars))

    def flush(self) -> None:
        """Hand to the system what was written."""
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()

    def _write(self, **event: Any) -> None:
        record = self._make_event(wall_time=time.time(), **event)
        self._writer.write(record.SerializeToString())
