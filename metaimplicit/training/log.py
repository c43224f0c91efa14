"""What a run writes while it trains: metrics.jsonl, TensorBoard, and how far it is."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from metaimplicit.training.board import Board
from metaimplicit.training.files import write_atomically
from metaimplicit.training.meter import Meter
from metaimplicit.training.progress import Progress
from metaimplicit.training.sealed import DamagedFileError, is_whole, read_sealed_json, seal

CONFIG = "config.json"
METRICS = "metrics.jsonl"
ASIDE = "metrics.aside.jsonl"
LINE_NUMBER = re.compile(rb'\{"line": (\d+), ')
SMOOTHING = 20  # steps over which the meter averages
Values = dict[str, float | None]


class RunLog:
    """Writes the metrics of a run to its folder. Use it as a context manager.

    If the run is resumed, metrics.jsonl keeps the lines up to its checkpoint. What else stands in
    it moves to metrics.aside.jsonl: later lines, whose steps are taken again, damaged lines, and
    those of another run. Only a last line that a crash cut short is dropped. A warning says which
    lines up to the checkpoint are missing.

    Args:
        out: The run's folder, which must exist.
        progress: How far the run is. Its number of lines grows with each.
        run: The run's name for itself, without which nothing can verify the lines.
        total: The number of steps that the run will take. If None, it is not known.
        minutes: The time that it will take at most. If None, it has no limit.
        bar: Whether to show how far the run is.
    """

    def __init__(
        self,
        out: Path,
        progress: Progress,
        run: str,
        *,
        total: int | None,
        minutes: float | None = None,
        bar: bool,
    ) -> None:
        _keep_lines(out, run, progress.lines)
        self._run = run
        self._lines = (out / METRICS).open("ab")
        self._board = Board(out / "tensorboard", purge_step=progress.step + 1)
        self._progress = progress
        self._meter = Meter(
            "step",
            count=progress.step,
            seconds=progress.seconds,
            total=total,
            minutes=minutes,
            is_shown=bar,
        )
        self._recent: deque[Values] = deque(maxlen=SMOOTHING)

    def __enter__(self) -> RunLog:
        """Return the log itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the files and the progress bar."""
        with self._lines:
            self._meter.close()
            self._board.close()

    def sync(self) -> None:
        """Wait until all lines are on the disk."""
        self._board.flush()
        os.fsync(self._lines.fileno())

    def write(self, split: str, progress: Progress, values: Values) -> None:
        """Write one line of metrics.jsonl and its TensorBoard scalars.

        Args:
            split: What the values were measured on, `"train"` or `"validation"`.
            progress: When they were measured.
            values: Numbers by name. Those that are not finite are written as null.

        Raises:
            FileNotFoundError: The file was removed while the run wrote to it.
        """
        if os.fstat(self._lines.fileno()).st_nlink == 0:
            raise FileNotFoundError(
                f"{self._lines.name}: the file was removed during the run, expected it to stay; "
                "start the run again"
            )
        progress.lines += 1
        line: dict[str, Any] = {
            "line": progress.lines,
            "step": progress.step,
            "seconds": round(progress.seconds, 3),
            "split": split,
        }
        scalars = {}
        for name, value in values.items():
            line[name] = None
            if value is not None and math.isfinite(value):
                line[name] = value
                scalars[f"{split}/{name}"] = value
        self._board.add_scalars(scalars, progress.step)
        self._lines.write(seal(line, self._run) + b"\n")
        self._lines.flush()

    def advance(self, values: Values) -> None:
        """Show that a step is done, with means over the last 20 steps."""
        self._recent.append(values)
        means = []
        for name in ("loss", "accuracy", "metric", "residual"):
            recent = [step.get(name) for step in self._recent]
            numbers = [value for value in recent if value is not None]
            if numbers:
                means.append(f"{name} {sum(numbers) / len(numbers):.3f}")
        self._meter.update(self._progress.step, self._progress.seconds, ", ".join(means))


class Log(NamedTuple):
    """What stands in a metrics.jsonl.

    Attributes:
        whole: The lines that the run wrote, by number from 1 on.
        others: All other lines. A last line that a crash cut short is not among them.
    """

    whole: dict[int, bytes]
    others: list[bytes]

    def require_complete(self, path: Path, lines: int) -> None:
        """Raise DamagedFileError unless the lines 1 … `lines` are there, and none is damaged."""
        missing = [number for number in range(1, lines + 1) if number not in self.whole]
        if not (missing or self.others):
            return
        shown = ", ".join(map(str, missing[:3])) + (", …" if len(missing) > 3 else "")
        lacking = f"lacks {len(missing)} lines ({shown})" if missing else "lacks no line"
        raise DamagedFileError(
            f"{path}: the file {lacking} of {lines}, and has {len(self.others)} that are damaged "
            "or of another run"
        )


def read_metrics(out: str | Path, *, complete: bool = True) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl. A last line that a crash cut short is left out.

    Args:
        out: The run's folder.
        complete: Whether damaged and missing lines are an error. If not, they are left out.

    Raises:
        FileNotFoundError: The folder holds no metrics.jsonl or no config.json.
        DamagedFileError: Lines are damaged or missing.

    Example:
        >>> import tempfile
        >>> import tasks
        >>> import torch
        >>> from metaimplicit import MetaLearner
        >>> from metaimplicit.training import Budget, fit
        >>> sampler = tasks.EpisodeSampler(tasks.load("sinusoid", shots=5).train, tasks=2)
        >>> learner = MetaLearner(torch.nn.Linear(1, 1), torch.nn.functional.mse_loss)
        >>> optimizer = torch.optim.Adam(learner.parameters())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     out = Path(folder)
        ...     _ = fit(learner, optimizer, sampler, out=out, budget=Budget(steps=3), bar=False)
        ...     [line["step"] for line in read_metrics(out)]
        [1, 2, 3]
    """
    out = Path(out)
    path = out / METRICS
    log = _read_log(path.read_bytes(), read_sealed_json(out / CONFIG).get("run", ""))
    if complete:
        log.require_complete(path, max(log.whole, default=0))
    lines = [json.loads(log.whole[number]) for number in sorted(log.whole)]
    for line in lines:
        del line["line"], line["sha256"]
    return lines


def _read_log(content: bytes, run: str) -> Log:
    log = Log(whole={}, others=[])
    texts = content.split(b"\n")
    for text in texts[:-1]:  # the last one is empty, or was cut short
        number = LINE_NUMBER.match(text)
        if number and is_whole(text, run) and int(number[1]) not in log.whole:
            log.whole[int(number[1])] = text
        else:
            log.others.append(text)
    return log


def _keep_lines(out: Path, run: str, lines: int) -> None:
    """Keep the lines 1 … `lines` of the run in its metrics.jsonl, and move all others."""
    path = out / METRICS
    content = path.read_bytes() if path.exists() else b""
    log = _read_log(content, run)
    try:
        log.require_complete(path, lines)
    except DamagedFileError as error:
        warnings.warn(
            f"{error}; the run continues, and the latter are in {ASIDE} now", stacklevel=3
        )
    later = [text for number, text in log.whole.items() if number > lines]
    if aside := log.others + later:
        with (out / ASIDE).open("ab") as file:
            file.writelines(text + b"\n" for text in aside)
            file.flush()
            os.fsync(file.fileno())
    kept = b"".join(text + b"\n" for number, text in log.whole.items() if number <= lines)
    if kept != content:
        write_atomically(path, lambda file: file.write(kept))
