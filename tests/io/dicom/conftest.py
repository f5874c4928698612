"""Made CT series as fixtures; `dicom_maker` has the functions themselves."""

from collections.abc import Callable
from pathlib import Path

import pytest

from dicom_maker import Plan, write_enhanced, write_series


@pytest.fixture
def series_plan() -> type[Plan]:
    """The class of plans: `series_plan(tilt_degrees=12)`."""
    return Plan


@pytest.fixture
def make_series(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes a series: (plan, folder name) -> folder."""
    return lambda plan=None, name="series", prefix="slice": write_series(tmp_path / name, plan or Plan(), prefix)


@pytest.fixture
def make_enhanced(tmp_path: Path) -> Callable[..., Path]:
    """A function that writes an Enhanced multi-frame file: (plan, name) -> file."""
    return lambda plan=None, name="enhanced.dcm": write_enhanced(tmp_path / name, plan or Plan())
