"""Sealed files: every flipped bit and every cut shows."""

import json

import pytest

from metaimplicit.training import DamagedFileError, read_sealed_json, write_sealed_json
from metaimplicit.training.sealed import read_sealed, seal, unseal, write_sealed

DATA = {"step": 12, "loss": 0.25, "name": "ä", "nested": {"a": [1, None, True]}}


def flips(content):
    """The content with each of its bits flipped in turn."""
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)


def cuts(content):
    return (content[:length] for length in range(len(content)))


@pytest.mark.parametrize("indent", [None, 2])
def test_sealed_json_is_json_that_shows_every_flipped_bit_and_every_cut(indent):
    text = seal(DATA, key="run", indent=indent)
    assert unseal(text, key="run") == DATA
    assert list(json.loads(text)) == [*DATA, "sha256"]
    assert all(unseal(damaged, key="run") is None for damaged in flips(text))
    assert all(unseal(damaged, key="run") is None for damaged in cuts(text))
    assert unseal(text, key="another run") is None
    assert unseal(json.dumps(DATA).encode(), key="run") is None


def test_a_sealed_json_file_shows_every_flipped_bit_and_every_cut(tmp_path):
    path = tmp_path / "config.json"
    write_sealed_json(path, {"seed": 1})
    content = path.read_bytes()
    assert read_sealed_json(path) == {"seed": 1}
    # Without the last newline, nothing is lost.
    for damaged in [*flips(content), *cuts(content[:-1])]:
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=r"config\.json: got a file that was changed or"):
            read_sealed_json(path)


def test_sealed_bytes_show_every_flipped_bit_and_every_cut(tmp_path):
    path = tmp_path / "checkpoint.pt"
    payload = bytes(range(16))
    write_sealed(path, payload)
    content = path.read_bytes()
    assert read_sealed(path) == payload
    for damaged in [*flips(content), *cuts(content), content + b"\n"]:
        path.write_bytes(damaged)
        with pytest.raises(DamagedFileError, match=r"checkpoint\.pt: got"):
            read_sealed(path)


def test_numbers_that_json_cannot_express_are_refused():
    with pytest.raises(ValueError, match="JSON"):
        seal({"loss": float("nan")})
