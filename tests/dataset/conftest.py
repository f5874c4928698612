"""Small cases whose files a test may change."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ctseg.io.images import write_labels
from ctseg.manifest import Case
from ctseg.sources.phantom import centered_grid, make_phantom


@pytest.fixture
def make_case(tmp_path: Path, write_ct) -> Callable[..., Case]:
    """A function that writes phantom `index` as 20 x 16 x 12 voxels of 10 mm: (index, split, patient) -> Case."""

    def made(index: int, split: str = "training", patient: str | None = None) -> Case:
        phantom = make_phantom(1, index, grid=centered_grid((20, 16, 12), (10.0, 10.0, 10.0), "RAS"))
        image, label = tmp_path / f"ct_{index}.nii.gz", tmp_path / f"ct_{index}_label.nii.gz"
        write_ct(image, phantom.image)
        write_labels(label, np.asfortranarray(phantom.labels().array), phantom.image.geometry)
        return Case(name=f"ct_{index}", split=split, image=image, label=label, patient=patient)

    return made
