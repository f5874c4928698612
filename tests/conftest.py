"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real CT (CTSEG_REAL_DATA, default ../shared/data beside the checkout); skips where missing."""
    folder = Path(os.environ.get("CTSEG_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real CT at {folder}: set CTSEG_REAL_DATA to run this test")
    return folder
