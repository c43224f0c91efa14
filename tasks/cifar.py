"""CIFAR-10 in memory: 60,000 images of 10 classes (Krizhevsky 2009)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from tasks.cache import cache_dir, download, load_or_build
from tasks.examples import Examples
from tasks.files import Files, content_digest

CLASSES = (
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
PER_CLASS = {"train": 5000, "test": 1000}  # images

URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
ARCHIVE = "cifar-10-binary.tar.gz"
BINARY_FILES = {
    "train": [f"data_batch_{i}.bin" for i in range(1, 6)],
    "test": ["test_batch.bin"],
}
SIDE = 32  # pixels
# Bytes of an image: its class, then its red, its green and its blue plane.
RECORD = 1 + 3 * SIDE**2


def cifar10(data_root: str | Path | None = None) -> tuple[Examples, Examples]:
    """Read CIFAR-10's 50,000 training images and 10,000 test images.

    `data_root`, or its subfolder `cifar10`, holds one of these layouts. The first that is found is
    read:

    1. The official binary version: `data_batch_1.bin` … `data_batch_5.bin` and `test_batch.bin`,
       directly or in `cifar-10-batches-bin/`, or `cifar-10-binary.tar.gz`, which is read without
       being extracted. Images come in the order of the files.
    2. Files class/image in `train.zip` and `test.zip`, or in the folders `train` and `test`.
       Images come in the order of their paths, class by class. They are decoded once and cached by
       the bytes that they were decoded from. Lossy formats differ from the official pixels.

    Args:
        data_root: A folder. If None, the official archive is downloaded into the cache folder.

    Returns:
        The training and the test set: inputs uint8 `[n, 3, 32, 32]`, targets int64 `[n]`, the
        positions in `CLASSES`.

    Raises:
        FileNotFoundError: If `data_root` has none of the layouts, or the download fails.
        ValueError: If the data is damaged, or not 5000 training and 1000 test images of each class.

    Example:
        >>> train, test = cifar10("folder/with/cifar10")  # doctest: +SKIP
        >>> train.inputs.shape, len(test)  # doctest: +SKIP
        (torch.Size([50000, 3, 32, 32]), 10000)
        >>> CLASSES[3], test.counts()[3]  # doctest: +SKIP
        ('cat', 1000)
    """
    source = _download() if data_root is None else _find(Path(data_root))
    if isinstance(source, Path):
        if source.is_file():
            files = _read_archive(source)
        else:
            paths = _binary_paths(source)
            files = {path.name: path.read_bytes() for path in paths}
        train = _from_records(source, files, "train")
        test = _from_records(source, files, "test")
        return train, test

    train_root, test_root = source
    train_files = Files(train_root)
    test_files = Files(test_root)
    # Both are checked before either is decoded, which takes time.
    train_classes = _classes_of_images(train_files, "train")
    test_classes = _classes_of_images(test_files, "test")
    train = _from_images(train_files, train_classes)
    test = _from_images(test_files, test_classes)
    return train, test


def _find(root: Path) -> Path | tuple[Path, Path]:
    """The binary version's folder or archive, else where the training and the test images are."""
    folders = (root, root / "cifar10")
    for folder in folders:
        for place in (folder, folder / "cifar-10-batches-bin"):
            if _binary_paths(place):
                return place
        if (folder / ARCHIVE).is_file():
            return folder / ARCHIVE
    for folder in folders:
        train = _zip_or_folder(folder, "train")
        test = _zip_or_folder(folder, "test")
        if train and test:
            return train, test
    raise FileNotFoundError(
        f"data_root: found no CIFAR-10 in {root}, expected {ARCHIVE} "
        "or the data_batch_1.bin … test_batch.bin extracted from it, "
        "or train.zip and test.zip (or folders) of class/image files, "
        "there or in cifar10/; "
        f"get the archive from {URL}, or leave data_root out to download it"
    )


def _zip_or_folder(folder: Path, part: str) -> Path | None:
    """The images of a part as a zip, else as a folder, or None."""
    for path in (folder / f"{part}.zip", folder / part):
        if path.exists():
            return path
    return None


def _download() -> Path:
    def fetch() -> None:
        from torchvision.datasets.utils import download_url

        # An archive that is there already, with this checksum, is left alone.
        download_url(URL, str(cache_dir()), md5=MD5)

    download("cifar10", fetch, by_hand=f"put {URL} into a folder")
    return cache_dir() / ARCHIVE


def _binary_paths(folder: Path) -> list[Path]:
    """Those of the binary files that lie in a folder."""
    paths = [folder / name for names in BINARY_FILES.values() for name in names]
    return [path for path in paths if path.is_file()]


def _read_archive(source: Path) -> dict[str, bytes]:
    """Those of the binary files that are in the archive, by name."""
    files = Files(source)
    name_of = {path: PurePosixPath(path).name for path in files.paths}
    wanted = {name for names in BINARY_FILES.values() for name in names}
    paths = [path for path, name in name_of.items() if name in wanted]
    doubled = [name for name, count in Counter(map(name_of.get, paths)).items() if count > 1]
    if doubled:
        raise ValueError(
            f"{source}: got {doubled[0]} in two folders, expected {URL}; download it again"
        )
    return {name_of[path]: data for path, data in files.contents(paths)}


def _from_records(source: Path, files: dict[str, bytes], split: str) -> Examples:
    """One split from the records of its binary files."""
    parts = []
    for name in BINARY_FILES[split]:
        data = files.get(name, b"")
        if not data or len(data) % RECORD:
            raise ValueError(
                f"{source}: {name}: got {len(data) or 'no'} bytes, "
                f"expected records of {RECORD}; download {URL} again"
            )
        parts.append(np.frombuffer(data, np.uint8).reshape(-1, RECORD))
    records = np.concatenate(parts)
    targets = records[:, 0].astype(np.int64)
    names = dict(enumerate(CLASSES))
    classes = [names.get(c, f"class {c}") for c in targets.tolist()]
    _check_counts(source, classes, split)
    inputs = np.ascontiguousarray(records[:, 1:]).reshape(-1, 3, SIDE, SIDE)
    return Examples(torch.from_numpy(inputs), torch.from_numpy(targets))


def _classes_of_images(files: Files, split: str) -> list[str]:
    """The class of each image: the name of the folder that it lies in."""
    classes = [PurePosixPath(path).parent.name for path in files.image_paths]
    _check_counts(files.root, classes, split)
    return classes


def _from_images(files: Files, classes: Sequence[str]) -> Examples:
    """One split from its image files, decoded once."""

    def decode() -> dict[str, np.ndarray]:
        images = files.images(files.image_paths, SIDE, color=True)
        return {"images": np.ascontiguousarray(images.transpose(0, 3, 1, 2))}

    digest = content_digest(files.root)
    arrays = load_or_build(f"cifar10-images-1-{digest}", decode)
    targets = torch.tensor([CLASSES.index(name) for name in classes])
    return Examples(torch.from_numpy(arrays["images"]), targets)


def _check_counts(root: Path, classes: Sequence[str], split: str) -> None:
    """Raise unless each class, and no other, has as many images as it has in CIFAR-10."""
    counts = Counter(classes)
    for name in (*CLASSES, *counts):
        expected = PER_CLASS[split] if name in CLASSES else 0
        if counts[name] != expected:
            raise ValueError(
                f"{root}: got {counts[name]} images of {name!r}, "
                f"expected {expected}: "
                f"{PER_CLASS[split]} each of {', '.join(CLASSES)}; "
                "download or extract CIFAR-10 again"
            )
