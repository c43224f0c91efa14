"""Few-shot classification of Omniglot: 1623 characters of 50 alphabets, each drawn by 20 people (Lake et al. 2015)."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from tasks.cache import Arrays, cache_dir, load_or_build
from tasks.episodes import Splits
from tasks.files import Files, content_digest
from tasks.pool import ImagePool, few_shot_splits

SIZE = 28
DRAWINGS = 20  # images a character
CHARACTERS = {"images_background": 964, "images_evaluation": 659}
SEED = 0
VINYALS_VALIDATION = ("Armenian", "Bengali", "Early_Aramaic", "Hebrew", "Mkhedruli_(Georgian)")


def load(
    *,
    ways: int,
    shots: int,
    queries: int,
    data_root: str | Path | None = None,
    split: Literal["standard", "vinyals"] = "standard",
    rotations: bool = True,
) -> Splits:
    """Omniglot, images `[1, 28, 28]` resized by Lanczos, strokes 1 on 0.

    Args:
        data_root: folder of `images_background` and `images_evaluation`, as the official zips or as their extracted
            trees, directly or under `omniglot/` or `omniglot-py/`. None downloads the zips through torchvision.
        split: "standard": a fixed shuffle into 1200 training and 423 test characters (Santoro et al. 2016), 100 of the
            1200 set aside for validation, so 1100/100/423. "vinyals": 1028/172/423, the lists of Vinyals et al. (2016)
            that prototypical networks published: validation is five whole alphabets of the background set, test the
            last 423 characters of the evaluation set.
        rotations: add the training characters turned anticlockwise by 90°, 180° and 270° as classes of their own
            (Santoro et al. 2016); validation and test characters stay upright.

    Raises:
        FileNotFoundError: no data, and none could be downloaded.
        ValueError: incomplete or damaged data, an unknown split.
    """
    if split not in ("standard", "vinyals"):
        raise ValueError(f"split: got {split!r}, expected 'standard' or 'vinyals'")
    found = _download() if data_root is None else _find(Path(data_root))
    arrays = load_or_build(
        "-".join(["omniglot-1", *map(content_digest, found.values())]), lambda: _read(found)
    )
    images, names = torch.from_numpy(arrays["images"]), arrays["names"].tolist()
    train, validation, test = standard_split() if split == "standard" else vinyals_split(names)
    if rotations:
        upright = images.view(-1, DRAWINGS, 1, SIZE, SIZE)[torch.from_numpy(train)].flatten(0, 1)
        images = torch.cat([images, *(upright.rot90(turns, (2, 3)) for turns in (1, 2, 3))])
        names += [f"{names[c]}/rot{90 * turns:03d}" for turns in (1, 2, 3) for c in train]
        train = np.append(train, np.arange(len(validation) + len(train) + len(test), len(names)))
    pool = ImagePool.from_sorted(images, np.full(len(names), DRAWINGS), names)
    return few_shot_splits(
        "omniglot", pool, (train, validation, test), ways=ways, shots=shots, queries=queries
    )


def standard_split() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """1100, 100 and 423 of the 1623 characters, by a fixed shuffle."""
    order = np.random.default_rng(SEED).permutation(sum(CHARACTERS.values()))
    return order[:1100], order[1100:1200], order[1200:]


def vinyals_split(names: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The 1028, 172 and 423 characters of Vinyals et al., from names `set/alphabet/character` in their order."""
    everything = np.arange(len(names))
    held_out = np.array([name.split("/")[1] in VINYALS_VALIDATION for name in names])
    trained = ~held_out & (everything < len(names) - 423)
    return everything[trained], everything[held_out], everything[-423:]


def _find(root: Path) -> dict[str, Path]:
    """Where the two sets lie below `root`."""
    for folder in (root, root / "omniglot", root / "omniglot-py"):
        places = {part: [folder / f"{part}.zip", folder / part] for part in CHARACTERS}
        found = {part: path for part, paths in places.items() for path in paths if path.exists()}
        if len(found) == len(CHARACTERS):
            return found
    raise FileNotFoundError(
        f"data_root: found no Omniglot in {root}, expected images_background.zip and images_evaluation.zip (or the "
        "folders extracted from them) there, in omniglot/ or in omniglot-py/; get the two zips from "
        "https://github.com/brendenlake/omniglot/tree/master/python, or leave data_root out to download them"
    )


def _download() -> dict[str, Path]:
    """The official zips, fetched by torchvision into the cache folder."""
    root = cache_dir()
    try:
        return _find(root)
    except FileNotFoundError:
        pass
    try:
        from torchvision.datasets import Omniglot

        for background in (True, False):
            Omniglot(str(root), background=background, download=True)
        return _find(root)
    except (ImportError, OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"omniglot: could not download it ({error}); put images_background.zip and images_evaluation.zip from "
            "https://github.com/brendenlake/omniglot/tree/master/python into a folder and name that as data_root"
        ) from error


def _read(found: dict[str, Path]) -> Arrays:
    """Decode every drawing: `images` uint8 `[1623·20, 1, 28, 28]` in order of `names` (set/alphabet/character)."""
    from tqdm import tqdm

    images, names = [], []
    for part, root in found.items():
        files = Files(root)
        drawings = [path for path in files.paths if path.endswith(".png")]
        characters = Counter("/".join(path.split("/")[-3:-1]) for path in drawings)
        if len(characters) != CHARACTERS[part] or set(characters.values()) != {DRAWINGS}:
            raise ValueError(
                f"{root}: got {len(drawings)} images of {len(characters)} characters, expected {CHARACTERS[part]} "
                f"characters of {DRAWINGS} images ({part}/alphabet/character/*.png); download or extract it again"
            )
        names += [f"{part}/{character}" for character in characters]
        images += [
            255 - files.image(path, SIZE, color=False)
            for path in tqdm(drawings, desc=part, leave=False, disable=None)
        ]
    return {"images": np.stack(images)[:, None], "names": np.array(names)}
