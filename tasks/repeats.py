"""Images that stand in two splits, or twice in a class: a model would be tested on what it saw."""

from __future__ import annotations

import hashlib

import numpy as np

DIGEST_SIZE = 16  # bytes


def image_digests(images: np.ndarray) -> np.ndarray:
    """A hash of the pixels of each image, or zeros where all its pixels are equal.

    Blank pages are no sign that one image stands in two places. Neither are equal features, which
    may be counts or other coarse numbers. So these have no hash.

    Args:
        images: Images, uint8 or float `[n, 1 or 3, height, width]`, or features of another shape.

    Returns:
        uint8 `[n, 16]`, or `[0, 16]` for features.

    Example:
        >>> images = np.arange(8, dtype=np.uint8).reshape(2, 1, 2, 2)
        >>> images[1] = 7
        >>> image_digests(images).any(1)
        array([ True, False])
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        return np.zeros((0, DIGEST_SIZE), np.uint8)
    digests = np.zeros((len(images), DIGEST_SIZE), np.uint8)
    for digest, image in zip(digests, images, strict=True):
        if (image != image[:, :1, :1]).any():
            hashed = hashlib.blake2b(image.tobytes(), digest_size=DIGEST_SIZE).digest()
            digest[:] = np.frombuffer(hashed, np.uint8)
    return digests


def repeated_images(digests: np.ndarray, split_of: np.ndarray) -> list[tuple[int, int]]:
    """The rows of equal images in two splits, in pairs.

    Args:
        digests: As `image_digests` returns them.
        split_of: The number of the split that each image is in, int64 `[n]`, or −1 for none.

    Example:
        >>> digests = np.ones((3, 16), np.uint8)
        >>> repeated_images(digests, split_of=np.array([0, -1, 2]))
        [(0, 2)]
    """
    return _equal_pairs(digests, split_of, apart=True)


def copied_images(digests: np.ndarray, class_of: np.ndarray) -> list[tuple[int, int]]:
    """The rows of equal images in one class, in pairs.

    Args:
        digests: As `image_digests` returns them.
        class_of: The number of the class that each image is in, int64 `[n]`, or −1 for none.

    Example:
        >>> digests = np.ones((4, 16), np.uint8)
        >>> copied_images(digests, class_of=np.array([0, -1, 2, 2]))
        [(2, 3)]
    """
    return _equal_pairs(digests, class_of, apart=False)


def _equal_pairs(digests: np.ndarray, group_of: np.ndarray, apart: bool) -> list[tuple[int, int]]:
    """The rows of neighbours among equal images, whose groups differ, or are one."""
    rows = np.flatnonzero((group_of >= 0) & digests.any(1))
    groups = group_of[rows]
    first, second = np.ascontiguousarray(digests[rows]).view(np.uint64).T
    # Sorted by hash, then group: equal images are neighbours, those of one group together.
    order = np.lexsort((groups, second, first))
    is_equal = (np.diff(first[order]) == 0) & (np.diff(second[order]) == 0)
    is_apart = np.diff(groups[order]) != 0
    neighbours = np.flatnonzero(is_equal & (is_apart == apart))
    return [(int(rows[order[i]]), int(rows[order[i + 1]])) for i in neighbours]
