"""What a run tells while it runs: metrics.jsonl, TensorBoard, and a progress bar."""

from __future__ import annotations

import json
import math
import sys
from collections import deque
from pathlib import Path
from types import TracebackType
from typing import Any

from tqdm import tqdm

from metaimplicit.training.checkpoint import Progress
from metaimplicit.training.files import write_atomically

METRICS = "metrics.jsonl"
Values = dict[str, float | None]


class RunLog:
    """Writes to the run's folder, from `progress` on: lines that a killed run wrote beyond its checkpoint are dropped.

    Args:
        out: the run's folder.
        progress: where the run stands.
        total: meta-steps to come to, if that is known.
        bar: show the progress bar.
    """

    def __init__(self, out: Path, progress: Progress, *, total: int | None, bar: bool) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = out / METRICS
        if path.exists():
            kept = [line for line in read_metrics(out) if line["step"] <= progress.step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_atomically(path, lambda file: file.write(text.encode()))
        self._lines = path.open("a", buffering=1)
        purge = progress.step + 1 if progress.step else None
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=purge)
        interval = 0.1 if sys.stderr.isatty() else 30.0  # a log file wants a line now and then
        self._bar = tqdm(
            total=total, initial=progress.step, unit="step", mininterval=interval, disable=not bar
        )
        self._recent: deque[Values] = deque(maxlen=20)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
        self._board.close()
        self._lines.close()

    def write(self, split: str, progress: Progress, values: Values) -> None:
        """One line of metrics.jsonl and its TensorBoard scalars; what is not finite becomes null."""
        clean = {
            name: v if v is not None and math.isfinite(v) else None for name, v in values.items()
        }
        line = {
            "step": progress.step,
            "seconds": round(progress.seconds, 3),
            "split": split,
            **clean,
        }
        self._lines.write(json.dumps(line) + "\n")
        for name, value in clean.items():
            if value is not None:
                self._board.add_scalar(f"{split}/{name}", value, progress.step)

    def advance(self, values: Values) -> None:
        """Move the bar on by one meta-step; it shows means over the last 20."""
        self._recent.append(values)
        shown = {}
        for name in ("loss", "accuracy", "residual"):
            present = [v for v in (old.get(name) for old in self._recent) if v is not None]
            if present:
                shown[name] = f"{sum(present) / len(present):.3f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a last line cut short by a crash is left out."""
    lines = []
    for text in (out / METRICS).read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines
