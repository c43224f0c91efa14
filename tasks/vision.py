"""Whole image data sets in memory, train and test: CIFAR-10 (Krizhevsky 2009) and MNIST (LeCun et al. 1998)."""

from __future__ import annotations

import tarfile
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

from tasks.cache import Arrays, cache_dir, load_or_build
from tasks.examples import Examples
from tasks.files import Files, content_digest
from tasks.folder import SUFFIXES

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
CIFAR10_PER_CLASS = {"train": 5000, "test": 1000}
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
CIFAR10_FILES = {"train": [f"data_batch_{i}.bin" for i in range(1, 6)], "test": ["test_batch.bin"]}
CIFAR10_RECORD = 1 + 3 * 32 * 32  # a label, then the red, the green and the blue plane

MNIST_CLASSES = ("0", "1", "2", "3", "4", "5", "6", "7", "8", "9")
MNIST_FILES = [
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
]


def cifar10(data_root: str | Path | None = None) -> tuple[Examples, Examples]:
    """CIFAR-10's 50,000 training and 10,000 test images, uint8 `[n, 3, 32, 32]`, targets by `CIFAR10_CLASSES`.

    Args:
        data_root: a folder that holds, itself or in `cifar10/`, the first found of

            1. the official binary version: `data_batch_1.bin` … `test_batch.bin`, directly, in
               `cifar-10-batches-bin/` or in `cifar-10-binary.tar.gz` (read without being extracted);
            2. class/image files: `train.zip` and `test.zip`, or the folders `train` and `test`. Copies in a lossy
               format differ from the official pixels; what is decoded is cached by the bytes it came from.

            None downloads the official binary archive into the cache folder.

    Raises:
        FileNotFoundError: no data, and none could be downloaded.
        ValueError: incomplete or damaged data.
    """
    found = _download_cifar10() if data_root is None else _find_cifar10(Path(data_root))
    train, test = _from_binary(found) if isinstance(found, Path) else _from_images(*found)
    return train, test


def mnist(data_root: str | Path | None = None) -> tuple[Examples, Examples]:
    """MNIST's 60,000 training and 10,000 test digits, uint8 `[n, 1, 28, 28]`, strokes 255 on 0, targets 0 … 9.

    Args:
        data_root: a folder that holds, itself or in `mnist/`, the four idx files in `MNIST/raw/`, as torchvision
            leaves them. None downloads them through torchvision into the cache folder.

    Raises:
        FileNotFoundError: no data, and none could be downloaded.
        ValueError: damaged data.
    """
    root = _download_mnist() if data_root is None else _find_mnist(Path(data_root))
    from torchvision.datasets import MNIST

    try:
        train, test = (MNIST(str(root), train=part) for part in (True, False))
    except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"{root / 'MNIST' / 'raw'}: got idx files that cannot be read ({error}); "
            "remove them, and copy or download them again"
        ) from error
    return Examples(train.data[:, None], train.targets), Examples(test.data[:, None], test.targets)


def standardise(examples: Examples, like: Examples | None = None) -> Examples:
    """Inputs uint8 `[n, channels, *size]` as float32 (x/255 − mean)/std, mean and std per channel.

    Args:
        like: whose mean and (population) std to take; None: those of `examples` themselves.

    Raises:
        ValueError: other inputs than uint8, another number of channels, a channel of one value.
    """
    like = examples if like is None else like
    for name, part in (("examples", examples), ("like", like)):
        shape = tuple(part.inputs.shape)
        if (
            part.inputs.dtype != torch.uint8
            or len(shape) < 2
            or shape[1] != examples.inputs.shape[1]
        ):
            raise ValueError(
                f"{name}: got {part.inputs.dtype} of shape {shape}, expected torch.uint8 [n, channels, *size], "
                "both sets of as many channels; give what the loaders return"
            )
    channels = like.inputs.transpose(0, 1).flatten(1)
    frequency = (
        torch.stack([channel.bincount(minlength=256) for channel in channels]).double()
        / channels.shape[1]
    )
    values = torch.arange(256, device=frequency.device, dtype=torch.float64) / 255
    mean = frequency @ values
    std = (frequency * (values - mean[:, None]) ** 2).sum(1).sqrt()
    if (std == 0).any():
        raise ValueError(
            f"like: got channel {int((std == 0).nonzero()[0])} with one value only, expected several; "
            "take mean and std from other examples, or leave the channel out"
        )
    per_channel = (-1, *(1 for _ in examples.inputs.shape[2:]))
    mean, std = (x.to(examples.inputs.device, torch.float32).view(per_channel) for x in (mean, std))
    return Examples(examples.inputs.float().div_(255).sub_(mean).div_(std), examples.targets)


def _find_cifar10(root: Path) -> Path | tuple[Path, Path]:
    """The binary version's folder or archive, or else where the training and the test images lie."""
    folders = (root, root / "cifar10")
    for folder in folders:
        for place in (folder, folder / "cifar-10-batches-bin"):
            if any((place / name).is_file() for names in CIFAR10_FILES.values() for name in names):
                return place
        if (archive := folder / CIFAR10_URL.rsplit("/", 1)[-1]).is_file():
            return archive
    for folder in folders:
        parts = [
            [p for p in (folder / f"{part}.zip", folder / part) if p.exists()]
            for part in CIFAR10_PER_CLASS
        ]
        if all(parts):
            return parts[0][0], parts[1][0]
    raise FileNotFoundError(
        f"data_root: found no CIFAR-10 in {root}, expected cifar-10-binary.tar.gz or the data_batch_1.bin … "
        "test_batch.bin extracted from it, or train.zip and test.zip (or folders) of class/image files, there or in "
        f"cifar10/; get the archive from {CIFAR10_URL}, or leave data_root out to download it"
    )


def _download_cifar10() -> Path:
    def fetch() -> None:
        from torchvision.datasets.utils import download_url

        download_url(
            CIFAR10_URL, str(cache_dir()), md5=CIFAR10_MD5
        )  # leaves alone what is there and whole

    _fetch("cifar10", fetch, f"put {CIFAR10_URL} into a folder")
    return cache_dir() / CIFAR10_URL.rsplit("/", 1)[-1]


def _from_binary(source: Path) -> tuple[Examples, Examples]:
    """Both sets from a folder or the archive of the binary version, in the order of its files."""
    files = _read_archive(source) if source.is_file() else _read_folder(source)
    train, test = (
        _from_records(
            source, {name: files.get(name, b"") for name in names}, CIFAR10_PER_CLASS[part]
        )
        for part, names in CIFAR10_FILES.items()
    )
    return train, test


def _read_folder(source: Path) -> dict[str, bytes]:
    paths = [source / name for names in CIFAR10_FILES.values() for name in names]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def _read_archive(source: Path) -> dict[str, bytes]:
    wanted = {name for names in CIFAR10_FILES.values() for name in names}
    files = {}
    try:
        with tarfile.open(source, "r:gz") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if name in wanted and (file := archive.extractfile(member)):
                    files[name] = file.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"{source}: got an unreadable archive ({error}), expected {CIFAR10_URL}; download it again"
        ) from error
    return files


def _from_records(source: Path, files: dict[str, bytes], each: int) -> Examples:
    for name, data in files.items():
        if not data or len(data) % CIFAR10_RECORD:
            raise ValueError(
                f"{source}: {name}: got {len(data) or 'no'} bytes, expected records of {CIFAR10_RECORD}; "
                f"download {CIFAR10_URL} again"
            )
    records = np.concatenate([np.frombuffer(data, np.uint8) for data in files.values()]).reshape(
        -1, CIFAR10_RECORD
    )
    labels = [
        CIFAR10_CLASSES[c] if c < len(CIFAR10_CLASSES) else f"class {c}" for c in records[:, 0]
    ]
    _check_classes(source, labels, each)
    inputs = np.ascontiguousarray(records[:, 1:]).reshape(-1, 3, 32, 32)
    return Examples(torch.from_numpy(inputs), torch.from_numpy(records[:, 0].astype(np.int64)))


def _from_images(*roots: Path) -> list[Examples]:
    """The sets from folders or zips of class/image files, in the order of their paths: class by class."""
    sources = []
    for root, each in zip(
        roots, CIFAR10_PER_CLASS.values(), strict=True
    ):  # both, before either is decoded
        files = Files(root)
        paths = [path for path in files.paths if path.lower().endswith(SUFFIXES)]
        labels = [PurePosixPath(path).parent.name for path in paths]
        _check_classes(root, labels, each)
        sources.append((files, labels, paths))
    return [_load_images(*source) for source in sources]


def _load_images(files: Files, labels: list[str], paths: list[str]) -> Examples:
    arrays = load_or_build(
        f"cifar10-images-1-{content_digest(files.root)}", lambda: _decode(files, paths)
    )
    targets = torch.tensor([CIFAR10_CLASSES.index(label) for label in labels])
    return Examples(torch.from_numpy(arrays["images"]), targets)


def _check_classes(root: Path, labels: list[str], each: int) -> None:
    """Refuses any other number of images than `each` of CIFAR-10's classes."""
    counts = Counter(labels)
    for label in (*CIFAR10_CLASSES, *counts):
        expected = each if label in CIFAR10_CLASSES else 0
        if counts[label] != expected:
            raise ValueError(
                f"{root}: got {counts[label]} images of {label!r}, expected {expected}: {each} each of "
                f"{', '.join(CIFAR10_CLASSES)}; download or extract CIFAR-10 again"
            )


def _decode(files: Files, paths: list[str]) -> Arrays:
    from tqdm import tqdm

    images = np.empty((len(paths), 32, 32, 3), np.uint8)
    for place, path in zip(
        images, tqdm(paths, desc="decoding images", leave=False, disable=None), strict=True
    ):
        place[:] = files.image(path, 32, color=True)
    return {"images": np.ascontiguousarray(images.transpose(0, 3, 1, 2))}


def _find_mnist(root: Path) -> Path:
    for folder in (root, root / "mnist"):
        if all((folder / "MNIST" / "raw" / name).is_file() for name in MNIST_FILES):
            return folder
    raise FileNotFoundError(
        f"data_root: found no MNIST in {root}, expected {', '.join(MNIST_FILES)} in MNIST/raw/, there or in mnist/; "
        "leave data_root out to download them"
    )


def _download_mnist() -> Path:
    def fetch() -> None:
        from torchvision.datasets import MNIST

        MNIST(str(cache_dir()), download=True)

    try:
        return _find_mnist(cache_dir())
    except FileNotFoundError:
        _fetch("mnist", fetch, f"put {', '.join(MNIST_FILES)} into the MNIST/raw/ of a folder")
        return cache_dir()


def _fetch(name: str, fetch: Callable[[], Any], otherwise: str) -> None:
    try:
        fetch()
    except (ImportError, OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"{name}: could not download it ({error}); {otherwise} and name that as data_root"
        ) from error
