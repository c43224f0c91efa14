"""Arrays that are kept on disk: read back whole, or built again."""

import numpy as np
import pytest

from tasks.cache import cache_dir, download, load_or_build


def build():
    return {"a": np.arange(1000), "names": np.array(["x", "y"])}


def test_arrays_are_built_once_and_read_back_from_one_file(empty_cache):
    calls = []
    for _ in range(2):
        arrays = load_or_build("thing-1", lambda: calls.append(1) or build())
        assert arrays["a"].tolist() == list(range(1000))
        assert arrays["names"].tolist() == ["x", "y"]
    assert len(calls) == 1
    assert [path.name for path in empty_cache.iterdir()] == ["thing-1.npz"]


@pytest.mark.parametrize("damage", ["emptied", "no zip", "cut short", "a bit flipped"])
def test_a_damaged_file_is_built_again(empty_cache, damage):
    load_or_build("thing-1", build)
    path = empty_cache / "thing-1.npz"
    whole = path.read_bytes()
    middle = len(whole) // 2
    damaged = {
        "emptied": b"",
        "no zip": b"not a zip",
        "cut short": whole[:middle],
        "a bit flipped": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
    }
    path.write_bytes(damaged[damage])
    assert load_or_build("thing-1", build)["a"].tolist() == list(range(1000))
    with np.load(path) as file:
        assert file["a"].tolist() == list(range(1000))


def test_an_interrupted_save_leaves_no_file(empty_cache, monkeypatch):
    def interrupt(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez_compressed", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_or_build("thing-1", build)
    assert list(empty_cache.iterdir()) == []


def test_arrays_are_returned_even_if_they_cannot_be_saved(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("METAIMPLICIT_CACHE", str(tmp_path / "file" / "cache"))
    assert load_or_build("thing-1", build)["a"].tolist() == list(range(1000))


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
