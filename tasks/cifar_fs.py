"""Few-shot classification of CIFAR-FS: 100 kinds of things in 32 × 32 pixels.

They are CIFAR-100's classes in the split of Bertinetto et al. (2019): 64, 16 and 20 classes of 600
images.
"""

from __future__ import annotations

from pathlib import Path

from tasks.cifar100 import CLASSES, SIDE, URL, read_cifar_classes
from tasks.episodes import Splits
from tasks.published import DataSet

VALIDATION = (
    *("beaver", "beetle", "butterfly", "camel", "cattle", "crab", "crocodile", "flatfish"),
    *("lamp", "maple_tree", "motorcycle", "otter", "sea", "shark", "television", "tractor"),
)
TEST = (
    *("baby", "bed", "bicycle", "chimpanzee", "fox", "leopard", "man", "pickup_truck"),
    *("plain", "poppy", "rocket", "rose", "snail", "sweet_pepper", "table", "telephone"),
    *("wardrobe", "whale", "woman", "worm"),
)
TRAIN = tuple(name for name in CLASSES if name not in VALIDATION + TEST)

CIFAR_FS = DataSet(
    name="cifar-fs",
    counts=(64, 16, 20),
    known_parts=(TRAIN, VALIDATION, TEST),
    how_to_get_it=f"get {URL}, or leave data_root out to download it",
)


def load(
    *,
    ways: int,
    shots: int,
    queries: int,
    data_root: str | Path | None = None,
    split_lists: str | Path | None = None,
    size: int = SIDE,
) -> Splits:
    """Few-shot tasks of CIFAR-FS. See `tasks.FewShot` for shapes and types.

    Images are `[3, size, size]`. They are read once, into a file of the cache folder. `data_root`
    holds one of

    - CIFAR-100: `cifar-100-python.tar.gz`, or the folder extracted from it,
    - the published `cifar100/data/class/image.png` and `cifar100/splits/bertinetto/train.txt`, …,
    - the pickles `CIFAR_FS_train.pickle`, `CIFAR_FS_val.pickle` and `CIFAR_FS_test.pickle`,
    - or any other layout of the `folder` family in which something splits the classes, or which has
      CIFAR-100's 100 classes by name.

    Args:
        ways: The number of classes in a task.
        shots: The number of support images of each class.
        queries: The number of query images of each class.
        data_root: A folder, or an archive. If None, CIFAR-100 is downloaded into the cache folder.
        split_lists: The folder or archive of lists of classes, if they lie elsewhere.
        size: Pixels a side.

    Raises:
        FileNotFoundError: If there is nothing at `data_root`, or the download fails.
        ValueError: If the data is damaged, nothing splits its classes, or they cannot give such
            tasks.
    """
    classes = read_cifar_classes(data_root, split_lists, size)
    return CIFAR_FS.splits(classes, ways=ways, shots=shots, queries=queries)
