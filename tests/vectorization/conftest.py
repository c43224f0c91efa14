"""Every test of this folder works in float64, so that its tolerances can be near round-off."""

import pytest


@pytest.fixture(autouse=True)
def _everywhere(float64: None) -> None:
    """The fixture of all folders, for every test of this one."""


@pytest.fixture(autouse=True)
def _vmap_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which of the two is faster depends on the machine, and these tests are of their values."""
    monkeypatch.setattr("metaimplicit.learner.meta_learner.choose_vectorize", lambda run: "vmap")
