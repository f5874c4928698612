"""What preparing will take: an upper bound of what it takes, and a refusal in time."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from ctseg.engine import estimate as module
from ctseg.engine.bank import bank_folder, case_folder, prepare_bank
from ctseg.engine.estimate import Estimate, check_space, estimate
from ctseg.errors import ImageError, OutputError
from ctseg.io.images import read_geometry, read_image, write_labels
from ctseg.manifest import Case, Manifest
from ctseg.progress import Silent
from ctseg.recipe import Recipe


class Notes(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def test_disk_is_at_most_the_estimate_also_where_all_is_foreground(
    tiny_manifest: Manifest, tiny_recipe: Recipe, tmp_path: Path
):
    whole = dataclasses.replace(
        tiny_recipe, preprocess=dataclasses.replace(tiny_recipe.preprocess, crop_foreground=False, spacing_mm=(3, 3, 3))
    )
    cases = tiny_manifest.split("training")
    folder = prepare_bank(cases, whole, tmp_path, Silent()).folder
    for case in cases:
        used = sum(file.stat().st_size for file in case_folder(folder, case).iterdir())
        assert 0.4 * estimate(case, whole.preprocess).disk_bytes < used < estimate(case, whole.preprocess).disk_bytes
    full = tmp_path / "full.nii.gz"
    write_labels(full, np.ones(read_geometry(cases[0].image).size, np.uint8), read_geometry(cases[0].image))
    case = dataclasses.replace(cases[0], name="full", label=full)
    folder = prepare_bank((case,), whole, tmp_path, Silent()).folder
    used = sum(file.stat().st_size for file in case_folder(folder, case).iterdir())
    assert 0.95 * estimate(case, whole.preprocess).disk_bytes < used
    assert used < estimate(case, whole.preprocess).disk_bytes + 4096  # headers of the files


def test_only_the_header_is_read_and_a_bad_one_costs_nothing(
    tiny_manifest: Manifest, tiny_recipe: Recipe, tmp_path: Path
):
    case = tiny_manifest.cases[0]
    spoiled = tmp_path / "spoiled.nii.gz"
    spoiled.write_bytes(case.image.read_bytes()[:-1000] + bytes(1000))
    with pytest.raises(ImageError):
        read_image(spoiled)
    there = estimate(case, tiny_recipe.preprocess)
    # 48 x 40 x 30 voxels of 5 mm are 30 x 25 x 19 of 8 mm: first and last voxel centres are 235, 195 and 145 mm apart.
    assert there == Estimate(30 * 25 * 19 * 7, 48 * 40 * 30 * 12 + 30 * 25 * 19 * 16)
    assert estimate(dataclasses.replace(case, image=spoiled), tiny_recipe.preprocess) == there
    for image in (tmp_path / "none.nii", Path(__file__)):
        assert estimate(dataclasses.replace(case, image=image), tiny_recipe.preprocess) == Estimate(0, 0)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_prepared(
    tiny_manifest: Manifest, tiny_recipe: Recipe, mount
):
    disk = mount("size=64k")
    with pytest.raises(OutputError) as caught:
        prepare_bank(tiny_manifest.to_prepare, tiny_recipe, disk, Silent())
    assert str(caught.value) == (
        f"'{bank_folder(disk, tiny_recipe)}': 4 cases to prepare need up to 0.00 GB, free are 0.00 GB; free space or "
        f"name another disk with --prepared"
    )
    assert list(bank_folder(disk, tiny_recipe).iterdir()) == []


def test_what_is_needed_is_told_unless_it_is_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 5 * 10**9}))
    notes = Notes()
    check_space(tmp_path, [], notes)
    assert notes.lines == []
    check_space(tmp_path, [Estimate(10**9, 1), Estimate(3 * 10**9, 1)], notes)
    assert notes.lines == ["2 cases to prepare need up to 4.00 GB, free are 5.00 GB"]
    with pytest.raises(OutputError, match=r"need up to 5.10 GB, free are 5.00 GB; free space or name another disk"):
        check_space(tmp_path, [Estimate(5_100_000_000, 1)], notes)


def test_ready_cases_need_no_space(tiny_manifest: Manifest, tiny_recipe: Recipe, tmp_path: Path, monkeypatch):
    cases: tuple[Case, ...] = tiny_manifest.to_prepare
    prepare_bank(cases, tiny_recipe, tmp_path, Silent())
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 0}))
    assert prepare_bank(cases, tiny_recipe, tmp_path, Silent()).ready == tuple(case.name for case in cases)
