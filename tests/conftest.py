"""Fixtures shared by all tests."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ctseg.files import write_json
from ctseg.io.images import write_labels
from ctseg.manifest import Manifest, read_manifest
from ctseg.recipe import Recipe, load_recipe
from ctseg.sources.phantom import centered_grid, make_phantom, organ_data

TINY_OVERRIDES = [
    "network.channels=[4,8]",
    "network.strides=[2]",
    "preprocess.spacing_mm=[8,8,8]",
    "sampling.patch_size=[16,16,16]",
    "sampling.patches_per_case=2",
    "training.batch_cases=2",
    "training.epochs=2",
    "training.validation_interval_epochs=1",
    "inference.window_size=[16,16,16]",
]
"""Turns spleen:small into a recipe that trains in about a second."""
TINY_CLICKS = [
    "network.features=[4,4,8,8,8,4]",
    "preprocess.spacing_mm=[8,8,8]",
    "sampling.patch_size=[32,16,16]",
    "inference.window_size=[32,16,16]",
    "training.batch_cases=4",
    "training.epochs=2",
    "training.validation_interval_epochs=1",
    "clicks.num_clicks=3",
    "clicks.margin_voxels=1",
    "clicks.min_voxels=4",
]
"""Turns deepgrow_3d:small into a recipe that trains in seconds."""


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests, and the processes they start, find no compiled network of yesterday and leave none to the user."""
    os.environ["CTSEG_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real CT (CTSEG_REAL_DATA, default ../shared/data beside the checkout); skips where missing."""
    folder = Path(os.environ.get("CTSEG_REAL_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real CT at {folder}: set CTSEG_REAL_DATA to run this test")
    return folder


@pytest.fixture(scope="session")
def tiny_recipe() -> Recipe:
    """The spleen pipeline, small enough to train in a second."""
    return load_recipe("spleen:small", TINY_OVERRIDES)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest file of six coarse phantoms in varied axis orders: 3 training, 1 validation, 1 testing, 1 test."""
    folder = tmp_path_factory.mktemp("tiny")
    splits = ["training"] * 3 + ["validation", "testing", "test"]
    entries: dict[str, list[object]] = {split: [] for split in splits}
    for index, (split, codes) in enumerate(zip(splits, ("LPS", "RAS", "LAS", "SPL", "LPS", "RAI"), strict=True)):
        sizes = dict(zip("LPS", (48, 40, 30), strict=True))
        sizes.update({"R": 48, "A": 40, "I": 30})
        grid = centered_grid(tuple(sizes[c] for c in codes), (5.0, 5.0, 5.0), codes)
        phantom = make_phantom(7, index, grid=grid)
        image, label = folder / f"case_{index}.nii.gz", folder / f"case_{index}_label.nii.gz"
        _write_ct(image, phantom.image)
        write_labels(label, phantom.labels().array, grid)
        entries[split].append(image.name if split == "test" else {"image": image.name, "label": label.name})
    write_json(folder / "tiny.json", {"name": "tiny", "labels": {"0": "background", "1": "spleen"}, **entries})
    return folder / "tiny.json"


@pytest.fixture(scope="session")
def tiny_organs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest file of five coarse phantoms with five organs each: 3 training, 1 validation, 1 testing."""
    folder = tmp_path_factory.mktemp("organs")
    entries: dict[str, list[object]] = {"training": [], "validation": [], "testing": []}
    splits = ["training"] * 3 + ["validation", "testing"]
    for index, (split, codes) in enumerate(zip(splits, ("LPS", "RAS", "LPS", "RAS", "LAS"), strict=True)):
        grid = centered_grid((48, 40, 30), (5.0, 5.0, 5.0), codes)
        phantom = make_phantom(7, index, grid=grid)
        image, label = folder / f"case_{index}.nii.gz", folder / f"case_{index}_label.nii.gz"
        _write_ct(image, phantom.image)
        write_labels(label, organ_data().label_of(phantom).array, grid)
        entries[split].append({"image": image.name, "label": label.name})
    write_json(folder / "organs.json", {"name": "organs", "labels": organ_data().labels, **entries})
    return folder / "organs.json"


@pytest.fixture(scope="session")
def clicks_recipe() -> Recipe:
    """The deepgrow pipeline, small enough to train in seconds."""
    return load_recipe("deepgrow_3d:small", TINY_CLICKS)


@pytest.fixture(scope="session")
def tiny_manifest(tiny_data: Path) -> Manifest:
    """The tiny data set."""
    return read_manifest(tiny_data)


def _write_ct(path: Path, volume) -> None:
    import nibabel

    image = nibabel.Nifti1Image(volume.array, volume.geometry.affine_ras, dtype=np.int16)
    nibabel.save(image, path)


@pytest.fixture
def write_ct():
    """A function that writes a Volume as NIfTI: (path, volume) -> None."""
    return _write_ct


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A function that mounts an empty disk with options such as "size=64k" or "ro"."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mounted(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
            pytest.skip("only root on Linux can mount a disk")
        return folder

    yield mounted
    subprocess.run(["umount", str(folder)], capture_output=True, check=False)
