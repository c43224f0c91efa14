"""The files of a run's checkpoints: the last two and the best, and which of them can be used."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from metaimplicit.plain_state import load_plain
from metaimplicit.training.files import json_types, previous, set_aside, write_atomically
from metaimplicit.training.log import RunLog
from metaimplicit.training.sealed import DamagedFileError, read_sealed, write_sealed

FORMAT = 3
MEMBERS = {"format", "progress", "identity", "rng"}
State = dict[str, Any]
Identity = Mapping[str, Any]  # what a run may not change, by name, in types that JSON has
Select = Literal["last", "best"]


class Loaded(NamedTuple):
    """The state of a checkpoint, its file, and the files before it that cannot be used."""

    state: State
    path: Path
    unusable: list[Path]


def versions(path: Path, select: Select = "last") -> list[Path]:
    """The files of a checkpoint in the order in which they are tried.

    Raises:
        ValueError: `select` is something else.

    Example:
        >>> [version.name for version in versions(Path("checkpoint.pt"))]
        ['checkpoint.pt', 'checkpoint-previous.pt', 'checkpoint-best.pt']
        >>> versions(Path("checkpoint.pt"), "best")[0].name
        'checkpoint-best.pt'
    """
    if select not in get_args(Select):
        raise ValueError(f"select: got {select!r}, expected 'last' or 'best'")
    last = [path, previous(path)]
    return [*last, best(path)] if select == "last" else [best(path), *last]


def best(path: Path) -> Path:
    """Where the checkpoint with the best validation is."""
    return path.with_stem(f"{path.stem}-best")


def write_checkpoint(
    path: Path,
    state: State,
    *,
    is_best: bool = False,
    log: RunLog | None = None,
) -> None:
    """Write a checkpoint atomically. The one before becomes `previous(path)`.

    Args:
        path: The file.
        state: What it holds, in plain containers of tensors, numbers and strings.
        is_best: Whether to write it to `best(path)` as well.
        log: What has to be on the disk before the checkpoint that counts its lines.

    Raises:
        ValueError: The state holds what could not be read again. The first checkpoint is tried.
    """
    # As text, because torch.save looks at each object of the state for its tensors.
    identity = json.dumps(json_types("identity", state["identity"]))
    state = state | {"format": FORMAT, "identity": identity}
    if not path.exists():
        _require_readable(state)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    payload = buffer.getbuffer()
    if is_best:
        # A run that is killed between the two writes takes the best step again.
        write_sealed(best(path), payload)
    sync = None if log is None else log.sync
    write_sealed(path, payload, keep=previous(path), before_rename=sync)


def read_checkpoint(
    path: Path, identity: Identity | None, device: torch.device, select: Select = "last"
) -> Loaded:
    """Read the first version of a checkpoint that is whole and belongs to the run.

    A warning says so if it is not the selected one.

    Args:
        path: The last checkpoint.
        identity: What the checkpoint's own identity must be. If None, it is not compared.
        device: Where the tensors go.
        select: Which version to try first.

    Raises:
        FileNotFoundError: There is no version.
        ValueError: None is whole and belongs to the run. The message is about the first.
    """
    problems: list[Exception] = []
    unusable = []
    selected, *others = versions(path, select)
    for version in (selected, *others):
        try:
            state = _read(version, identity, device)
        except FileNotFoundError:
            if version == selected:
                problems.append(FileNotFoundError(f"checkpoint: {version} is missing"))
        except ValueError as error:
            problems.append(error)
            unusable.append(version)
        else:
            if problems:
                step = state["progress"]["step"]
                warnings.warn(
                    f"{problems[0]}; {version.name}, of step {step}, is used instead",
                    stacklevel=2,
                )
            return Loaded(state, version, unusable)
    for problem in problems:
        if isinstance(problem, ValueError):
            raise problem
    raise FileNotFoundError(f"checkpoint: found no {path}; give a folder that a run has written to")


def has_taken_steps(path: Path) -> bool:
    """Whether a version of a checkpoint is of a later step than 0, or cannot be read.

    Example:
        >>> has_taken_steps(Path("no-such-folder", "checkpoint.pt"))
        False
    """
    for version in versions(path):
        try:
            state = _read(version, None, torch.device("cpu"))
        except FileNotFoundError:
            continue
        except ValueError:
            return True
        if state["progress"]["step"] > 0:
            return True
    return False


def repair(path: Path, loaded: Loaded) -> None:
    """Set the versions aside that cannot be used, and put a copy of the used one in their place."""
    for version in loaded.unusable:
        set_aside(version)
    if loaded.path != path:
        content = loaded.path.read_bytes()
        write_atomically(path, lambda file: file.write(content))


def _require_readable(state: State) -> None:
    buffer = io.BytesIO()
    # Tensors can be read. They may be large.
    torch.save(tree_map_only(Tensor, lambda tensor: torch.empty(0), state), buffer)
    try:
        load_plain(buffer.getvalue(), "cpu")
    except ValueError as error:
        raise ValueError(
            f"checkpoint: the state of the run could not be read again ({error}), expected "
            "containers of tensors, numbers, strings and arrays; change what the state_dict of "
            "the sampler or the optimiser returns"
        ) from error


def _read(path: Path, identity: Identity | None, device: torch.device) -> State:
    payload = read_sealed(path)
    try:
        state = load_plain(payload, device)
    except ValueError as error:
        raise DamagedFileError(f"checkpoint: {path} is no checkpoint ({error})") from error
    if not (isinstance(state, dict) and set(state) >= MEMBERS):
        raise DamagedFileError(f"checkpoint: {path} is no checkpoint of a run")
    if state["format"] != FORMAT:
        raise ValueError(
            f"checkpoint: {path} has format {state['format']}, expected {FORMAT}; "
            "use the version that wrote it"
        )
    state["identity"] = json.loads(state["identity"])
    if identity is not None:
        _require_same_identity(state["identity"], identity, path)
    return state


def _require_same_identity(stored: Identity, given: Identity, path: Path) -> None:
    given = json_types("identity", given)
    names = [name for name in {**stored, **given} if stored.get(name) != given.get(name)]
    if not names:
        return
    # Where options differ, they say more than the numbers that runs are given.
    telling = [name for name in names if name != "run"] or names
    changes = [f"{name} is {stored.get(name)} there, {given.get(name)} here" for name in telling]
    raise ValueError(
        f"checkpoint: {path} is of another run, or this run was changed: {'; '.join(changes[:5])}"
    )
