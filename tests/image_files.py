"""Small image files of known pixels, in folders and archives, and where the real data sets are."""

import io
import tarfile
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

REAL_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def encode(pixels, format="PNG"):
    """The bytes of an image file of uint8 pixels `[height, width]` or `[height, width, 3]`."""
    file = io.BytesIO()
    Image.fromarray(np.asarray(pixels, np.uint8)).save(file, format)
    return file.getvalue()


@cache
def red_square(value, height=8, width=8):
    """A PNG file whose pixels are all (value, 0, 0)."""
    return encode(np.full((height, width, 3), [value, 0, 0]))


def class_folders(classes=12, count=3, prefix=""):
    """Files of class/image. Image i of class c has red 10c + i, so that a pixel tells both."""
    return {
        f"{prefix}c{c:02d}/{i}.png": red_square(10 * c + i)
        for c in range(classes)
        for i in range(count)
    }


def write_tree(root, files):
    """Write files, `{path: bytes or str}`, below `root`, which is returned."""
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data if isinstance(data, bytes) else data.encode())
    return root


def write_zip(path, files):
    """Write files, `{path: bytes}`, into a zip at `path`, which is returned."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path, files, compression="", prefix="", links=()):
    """Write files, `{path: bytes}`, and links, `(path, target, type)`, into a tar at `path`."""
    with tarfile.open(path, f"w:{compression}") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(prefix + name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for name, target, kind in links:
            member = tarfile.TarInfo(name)
            member.linkname = target
            member.type = kind
            archive.addfile(member)
    return path


def no_network(*args, **options):
    """In place of a download."""
    raise OSError("no network")
