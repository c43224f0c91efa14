"""The folder of a run: who writes to it, what the run is, and when it ran on what."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from metaimplicit.training.files import json_types, previous
from metaimplicit.training.lock import only_writer
from metaimplicit.training.log import ASIDE, CONFIG, METRICS
from metaimplicit.training.progress import Progress
from metaimplicit.training.provenance import changed_versions, describe_sitting
from metaimplicit.training.rotation import Identity, has_taken_steps, versions
from metaimplicit.training.sealed import DamagedFileError, read_sealed_json, write_sealed_json

CHECKPOINT = "checkpoint.pt"
RESULTS = ("summary.json", "report.html")  # what a script leaves when its run is done


class RunFolder:
    """The folder of a run, while this process alone writes to it. Use it as a context manager.

    Its config.json holds what `config` does, the run's own name for itself ("run"), by which its
    files are told from those of other runs, and its sittings ("sittings"): for each, the commit,
    the versions, the threads, the device, and from which step to which it went. The version before
    it is kept as config-previous.json.

    Args:
        out: The folder. It is made if it does not exist.
        resume: Whether to continue the run in it, if there is one.
        config: Further entries of config.json, in types that JSON has.
        identity: What the run may not change, by name, in types that JSON has.

    Attributes:
        checkpoint: The path of the last checkpoint.
        has_checkpoint: Whether there is a checkpoint to continue from.
        run: The run's name for itself.
        identity: What its checkpoints have to hold, that name included.

    Raises:
        FileExistsError: `out` holds a run, and `resume` is False. Or another process writes to it.
        ValueError: `config` or `identity` holds what JSON has not. Or config.json is damaged. Or
            `out` has a run's metrics, but no checkpoint. Or a folder has the name of a file.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        resume: bool,
        config: Mapping[str, Any] | None = None,
        identity: Identity | None = None,
    ) -> None:
        out = Path(out)
        require_new_run_folder(out, resume)
        self.out = out
        self.checkpoint = out / CHECKPOINT
        self._resume = resume
        self._config = json_types("config", config or {})
        self._given = json_types("identity", identity or {})
        self._stack = ExitStack()
        self._progress: Progress | None = None

    def __enter__(self) -> RunFolder:
        """Lock the folder, and read which run it holds."""
        with ExitStack() as stack:
            stack.enter_context(only_writer(self.out))
            # Between the first check and the lock, another process may have finished a run.
            require_new_run_folder(self.out, self._resume)
            if not self._resume:
                remove_unsaved_run(self.out)
            self._require_files()
            self.has_checkpoint = any(path.exists() for path in versions(self.checkpoint))
            if not self.has_checkpoint and _holds_lines(self.out):
                raise ValueError(
                    f"out: {self.checkpoint} is gone, but {METRICS} holds steps of a run; restore "
                    "the checkpoint, or name another folder"
                )
            self._stored = self._read_config()
            self.run: str = self._stored.get("run") or uuid.uuid4().hex
            self.identity = {"run": self.run, **self._given}
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Note to which step the sitting went, unless it failed, and let go of the folder."""
        with self._stack:
            if self._progress is not None and kind is None:
                self._stored["sittings"][-1]["to_step"] = self._progress.step
                self._write_config()

    def begin_sitting(self, progress: Progress, device: torch.device, processes: int = 1) -> None:
        """Write config.json with a new sitting of some processes, which goes on at `progress`.

        A warning names the versions that are not those of the sitting before.
        """
        sittings = list(self._stored.get("sittings", []))
        sitting = describe_sitting(device) | {"from_step": progress.step, "to_step": None}
        if processes > 1:
            sitting["processes"] = processes
        if sittings:
            # Of a sitting that was killed, the steps up to the checkpoint remain.
            sittings[-1] |= {"to_step": progress.step}
            is_empty = sittings[-1].get("from_step") == progress.step
            if changes := changed_versions(sittings[-1], sitting):
                warnings.warn(
                    f"{self.out}: the run continues under other versions ({', '.join(changes)}); "
                    "its numbers may differ from those of an uninterrupted run",
                    stacklevel=3,
                )
            if is_empty:
                sittings.pop()
        self._stored |= self._config | {"run": self.run, "sittings": [*sittings, sitting]}
        self._write_config()
        self._progress = progress

    def _require_files(self) -> None:
        """Check that nothing stands where the run writes its files."""
        names = (CONFIG, previous(Path(CONFIG)), METRICS, ASIDE)
        paths = [*versions(self.checkpoint), *(self.out / name for name in names)]
        for path in paths:
            if path.is_dir():
                raise ValueError(f"out: {path} is a folder, expected a file or nothing; move it")

    def _read_config(self) -> dict[str, Any]:
        path = self.out / CONFIG
        if not self._resume or not (path.exists() or self.has_checkpoint):
            return {}
        if not path.exists():
            raise DamagedFileError(
                f"out: found a checkpoint in {self.out}, but no {CONFIG}, which says what run it "
                f"is of; put {previous(path).name} in its place if it is there, or take another "
                "folder"
            )
        return read_sealed_json(path)

    def _write_config(self) -> None:
        path = self.out / CONFIG
        write_sealed_json(path, self._stored, keep=previous(path))


def require_new_run_folder(out: Path, resume: bool) -> None:
    """Check that a folder holds no run, unless that run is to be resumed.

    A run that ended before it saved a step is none, and gives its place to a new one.

    Args:
        out: The folder, which need not exist.
        resume: Whether the run in it is to be resumed. If so, nothing is checked.

    Raises:
        FileExistsError: The folder holds a checkpoint of a step, or metrics or a result without a
            checkpoint.

    Example:
        >>> require_new_run_folder(Path("no-such-folder"), resume=False)
    """
    if resume:
        return
    files = [path.name for path in versions(out / CHECKPOINT) if path.exists()]
    if files and not has_taken_steps(out / CHECKPOINT):
        return
    if _holds_lines(out):
        files.append(METRICS)
    files += [name for name in RESULTS if (out / name).exists()]
    if files:
        raise FileExistsError(
            f"out: {out} holds a run already ({', '.join(files)}), expected a new or empty "
            "folder; name another one with --out, or continue the run with --resume"
        )


def remove_unsaved_run(out: Path) -> None:
    """Remove the checkpoints, metrics and config.json of a run that saved no step.

    Any other folder stays as it is.

    Args:
        out: The folder, of which this process is the only writer.

    Example:
        >>> remove_unsaved_run(Path("no-such-folder"))
    """
    checkpoints = versions(out / CHECKPOINT)
    if has_taken_steps(out / CHECKPOINT) or not any(path.exists() for path in checkpoints):
        return
    config = out / CONFIG
    for path in (*checkpoints, out / METRICS, config, previous(config)):
        path.unlink(missing_ok=True)


def _holds_lines(out: Path) -> bool:
    path = out / METRICS
    return path.exists() and path.stat().st_size > 0
