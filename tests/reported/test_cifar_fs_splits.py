"""CIFAR-FS as it is published: cifar100/data/CLASS/*.png and cifar100/splits/bertinetto/*.txt."""

import numpy as np
from PIL import Image

import tasks

NAMES = [f"c{number:02d}" for number in range(20)]
PUBLISHED = {"train": NAMES[10:], "val": NAMES[5:10], "test": NAMES[:5]}


def test_the_published_splits_of_cifar_fs_are_respected(tmp_path):
    for name in NAMES:
        folder = tmp_path / "cifar100" / "data" / name
        folder.mkdir(parents=True)
        for number in range(3):
            pixels = np.full((8, 8, 3), 9 * number, np.uint8)
            Image.fromarray(pixels).save(folder / f"{name}_s_{number:06d}.png")
    lists = tmp_path / "cifar100" / "splits" / "bertinetto"
    lists.mkdir(parents=True)
    for part, names in PUBLISHED.items():
        (lists / f"{part}.txt").write_text("\n".join(names) + "\n")

    splits = tasks.load("folder", ways=2, shots=1, queries=2, data_root=tmp_path, size=8)
    families = {"train": splits.train, "val": splits.validation, "test": splits.test}
    for part, family in families.items():
        loaded = [name.split("/")[-1] for name in family.classes]
        assert sorted(loaded) == PUBLISHED[part], part
