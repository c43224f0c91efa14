"""What a run writes while it trains: metrics.jsonl, TensorBoard, and a progress bar."""

from __future__ import annotations

import json
import math
import os
import sys
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from metaimplicit.training.files import write_atomically
from metaimplicit.training.progress import Progress

METRICS = "metrics.jsonl"
SMOOTHING = 20  # steps over which the progress bar averages
Values = dict[str, float | None]


class RunLog:
    """Writes the metrics of a run to its folder. Use it as a context manager.

    If the run is resumed, the lines that it wrote after its last checkpoint are dropped.

    Args:
        out: The run's folder, which must exist.
        progress: How far the run is.
        total: The number of steps that the run will take. If None, it is not known.
        bar: Whether to show a progress bar.
    """

    def __init__(self, out: Path, progress: Progress, *, total: int | None, bar: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter  # it takes a second to import

        _drop_lines_after(out, progress.step)
        self._lines = (out / METRICS).open("a", buffering=1)
        first_step = progress.step + 1 if progress.step else None
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=first_step)
        self._bar = tqdm(
            total=total,
            initial=progress.step,
            unit="step",
            mininterval=0.1 if sys.stderr.isatty() else 30.0,  # in a log file, a line in a while
            disable=not bar,
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
        self._bar.close()
        self._board.close()
        self._lines.close()

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
        line: dict[str, Any] = {
            "step": progress.step,
            "seconds": round(progress.seconds, 3),
            "split": split,
        }
        for name, value in values.items():
            line[name] = value if value is not None and math.isfinite(value) else None
            if line[name] is not None:
                self._board.add_scalar(f"{split}/{name}", value, progress.step)
        self._lines.write(json.dumps(line) + "\n")

    def advance(self, values: Values) -> None:
        """Move the progress bar by one step. It shows means over the last 20 steps."""
        self._recent.append(values)
        means = {}
        for name in ("loss", "accuracy", "residual"):
            recent = [step.get(name) for step in self._recent]
            numbers = [value for value in recent if value is not None]
            if numbers:
                means[name] = f"{sum(numbers) / len(numbers):.3f}"
        self._bar.set_postfix(means, refresh=False)
        self._bar.update()


def read_metrics(out: Path) -> list[dict[str, Any]]:
    r"""The lines of a run's metrics.jsonl. A last line that a crash cut short is left out.

    Raises:
        FileNotFoundError: The folder holds no metrics.jsonl.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = Path(folder, "metrics.jsonl").write_text('{"step": 1}\n{"ste')
        ...     read_metrics(Path(folder))
        [{'step': 1}]
    """
    lines = []
    for text in (out / METRICS).read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _drop_lines_after(out: Path, step: int) -> None:
    path = out / METRICS
    if path.exists():
        lines = [line for line in read_metrics(out) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        write_atomically(path, lambda file: file.write(text.encode()))
