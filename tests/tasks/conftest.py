"""Cache folders: an empty one for each test, and one that tests of slow data share."""

import os

import pytest

from tasks import glyphs
from tasks.cache import load_or_build


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A cache folder that does not exist yet."""
    monkeypatch.setenv("METAIMPLICIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """One folder for all workers of pytest-xdist, each of which has its own below a common one."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "cache"


@pytest.fixture
def shared_cache(shared_folder, monkeypatch):
    """A cache folder that keeps what earlier tests have put there."""
    monkeypatch.setenv("METAIMPLICIT_CACHE", str(shared_folder))
    return shared_folder


@pytest.fixture
def rendered(shared_cache):
    """The arrays of `glyphs.render()`, rendered once."""
    return load_or_build("glyphs-1", glyphs.render)
