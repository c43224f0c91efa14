"""Every test of this folder works in float64, so that its tolerances can be near round-off."""

import pytest


@pytest.fixture(autouse=True)
def _everywhere(float64: None) -> None:
    """The fixture of all folders, for every test of this one."""
