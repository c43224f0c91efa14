"""An empty cache folder, and what is rendered into the one that all tests share."""

import pytest

from tasks import glyphs
from tasks.cache import load_or_build


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A cache folder that does not exist yet."""
    monkeypatch.setenv("METAIMPLICIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def rendered():
    """The arrays of `glyphs.render()`, rendered once."""
    return load_or_build("glyphs-1", glyphs.render)
