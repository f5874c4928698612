"""How a made data set comes to disk: its kind, its files, its manifest.

A kind of made data is a `MadeData`: names, label values, and a function that makes case `index` of `seed`. All kinds
are written alike, so that every one is a manifest, resumes after a stop and refuses a folder that is not its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ctseg.errors import CtsegError
from ctseg.files import make_folder, write_json
from ctseg.io.images import write_image
from ctseg.manifest import SPLITS
from ctseg.volume import Volume


@dataclass(frozen=True)
class MadeCase:
    """One made case.

    Attributes:
        image: The CT, int16 Hounsfield units.
        organs: Values of all structures, uint8, on the same grid; 0 is everything else.
    """

    image: Volume
    organs: Volume

    def mask(self, *values: int) -> Volume:
        """Where the structures of these values are, uint8 0 and 1."""
        return Volume(np.isin(self.organs.array, values).astype(np.uint8), self.organs.geometry)


@dataclass(frozen=True, kw_only=True)
class MadeData:
    """A kind of made data set.

    Attributes:
        name: Names the folder, the manifest and, with a number, the cases.
        label: The structure that is the label, value 1.
        label_values: Its values in `MadeCase.organs`.
        keep_values: The label holds the structures of `label_values` by these values, not one structure by value 1.
        structures: Value (as a string) -> name of all structures in `MadeCase.organs`.
        version: Grows whenever the same seed gives other voxels.
        make: Case `index` of `seed`: (seed, index) -> case.
    """

    name: str
    label: str
    label_values: tuple[int, ...]
    structures: Mapping[str, str]
    version: int
    make: Callable[[int, int], MadeCase]
    keep_values: bool = False

    @property
    def labels(self) -> dict[str, str]:
        """Label value (as a string) -> name."""
        return {str(v): self.structures[str(v)] for v in self.label_values} if self.keep_values else {"1": self.label}

    def label_of(self, case: MadeCase) -> Volume:
        """The label of a case."""
        mask = case.mask(*self.label_values)
        return Volume(mask.array * case.organs.array, mask.geometry) if self.keep_values else mask


def write_made(
    folder: Path, data: MadeData, counts: Mapping[str, int], seed: int, on_case: Callable[[str], None]
) -> Path:
    """The path of `folder/manifest.json`, once all its cases are made.

    Images go to `imagesTr` and `imagesTs` (split `test`, without labels), label masks to `labelsTr`, all structures
    of the labelled cases to `organs`. Files that are there already are kept, so a stopped run resumes.

    Args:
        folder: The data set's folder.
        data: What to make.
        counts: Cases of each split.
        seed: Names the data set.
        on_case: Called with a case's name once its files are there.

    Raises:
        CtsegError: if the folder holds another data set.
        OutputError: if a file cannot be written.
    """
    splits = [split for split in SPLITS for _ in range(counts.get(split, 0))]
    manifest = make_folder(folder) / "manifest.json"
    _refuse_other_data(manifest, data, seed)
    files = [_case_files(f"{data.name}_{index:03d}", split) for index, split in enumerate(splits)]
    for name in ("imagesTr", "imagesTs", "labelsTr", "organs"):
        make_folder(folder / name)
    write_json(manifest, _manifest(data, splits, files, seed))  # first: an unfinished folder then says what it lacks
    for index, case in enumerate(files):
        missing = {kind: file for kind, file in case.items() if not (folder / file).is_file()}
        if missing:
            made = data.make(seed, index)
            volumes = {"image": made.image, "label": data.label_of(made), "organs": made.organs}
            for kind, file in missing.items():
                write_image(folder / file, volumes[kind])
        on_case(f"{data.name}_{index:03d}")
    return manifest


def case_streams(seed: int, index: int) -> tuple[np.random.Generator, np.random.Generator, np.random.Generator]:
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


def _manifest(data: MadeData, splits: list[str], files: list[dict[str, str]], seed: int) -> dict[str, object]:
    entries: dict[str, object] = {}
    for split in SPLITS:
        cases = [case for case, s in zip(files, splits, strict=True) if s == split]
        entries[split] = [{key: case[key] for key in ("image", "label") if key in case} for case in cases]
    return {
        "name": data.name,
        "labels": data.labels,
        "organs": dict(data.structures),
        "licence": "CC0-1.0 (made by ctseg)",
        "source": "made by ctseg, no patient data",
        "seed": seed,
        "generator_version": data.version,
        **entries,
    }


def _refuse_other_data(manifest: Path, data: MadeData, seed: int) -> None:
    if not manifest.is_file():
        return
    try:
        content = json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CtsegError(f"'{manifest}' cannot be read: {error}; remove it or choose another folder") from error
    keys = ("name", "seed", "generator_version")
    found = tuple(content.get(key) for key in keys) if isinstance(content, dict) else None
    if found != (data.name, seed, data.version):
        raise CtsegError(
            f"'{manifest.parent}' holds another data set (name, seed, generator version: {found}), wanted "
            f"{(data.name, seed, data.version)}; choose another folder or remove this one"
        )
