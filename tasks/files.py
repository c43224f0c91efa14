"""Image files in a folder or a zip archive, read without extracting anything."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

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
    """The files below a folder, or in a zip archive, with their relative paths.

    Names that start with a dot and macOS's `__MACOSX` folders are left out. In a folder, links are
    followed, except a link to a folder that contains it.

    Args:
        root: A folder or a zip archive.

    Attributes:
        root: The folder or the archive.
        paths: The relative path of every file, with forward slashes, sorted.

    Raises:
        FileNotFoundError: If there is nothing at `root`.
        ValueError: If `root` is a file but not a readable zip archive.

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

    def __init__(self, root: Path) -> None:
        self.root = root
        self._zip: zipfile.ZipFile | None = None
        if root.is_dir():
            paths = [path.relative_to(root).as_posix() for path in _walk(root)]
        elif root.is_file():
            self._zip = _open_zip(root)
            names = self._zip.namelist()
            paths = [name for name in names if not name.endswith("/")]
        else:
            raise FileNotFoundError(f"{root}: nothing there, expected a folder or a zip of images")
        self.paths = sorted(path for path in paths if not _is_hidden(path))

    @property
    def image_paths(self) -> list[str]:
        """The paths that end in one of `IMAGE_SUFFIXES`, in upper or lower case."""
        return [path for path in self.paths if path.lower().endswith(IMAGE_SUFFIXES)]

    def read(self, path: str) -> bytes:
        """The bytes of one file.

        Raises:
            ValueError: If this member of a zip archive is damaged.
        """
        if self._zip is None:
            return (self.root / path).read_bytes()
        try:
            return self._zip.read(path)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(
                f"{self.root}: {path} is damaged ({error}); copy or download the zip again"
            ) from error

    def image(self, path: str, size: int, *, color: bool) -> np.ndarray:
        """Decode one image, cut it to its central square and resize it by Lanczos' filter.

        Transparent pixels lie on white. Of 16-bit greys, the upper 8 bits are taken.

        Args:
            path: One of `paths`.
            size: Pixels a side.
            color: Whether the result has three channels (red, green, blue) or one of grey.

        Returns:
            uint8 `[size, size, channels]`.

        Raises:
            ValueError: If the file is empty, or no image that can be decoded.
        """
        from PIL import Image, ImageOps, UnidentifiedImageError

        data = self.read(path)
        try:
            with Image.open(io.BytesIO(data)) as opened:
                image = _opaque_8_bit(opened).convert("RGB" if color else "L")
                square = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            got = "an empty file"
            if data:
                got = f"{len(data)} bytes that do not decode ({error})"
            raise ValueError(
                f"{self.root}: {path}: got {got}, expected an image; replace or remove it"
            ) from error
        return np.asarray(square).reshape(size, size, -1)

    def images(self, paths: Sequence[str], size: int, *, color: bool) -> np.ndarray:
        """Decode several images as `image` does: uint8 `[n, size, size, channels]`."""
        channels = 3 if color else 1
        decoded = np.empty((len(paths), size, size, channels), np.uint8)
        bar = progress(paths, f"decoding {self.root.name}")
        for image, path in zip(decoded, bar, strict=True):
            image[:] = self.image(path, size, color=color)
        return decoded


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


def _open_zip(root: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(root)
    except (zipfile.BadZipFile, OSError) as error:
        raise ValueError(
            f"{root}: got an unreadable zip ({error}), "
            "expected a folder or a zip; copy or download it again"
        ) from error


def _is_hidden(path: str) -> bool:
    parts = path.split("/")
    return any(part.startswith((".", "__MACOSX")) for part in parts)


def _walk(root: Path) -> Iterator[Path]:
    """The files in every folder. A link to a folder that contains it would never end."""
    for folder, subfolders, names in os.walk(root, followlinks=True):
        here = Path(os.path.realpath(folder))
        targets = {name: os.path.realpath(Path(folder, name)) for name in subfolders}
        subfolders[:] = [name for name in subfolders if not here.is_relative_to(targets[name])]
        paths = [Path(folder, name) for name in names]
        yield from (path for path in paths if path.is_file())


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
