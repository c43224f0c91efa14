"""Few-shot classification of any labelled data set: torchvision's, one of your own, or arrays."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset

from tasks.arrays import class_inputs
from tasks.cache import cache_dir, download, progress
from tasks.class_images import ClassImages
from tasks.episodes import Splits
from tasks.folder import splits_of
from tasks.images import fit_square
from tasks.list_files import PARTS, part_called, plain_name
from tasks.pool import ImagePool
from tasks.repeats import image_digests

EXPECTED = (
    "expected a map-style dataset of pairs (input, label), a pair of arrays (inputs, labels), "
    "a dictionary of either for train, val and test, "
    "or the name of a data set of torchvision, such as CIFAR100"
)


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
    type stay as they are, in float32. A label is the name of its class, or its position in
    `dataset.classes`.

    Args:
        ways: The number of classes in a task.
        shots: The number of support images of each class.
        queries: The number of query images of each class.
        data_root: Where torchvision has or downloads its data. If None, the cache folder.
        dataset: A map-style dataset of pairs (input, label), or a pair of arrays: inputs `[n, ...]`
            and labels `[n]`. Or a dictionary of three of these, called train, val and test, which
            is a split. Or the name of a data set in `torchvision.datasets`, whose training and test
            set are joined.
        split: The classes of train, val and test. If None, and the data set has no split, classes
            are shuffled by `seed` into 64 % train, 16 % validation and 20 % test.
        size: Pixels a side.
        color: Whether images have three channels or one of grey.
        seed: Of the shuffle.
        allow_repeats: Whether an image may stand in two splits. Images of one colour always may.

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
    if known is None or not {"root", "train", "download"} <= options.keys():
        raise ValueError(
            f"dataset: got {name!r}, expected the name of a data set in torchvision.datasets that "
            "has a training and a test set, such as CIFAR100; build others in Python"
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
    by_part = {part_called(str(key)): value for key, value in values.items()}
    if len(values) != 3 or set(by_part) != {0, 1, 2}:
        raise ValueError(
            f"{argument}: got a dictionary of {', '.join(map(str, values))}, "
            f"expected {', '.join(PARTS)}"
        )
    return [by_part[part] for part in range(3)]


def _read(dataset: Any, size: int, *, color: bool) -> tuple[np.ndarray, list[str]]:
    """All inputs `[n, ...]` as a pool holds them, and the name of the class of each."""
    if isinstance(dataset, tuple) and len(dataset) == 2:
        inputs, labels = (np.asarray(array) for array in dataset)
        if labels.shape != (len(inputs),):
            raise ValueError(
                f"dataset: got inputs of shape {inputs.shape} and labels of shape {labels.shape}, "
                f"expected labels ({len(inputs)},)"
            )
        names = [plain_name(str(label)) for label in labels.tolist()]
        return class_inputs("dataset", inputs, size, color=color), names
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        raise ValueError(f"dataset: got {type(dataset).__name__}, {EXPECTED}")

    classes = getattr(dataset, "classes", ())
    rows = []
    names = []
    for number in progress(range(len(dataset)), "reading the dataset"):
        value, label = dataset[number]
        rows.append(_input(value, number, size, color=color))
        array = np.asarray(label)
        if array.size != 1:
            raise ValueError(
                f"dataset: label {number}: got shape {array.shape}, expected one number or name"
            )
        name = array.item()
        is_position = isinstance(name, int) and 0 <= name < len(classes)
        names.append(plain_name(str(classes[name] if is_position else name)))
    shapes = {f"{row.dtype} {row.shape}" for row in rows}
    if len(shapes) != 1:
        raise ValueError(
            f"dataset: got inputs of {', '.join(sorted(shapes)) or 'no examples'}, "
            "expected one type and shape; transform all examples alike"
        )
    return np.stack(rows), names


def _input(value: Any, number: int, size: int, *, color: bool) -> np.ndarray:
    """One input as a pool holds it."""
    if hasattr(value, "getexif"):  # an image of Pillow
        return fit_square(value, size, color=color).transpose(2, 0, 1)
    array = np.asarray(value)
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    inputs = class_inputs(f"dataset: input {number}", array[None], size, color=color)
    return inputs.squeeze(0)


def _class_images(root: str, read: Sequence[tuple[np.ndarray, list[str]]]) -> ClassImages:
    """The classes of one or three data sets."""
    parts = [sorted(set(names)) for _, names in read]
    classes = [name for part in parts for name in part]
    number = {name: i for i, name in enumerate(classes)}
    if len(number) != len(classes):
        name = next(name for name in classes if classes.count(name) > 1)
        raise ValueError(
            f"dataset: class {name!r} is in two of {', '.join(PARTS)}; "
            "few-shot splits hold whole classes apart"
        )
    labels = np.array([number[name] for _, names in read for name in names])
    order = np.argsort(labels, kind="stable")
    inputs = np.concatenate([inputs for inputs, _ in read])[order]
    is_image = inputs.dtype == np.uint8
    pool = ImagePool.from_sorted(torch.from_numpy(inputs), np.bincount(labels), classes)
    return ClassImages(
        root,
        pool,
        parts,
        divided_by="its parts" if len(parts) == 3 else "",
        digests=image_digests(inputs if is_image else inputs[:0]),
    )


def _divided(classes: ClassImages, split: Mapping[str, Iterable[Any]]) -> ClassImages:
    """The classes divided by a dictionary."""
    class_called = {plain_name(name): name for name in classes.pool.names}
    parts = []
    for values in _by_part("split", split):
        names = [plain_name(str(value)) for value in values]
        unknown = [name for name in names if name not in class_called]
        if unknown:
            raise ValueError(
                f"split: got class {unknown[0]!r}, expected some of {', '.join(class_called)}"
            )
        parts.append(list(dict.fromkeys(class_called[name] for name in names)))
    return replace(classes, parts=parts, divided_by="split=")
