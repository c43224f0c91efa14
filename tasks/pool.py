"""Images or features, grouped by class."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset


@dataclass(frozen=True, eq=False)
class ImagePool:
    """Images or features grouped by class. `len` is the number of classes.

    Images are uint8. Features, such as the embeddings of another network, are of a float type.
    Build a pool with `from_sorted` or `from_dataset`. A `subset` shares the images of the whole
    pool and keeps its class numbers.

    Args:
        images: uint8 `[N, channels, height, width]`, or features, float `[N, ...]`.
        starts: The row of the first image of each class, int64 `[classes]`.
        counts: The number of images of each class, int64 `[classes]`.
        names: The name of each class. `Splits` checks by name that no class is in two splits.
        ids: The number of each class in the whole pool, int64 `[classes]`.

    Example:
        >>> images = torch.zeros(5, 1, 8, 8, dtype=torch.uint8)
        >>> pool = ImagePool.from_sorted(images, counts=[2, 3], names=["cat", "dog"])
        >>> pool.images_of(1).shape
        torch.Size([3, 1, 8, 8])
        >>> pool.subset([1]).names
        ('dog',)
    """

    images: Tensor
    starts: np.ndarray
    counts: np.ndarray
    names: tuple[str, ...]
    ids: np.ndarray

    @classmethod
    def from_sorted(
        cls,
        images: Tensor,
        counts: Sequence[int] | np.ndarray,
        names: Iterable[str],
    ) -> ImagePool:
        """A whole pool of images that are sorted by class.

        Args:
            images: uint8 `[N, channels, height, width]`, or features, float `[N, ...]`:
                `counts[0]` of class 0, then `counts[1]` of class 1, and so on.
            counts: The number of images of each class.
            names: The name of each class.

        Raises:
            ValueError: If the images have another type or shape, if counts, names and images
                disagree about the number of classes or images, a count is negative, or two classes
                have one name.
        """
        counts = np.asarray(counts, dtype=np.int64)
        names = tuple(names)
        is_image = images.dtype == torch.uint8 and images.ndim == 4
        is_feature = images.is_floating_point() and images.ndim >= 2
        if not (is_image or is_feature):
            raise ValueError(
                f"images: got {images.dtype} of shape {tuple(images.shape)}, "
                "expected images, torch.uint8 [N, channels, height, width], "
                "or features, float [N, ...]"
            )
        if len(names) != len(counts) or counts.sum() != len(images):
            raise ValueError(
                f"counts: got {len(counts)} classes of {counts.sum()} images in all, "
                f"expected {len(names)} classes (names) "
                f"of {len(images)} images (images)"
            )
        if counts.min(initial=0) < 0:
            raise ValueError(f"counts: got {counts.min()}, expected numbers ≥ 0")
        if len(set(names)) < len(names):
            name, _ = Counter(names).most_common(1)[0]
            raise ValueError(f"names: got {name!r} twice, expected another name for each class")
        return cls(
            images.detach(),
            starts=np.cumsum(counts) - counts,
            counts=counts,
            names=names,
            ids=np.arange(len(names)),
        )

    @classmethod
    def from_dataset(cls, dataset: Dataset[tuple[Any, Any]]) -> ImagePool:
        """A whole pool of the examples of any dataset, sorted by label.

        Args:
            dataset: A map-style dataset of pairs (input, label). Inputs are tensors or arrays of
                one shape: uint8 images `[channels, height, width]`, or float features `[...]`.
                Labels are numbers or names. A label, as text, is the name of its class. Further
                entries of an item, such as its number, are left out. An example that the dataset
                gives twice is there twice, so a task may have it as support and as query.

        Raises:
            ValueError: If the dataset has no length, an item is no pair, inputs are something else,
                differ in shape, or there are none, or a label is missing (None, NaN) or no single
                number or name.

        Example:
            >>> from torch.utils.data import TensorDataset
            >>> dataset = TensorDataset(torch.randn(6, 16), torch.tensor([4, 7, 7, 4, 4, 7]))
            >>> pool = ImagePool.from_dataset(dataset)
            >>> pool.names, pool.counts.tolist()
            (('4', '7'), [3, 3])
        """
        if not isinstance(dataset, Sized):
            raise ValueError(
                f"dataset: got {type(dataset).__name__}, which has no length, expected a map-style "
                "dataset; make a list of its examples"
            )
        values = []
        labels = []
        for number in range(len(dataset)):
            value, label = input_and_label(dataset[number], number=number)
            values.append(_copied(value))
            labels.append(label)
        if len({isinstance(label, str) for label in labels}) > 1:
            labels = [str(label) for label in labels]
        sizes = Counter(labels)
        classes = sorted(sizes)
        order = sorted(range(len(labels)), key=labels.__getitem__)
        try:
            inputs = torch.stack([torch.as_tensor(values[number]) for number in order])
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"dataset: got inputs that do not stack ({error}), "
                "expected one or more tensors of one shape; "
                "give a dataset of images transform=Compose([Resize(...), PILToTensor()])"
            ) from error
        return cls.from_sorted(
            inputs,
            counts=[sizes[label] for label in classes],
            names=map(str, classes),
        )

    def __len__(self) -> int:
        return len(self.names)

    def subset(self, classes: Sequence[int] | np.ndarray) -> ImagePool:
        """The pool of some classes, given by their positions here or by a mask. No image is copied.

        Raises:
            ValueError: If a class is given twice.
            IndexError: If a position is none in this pool, or no integer.
        """
        try:
            positions = np.arange(len(self))[list(classes)]
        except (TypeError, IndexError) as error:
            raise IndexError(
                f"classes: got {classes!r}, expected positions below {len(self)}, or a mask"
            ) from error
        if len(set(positions)) < len(positions):
            raise ValueError(
                f"classes: got {list(classes)}, expected each class once; leave one out"
            )
        return ImagePool(
            images=self.images,
            starts=self.starts[positions],
            counts=self.counts[positions],
            names=tuple(self.names[c] for c in positions),
            ids=self.ids[positions],
        )

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that identify the names of the classes and their images."""
        content = hashlib.sha256()
        for position, name in enumerate(self.names):
            images = self.images_of(position)
            header = f"{name}\n{images.dtype} {tuple(images.shape)}\n"
            content.update(header.encode(errors="surrogatepass"))
            content.update(images.contiguous().view(torch.uint8).numpy().data)
        return content.hexdigest()[:16]

    def images_of(self, position: int) -> Tensor:
        """The images of the class at `position`, `[count, channels, height, width]`."""
        start = self.starts[position]
        return self.images[start : start + self.counts[position]]

    def require_finite(self) -> None:
        """Check that no feature is NaN or Inf, for models that do not fill them in.

        Raises:
            ValueError: One is. The message names the class, and the input among those of the class.
        """
        if not self.images.is_floating_point():
            return
        for position, name in enumerate(self.names):
            is_finite = self.images_of(position).flatten(1).isfinite().all(1)
            if not is_finite.all():
                raise ValueError(
                    f"images: got NaN or Inf in input {int(is_finite.long().argmin())} of class "
                    f"{name!r}, expected finite numbers; leave it out, or fill it in"
                )


def _copied(value: Any) -> Any:
    """An input of its own, since a dataset may give one buffer again."""
    return value.clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def input_and_label(item: Any, *, number: int) -> tuple[Any, Any]:
    """The first two entries of an item of a dataset, the second as a number or name of Python.

    Args:
        item: The input, the label, and further entries, which are left out.
        number: The position of the item, for the message.

    Raises:
        ValueError: If the item is something else, or `check_labels` refuses the label.

    Example:
        >>> input_and_label(("a picture", torch.tensor([7]), "a note"), number=0)
        ('a picture', 7)
    """
    # A dictionary would give its keys, and an array of numbers has no label.
    is_numeric = isinstance(item, np.ndarray) and item.dtype.kind != "O"
    try:
        if is_numeric or isinstance(item, (Mapping, str, Tensor)):
            raise TypeError("not a pair")
        value, label, *_ = item
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"dataset: item {number}: got {type(item).__name__}, expected (input, label); "
            "take the two out of a row, as in [(row['image'], row['label']) for row in dataset]"
        ) from error
    array = np.asarray(label)
    if array.size != 1:
        raise ValueError(
            f"dataset: label {number}: got shape {array.shape}, expected one number or name; "
            "take the argmax of a one-hot label"
        )
    name = array.item()
    check_labels("dataset", [name], first=number)
    return value, name


def check_labels(where: str, labels: Iterable[Any], *, first: int = 0) -> None:
    """Raise a ValueError that names the first label that is None or NaN.

    NaN equals nothing, itself included. So it cannot be the name of a class.

    Args:
        where: The argument or the file, for the message.
        labels: Numbers or names.
        first: The number of the first of these labels.

    Example:
        >>> check_labels("dataset", [2.0, float("nan")])
        Traceback (most recent call last):
            ...
        ValueError: dataset: label 1: got nan, expected a number or name; leave this example out
    """
    for number, label in enumerate(labels, start=first):
        if label is None or label != label:
            raise ValueError(
                f"{where}: label {number}: got {label}, expected a number or name; "
                "leave this example out"
            )
