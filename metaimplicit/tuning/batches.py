"""Training batches: their parts, by one rule, and an endless stream of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metaimplicit.labels import SHORT_INTEGERS
from metaimplicit.task_axis import map_tensors
from metaimplicit.tensors import recordable, tensors_in, with_known_types

Source = Callable[[int], Any] | Iterable[Any]
Batch = dict[str, Any]


class NamedInputs(dict[str, Any]):
    """The entries of a batch that are neither targets nor index, which are its inputs.

    Example:
        >>> NamedInputs(input_ids=1)
        {'input_ids': 1}
    """


TARGETS = ("targets", "target", "labels", "label", "y")
INDEX = ("index", "idx")


def split_batch(data: Any) -> Batch:
    """Take a batch apart into what goes into the model, what goes into the loss, and numbers.

    The rule is:

    - A tuple or list is `(inputs, targets)` or `(inputs, targets, index)`.
    - A mapping, a dataclass or a named tuple with an entry `targets`, `target`, `labels`, `label`
      or `y` has its targets there, and the index, if any, in `index` or `idx`. Its inputs are its
      entry `inputs`, if there is one, and the other entries are left to variables that ask for
      them. Else its inputs are all its other entries, which the model receives by their names.

    The index holds the numbers of the examples in the training set, integers `[m]`. Arrays become
    tensors, and tensors that autograd cannot record (of `inference_mode`) are copied.

    Returns:
        A dict with `"inputs"`, `"targets"`, `"index"` and other entries, as far as the batch has
        them.

    Raises:
        ValueError: The batch has none of these forms, or its third part is not an index.

    Example:
        >>> import torch
        >>> labels = torch.tensor([1, 0])
        >>> batch = split_batch({"input_ids": torch.ones(2, 5), "labels": labels})
        >>> list(batch), list(batch["inputs"]), batch["targets"] is labels
        (['targets', 'inputs'], ['input_ids'], True)
        >>> list(split_batch((torch.ones(2, 5), labels, torch.arange(2))))
        ['inputs', 'targets', 'index']
    """
    entries = _entries_by_name(data)
    if entries is not None:
        return _split_entries(entries)
    if isinstance(data, (tuple, list)) and len(data) in (2, 3):
        parts = [_plain(part) for part in data]
        batch = dict(zip(("inputs", "targets", "index")[: len(parts)], parts, strict=True))
        if len(data) == 3:
            batch["index"] = _read_index(batch["index"])
        return batch
    got = type(data).__name__
    if isinstance(data, (tuple, list)):
        got = f"{got} of {len(data)}"
    raise ValueError(
        f"batch: got a {got}, expected (inputs, targets), (inputs, targets, index), or a mapping "
        f"with one of the entries {', '.join(TARGETS)}; write several inputs as "
        "((first, second), targets)"
    )


def batch_entry(batch: Batch, name: str) -> Any:
    """An entry of a batch that `split_batch` took apart.

    Raises:
        ValueError: The batch does not have it.

    Example:
        >>> batch_entry({"inputs": 1.0, "targets": 2.0}, "targets")
        2.0
    """
    if name in batch:
        return batch[name]
    hint = f"; its name is one of {', '.join(TARGETS)}" if name == "targets" else ""
    raise ValueError(
        f"batch: got one with the entries {sorted(batch)}, expected one with {name}{hint}"
    )


def holds_tensors_directly(data: Any) -> bool:
    """Whether this is a list such as `[inputs, targets]`, which is one batch and not several.

    Example:
        >>> import torch
        >>> x, y = torch.ones(2, 3), torch.ones(2)
        >>> holds_tensors_directly([x, y]), holds_tensors_directly([(x, y), (x, y)])
        (True, False)
    """
    return isinstance(data, list) and any(isinstance(part, (Tensor, np.ndarray)) for part in data)


def check_source(name: str, source: Any) -> None:
    """Raise ValueError for what is one batch, or nothing that has batches.

    Example:
        >>> check_source("train", {"x": torch.ones(2)})
        Traceback (most recent call last):
        ...
        ValueError: train: got dict, expected a loader, a list of batches, or a function of a \
batch's number; wrap one batch that serves all steps in a list, [batch]
    """
    is_batch = isinstance(source, (Mapping, Tensor, np.ndarray))
    if is_batch or not (callable(source) or isinstance(source, Iterable)):
        raise ValueError(
            f"{name}: got {type(source).__name__}, expected a loader, a list of batches, or a "
            "function of a batch's number; wrap one batch that serves all steps in a list, [batch]"
        )


def read_batches(source: Source, *, first: int) -> Iterator[Any]:
    """Yield the batches of a source without end.

    Args:
        source: A function of the batch's number, or an iterable such as a loader, which is iterated
            again whenever it ends.
        first: The number at which a function starts. An iterable starts at its beginning.

    Raises:
        ValueError: An iteration over the iterable yields no batch.

    Example:
        >>> batches = read_batches(["a", "b"], first=0)
        >>> [next(batches) for _ in range(3)]
        ['a', 'b', 'a']
    """
    if callable(source):
        number = first
        while True:
            yield source(number)
            number += 1
    while True:
        empty = True
        for batch in source:
            empty = False
            yield batch
        if empty:
            raise ValueError(
                "batches: got an iterable without any, or one that is used up, expected a loader"
            )


def take_batches(batches: Iterator[Any], count: int) -> list[Any]:
    """The next batches, which are held at once.

    Raises:
        ValueError: The tensors of one of them were written to while later ones were read, as by a
            loader that fills the same tensors again. Views are not looked at.

    Example:
        >>> take_batches(iter("abc"), 2)
        ['a', 'b']
    """
    taken = []
    versions = []
    for _ in range(count):
        taken.append(next(batches))
        versions.append(_counts_of_writes(taken[-1]))
    if versions != [_counts_of_writes(batch) for batch in taken]:
        raise ValueError(
            "batches: got a loader that writes into tensors which it has given already, expected "
            f"new ones, because a step holds {count} batches at once; yield copies (x.clone())"
        )
    return taken


def _counts_of_writes(batch: Any) -> list[int]:
    """Of a view, the writes to other parts of its memory count as well, so it is left out."""
    return [x._version for x in tensors_in(batch) if not (x.is_inference() or x._is_view())]


def _plain(part: Any) -> Any:
    """A part of a batch whose tensors autograd can record."""
    if isinstance(part, Tensor):
        return recordable(part)
    return map_tensors(recordable, with_known_types(part))


def _entries_by_name(data: Any) -> dict[str, Any] | None:
    """The entries of a mapping, or of an object whose fields name its targets; else None."""
    if hasattr(data, "keys") and hasattr(data, "__getitem__"):
        return {str(name): data[name] for name in data.keys()}  # noqa: SIM118  (not only of dicts)
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        names: tuple[str, ...] = data._fields
    elif is_dataclass(data) and not isinstance(data, type):
        names = tuple(field.name for field in fields(data))
    else:
        return None
    named = {name: getattr(data, name) for name in names}
    return named if set(named) & set(TARGETS) else None


def _split_entries(entries: dict[str, Any]) -> Batch:
    batch: Batch = {}
    for part, names in {"targets": TARGETS, "index": INDEX}.items():
        present = [name for name in names if name in entries]
        if len(present) > 1 and present[0] != part:
            raise ValueError(
                f"batch: got the entries {present}, of which each may be its {part}, expected one "
                f"of them, or one of the name {part}"
            )
        if present:
            batch[part] = _plain(entries.pop(present[0]))
    entries = {name: _plain(entry) for name, entry in entries.items()}
    if "index" in batch:
        batch["index"] = _read_index(batch["index"])
    # Without an entry "inputs", every entry that is left is an input.
    if entries and "inputs" not in entries:
        entries = {"inputs": NamedInputs(entries)}
    return {**batch, **entries}


def _read_index(index: Any) -> Tensor:
    """The numbers of the examples, int64 `[m]`."""
    if (
        isinstance(index, Tensor)
        and index.dim() == 1
        and index.dtype in (torch.int64, *SHORT_INTEGERS)
    ):
        return index.long()
    got = type(index).__name__
    if isinstance(index, Tensor):
        got = f"{index.dtype} of shape {tuple(index.shape)}"
    raise ValueError(
        f"batch: got {got} as its index, expected the numbers of its examples, int64 [m]; a tuple "
        "of three is (inputs, targets, index), and ((first, second), targets) has two inputs"
    )
