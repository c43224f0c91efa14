"""Folders, zips and tars alike: the paths of the files in them, and the bytes of some of these.

Nothing is extracted. A path that leaves its archive is refused, and so are links and devices.
"""

from __future__ import annotations

import contextlib
import lzma
import os
import posixpath
import stat
import tarfile
import zipfile
import zlib
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal, Protocol

Kind = Literal["file", "folder", "link or device"]

# Bits and numbers in the entries of a zip, as its specification (APPNOTE.TXT) calls them.
ENCRYPTED = 1 << 0
UTF8_NAME = 1 << 11
WINDOWS = (0, 10)  # made on FAT or NTFS

# What the folder of a training run holds.
RUN_FILES = {"config.json", "checkpoint.pt", "metrics.jsonl"}


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
            f"{root.absolute()}: nothing there, expected a folder, or a zip or tar archive"
        )
    return Tar(root) if _is_tar(root) else Zip(root)


@dataclass(frozen=True)
class Folder:
    """A folder. Links are followed, except a link to a folder that contains it."""

    root: Path

    def paths(self) -> list[str]:
        """See `Source`.

        Raises:
            ValueError: If two paths lead to one folder.
        """
        return list(_walk(self.root))

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
        with _open_zip(self.root) as archive:
            members = [(_zip_name(info), _zip_kind(info)) for info in archive.infolist()]
        return _file_paths(self.root, members)

    def contents(self, paths: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """See `Source`."""
        with _open_zip(self.root) as archive:
            members = {posixpath.normpath(_zip_name(info)): info for info in archive.infolist()}
            for path in paths:
                if members[path].flag_bits & ENCRYPTED:
                    raise ValueError(
                        f"{self.root}: {path} is encrypted; "
                        "unpack the archive with its password, and give the folder"
                    )
                with _readable(self.root, path):
                    data = archive.read(members[path])
                yield path, data


@dataclass(frozen=True)
class Tar:
    """A tar archive. It is read from front to back, because a compressed one cannot be searched."""

    root: Path

    def paths(self) -> list[str]:
        """See `Source`."""
        members = [(member.name, _tar_kind(member)) for _, member in _tar_members(self.root)]
        return _file_paths(self.root, members)

    def contents(self, paths: Collection[str]) -> Iterator[tuple[str, bytes]]:
        """See `Source`."""
        wanted = set(paths)
        for archive, member in _tar_members(self.root):
            path = posixpath.normpath(member.name)
            if path in wanted and (file := archive.extractfile(member)):
                with _readable(self.root, path):
                    data = file.read()
                yield path, data


@contextmanager
def _readable(root: Path, path: str | None = None) -> Iterator[None]:
    """Raise a ValueError that names the archive, or the file in it, if it cannot be read."""
    try:
        yield
    except MemoryError:
        raise
    except NotImplementedError as error:
        raise ValueError(
            f"{root}: {path or 'the archive'} is packed in a way that is not supported ({error}); "
            "pack it again as an ordinary zip or tar"
        ) from error
    except Exception as error:  # A damaged archive can raise any.
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


def _open_zip(root: Path) -> zipfile.ZipFile:
    with _readable(root):
        return zipfile.ZipFile(root)


def _zip_name(info: zipfile.ZipInfo) -> str:
    """The path of a member, with forward slashes."""
    name = info.filename
    if not info.flag_bits & UTF8_NAME and not name.isascii():
        # By the specification the name is in code page 437. Many programs write UTF-8 unmarked.
        with contextlib.suppress(UnicodeError):
            name = name.encode("cp437").decode("utf-8")
    return name.replace("\\", "/") if info.create_system in WINDOWS else name


def _zip_kind(info: zipfile.ZipInfo) -> Kind:
    # The upper half holds the mode of a file system, or 0 where the zip was made without one.
    mode = info.external_attr >> 16
    if _zip_name(info).endswith("/"):
        return "folder"
    is_regular = stat.S_IFMT(mode) in (0, stat.S_IFREG)
    return "file" if is_regular else "link or device"


def _tar_members(root: Path) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Every member of a tar, with the open archive."""
    with _readable(root), tarfile.open(root) as archive:
        for member in archive:
            yield archive, member
        _read_to_the_end(archive)


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
        if kind == "folder" or any(map(_is_hidden, path.split("/"))):
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


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__MACOSX"))


def _walk(root: Path) -> Iterator[str]:
    """The path of every file, relative to `root`. Every real folder is entered once.

    Folders of training runs are passed over. `runs` stands in the data where a run is started
    there.
    """
    real_of: dict[PurePosixPath, Path] = {}
    path_of: dict[Path, PurePosixPath] = {}
    # Links wait at the end, so that folders are entered by their own paths first.
    waiting = deque([PurePosixPath()])
    while waiting:
        folder = waiting.popleft()
        real = Path(os.path.realpath(root / folder))
        above = [real_of[parent] for parent in folder.parents]
        if any(parent.is_relative_to(real) for parent in above):
            continue  # It contains itself, so this would never end.
        if real in path_of:
            raise ValueError(
                f"{root}: {path_of[real]} and {folder} are one folder, whose files would be read "
                "twice; expected every file once; remove the link"
            )
        real_of[folder] = real
        path_of[real] = folder
        entries = sorted(os.scandir(root / folder), key=lambda entry: entry.name)
        if folder.parts and {entry.name for entry in entries} >= RUN_FILES:
            continue  # Its plots are no images of the data.
        for entry in entries:
            if _is_hidden(entry.name):
                continue
            path = f"{folder}/{entry.name}".removeprefix("./")
            is_link = entry.is_symlink()
            # A link that leads nowhere is neither a file nor a folder. Its entry may not say so.
            if os.path.isfile(entry) if is_link else entry.is_file():
                yield path
            elif os.path.isdir(entry) if is_link else entry.is_dir():
                wait = waiting.append if is_link else waiting.appendleft
                wait(PurePosixPath(path))
