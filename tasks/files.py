"""Image files in a folder or an archive, read without extracting anything."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tasks.archives import OneFile, open_source
from tasks.cache import progress

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (
    ".png",
    ".jpg",
    ".jpeg",
    ".bmp",
    ".gif",
    ".webp",
    ".ppm",
    ".pgm",
    ".tif",
    ".tiff",
)


class Files:
    """The files below a folder, or in a zip or tar archive, with their relative paths.

    Names that start with a dot and macOS's `__MACOSX` folders are left out. In a folder, links are
    followed, except a link to a folder that contains it. An archive with links, devices or paths
    that leave it is refused.

    Args:
        root: A folder, or a zip or tar archive. The tar may be compressed by gzip, bzip2 or xz.
        is_one_file: Whether a file at `root` is itself the only file, in place of an archive.

    Attributes:
        root: The folder or the archive.
        paths: The relative path of every file, with forward slashes, sorted.

    Raises:
        FileNotFoundError: If there is nothing at `root`.
        ValueError: If `root` is a file but no archive that can be read.

    Example:
        >>> import tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> root = Path(folder.name)
        >>> (root / "cat").mkdir()
        >>> _ = (root / "cat" / "1.png").write_bytes(b"pixels")
        >>> files = Files(root)
        >>> files.paths
        ['cat/1.png']
        >>> files.read("cat/1.png")
        b'pixels'
        >>> folder.cleanup()
    """

    def __init__(self, root: Path, *, is_one_file: bool = False) -> None:
        self.root = root
        alone = is_one_file and root.is_file()
        self._source = OneFile(root) if alone else open_source(root)
        self.paths = sorted(self._source.paths())

    @property
    def image_paths(self) -> list[str]:
        """The paths that end in one of `IMAGE_SUFFIXES`, in upper or lower case."""
        return [path for path in self.paths if path.lower().endswith(IMAGE_SUFFIXES)]

    def read(self, path: str) -> bytes:
        """The bytes of one file.

        Raises:
            ValueError: If this member of an archive is damaged.
        """
        _, data = next(self._source.contents([path]))
        return data

    def image(self, path: str, size: int, *, color: bool) -> np.ndarray:
        """Decode one image and `fit_square` it: uint8 `[size, size, channels]`.

        Args:
            path: One of `paths`.
            size: Pixels a side.
            color: Whether the result has three channels (red, green, blue) or one of grey.

        Raises:
            ValueError: If the file is empty, or no image that can be decoded.
        """
        image: np.ndarray = self.images([path], size, color=color)[0]
        return image

    def images(self, paths: Sequence[str], size: int, *, color: bool) -> np.ndarray:
        """Decode several images as `image` does: uint8 `[n, size, size, channels]`."""
        channels = 3 if color else 1
        decoded = np.empty((len(paths), size, size, channels), np.uint8)
        rows = {path: row for row, path in enumerate(paths)}
        contents = self._source.contents(paths)
        for path, data in progress(contents, f"decoding {self.root.name}", total=len(paths)):
            decoded[rows[path]] = self._decode(path, data, size, color)
        return decoded

    def _decode(self, path: str, data: bytes, size: int, color: bool) -> np.ndarray:
        """The image in the bytes of the file at `path`."""
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(io.BytesIO(data)) as opened:
                return fit_square(opened, size, color=color)
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            got = "an empty file"
            if data:
                got = f"{len(data)} bytes that do not decode ({error})"
            raise ValueError(
                f"{self.root}: {path}: got {got}, expected an image; replace or remove it"
            ) from error


def fit_square(image: Image, size: int, *, color: bool) -> np.ndarray:
    """Cut an image to its central square and resize it by Lanczos' filter.

    Transparent pixels lie on white. Of 16-bit greys, the upper 8 bits are taken.

    Args:
        image: Of any size and mode.
        size: Pixels a side.
        color: Whether the result has three channels (red, green, blue) or one of grey.

    Returns:
        uint8 `[size, size, channels]`.

    Example:
        >>> from PIL import Image
        >>> fit_square(Image.new("RGB", (9, 5), "red"), 3, color=True)[0, 0].tolist()
        [255, 0, 0]
    """
    from PIL import Image, ImageOps

    converted = _opaque_8_bit(image).convert("RGB" if color else "L")
    square = ImageOps.fit(converted, (size, size), Image.Resampling.LANCZOS)
    return np.asarray(square).reshape(size, size, -1)


def content_digest(root: Path) -> str:
    """16 hexadecimal digits that identify the bytes of a file, or of all files below a folder.

    Another copy of a data set, in another format or quality, has another digest.
    """
    digest = hashlib.sha256()
    if root.is_file():
        digest.update(root.read_bytes())
    else:
        files = Files(root)
        for path in files.paths:
            digest.update(path.encode() + files.read(path))
    return digest.hexdigest()[:16]


def _opaque_8_bit(image: Image) -> Image:
    """The image with 8 bits a channel, laid on white if it is transparent."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        transparent = image.convert("RGBA")
        white = Image.new("RGBA", transparent.size, "white")
        return Image.alpha_composite(white, transparent)
    return image
