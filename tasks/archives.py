"""Folders, zips and tars alike: the paths of the files in them, and the bytes of some of these.

Nothing is extracted. A path that leaves its archive is refused, and so are links and devices.
"""

from __future__ import annotations

import lzma
import os
import posixpath
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

Kind = Literal["file", "folder", "link or device"]

# What the modules of the standard library raise for damaged, encrypted or foreign archives.
UNREADABLE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    RuntimeError,
)


class Source(Protocol):
    """Files below one root."""

    def paths(self) -> list[str]:
        """The relative path of every file, with forward slashes. Hidden files are left out."""
        ...

    def contents(self, paths: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """Some of the paths, each with its bytes, in the order that is quickest to read."""
        ...


def open_source(root: Path) -> Source:
    """The files at `root`: a folder, a zip, or a tar, compressed by gzip, bzip2, xz or not at all.

    The content of a file tells its kind, not its name.

    Raises:
        FileNotFoundError: If there is nothing at `root`.
    """
    if root.is_dir():
        return Folder(root)
    if not root.is_file():
        raise FileNotFoundError(
            f"{root}: nothing there, expected a folder, or a zip or tar archive"
        )
    return Tar(root) if _is_tar(root) else Zip(root)


@dataclass(frozen=True)
class Folder:
    """A folder. Links are followed, except a link to a folder that contains it."""

    root: Path

    def paths(self) -> list[str]:
        """See `Source`."""
        paths = [path.relative_to(self.root).as_posix() for path in _walk(self.root)]
        return [path for path in paths if not _is_hidden(path)]

    def contents(self, paths: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """See `Source`."""
        for path in paths:
            yield path, (self.root / path).read_bytes()


@dataclass(frozen=True)
class OneFile:
    """A file on its own. Its path is its name."""

    root: Path

    def paths(self) -> list[str]:
        """See `Source`."""
        return [self.root.name]

    def contents(self, paths: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """See `Source`."""
        for path in paths:
            yield path, self.root.read_bytes()


@dataclass(frozen=True)
class Zip:
    """A zip archive."""

    root: Path

    def paths(self) -> list[str]:
        """See `Source`."""
        with _readable(self.root), zipfile.ZipFile(self.root) as archive:
            members = [(info.filename, _zip_kind(info)) for info in archive.infolist()]
        return _file_paths(self.root, members)

    def contents(self, paths: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """See `Source`."""
        with _readable(self.root), zipfile.ZipFile(self.root) as archive:
            members = {posixpath.normpath(info.filename): info for info in archive.infolist()}
            for path in paths:
                with _readable(self.root, path):
                    data = archive.read(members[path])
                yield path, data


@dataclass(frozen=True)
class Tar:
    """A tar archive. It is read from front to back, because a compressed one cannot be searched."""

    root: Path

    def paths(self) -> list[str]:
        """See `Source`."""
        with _readable(self.root), tarfile.open(self.root) as archive:
            members = [(member.name, _tar_kind(member)) for member in archive]
            _read_to_the_end(archive)
        return _file_paths(self.root, members)

    def contents(self, paths: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """See `Source`."""
        wanted = set(paths)
        with _readable(self.root), tarfile.open(self.root) as archive:
            for member in archive:
                path = posixpath.normpath(member.name)
                if path in wanted and (file := archive.extractfile(member)):
                    yield path, file.read()


@contextmanager
def _readable(root: Path, path: str | None = None) -> Iterator[None]:
    """Raise a ValueError that names the archive, or the file in it, if it cannot be read."""
    try:
        yield
    except UNREADABLE as error:
        if path is None:
            message = (
                f"{root}: got an unreadable archive ({error}), "
                "expected a folder, or a zip or tar archive"
            )
        else:
            message = f"{root}: {path} is damaged ({error})"
        raise ValueError(f"{message}; copy or download it again") from error


def _is_tar(root: Path) -> bool:
    try:
        return tarfile.is_tarfile(root)
    except (EOFError, OSError, zlib.error, lzma.LZMAError):
        return True  # A compressed stream breaks off at once. Reading it says so.


def _zip_kind(info: zipfile.ZipInfo) -> Kind:
    # The upper half holds the mode of a file system, or 0 where the zip was made without one.
    mode = info.external_attr >> 16
    if info.is_dir():
        return "folder"
    is_regular = stat.S_IFMT(mode) in (0, stat.S_IFREG)
    return "file" if is_regular else "link or device"


def _tar_kind(member: tarfile.TarInfo) -> Kind:
    if member.isdir():
        return "folder"
    return "file" if member.isfile() else "link or device"


def _read_to_the_end(archive: tarfile.TarFile) -> None:
    """Raise an EOFError if the archive has no end, and what its compression raises if damaged."""
    file = archive.fileobj
    if file is None:
        return
    # The last member is followed by a block of zeros, which `archive` has read by now.
    if file.tell() == archive.offset:
        raise EOFError("it breaks off after a member")
    while file.read(2**20):  # A checksum stands at the end of the compressed stream.
        pass


def _file_paths(root: Path, members: Iterable[tuple[str, Kind]]) -> list[str]:
    """The paths of the members that are files. Hidden ones are left out, unsafe ones refused."""
    paths: dict[str, None] = {}  # in order
    for name, kind in members:
        path = posixpath.normpath(name)
        if path.startswith(("/", "../")) or path == "..":
            raise ValueError(
                f"{root}: got the path {name!r}, which leaves the archive; "
                "pack the archive again with relative paths"
            )
        if kind == "folder" or _is_hidden(path):
            continue
        if kind != "file":
            raise ValueError(
                f"{root}: {name!r} is a {kind}, expected files and folders; "
                "pack the archive again with copies in place of links, "
                "as `tar --dereference --hard-dereference` and `zip` do"
            )
        if path in paths:
            raise ValueError(f"{root}: got {path!r} twice, expected once; pack the archive again")
        paths[path] = None
    return list(paths)


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
