"""Few-shot classification of Omniglot: characters of 50 alphabets, drawn by hand.

There are 1623 characters, each drawn by 20 people (Lake et al. 2015).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from tasks.cache import Arrays, cache_dir, download, load_or_build
from tasks.episodes import Splits
from tasks.few_shot import few_shot_splits
from tasks.files import Files, content_digest
from tasks.pool import ImagePool

SIDE = 28  # pixels
DRAWINGS = 20  # images of a character
CHARACTERS = {"images_background": 964, "images_evaluation": 659}
SEED = 0  # of the standard split
TRAINING = 1100  # characters of the standard split
VALIDATION = 100  # characters of the standard split
TEST = 423  # characters of either split
VINYALS_VALIDATION = (
    "Armenian",
    "Bengali",
    "Early_Aramaic",
    "Hebrew",
    "Mkhedruli_(Georgian)",
)
SOURCE = "https://github.com/brendenlake/omniglot/tree/master/python"


def load(
    *,
    ways: int,
    shots: int,
    queries: int,
    data_root: str | Path | None = None,
    split: Literal["standard", "vinyals"] = "standard",
    rotations: bool = True,
) -> Splits:
    """Few-shot tasks of Omniglot's characters. See `tasks.FewShot` for shapes and types.

    Images are `[1, 28, 28]`, resized by Lanczos' filter, strokes 1 on 0. They are decoded once, and
    cached by the bytes that they were decoded from.

    `data_root`, or its subfolder `omniglot` or `omniglot-py`, holds both `images_background` and
    `images_evaluation`, each as the official zip or as the tree extracted from it: files
    set/alphabet/character/drawing.png.

    Args:
        ways: The number of classes in a task.
        shots: The number of support images of each class.
        queries: The number of query images of each class. A class has 20 images.
        data_root: A folder. If None, torchvision downloads the zips into the cache folder.
        split: "standard" is a fixed shuffle into 1200 training and 423 test characters (Santoro et
            al. 2016), of which 100 training characters are set aside for validation. "vinyals" is
            1028 / 172 / 423, the lists of Vinyals et al. (2016) that prototypical networks
            published: validation is five whole alphabets of the background set, and test is the
            last 423 characters of the evaluation set.
        rotations: Whether the training characters, turned anticlockwise by 90°, 180° and 270°, are
            further training classes (Santoro et al. 2016). Validation and test characters stay
            upright.

    Raises:
        FileNotFoundError: If `data_root` has no Omniglot, or the download fails.
        ValueError: If the data is incomplete or damaged, `split` is unknown, or the data cannot
            give such tasks.
    """
    if split not in ("standard", "vinyals"):
        raise ValueError(f"split: got {split!r}, expected 'standard' or 'vinyals'")
    roots = _download() if data_root is None else _find(Path(data_root))
    digests = [content_digest(root) for root in roots.values()]
    cache_name = "-".join(["omniglot-1", *digests])
    arrays = load_or_build(cache_name, lambda: _read(roots))
    images = torch.from_numpy(arrays["images"])
    names = arrays["names"].tolist()

    if split == "standard":
        train, validation, test = standard_split()
    else:
        train, validation, test = vinyals_split(names)
    if rotations:
        characters = len(names)
        by_class = images.view(characters, DRAWINGS, 1, SIDE, SIDE)
        upright = by_class[torch.from_numpy(train)].flatten(0, 1)
        turned = [upright.rot90(turns, (2, 3)) for turns in (1, 2, 3)]
        images = torch.cat([images, *turned])
        for degrees in (90, 180, 270):
            names += [f"{names[c]}/rot{degrees:03d}" for c in train]
        train = np.append(train, np.arange(characters, len(names)))
    counts = np.full(len(names), DRAWINGS)
    return few_shot_splits(
        "omniglot",
        ImagePool.from_sorted(images, counts, names),
        (train, validation, test),
        ways=ways,
        shots=shots,
        queries=queries,
        source=f"{roots['images_background'].parent}, the {split} split",
    )


def standard_split() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The positions of 1100 training, 100 validation and 423 test characters, shuffled.

    Example:
        >>> [len(part) for part in standard_split()]
        [1100, 100, 423]
    """
    rng = np.random.default_rng(SEED)
    order = rng.permutation(TRAINING + VALIDATION + TEST)
    return order[:TRAINING], order[TRAINING:-TEST], order[-TEST:]


def vinyals_split(names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The positions of the 1028, 172 and 423 characters of Vinyals et al. (2016), ascending.

    Args:
        names: All 1623 characters in the order of their paths, as set/alphabet/character.
    """
    positions = np.arange(len(names))
    is_test = positions >= len(names) - TEST
    alphabets = [name.split("/")[1] for name in names]
    is_validation = np.isin(alphabets, VINYALS_VALIDATION)
    is_train = ~is_validation & ~is_test
    return positions[is_train], positions[is_validation], positions[is_test]


def _find(root: Path) -> dict[str, Path]:
    """The zip or folder of each of the two sets, below `root`."""
    for folder in (root, root / "omniglot", root / "omniglot-py"):
        roots = {}
        for part in CHARACTERS:
            tree = folder / part
            roots[part] = tree if tree.exists() else folder / f"{part}.zip"
        if all(path.exists() for path in roots.values()):
            return roots
    raise FileNotFoundError(
        f"data_root: found no Omniglot in {root}, "
        "expected images_background.zip and images_evaluation.zip "
        "(or the folders extracted from them) there, in omniglot/ or in omniglot-py/; "
        f"get the two zips from {SOURCE}, or leave data_root out to download them"
    )


def _download() -> dict[str, Path]:
    """The official zips, which torchvision downloads into the cache folder."""
    root = cache_dir()

    def fetch() -> None:
        from torchvision.datasets import Omniglot

        Omniglot(str(root), background=True, download=True)
        Omniglot(str(root), background=False, download=True)

    try:
        return _find(root)
    except FileNotFoundError:
        zips = "images_background.zip and images_evaluation.zip"
        by_hand = f"put {zips} from {SOURCE} into a folder"
        download("omniglot", fetch, by_hand)
        return _find(root)


def _read(roots: dict[str, Path]) -> Arrays:
    """Decode every drawing, white on black, in the order of the paths.

    Returns:
        `images` uint8 `[1623·20, 1, 28, 28]`, and the `names` of the 1623 characters, as
        set/alphabet/character.
    """
    images = []
    names = []
    for part, root in roots.items():
        files = Files(root)
        drawings = [path for path in files.paths if path.endswith(".png")]
        characters = Counter("/".join(path.split("/")[-3:-1]) for path in drawings)
        counts = list(characters.values())
        if counts != [DRAWINGS] * CHARACTERS[part]:
            raise ValueError(
                f"{root}: got {len(drawings)} images of {len(characters)} characters, "
                f"expected {CHARACTERS[part]} characters of {DRAWINGS} images "
                f"({part}/alphabet/character/*.png); "
                "download or extract it again"
            )
        names += [f"{part}/{character}" for character in characters]
        images.append(255 - files.images(drawings, SIDE, color=False))
    # With one channel, [n, 28, 28, 1] and [n, 1, 28, 28] have the same layout.
    return {
        "images": np.concatenate(images).reshape(-1, 1, SIDE, SIDE),
        "names": np.array(names),
    }
