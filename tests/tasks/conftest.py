"""An empty cache folder, and what is rendered or decoded into one that all tests share."""

import numpy as np
import pytest
from image_files import REAL_DATA

from tasks import glyphs
from tasks.cache import cache_dir, load_or_build
from tasks.files import Files


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A cache folder that does not exist yet."""
    monkeypatch.setenv("METAIMPLICIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def rendered():
    """The arrays of `glyphs.render()`, rendered once."""
    return load_or_build("glyphs-1", glyphs.render)


@pytest.fixture
def real_omniglot(monkeypatch):
    """The folder of the real zips, of which one drawing of each character is decoded.

    This is the fourth. The other 19 are that one, shifted.
    """
    if not (REAL_DATA / "omniglot").is_dir():
        pytest.skip(f"the Omniglot zips are not in {REAL_DATA / 'omniglot'}")
    decode = Files.images

    def decode_a_twentieth(files, paths, size, *, color):
        fourth = decode(files, paths[3::20], size, color=color)
        shifted = [np.roll(fourth, d - 3, axis=1) for d in range(20)]
        return np.stack(shifted, 1).reshape(len(paths), *fourth.shape[1:])

    monkeypatch.setattr(Files, "images", decode_a_twentieth)
    monkeypatch.setenv("METAIMPLICIT_CACHE", str(cache_dir() / "omniglot"))
    return REAL_DATA
