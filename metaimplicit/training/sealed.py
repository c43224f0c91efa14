"""Files that know whether they are whole: each ends with a number for all that stands before it.

A sealed JSON object has a digest as its last member. Sealed bytes have a checksum in a last line,
because they are long, and a digest of theirs would take longer than to write them.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

from metaimplicit.training.files import previous, write_atomically

MEMBER = b'"sha256": "'  # what stands before the digest in JSON
LINE = b"\ncrc32 "  # and after bytes
DIGITS = 16  # of the hexadecimal digest: 64 bits, where only accidents are to be noticed


class DamagedFileError(ValueError):
    """A file is not what was written: it is cut, changed, or not one of these files at all.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "config.json")
        ...     write_sealed_json(path, {"seed": 1})
        ...     _ = path.write_text(path.read_text().replace("1", "2", 1))
        ...     try:
        ...         read_sealed_json(path)
        ...     except DamagedFileError:
        ...         print("damaged")
        damaged
    """


def seal(data: dict[str, Any], key: str = "", *, indent: int | None = None) -> bytes:
    """A JSON object that ends with the digest of `key` and of the text before it.

    Args:
        data: The members, at least one.
        key: What the reader has to know, too. An object sealed with another key counts as damaged.
        indent: Spaces for each level. If None, the object is one line.

    Raises:
        ValueError: The data hold NaN or Inf, which JSON cannot express.

    Example:
        >>> text = seal({"loss": 0.5}, key="run 1")
        >>> unseal(text, key="run 1"), unseal(text, key="run 2"), unseal(text[:-9], key="run 1")
        ({'loss': 0.5}, None, None)
    """
    text = json.dumps(data, indent=indent, allow_nan=False)
    margin, end = (" ", "}") if indent is None else ("\n" + " " * indent, "\n}")
    body = text.removesuffix(end).encode() + b"," + margin.encode() + MEMBER
    return body + digest(key.encode() + body) + b'"' + end.encode()


def unseal(text: bytes, key: str = "") -> dict[str, Any] | None:
    """The members of a sealed JSON object without its digest, or None if it is damaged."""
    if not is_whole(text, key):
        return None
    data: dict[str, Any] = json.loads(text)
    del data["sha256"]
    return data


def is_whole(text: bytes, key: str = "") -> bool:
    """Whether a sealed JSON object is what was written."""
    before, member, after = text.rpartition(MEMBER)
    expected = digest(key.encode() + before + member)
    return after in (expected + b'"}', expected + b'"\n}')


def write_sealed_json(path: Path, data: dict[str, Any], *, keep: Path | None = None) -> None:
    """Write a sealed JSON object atomically, for `read_sealed_json`.

    Args:
        path: The file.
        data: The members, at least one.
        keep: Where the old file goes. If None, it is overwritten.

    Raises:
        ValueError: The data hold NaN or Inf, which JSON cannot express.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "config.json")
        ...     write_sealed_json(path, {"seed": 1})
        ...     print(path.read_text())
        {
          "seed": 1,
          "sha256": "3877f371981d3434"
        }
        <BLANKLINE>
    """
    text = seal(data, indent=2) + b"\n"
    write_atomically(path, lambda file: file.write(text), keep=keep)


def read_sealed_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that `write_sealed_json` wrote, without its digest.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedFileError: The file is not what was written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "config.json")
        ...     write_sealed_json(path, {"seed": 1})
        ...     read_sealed_json(path)
        {'seed': 1}
    """
    data = unseal(_read_file(path).removesuffix(b"\n"))
    if data is None:
        raise DamagedFileError(
            f"{path}: got a file that was changed or damaged after it was written, or that an "
            "earlier version wrote, expected one that ends with its own digest; restore it, from "
            f"{previous(path).name} if that exists"
        )
    return data


def write_sealed(path: Path, payload: bytes | memoryview, **options: Any) -> None:
    """Write bytes and a last line with their checksum, atomically, for `read_sealed`.

    Args:
        path: The file.
        payload: The bytes.
        options: Those of `write_atomically`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "a.pt")
        ...     write_sealed(path, b"payload")
        ...     read_sealed(path)
        b'payload'
    """
    last_line = _last_line(payload)
    write_atomically(path, lambda file: file.writelines((payload, last_line)), **options)


def read_sealed(path: Path) -> bytes:
    """Read the bytes that `write_sealed` wrote, without their checksum.

    Raises:
        FileNotFoundError: There is no such file.
        DamagedFileError: The file is not what was written.
    """
    content = _read_file(path)
    length = len(_last_line(b""))
    payload, last_line = content[:-length], content[-length:]
    if not last_line.startswith(LINE):
        raise DamagedFileError(
            f"{path.name}: got no checksum at the end, expected the file that was written; it was "
            f"cut or damaged, or is of an earlier version ({path})"
        )
    if last_line != _last_line(payload):
        raise DamagedFileError(
            f"{path.name}: got other bytes than were written; it is damaged ({path})"
        )
    return payload


def digest(content: bytes | memoryview) -> bytes:
    """The first 16 hexadecimal digits of the SHA-256 of some bytes.

    Example:
        >>> digest(b"")
        b'e3b0c44298fc1c14'
    """
    return hashlib.sha256(content).hexdigest()[:DIGITS].encode()


def _read_file(path: Path) -> bytes:
    if path.is_dir():
        raise DamagedFileError(f"{path}: got a folder, expected the file that a run wrote")
    return path.read_bytes()


def _last_line(payload: bytes | memoryview) -> bytes:
    """The checksum of sealed bytes, as their last line."""
    return LINE + b"%08x\n" % zlib.crc32(payload)
