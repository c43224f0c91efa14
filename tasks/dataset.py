"""Few-shot classification of any labelled data set: torchvision's, one of your own, or arrays."""

from __future__ import annotations

import hashlib
import inspect
import warnings
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset

from tasks.arrays import as_array, class_inputs
from tasks.cache import cache_dir, download, progress
from tasks.class_images import ClassImages
from tasks.episodes import Splits
from tasks.folder import splits_of
from tasks.images import fit_square
from tasks.list_files import PARTS, part_called, plain_name
from tasks.pool import ImagePool, check_labels, input_and_label
from tasks.repeats import DIGEST_SIZE, image_digests

PROBES = 8  # inputs that are read twice, to see that they stay the same
EXPECTED = (
    "expected a map-style dataset of pairs (input, label), a pair of arrays (inputs, labels), "
    "a dictionary of either for train, val and test, "
    "or the name of a data set of torchvision, such as CIFAR100"
)
# A dataset whose `__getitem__` is one of these gives the examples of other datasets, unchanged.
PASSING_ON = (Subset.__getitem__, ConcatDataset.__getitem__)


def load(
    *,
    ways: int,
    shots: int,
    queries: int,
    data_root: str | Path | None = None,
    dataset: Any = None,
    split: Mapping[str, Iterable[Any]] | None = None,
    size: int = 84,
    color: bool = True,
    seed: int = 0,
    allow_repeats: bool = False,
) -> Splits:
    """Few-shot tasks of a labelled data set, held in memory. See `tasks.FewShot` for shapes.

    Images, of Pillow or of uint8, become `[3, size, size]` or `[1, size, size]`. Inputs of a float
    type stay as they are, in float32. A label is the name of its class, or its position in the list
    `dataset.classes`, unless all labels stand in this list themselves. In a `ConcatDataset` or a
    `Subset`, however nested, each dataset has its own list. Without lists, equal numbers are one
    class.

    Args:
        ways: The number of classes in a task.
        shots: The number of support images of each class.
        queries: The number of query images of each class.
        data_root: Where torchvision has or downloads its data. If None, the cache folder.
        dataset: A map-style dataset of pairs (input, label), whose further entries are left out.
            Or a pair of arrays: inputs `[n, ...]`, or a list of them, and labels `[n]`. Or a
            dictionary of three of these, called train, val and test, which
            is a split. Or the name of a data set in `torchvision.datasets`, whose training and test
            set are joined.
        split: The classes of train, val and test. If None, and the data set has no split, classes
            are shuffled by `seed` into 64 % train, 16 % validation and 20 % test.
        size: Pixels a side.
        color: Whether images have three channels or one of grey.
        seed: The seed of the shuffle.
        allow_repeats: Whether an image may stand in two splits. Images of one colour always may.
            If False, a warning names images that stand twice in a class. Float inputs
            `[1 or 3, height, width]` are images, too. Features of other shapes may repeat, but not
            an example that a dataset gives twice, as a `Subset` with repeated indices does.

    Raises:
        FileNotFoundError: If the download fails.
        ValueError: If `dataset` or an input is something else, `split` does not fit, a class or an
            image is in two splits, or the classes cannot give such tasks.

    Example:
        >>> import tasks
        >>> features = torch.randn(60, 16)
        >>> labels = torch.arange(60) % 12
        >>> splits = tasks.load("dataset", dataset=(features, labels), ways=2, shots=1, queries=2)
        >>> tasks.EpisodeSampler(splits.train, tasks=4)[0].support[0].shape
        torch.Size([4, 2, 16])
        >>> splits.source
        'the dataset, shuffled by seed 0, since nothing splits the classes'
    """
    root = "the dataset"
    if isinstance(dataset, str):
        root = f"torchvision's {dataset}"
        dataset = _torchvision(dataset, cache_dir() if data_root is None else Path(data_root))
    parts = _parts(dataset)
    read = [_read(part, size, color=color) for part in parts]
    classes = _class_images(root, read)
    if split is not None:
        classes = _divided(classes, split)
    return splits_of(
        "dataset",
        classes,
        ways=ways,
        shots=shots,
        queries=queries,
        seed=seed,
        allow_repeats=allow_repeats,
    )


def _torchvision(name: str, root: Path) -> Any:
    """The training and the test set of one of torchvision's data sets."""
    import torchvision.datasets

    known = getattr(torchvision.datasets, name, None)
    options = inspect.signature(known).parameters if inspect.isclass(known) else {}
    required = {key for key, option in options.items() if option.default is option.empty}
    fits = required == {"root"} and {"train", "download"} <= options.keys()
    if known is None or not fits:
        raise ValueError(
            f"dataset: got {name!r}, expected the name of a data set in torchvision.datasets that "
            "has a training and a test set and needs no other argument, such as CIFAR100; build "
            "others in Python"
        )
    joined: list[Any] = []

    def fetch() -> None:
        joined.extend(known(root, train=train, download=True) for train in (True, False))

    download(
        name, fetch, by_hand=f"put its files into a folder as torchvision.datasets.{name} does"
    )
    return _Joined(joined)


class _Joined(ConcatDataset[Any]):
    """Several datasets with the same classes."""

    @property
    def classes(self) -> Sequence[str]:
        return getattr(self.datasets[0], "classes", ())


def _parts(dataset: Any) -> list[Any]:
    """One data set, or those of train, val and test."""
    if not isinstance(dataset, Mapping):
        return [dataset]
    return _by_part("dataset", dataset)


def _by_part(argument: str, values: Mapping[str, Any]) -> list[Any]:
    """The values of a dictionary in the order of `PARTS`."""
    if not isinstance(values, Mapping):
        raise ValueError(
            f"{argument}: got {values!r}, expected a dictionary from {', '.join(PARTS)} to classes"
        )
    by_part = {part_called(str(key)): value for key, value in values.items()}
    if len(values) != 3 or set(by_part) != {0, 1, 2}:
        raise ValueError(
            f"{argument}: got a dictionary of {', '.join(map(str, values))}, "
            f"expected {', '.join(PARTS)}"
        )
    return [by_part[part] for part in range(3)]


class _Part(NamedTuple):
    """What is read of one data set.

    Attributes:
        inputs: All inputs `[n, ...]` as a pool holds them.
        names: The name of the class of each.
        origins: What tells the examples apart, uint8 `[n, 16]`, equal where a dataset gives one
            example twice. Zeros where nothing is known.
    """

    inputs: np.ndarray
    names: list[str]
    origins: np.ndarray


def _read(dataset: Any, size: int, *, color: bool) -> _Part:
    if _is_pair(dataset):
        inputs, labels = dataset
        array, names = _read_pair(inputs, labels, size, color=color)
        return _Part(array, names, np.zeros((len(names), DIGEST_SIZE), np.uint8))
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise ValueError(f"dataset: got {type(dataset).__name__}, {EXPECTED}")

    rows = []
    labels = []
    for number in progress(range(len(dataset)), "reading the dataset"):
        value, label = input_and_label(dataset[number], number=number)
        rows.append(_input(value, number, size, color=color))
        labels.append(label)
    _warn_if_random(dataset, rows, size, color=color)
    sources = [_source(dataset, number) for number in range(len(labels))]
    names = _names([holder for holder, _ in sources], labels)
    return _Part(_stacked(rows), names, _origins(sources))


def _warn_if_random(dataset: Any, rows: Sequence[np.ndarray], size: int, *, color: bool) -> None:
    """Warn if an input is another one when it is read again."""
    for number, row in enumerate(rows[:PROBES]):
        value, _ = input_and_label(dataset[number], number=number)
        again = _input(value, number, size, color=color)
        if again.tobytes() != row.tobytes():
            warnings.warn(
                f"dataset: input {number} is another one when it is read again, as by a random "
                "transform; each input is read once, and stays as it was then: leave random "
                "transforms out, and give the families to tasks.Augmented or tasks.Distorted",
                stacklevel=4,
            )
            return


def _names(holders: Sequence[Any], labels: Sequence[Any]) -> list[str]:
    """The name of the class of each label, which only the dataset that holds the example knows."""
    positions: dict[int, list[int]] = {}
    for number, holder in enumerate(holders):
        positions.setdefault(id(holder), []).append(number)
    names = [""] * len(labels)
    for numbers in positions.values():
        classes = getattr(holders[numbers[0]], "classes", ())
        own = _class_names([labels[number] for number in numbers], classes)
        for number, name in zip(numbers, own, strict=True):
            names[number] = name
    return names


def _origins(sources: Sequence[tuple[Any, int]]) -> np.ndarray:
    """A hash of the dataset and the position that each example comes from, uint8 `[n, 16]`."""
    texts = [f"{id(holder)} {number}".encode() for holder, number in sources]
    hashes = [hashlib.blake2b(text, digest_size=DIGEST_SIZE).digest() for text in texts]
    return np.frombuffer(b"".join(hashes), np.uint8).reshape(len(texts), DIGEST_SIZE)


def _source(dataset: Any, number: int) -> tuple[Any, int]:
    """The dataset that holds an example, and its position there.

    It lies below what joins or cuts datasets without classes of their own.
    """
    while type(dataset).__getitem__ in PASSING_ON and not hasattr(dataset, "classes"):
        if isinstance(dataset, Subset):
            number = int(dataset.indices[number])
            dataset = dataset.dataset
        else:
            number %= len(dataset)  # a subset may count from the end
            part = bisect_right(dataset.cumulative_sizes, number)
            number -= dataset.cumulative_sizes[part - 1] if part else 0
            dataset = dataset.datasets[part]
    return dataset, number


def _class_names(labels: Sequence[Any], classes: Any) -> list[str]:
    """The name of the class of each label.

    Args:
        labels: Numbers or names.
        classes: A list or dictionary of names by number, in which labels may be positions. Anything
            else, such as the number of classes, names none.

    Raises:
        ValueError: Two numbers have one name, or some numbers have a name and others none.
    """
    if hasattr(classes, "__array__"):
        classes = as_array(classes).tolist()
    is_list = isinstance(classes, Sequence) and not isinstance(classes, str)
    name_of = dict(enumerate(classes)) if is_list else {}
    if isinstance(classes, Mapping):
        name_of = dict(classes)
    known = list(name_of.values())
    if all(label in known for label in set(labels)):
        name_of = {}  # the labels themselves are listed, such as the distinct ones in their order
    _require_all_or_none({label for label in labels if isinstance(label, int)}, name_of)

    label_of: dict[str, int] = {}
    names = []
    for label in labels:
        is_position = isinstance(label, int) and label in name_of
        name = plain_name(str(name_of[label] if is_position else label))
        if isinstance(label, int) and label_of.setdefault(name, label) != label:
            raise ValueError(
                f"dataset: got {name!r} in dataset.classes at {label_of[name]} and {label}, "
                "expected another name for each label; rename one, or merge the labels"
            )
        names.append(name)
    return names


def _require_all_or_none(labels: set[int], name_of: Mapping[int, Any]) -> None:
    """Raise a ValueError if some of these labels have a name and others do not."""
    unnamed = labels - name_of.keys()
    if unnamed and unnamed != labels:
        raise ValueError(
            f"dataset: got labels {min(labels)} … {max(labels)}, but no name for {min(unnamed)} "
            f"in the {len(name_of)} of dataset.classes, expected positions there, from 0 on"
        )


def _is_pair(dataset: Any) -> bool:
    """Whether this is a pair of arrays. A list may also be a dataset of two examples."""
    if not isinstance(dataset, (tuple, list)) or len(dataset) != 2:
        return False
    return isinstance(dataset, tuple) or all(hasattr(part, "__array__") for part in dataset)


def _read_pair(
    inputs: Any,
    labels: Any,
    size: int,
    *,
    color: bool,
) -> tuple[np.ndarray, list[str]]:
    """What `_read` returns, of inputs and labels in arrays or lists."""
    try:
        label_array = as_array(labels)
        if not isinstance(inputs, (list, tuple)):
            inputs = as_array(inputs)
    except ValueError as error:  # they are ragged
        kinds = f"{type(inputs).__name__} and {type(labels).__name__}"
        raise ValueError(f"dataset: got a tuple of {kinds}, {EXPECTED}") from error
    if label_array.shape != (len(inputs),):
        shape = getattr(inputs, "shape", (len(inputs),))
        raise ValueError(
            f"dataset: got inputs of shape {shape} and labels of shape {label_array.shape}, "
            f"expected labels ({len(inputs)},)"
        )
    if len(inputs) == 0:
        raise ValueError("dataset: got no examples, expected several of each class")
    # In an array of strings, a missing label would be the string "nan".
    check_labels("dataset", labels if isinstance(labels, (list, tuple)) else label_array.tolist())
    names = [plain_name(str(label)) for label in label_array.tolist()]
    if isinstance(inputs, np.ndarray):
        return class_inputs("dataset", inputs, size, color=color), names
    rows = [
        _input(value, number, size, color=color)
        for number, value in enumerate(progress(inputs, "reading the dataset"))
    ]
    return _stacked(rows), names


def _input(value: Any, number: int, size: int, *, color: bool) -> np.ndarray:
    """One input as a pool holds it."""
    if hasattr(value, "getexif"):  # an image of Pillow
        try:
            return fit_square(value, size, color=color).transpose(2, 0, 1)
        except ValueError as error:
            raise ValueError(f"dataset: input {number}: {error}") from error
    array = as_array(value)
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    inputs = class_inputs(f"dataset: input {number}", array[None], size, color=color)
    return np.array(inputs.squeeze(0))  # a copy, since a dataset may give one buffer again


def _stacked(rows: Sequence[np.ndarray]) -> np.ndarray:
    """All inputs together. A ValueError says that they differ in type or shape."""
    kinds = {f"{row.dtype} {row.shape}" for row in rows}
    if len(kinds) != 1:
        raise ValueError(
            f"dataset: got inputs of {', '.join(sorted(kinds)) or 'no examples'}, "
            "expected one type and shape; transform all examples alike"
        )
    return np.stack(rows)


def _class_images(root: str, read: Sequence[_Part]) -> ClassImages:
    """The classes of one or three data sets."""
    parts = [sorted(set(part.names)) for part in read]
    classes = [name for part in parts for name in part]
    number = {name: i for i, name in enumerate(classes)}
    if len(number) != len(classes):
        name = next(name for name in classes if classes.count(name) > 1)
        raise ValueError(
            f"dataset: class {name!r} is in two of {', '.join(PARTS)}; "
            "few-shot splits hold whole classes apart"
        )
    labels = np.array([number[name] for part in read for name in part.names])
    order = np.argsort(labels, kind="stable")
    kinds = [f"{part.inputs.dtype} {part.inputs.shape[1:]}" for part in read]
    if len(set(kinds)) > 1:
        kind_of = zip(PARTS, kinds, strict=True)
        raise ValueError(
            f"dataset: got inputs {', '.join(f'{kind} in {part}' for part, kind in kind_of)}, "
            "expected one type and shape; transform the examples of all parts alike"
        )
    inputs = np.concatenate([part.inputs for part in read])[order]
    origins = np.concatenate([part.origins for part in read])[order]
    digests = image_digests(inputs)
    pool = ImagePool.from_sorted(torch.from_numpy(inputs), np.bincount(labels), classes)
    return ClassImages(
        root,
        pool,
        parts,
        divided_by="its parts" if len(parts) == 3 else "",
        digests=digests if len(digests) else origins,
    )


def _divided(classes: ClassImages, split: Mapping[str, Iterable[Any]]) -> ClassImages:
    """The classes divided by a dictionary."""
    class_called = {plain_name(name): name for name in classes.pool.names}
    parts = []
    for values in _by_part("split", split):
        values = as_array(values).tolist() if hasattr(values, "__array__") else values
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise ValueError(f"split: got {values!r} for a part, expected a list of its classes")
        names = [plain_name(str(value)) for value in values]
        unknown = [name for name in names if name not in class_called]
        if unknown:
            raise ValueError(
                f"split: got class {unknown[0]!r}, expected some of {', '.join(class_called)}"
            )
        parts.append(list(dict.fromkeys(class_called[name] for name in names)))
    return replace(classes, parts=parts, divided_by="split=")
