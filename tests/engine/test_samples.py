"""Organs as samples: the index of a label map, what a sample shows, and what is left out."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ctseg.engine.bank import bank_folder, open_bank, prepare_bank
from ctseg.engine.samples import count_organs, open_samples
from ctseg.errors import ManifestError
from ctseg.manifest import Manifest, read_manifest
from ctseg.organs import index_organs
from ctseg.progress import Silent
from ctseg.recipe import Recipe, load_recipe
from ctseg.sampling import CaseArrays, cut_batch, draw_step

CPU = torch.device("cpu")
FLAT = [
    "preprocess.spacing_mm=[6,6,6]",
    "network.features=[4,4,8,8,8,4]",
    "sampling.patch_size=[32,32,1]",
    "inference.window_size=[32,32,1]",
    "clicks.min_voxels=5",
    "clicks.partial_fraction=0",
]


@pytest.fixture(scope="module")
def organs(tiny_organs: Path) -> Manifest:
    return read_manifest(tiny_organs)


@pytest.fixture(scope="module")
def root(organs: Manifest, clicks_recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared")
    prepare_bank(organs.to_prepare, clicks_recipe, folder, Silent())
    return folder


@pytest.fixture(scope="module")
def samples(organs: Manifest, clicks_recipe: Recipe, root: Path) -> list[CaseArrays]:
    return open_samples(organs.split("training"), root, clicks_recipe, organs.labels, CPU)


def test_the_index_holds_every_voxel_organ_by_organ_and_slice_by_slice() -> None:
    label = np.random.default_rng(0).choice([0, 0, 0, 2, 7, 255], (6, 5, 4)).astype(np.uint8)
    label[..., 1] = 0
    flat, sections = index_organs(label)
    assert sorted(flat) == np.flatnonzero(label).tolist()
    assert [row[:2] for row in sections] == [[v, z] for v in (2, 7, 255) for z in (0, 2, 3)]
    for value, z, start, stop, *box in sections:
        own = np.zeros(label.shape, bool)
        own.flat[flat[start:stop]] = True
        assert np.array_equal(np.argwhere(own)[:, 2] == z, np.ones(own.sum(), bool))
        assert np.array_equal(own[..., z], label[..., z] == value)
        x, y, _ = np.nonzero(own)
        assert box == [x.min(), x.max(), y.min(), y.max()]
    assert index_organs(np.zeros((3, 3, 3), np.uint8))[1] == []


def test_each_organ_of_each_case_is_a_sample(organs: Manifest, samples: list[CaseArrays], root, clicks_recipe) -> None:
    names = list(organs.labels.values())
    assert [s.name for s in samples] == [f"case_{n} {name}" for n in range(3) for name in names]
    folder = bank_folder(root, clicks_recipe)
    cases = [c for c in open_bank(organs.split("training"), folder, CPU) for _ in names]
    for sample, case in zip(samples, cases, strict=True):
        assert sample.organ is not None
        own = case.host_label == sample.organ.value
        assert np.array_equal(np.sort(sample.foreground), np.flatnonzero(own))
        corners = np.argwhere(own)
        assert (sample.organ.low, sample.organ.high) == (tuple(corners.min(0)), tuple(corners.max(0)))
    counts = count_organs(organs.split("training"), root, clicks_recipe, organs.labels)
    assert [(c.value, c.organ, c.samples) for c in counts] == [(n + 1, name, 3) for n, name in enumerate(names)]
    assert counts[0].voxels == sum(len(s.foreground) for s in samples if s.name.endswith("spleen"))


def test_a_patch_holds_its_whole_organ_and_no_other(organs, root: Path, clicks_recipe: Recipe, changed) -> None:
    recipe = changed(clicks_recipe, clicks={"margin_voxels": 4, "partial_fraction": 0.0})
    samples = open_samples(organs.split("training"), root, recipe, organs.labels, CPU)
    numbers = list(range(len(samples)))
    shrunk = 0
    for epoch in range(5):
        draws = draw_step(samples, numbers, recipe.sampling, recipe.augmentation, 0, (epoch, 0))
        image, label = cut_batch(samples, draws, recipe.sampling, CPU)
        assert image.shape == label.shape == (15, 1, 32, 16, 16)
        for draw, sample, patch in zip(draws, samples, label, strict=True):
            voxels = len(sample.foreground)
            if draw.size is None:
                assert int(patch.sum()) == voxels
            else:
                shrunk += 1
                scale = np.prod(draw.size) / patch.numel()
                assert int(patch.sum()) * scale == pytest.approx(voxels, rel=0.3)
    assert 0 < shrunk < 75, "some organs do not fit, some do"


def test_a_patch_may_be_what_a_first_click_shows(organs, root: Path, clicks_recipe: Recipe, changed) -> None:
    """Of the window's size at the network's spacing, with one of the organ's voxels in its middle."""
    recipe = changed(clicks_recipe, clicks={"partial_fraction": 1.0})
    samples = open_samples(organs.split("training"), root, recipe, organs.labels, CPU)
    cut = 0
    for epoch in range(5):
        draws = draw_step(samples, list(range(len(samples))), recipe.sampling, recipe.augmentation, 0, (epoch, 0))
        _, label = cut_batch(samples, draws, recipe.sampling, CPU)
        for draw, sample, patch in zip(draws, samples, label, strict=True):
            assert draw.size is None
            shape, half = np.array(sample.host_label.shape), np.array(recipe.sampling.patch_size) // 2
            centres = np.stack(np.unravel_index(sample.foreground, shape), axis=1)
            room = shape - 2 * half
            starts = np.where(room >= 0, np.clip(centres - half, 0, np.maximum(room, 0)), -(-room // 2))
            assert (np.array(draw.start) == starts).all(axis=1).any()
            assert 0 < int(patch.sum()) <= len(sample.foreground)
            cut += int(patch.sum()) < len(sample.foreground)
    assert cut > 10


def test_patches_lie_around_the_organ_in_varied_places(samples: list[CaseArrays], clicks_recipe: Recipe) -> None:
    recipe = clicks_recipe
    starts = {draw_step(samples, [0], recipe.sampling, recipe.augmentation, 0, (e, 0))[0].start for e in range(20)}
    assert len(starts) > 5


def test_in_2d_each_slice_of_an_organ_is_a_sample(organs: Manifest, tmp_path: Path) -> None:
    recipe = load_recipe("deepgrow_2d:small", FLAT)
    prepare_bank(organs.to_prepare, recipe, tmp_path, Silent())
    cases = organs.split("training")
    samples = open_samples(cases, tmp_path, recipe, organs.labels, CPU)
    whole = open_bank(cases, bank_folder(tmp_path, recipe), CPU)
    areas = [np.bincount(case.host_label[..., z].ravel(), minlength=6)[1:] for case in whole for z in range(30)]
    assert all(case.host_label.shape[2] == 30 for case in whole), "slices as the CT has them"
    assert len(samples) == int((np.stack(areas) >= 5).sum())
    draws = draw_step(samples, list(range(len(samples))), recipe.sampling, recipe.augmentation, 0, (0, 0))
    _, label = cut_batch(samples, draws, recipe.sampling, CPU)
    assert label.shape[2:] == (32, 32, 1)
    fits = [d.size is None for d in draws]
    assert [int(p.sum()) for p, fit in zip(label, fits, strict=True) if fit] == [
        len(s.foreground) for s, fit in zip(samples, fits, strict=True) if fit
    ]


def test_small_organs_are_left_out_and_none_at_all_is_told(
    organs: Manifest, samples: list[CaseArrays], root: Path, clicks_recipe: Recipe, changed
) -> None:
    others = max(len(s.foreground) for s in samples if not s.name.endswith("liver"))
    most = changed(clicks_recipe, clicks={"min_voxels": others + 1})
    kept = open_samples(organs.split("training"), root, most, {}, CPU)
    assert {s.name.split(" ", 1)[1] for s in kept} == {"label 4"}, "the liver, whose name is not given here"
    with pytest.raises(ManifestError, match="no label has an organ of 99999 voxels or more"):
        open_samples(organs.split("training"), root, changed(clicks_recipe, clicks={"min_voxels": 99999}), {}, CPU)


def test_any_label_value_is_an_organ(tiny_organs: Path, clicks_recipe: Recipe, tmp_path: Path) -> None:
    from ctseg.io.images import read_labels, write_labels

    (case, *_) = read_manifest(tiny_organs).cases
    label = read_labels(case.label)
    write_labels(tmp_path / "l.nii.gz", np.where(label.array == 4, 200, 0).astype(np.uint8), label.geometry)
    (tmp_path / "m.json").write_text(f'{{"training": [{{"image": "{case.image}", "label": "{tmp_path}/l.nii.gz"}}]}}')
    manifest = read_manifest(tmp_path / "m.json")
    prepare_bank(manifest.to_prepare, clicks_recipe, tmp_path, Silent())
    (sample,) = open_samples(manifest.cases, tmp_path, clicks_recipe, {"200": "thing"}, CPU)
    assert sample.name == "case_0 thing"
