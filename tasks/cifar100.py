"""CIFAR-100's classes (Krizhevsky 2009), of which CIFAR-FS and FC100 are made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tasks.arrays import class_inputs, read_file
from tasks.cache import Arrays, cache_dir, download, load_or_build
from tasks.class_images import ClassImages, divide, read_class_images
from tasks.files import Files
from tasks.pickles import load_plain
from tasks.pool import ImagePool
from tasks.repeats import image_digests

URL = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz"
MD5 = "eb9058c3a382ffc7106e4002c42a8d85"
ARCHIVE = "cifar-100-python.tar.gz"
FOLDER = "cifar-100-python"
PICKLES = ("meta", "train", "test")
SIDE = 32  # pixels

SUPERCLASSES = {
    "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}
CLASSES = tuple(sorted(name for names in SUPERCLASSES.values() for name in names))


def read_cifar_classes(
    data_root: str | Path | None,
    split_lists: str | Path | None,
    size: int,
) -> ClassImages:
    """The classes of CIFAR-FS or FC100, in any layout.

    Args:
        data_root: A folder or archive of CIFAR-100 as it is published, or in any of the layouts of
            the `folder` family. If None, CIFAR-100 is downloaded into the cache folder.
        split_lists: The folder or archive of lists of classes, if they lie elsewhere.
        size: Pixels a side.

    Raises:
        FileNotFoundError: If there is nothing at `data_root`, or the download fails.
        ValueError: If the data is damaged.
    """
    root = _download() if data_root is None else Path(data_root)
    source = _find(root)
    if source is None:
        return read_class_images(
            root,
            size=size,
            color=True,
            split_lists=split_lists,
        )
    classes = _read(source, size)
    if split_lists is None:
        return classes
    # On the command line, the name 2024 of a folder is read as a number.
    return divide(classes, Files(Path(str(split_lists))), required=True)


def _find(root: Path) -> Path | None:
    """CIFAR-100's archive or the folder extracted from it, or None if it is neither."""
    places = (root, root / FOLDER, root / ARCHIVE)
    for place in places:
        is_archive = place.name == ARCHIVE and place.is_file()
        if is_archive or all((place / name).is_file() for name in PICKLES):
            return place
    return None


def _read(source: Path, size: int) -> ClassImages:
    """The 100 classes of 600 images, first those of the training set."""
    files = Files(source)
    path_of = {path.rsplit("/", 1)[-1]: path for path in files.paths}
    missing = [name for name in PICKLES if name not in path_of]
    if missing:
        raise ValueError(f"{source}: has no {', '.join(missing)}; download {URL} again")

    def read() -> Arrays:
        (names,) = _entries(files, path_of["meta"], "fine_label_names")
        parts = [
            _entries(
                files,
                path_of[name],
                "data",
                "fine_labels",
            )
            for name in ("train", "test")
        ]
        pixels, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        order = np.argsort(labels, kind="stable")
        images = pixels.reshape(-1, 3, SIDE, SIDE)[order]
        inputs = class_inputs(str(source), images, size, color=True)
        return {
            "images": inputs,
            "names": np.asarray(names),
            "counts": np.bincount(labels, minlength=len(names)),
            "digests": image_digests(inputs),
        }

    stamp = files.stamp([path_of[name] for name in PICKLES])
    arrays = load_or_build(f"cifar100-1-{size}", read, stamp)
    names = arrays["names"].tolist()
    pool = ImagePool.from_sorted(torch.from_numpy(arrays["images"]), arrays["counts"], names)
    return ClassImages(
        source,
        pool,
        [names],
        divided_by="",
        digests=arrays["digests"],
    )


def _entries(files: Files, path: str, *names: str) -> list[Any]:
    """Some entries of a pickled dictionary."""
    content = read_file(files, path, load_plain)
    if not isinstance(content, Mapping) or not set(names) <= content.keys():
        raise ValueError(
            f"{files.root}: {path}: has no {' or no '.join(names)}; download {URL} again"
        )
    return [content[name] for name in names]


def _download() -> Path:
    def fetch() -> None:
        from torchvision.datasets.utils import download_url

        # An archive that is there already, with this checksum, is left alone.
        download_url(URL, str(cache_dir()), md5=MD5)

    download("CIFAR-100", fetch, by_hand=f"put {URL} into a folder")
    return cache_dir() / ARCHIVE
