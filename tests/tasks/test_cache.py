"""Arrays that are kept on disk: mapped from a whole file, or built again."""

import os

import numpy as np
import pytest

from tasks.cache import ALIGNMENT, cache_dir, download, load_or_build


def build():
    rng = np.random.default_rng(0)
    return {
        "images": rng.integers(0, 256, (40, 3, 8, 8), np.uint8),
        "names": np.array(["x", "Ägypten"]),
        "numbers": np.arange(5.0),
        "none": np.zeros((0, 16), np.uint8),
        "one": np.array(3),
    }


def is_whole(arrays):
    expected = build()
    assert list(arrays) == list(expected)
    return all(
        arrays[name].dtype == array.dtype and np.array_equal(arrays[name], array)
        for name, array in expected.items()
    )


@pytest.fixture
def saved(empty_cache):
    """The path of a file of the arrays of `build`."""
    load_or_build("thing-1", build)
    return empty_cache / "thing-1.arrays"


def test_arrays_are_built_once_and_read_back_from_one_file(empty_cache):
    calls = []
    for _ in range(2):
        assert is_whole(load_or_build("thing-1", lambda: calls.append(1) or build()))
    assert len(calls) == 1
    assert [path.name for path in empty_cache.iterdir()] == ["thing-1.arrays"]


def test_an_empty_array_may_be_the_last(empty_cache):
    """It begins at a multiple of 64 bytes, which may be after all that was written."""
    expected = {"a": np.arange(3, dtype=np.uint8), "b": np.zeros(0)}
    for _ in range(2):
        arrays = load_or_build("empty-1", lambda: expected)
        assert not arrays["a"].flags.owndata
        assert all(np.array_equal(arrays[name], x) for name, x in expected.items())


def test_arrays_are_mapped_and_what_is_written_to_them_stays_here(saved):
    whole = saved.read_bytes()
    arrays = load_or_build("thing-1", build)
    for array in arrays.values():
        assert array.ctypes.data % ALIGNMENT == 0
        assert not array.flags.owndata
    arrays["images"][:] = 0
    assert saved.read_bytes() == whole
    assert is_whole(load_or_build("thing-1", build))


def damage(data, kind, rng):
    """A file with one fault."""
    data = bytearray(data)
    start = int(rng.integers(len(data)))
    stop = start + int(rng.integers(1, 2000))
    if kind == "bit":
        data[start] ^= 1 << int(rng.integers(8))
    elif kind == "byte":
        data[start] ^= int(rng.integers(1, 256))
    elif kind == "end":
        del data[start:]
    elif kind == "gap":
        del data[start:stop]
    elif kind == "zeros":
        data[start:stop] = bytes(len(data[start:stop]))
    elif kind == "noise":
        data[start:stop] = rng.bytes(len(data[start:stop]))
    elif kind == "more":
        data += rng.bytes(stop - start)
    return bytes(data)


@pytest.mark.parametrize("kind", ["bit", "byte", "end", "gap", "zeros", "noise", "more"])
def test_a_file_with_any_fault_is_built_again(saved, kind):
    whole = saved.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(30):
        damaged = damage(whole, kind, rng)
        saved.write_bytes(damaged)
        calls = []
        arrays = load_or_build("thing-1", lambda calls=calls: calls.append(1) or build())
        assert is_whole(arrays)
        assert len(calls) == (damaged != whole)  # zeros may be there already
        assert saved.read_bytes() == whole


@pytest.mark.parametrize("content", [b"", b"not arrays", bytes(4), b"\0" * 100])
def test_a_file_of_something_else_is_built_again(saved, content):
    saved.write_bytes(content)
    assert is_whole(load_or_build("thing-1", build))


def test_the_file_of_another_name_or_stamp_is_built_again(saved):
    load_or_build("thing-2", lambda: {"images": np.zeros(3)})
    os.replace(saved.with_name("thing-2.arrays"), saved)
    assert is_whole(load_or_build("thing-1", build))
    other = load_or_build("thing-1", lambda: {"images": np.ones(3)}, stamp="other")
    assert list(other) == ["images"]
    assert is_whole(load_or_build("thing-1", build))


def test_an_interrupted_save_leaves_no_file(empty_cache, monkeypatch):
    def interrupt(block, checksum):
        raise KeyboardInterrupt

    monkeypatch.setattr("tasks.cache.zlib.crc32", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_or_build("thing-1", build)
    assert list(empty_cache.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_what_others_write_is_not(empty_cache):
    empty_cache.mkdir()
    for name in ("thing-1abc.partial", "thing-1new.partial", "other-1abc.partial"):
        (empty_cache / name).write_bytes(b"half")
        if "abc" in name:
            os.utime(empty_cache / name, (0, 0))
    load_or_build("thing-1", build)
    left = sorted(path.name for path in empty_cache.iterdir())
    assert left == ["other-1abc.partial", "thing-1.arrays", "thing-1new.partial"]


def test_arrays_are_returned_even_if_they_cannot_be_saved(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("METAIMPLICIT_CACHE", str(tmp_path / "file" / "cache"))
    assert is_whole(load_or_build("thing-1", build))


def test_the_cache_folder_is_the_users_unless_the_environment_names_one(monkeypatch, tmp_path):
    monkeypatch.delenv("METAIMPLICIT_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "metaimplicit"
    monkeypatch.setenv("METAIMPLICIT_CACHE", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"


@pytest.mark.parametrize("error", [ImportError, OSError, RuntimeError])
def test_a_download_that_fails_says_how_to_get_the_data_by_hand(error):
    def fetch():
        raise error("no network")

    message = r"set: could not download it \(no network\); put x there and name that as data_root"
    with pytest.raises(FileNotFoundError, match=message):
        download("set", fetch, by_hand="put x there")
