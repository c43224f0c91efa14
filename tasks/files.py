"""Image files in a folder or a zip, read without extracting anything."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np


class Files:
    """The files below a folder or inside a zip, by relative path with forward slashes; hidden ones are left out.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a file that is not a readable zip.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._zip: zipfile.ZipFile | None = None
        if root.is_dir():
            found = [path.relative_to(root).as_posix() for path in _walk(root)]
        elif root.is_file():
            try:
                self._zip = zipfile.ZipFile(root)
            except (zipfile.BadZipFile, OSError) as error:
                raise ValueError(
                    f"{root}: got an unreadable zip ({error}), expected a folder or a zip; copy or download it again"
                ) from error
            found = [name for name in self._zip.namelist() if not name.endswith("/")]
        else:
            raise FileNotFoundError(f"{root}: nothing there, expected a folder or a zip of images")
        self.paths = sorted(
            p for p in found if not any(part.startswith((".", "__MACOSX")) for part in p.split("/"))
        )

    def read(self, path: str) -> bytes:
        """The bytes of one file; ValueError names a damaged member of a zip."""
        if self._zip is None:
            return (self.root / path).read_bytes()
        try:
            return self._zip.read(path)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(
                f"{self.root}: {path} is damaged ({error}); copy or download the zip again"
            ) from error

    def image(self, path: str, size: int, *, color: bool) -> np.ndarray:
        """One image as uint8 `[size, size]`, or `[size, size, 3]` in color: its central square, resized by Lanczos.

        What is transparent lies on white, and greys of 16 bits are scaled to 8. ValueError names an image that cannot
        be decoded.
        """
        from PIL import Image, ImageOps, UnidentifiedImageError

        data = self.read(path)
        try:
            with Image.open(io.BytesIO(data)) as opened:
                image: Image.Image = opened
                if image.mode.startswith("I;16"):
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                    over = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)
                square = ImageOps.fit(
                    image.convert("RGB" if color else "L"), (size, size), Image.Resampling.LANCZOS
                )
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError) as error:
            what = (
                "an empty file" if not data else f"{len(data)} bytes that do not decode ({error})"
            )
            raise ValueError(
                f"{self.root}: {path}: got {what}, expected an image; replace or remove it"
            ) from error
        return np.asarray(square)


def content_digest(root: Path) -> str:
    """Of all the bytes there: another copy, in another format or quality, is another entry in a cache."""
    found = hashlib.sha256()
    if root.is_file():
        found.update(root.read_bytes())
    else:
        for path in (files := Files(root)).paths:
            found.update(path.encode() + files.read(path))
    return found.hexdigest()[:16]


def _walk(root: Path) -> Iterator[Path]:
    """The files in every folder, through links, but not those to a folder that they lie in."""
    for folder, inside, names in os.walk(root, followlinks=True):
        here = f"{os.path.realpath(folder)}/"
        inside[:] = [
            name
            for name in inside
            if not here.startswith(f"{os.path.realpath(Path(folder, name))}/")
        ]
        yield from (path for name in names if (path := Path(folder, name)).is_file())
