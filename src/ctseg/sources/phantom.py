"""Made CT of the upper abdomen with ground truth: the data set ctseg brings along.

Any number of cases without a download, a licence or a patient. Case `index` of `seed` is always the same voxels,
however many others are made. Hounsfield units, blur, noise, grids and orientations vary as they do between scanners.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ctseg.errors import CtsegError
from ctseg.files import atomic_path, make_folder, write_json
from ctseg.manifest import SPLITS
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
class Phantom:
    """One made case.

    Attributes:
        image: The CT, int16 Hounsfield units.
        organs: Label values as `ORGANS` names them, uint8, on the same grid; 0 is everything else.
    """

    image: Volume
    organs: Volume

    def labels(self, value: int = SPLEEN) -> Volume:
        """A mask of one structure, uint8 0 and 1."""
        return Volume((self.organs.array == value).astype(np.uint8), self.organs.geometry)


def plan_phantom(seed: int, index: int, *, size: PhantomSize = SMALL, grid: Geometry | None = None) -> ScanPlan:
    """The grid and the patient's place in it, without making a voxel; the plan that `make_phantom` follows."""
    return draw_plan(_streams(seed, index)[0], size, grid)


def make_phantom(seed: int, index: int, *, size: PhantomSize = SMALL, grid: Geometry | None = None) -> Phantom:
    """Case `index` of `seed`: CT and ground truth.

    Args:
        seed: Names the data set.
        index: Names the case in it; cases do not depend on each other.
        size: How large the patient is.
        grid: The voxel grid to use, e.g. from `centered_grid`, with the patient in its middle; default a random one.
    """
    anatomy, noise = _streams(seed, index)[1:]
    plan = plan_phantom(seed, index, size=size, grid=grid)
    return Phantom(*scan(draw_anatomy(anatomy), plan, noise))


def write_phantoms(folder: Path, counts: Mapping[str, int], seed: int, on_case: Callable[[str], None]) -> Path:
    """The path of `folder/manifest.json`, once all its cases are made.

    Images go to `imagesTr` and `imagesTs` (split `test`, without labels), spleen masks to `labelsTr`, all structures
    of the labelled cases to `organs`. Files that are there already are kept, so a stopped run resumes.

    Args:
        folder: The data set's folder.
        counts: Cases of each split.
        seed: Names the data set.
        on_case: Called with a case's name once its files are there.

    Raises:
        CtsegError: if the folder holds another data set.
        OutputError: if a file cannot be written.
    """
    splits = [split for split in SPLITS for _ in range(counts.get(split, 0))]
    manifest = make_folder(folder) / "manifest.json"
    _refuse_other_data(manifest, seed)
    files = [_case_files(f"phantom_{index:03d}", split) for index, split in enumerate(splits)]
    for name in ("imagesTr", "imagesTs", "labelsTr", "organs"):
        make_folder(folder / name)
    write_json(manifest, _manifest(splits, files, seed))  # first: an unfinished folder then says what it lacks
    for index, case in enumerate(files):
        missing = {kind: file for kind, file in case.items() if not (folder / file).is_file()}
        if missing:
            phantom = make_phantom(seed, index)
            volumes = {"image": phantom.image, "label": phantom.labels(), "organs": phantom.organs}
            for kind, file in missing.items():
                _write_nifti(folder / file, volumes[kind])
        on_case(f"phantom_{index:03d}")
    return manifest


def _streams(seed: int, index: int) -> tuple[np.random.Generator, np.random.Generator, np.random.Generator]:
    """Independent random numbers for a case's plan, anatomy and noise."""
    plan, anatomy, noise = np.random.SeedSequence([seed, index]).spawn(3)
    return np.random.default_rng(plan), np.random.default_rng(anatomy), np.random.default_rng(noise)


def _case_files(name: str, split: str) -> dict[str, str]:
    """Paths in the folder of what is written for a case."""
    if split == "test":
        return {"image": f"imagesTs/{name}.nii.gz"}
    return {
        "image": f"imagesTr/{name}.nii.gz",
        "label": f"labelsTr/{name}.nii.gz",
        "organs": f"organs/{name}.nii.gz",
    }


def _manifest(splits: list[str], files: list[dict[str, str]], seed: int) -> dict[str, object]:
    entries: dict[str, object] = {}
    for split in SPLITS:
        cases = [case for case, s in zip(files, splits, strict=True) if s == split]
        entries[split] = [{key: case[key] for key in ("image", "label") if key in case} for case in cases]
    return {
        "name": "phantom",
        "labels": {"1": "spleen"},
        "organs": ORGANS,
        "licence": "CC0-1.0 (made by ctseg)",
        "source": "made by ctseg, no patient data",
        "seed": seed,
        "generator_version": GENERATOR_VERSION,
        **entries,
    }


def _refuse_other_data(manifest: Path, seed: int) -> None:
    if not manifest.is_file():
        return
    try:
        data = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CtsegError(f"'{manifest}' cannot be read: {error}; remove it or choose another folder") from error
    keys = ("name", "seed", "generator_version")
    found = tuple(data.get(key) for key in keys) if isinstance(data, dict) else None
    if found != ("phantom", seed, GENERATOR_VERSION):
        raise CtsegError(
            f"'{manifest.parent}' holds another data set (name, seed, generator version: {found}), wanted "
            f"{('phantom', seed, GENERATOR_VERSION)}; choose another folder or remove this one"
        )


def _write_nifti(path: Path, volume: Volume) -> None:
    import nibabel
    from isal import igzip

    image = nibabel.Nifti1Image(volume.array, volume.geometry.affine_ras)
    image.header.set_xyzt_units("mm")
    image.set_sform(volume.geometry.affine_ras, code=1)
    image.set_qform(volume.geometry.affine_ras, code=1)
    with atomic_path(path) as temporary:
        temporary.write_bytes(igzip.compress(image.to_bytes(), 1, mtime=0))
