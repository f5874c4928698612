"""Made CT of the upper abdomen with ground truth: the data set ctseg brings along.

Any number of cases without a download, a licence or a patient. Case `index` of `seed` is always the same voxels,
however many others are made. Hounsfield units, blur, noise, grids and orientations vary as they do between scanners.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ctseg.sources.made import MadeCase, MadeData, case_streams, write_made
from ctseg.sources.phantom_anatomy import draw_anatomy
from ctseg.sources.phantom_plan import ADULT, SMALL, PhantomSize, ScanPlan, centered_grid, draw_plan
from ctseg.sources.phantom_scan import scan
from ctseg.sources.phantom_tissue import ORGANS
from ctseg.volume import Geometry, Volume

__all__ = [
    "ADULT",
    "DEMO_COUNTS",
    "GENERATOR_VERSION",
    "ORGANS",
    "SMALL",
    "SPLEEN",
    "Phantom",
    "PhantomSize",
    "centered_grid",
    "make_phantom",
    "organ_data",
    "plan_phantom",
    "write_phantoms",
]

GENERATOR_VERSION = 1
"""Grows whenever the same seed gives other voxels."""
DEMO_COUNTS = {"training": 24, "validation": 3, "testing": 5, "test": 2}
"""Cases of each split in the demo's data set."""
SPLEEN = 1
"""The spleen's value in `Phantom.organs`."""


@dataclass(frozen=True)
class Phantom(MadeCase):
    """One made case; `organs` holds label values as `ORGANS` names them."""

    def labels(self, value: int = SPLEEN) -> Volume:
        """A mask of one structure, uint8 0 and 1."""
        return self.mask(value)


def plan_phantom(seed: int, index: int, *, size: PhantomSize = SMALL, grid: Geometry | None = None) -> ScanPlan:
    """The grid and the patient's place in it, without making a voxel; the plan that `make_phantom` follows."""
    return draw_plan(case_streams(seed, index)[0], size, grid)


def make_phantom(seed: int, index: int, *, size: PhantomSize = SMALL, grid: Geometry | None = None) -> Phantom:
    """Case `index` of `seed`: CT and ground truth.

    Args:
        seed: Names the data set.
        index: Names the case in it; cases do not depend on each other.
        size: How large the patient is.
        grid: The voxel grid to use, e.g. from `centered_grid`, with the patient in its middle; default a random one.
    """
    anatomy, noise = case_streams(seed, index)[1:]
    plan = plan_phantom(seed, index, size=size, grid=grid)
    return Phantom(*scan(draw_anatomy(anatomy), plan, noise))


def phantom_data() -> MadeData:
    """The abdomen as a kind of made data: its label is the spleen."""
    return MadeData(
        name="phantom",
        label="spleen",
        label_values=(SPLEEN,),
        structures=ORGANS,
        version=GENERATOR_VERSION,
        make=lambda seed, index: make_phantom(seed, index),
    )


def organ_data() -> MadeData:
    """The abdomen as a kind of made data: its label holds the five large organs, as `ORGANS` numbers them."""
    return MadeData(
        name="phantom_organs",
        label="organs",
        label_values=(1, 2, 3, 4, 5),
        structures=ORGANS,
        version=GENERATOR_VERSION,
        make=lambda seed, index: make_phantom(seed, index),
        keep_values=True,
    )


def write_phantoms(folder: Path, counts: Mapping[str, int], seed: int, on_case: Callable[[str], None]) -> Path:
    """The path of `folder/manifest.json`, once all its cases are made; see `write_made`."""
    return write_made(folder, phantom_data(), counts, seed, on_case)
