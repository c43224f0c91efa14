"""Images and features in the arrays of pickles, `.npz`, `.npy` and `.pt` files, by class."""

from __future__ import annotations

import contextlib
import io
import pickle
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch

from tasks.cache import progress
from tasks.files import Files
from tasks.images import fit_square
from tasks.list_files import PART_WORDS, PARTS, part_called
from tasks.pickles import foreign_name, load_plain, numpy_stand_ins
from tasks.pool import check_labels

LABELS = ("labels", "label", "targets", "target", "y", "label_specific")
ARRAY_LAYOUT = (
    "expected an array and its class_dict, an array and its labels, or an array for each class"
)

Content = dict[str, Any]  # what the files of one part hold, by name
ClassArrays = dict[str, np.ndarray]  # the inputs of each class, by its name


def _load_numpy(data: bytes) -> Any:
    loaded = np.load(io.BytesIO(data), allow_pickle=False)
    return loaded if isinstance(loaded, np.ndarray) else dict(loaded)


def _load_torch(data: bytes) -> Any:
    try:
        with torch.serialization.safe_globals(numpy_stand_ins()):
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # PyTorch advises to load the file without this check, which would run its code.
        if name := re.search(r"GLOBAL (\S+)", str(error)):
            raise foreign_name(name[1]) from error
        if reason := re.search(r"WeightsUnpickler error:\s+(.+)", str(error)):
            raise pickle.UnpicklingError(reason[1]) from error
        raise


# What reads a file, by its suffix. None of them runs code that the file holds.
READERS: dict[str, Callable[[bytes], Any]] = {
    ".pkl": load_plain,
    ".pickle": load_plain,
    ".npz": _load_numpy,
    ".npy": _load_numpy,
    ".pt": _load_torch,
    ".pth": _load_torch,
}


def array_paths(files: Files) -> list[str]:
    """The paths that end in one of the suffixes of `READERS`."""
    return [path for path in files.paths if _suffix(path) in READERS]


def array_classes(files: Files, size: int, *, color: bool) -> list[ClassArrays]:
    """The inputs of each class in the files of arrays: one part, or train, validation and test.

    Args:
        files: What holds the files. Folders called after all three parts tell the part of the
            files in them. Without them, the words train, val (or valid, validation) and test in a
            file's name do, or else those in its folder's. Where they occur, files without them, or
            with those of two parts, are passed over. One of them in the name of a single file among
            several is that of an ordinary class.
        size: Pixels a side of an image.
        color: Whether images have three channels or one of grey.

    Returns:
        For each part, images uint8 `[n, channels, size, size]` or features float32 `[n, ...]`.

    Raises:
        ValueError: If a file cannot be read or does not fit, or a part has no file.
    """
    paths_of: dict[frozenset[int], list[str]] = defaultdict(list)
    # A class in the folder train may be called test-tube.
    folders = frozenset().union(*map(_parts_of_folders, array_paths(files)))
    parts_of = _parts_of_folders if len(folders) == len(PARTS) else _parts_in_name
    for path in array_paths(files):
        paths_of[parts_of(path)].append(path)
    groups = [paths_of.get(frozenset([part]), []) for part in range(len(PARTS))]
    named = [path for paths in groups for path in paths]
    if not named:
        groups = [paths_of.get(frozenset(), [])]
    elif len(named) == 1 and len(array_paths(files)) > len(PARTS):
        groups = [array_paths(files)]
    if not all(groups):
        raise ValueError(
            f"data_root: got files of arrays {named or array_paths(files)} in {files.root}, "
            f"expected one or more of each of {', '.join(PARTS)}"
        )

    parts = []
    for paths in groups:
        listed = ", ".join(paths if len(paths) <= 3 else [paths[0], "…", paths[-1]])
        where = f"{files.root}: {listed}"
        content = _content(files, paths, is_part=len(groups) == len(PARTS))
        classes = _classes(where, content)
        parts.append(
            {
                name: class_inputs(f"{where}: class {name!r}", array, size, color=color)
                for name, array in progress(classes.items(), f"reading {paths[0]}")
            }
        )
    return parts


def read_file(files: Files, path: str, reader: Callable[[bytes], Any]) -> Any:
    """What a reader makes of one of the files.

    Raises:
        ValueError: If it cannot read the file.
    """
    data = files.read(path)
    try:
        return reader(data)
    except MemoryError:
        raise
    except Exception as error:  # A damaged file can raise any.
        reason = str(error).split("\n")[0]
        raise ValueError(
            f"{files.root}: {path}: got {len(data)} bytes that cannot be read ({reason}), "
            "expected arrays, dictionaries, lists, strings and numbers; "
            "download it again, or save it in this form"
        ) from error


def class_inputs(where: str, array: np.ndarray, size: int, *, color: bool) -> np.ndarray:
    """The images or features of a class as a pool holds them.

    Args:
        where: The file and the class, for the message.
        array: Images, uint8 `[n, height, width]`, `[n, height, width, channels]` or `[n, channels,
            height, width]` with 1 or 3 channels, or features, float `[n, ...]`.
        size: Pixels a side.
        color: Whether images have three channels or one of grey.

    Returns:
        Images, uint8 `[n, channels, size, size]`, or features, float32 `[n, ...]`.

    Raises:
        ValueError: If the array is neither.
    """
    if array.dtype.kind == "f" and array.ndim >= 2:
        return array.astype(np.float32, copy=False)
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim == 4 and array.shape[3] not in (1, 3) and array.shape[1] in (1, 3):
        array = array.transpose(0, 2, 3, 1)  # the channels last
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3):
        raise ValueError(
            f"{where}: got {array.dtype} of shape {array.shape}, "
            "expected images, uint8 [n, height, width, 1 or 3], or features, float [n, ...]"
        )
    channels = 3 if color else 1
    if array.shape[1:] != (size, size, channels):
        from PIL import Image

        # Pillow takes greys without the axis of their one channel.
        pixels = array[..., 0] if array.shape[3] == 1 else array
        images = map(Image.fromarray, pixels)
        array = np.stack([fit_square(image, size, color=color) for image in images])
    return array.transpose(0, 3, 1, 2)


def _suffix(path: str) -> str:
    return PurePosixPath(path).suffix.lower()


def _parts_of_folders(path: str) -> frozenset[int]:
    """The parts that folders of a path are called after."""
    called = map(part_called, path.split("/")[:-1])
    return frozenset(part for part in called if part is not None)


def _parts_in_name(path: str) -> frozenset[int]:
    """The parts whose words are in the name of a file, or else in that of its nearest folder."""
    for name in reversed(path.lower().split("/")):
        words = re.split(r"[^a-z]+", name)
        parts = frozenset(PART_WORDS[word] for word in words if word in PART_WORDS)
        if parts:
            return parts
    return frozenset()


def _content(files: Files, paths: Sequence[str], *, is_part: bool) -> Content:
    """The entries of some files together."""
    entries = [
        (path, name, value)
        for path in paths
        for name, value in _entries(files, path, is_part=is_part)
    ]
    if not any(name == "class_dict" or _is_called_labels(name) for _, name, _ in entries):
        _check_one_array_a_class(files, Counter(path for path, _, _ in entries))
    content: Content = {}
    for path, name, value in entries:
        if name in content:
            raise ValueError(
                f"{files.root}: {path}: {name!r} is in another file too, "
                "expected it once; move one of them"
            )
        content[name] = value
    return content


def _check_one_array_a_class(files: Files, arrays_in: Mapping[str, int]) -> None:
    """Raise if several folders hold several arrays, as where each example has a file of its own.

    The rows of an example would be taken for the examples of a class.

    Args:
        files: For the message.
        arrays_in: How many arrays each file holds.
    """
    paths_in: dict[str, list[str]] = defaultdict(list)
    for path, number in arrays_in.items():
        if number == 1:
            paths_in[path.rpartition("/")[0]].append(path)
    crowded = [paths for paths in paths_in.values() if len(paths) > 1]
    if len(crowded) > 1:
        raise ValueError(
            f"{files.root}: got several arrays in each of several folders, such as "
            f"{crowded[0][0]} and {crowded[1][0]}, expected one array [n, ...] for each class; "
            "stack those of a class into one file, or put the arrays of all classes into one folder"
        )


def _entries(files: Files, path: str, *, is_part: bool) -> Iterator[tuple[str, Any]]:
    """The named values in one file. A single array has the name of its file.

    Args:
        files: What holds the file.
        path: The file.
        is_part: Whether words in names tell the part, so that they are no part of a class's name.
    """
    value = read_file(files, path, READERS[_suffix(path)])
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield str(name), entry
    elif _is_pair(value):
        yield "inputs", value[0]
        yield "labels", value[1]
    else:
        words = re.split(r"[-_.\s]+", PurePosixPath(path).stem)
        kept = [word for word in words if not (is_part and word.lower() in PART_WORDS)]
        yield "_".join(kept) or "inputs", value


def _is_pair(value: Any) -> bool:
    """Whether this is inputs and their labels. A list may also be the two examples of a class."""
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        return False
    inputs, labels = map(_array, value)
    are_alike = inputs.ndim >= 2 and labels.shape == inputs.shape[:1]
    return isinstance(value, tuple) or are_alike


def _classes(where: str, content: Content) -> ClassArrays:
    """The raw inputs of each class, from any of the three forms in `ARRAY_LAYOUT`."""
    arrays = {name: _array(value) for name, value in content.items()}
    large = {name: array for name, array in arrays.items() if array.ndim >= 2}
    called_labels = [name for name in arrays if _is_called_labels(name)]
    labels = [name for name in called_labels if not _is_class(arrays[name], large)]
    if "class_dict" not in content and not labels:
        _check_no_parts(where, arrays)
        if len(large) < 2:
            raise ValueError(f"{where}: got {sorted(content)}; {ARRAY_LAYOUT}")
        return large

    if len(large) != 1:
        raise ValueError(
            f"{where}: got {sorted(large) or 'no array'} beside the classes, "
            "expected one array of two or more axes, [n, ...]"
        )
    (inputs,) = large.values()
    if "class_dict" in content:
        rows = _rows_of_dict(where, content["class_dict"])
    else:
        _check_one_labelling(where, {name: arrays[name] for name in labels})
        rows = _rows_of_labels(where, content[labels[0]], len(inputs))
    _check_rows(where, rows, len(inputs))
    return {name: _rows(inputs, numbers) for name, numbers in rows.items()}


def _check_no_parts(where: str, names: Iterable[str]) -> None:
    """Raise if names are those of the labels of a part, such as y_train."""
    for name in names:
        words = re.split(r"[-_.\s]+", name)
        kept = [word for word in words if word.lower() not in PART_WORDS]
        if len(kept) < len(words) and _is_called_labels("_".join(kept)):
            raise ValueError(
                f"{where}: got {name!r}, the labels of one of several parts, expected inputs and "
                "labels of one part in a file; save each part in a file of its own, such as "
                f"{', '.join(f'{part}.npz' for part in PARTS)}"
            )


def _is_called_labels(name: str) -> bool:
    return name.lower() in LABELS


def _check_one_labelling(where: str, labels: ClassArrays) -> None:
    """Raise if arrays that are called as labels are differ."""
    first, *others = labels
    for other in others:
        if not np.array_equal(labels[first], labels[other]):
            raise ValueError(
                f"{where}: got labels in {first!r} and others in {other!r}, expected one of them; "
                "leave one out, or rename it"
            )


def _is_class(array: np.ndarray, large: ClassArrays) -> bool:
    """Whether an array that is called as labels are is a class, such as y among the letters."""
    kinds = {(other.dtype, other.shape[1:]) for other in large.values()}
    return array.ndim >= 2 and len(large) > 2 and len(kinds) == 1


def _rows(inputs: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Some rows, without a copy if they follow each other, as they mostly do."""
    run = slice(int(numbers[0]), int(numbers[0]) + len(numbers))
    is_run = np.array_equal(numbers, np.arange(run.start, run.stop))
    rows: np.ndarray = inputs[run if is_run else numbers]
    return rows


def as_array(value: Any) -> np.ndarray:
    """A tensor, list or array as an array.

    Example:
        >>> as_array(torch.ones(2, dtype=torch.bfloat16, requires_grad=True))
        array([1., 1.], dtype=float32)
    """
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().to_dense()
        # NumPy has no bfloat16.
        if value.is_floating_point() and value.itemsize < 4:
            value = value.float()
    return np.asarray(value)


def _array(value: Any) -> np.ndarray:
    """A tensor, list or array as an array. Of anything else, or a ragged list, one without axes."""
    if isinstance(value, (list, tuple)) or hasattr(value, "__array__"):
        with contextlib.suppress(ValueError):
            return as_array(value)
    return np.zeros(())


def _rows_of_dict(where: str, class_dict: Any) -> ClassArrays:
    if not isinstance(class_dict, Mapping):
        raise ValueError(
            f"{where}: got class_dict of type {type(class_dict).__name__}, "
            "expected a dictionary from each class to its rows"
        )
    return {str(name): _array(rows) for name, rows in class_dict.items()}


def _rows_of_labels(where: str, labels: Any, n: int) -> ClassArrays:
    array = _array(labels)
    if array.shape != (n,):
        raise ValueError(f"{where}: got labels of shape {array.shape}, expected ({n},), as inputs")
    # In an array of strings, a missing label would be the string "nan".
    check_labels(where, labels if isinstance(labels, (list, tuple)) else array.tolist())
    names, numbers = np.unique(array, return_inverse=True)
    return {str(name): np.flatnonzero(numbers == i) for i, name in enumerate(names)}


def _check_rows(where: str, rows: ClassArrays, n: int) -> None:
    """Raise unless every class has rows of its own among the n inputs."""
    used = np.zeros(n, np.int64)
    for name, numbers in rows.items():
        if numbers.ndim != 1 or len(numbers) == 0 or numbers.dtype.kind not in "iu":
            raise ValueError(
                f"{where}: class {name!r} has no rows, expected one or more row numbers; "
                "remove the class, or give it inputs"
            )
        if numbers.min() < 0 or numbers.max() >= n:
            raise ValueError(
                f"{where}: class {name!r} has rows {numbers.min()} … {numbers.max()}, "
                f"expected them in 0 … {n - 1}, as there are {n} inputs"
            )
        np.add.at(used, numbers, 1)
    # An input that is there twice could be in both support and query.
    if (used > 1).any():
        raise ValueError(f"{where}: row {int(used.argmax())} is listed twice; list every row once")
