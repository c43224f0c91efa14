"""Image files in a folder or an archive, read without extracting anything."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from tasks.archives import OneFile, open_source
from tasks.cache import progress
from tasks.images import IMAGE_SUFFIXES, UNREAD_SUFFIXES, decode


class Files:
    """The files below a folder, or in a zip or tar archive, with their relative paths.

    Names that start with a dot and macOS's `__MACOSX` folders are left out. In a folder, so are
    folders of training runs, whose plots are no data. Links are followed, except a link to a folder
    that contains it. Two paths to one folder are refused, as is an archive with links, devices or
    paths that leave it.

    Args:
        root: A folder, or a zip or tar archive. The tar may be compressed by gzip, bzip2 or xz.
        is_one_file: Whether a file at `root` is itself the only file, in place of an archive.

    Attributes:
        root: The folder or the archive.
        paths: The relative path of every file, with forward slashes, sorted.

    Raises:
        FileNotFoundError: If there is nothing at `root`.
        ValueError: If `root` is a file but no archive that can be read, or two paths lead to one
            folder.

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

    @property
    def unread_images(self) -> list[str]:
        """The paths that end in one of `UNREAD_SUFFIXES`, in upper or lower case."""
        return [path for path in self.paths if path.lower().endswith(UNREAD_SUFFIXES)]

    def read(self, path: str) -> bytes:
        """The bytes of one file.

        Raises:
            ValueError: If this member of an archive is damaged.
        """
        _, data = next(self.contents([path]))
        return data

    def contents(self, paths: Sequence[str]) -> Iterator[tuple[str, bytes]]:
        """Some of the paths, each with its bytes, in the order that is quickest to read."""
        return self._source.contents(paths)

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
        """Decode several images as `image` does: uint8 `[n, size, size, channels]`.

        Raises:
            ValueError: If an image cannot be decoded, or two paths lead to one file.
        """
        self._check_once(paths)
        channels = 3 if color else 1
        # PyTorch has the channels first. So they are in memory, and need not be copied later.
        decoded = np.empty((len(paths), channels, size, size), np.uint8).transpose(
            0,
            2,
            3,
            1,
        )
        rows = {path: row for row, path in enumerate(paths)}
        contents = self.contents(paths)
        for path, data in progress(contents, f"decoding {self.root.name}", total=len(paths)):
            try:
                decoded[rows[path]] = decode(data, size, color=color)
            except ValueError as error:
                raise ValueError(f"{self.root}: {path}: {error}") from error
        return decoded

    def stamp(self, paths: Sequence[str]) -> str:
        """32 hexadecimal digits that change if one of the files is changed or exchanged.

        Nothing is read. They are a hash of the paths, and of the number, size and times that the
        file system has of each file, or of the archive.
        """
        digest = hashlib.sha256()
        for path in paths:
            digest.update(path.encode(errors="surrogatepass") + b"\0")
        for status in self._status(paths):
            identity = f"{status.st_dev} {status.st_ino} {status.st_size}"
            # Unlike the first time, the second cannot be set to what it was.
            times = f"{status.st_mtime_ns} {status.st_ctime_ns}"
            digest.update(f"{identity} {times}\n".encode())
        return digest.hexdigest()[:32]

    def bytes_of(self, paths: Sequence[str]) -> int:
        """The size of the files together, or of the archive."""
        return sum(status.st_size for status in self._status(paths))

    def _status(self, paths: Sequence[str]) -> list[os.stat_result]:
        """What the file system has of each file, or of the archive."""
        if self.root.is_dir():
            return [os.stat(f"{self.root}/{path}") for path in paths]
        return [self.root.stat()]

    def _check_once(self, paths: Sequence[str]) -> None:
        """Raise if two paths lead to one file, which would be in both support and query."""
        if not self.root.is_dir():
            return  # an archive, which holds no links
        path_of: dict[str, str] = {}
        for path in paths:
            other = path_of.setdefault(os.path.realpath(self.root / path), path)
            if other != path:
                raise ValueError(
                    f"{self.root}: {other} and {path} are one file, "
                    "expected every image once; remove the link"
                )


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
            # A name may hold bytes that are not UTF-8, which Python writes as surrogates.
            digest.update(path.encode(errors="surrogatepass") + files.read(path))
    return digest.hexdigest()[:16]
