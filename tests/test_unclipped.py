"""Intensities that are not clipped, and slices that keep their spacing."""

import dataclasses

import numpy as np
import pytest
import torch

from ctseg.preprocess import prepare
from ctseg.recipe import load_recipe
from ctseg.specs import Preprocess
from ctseg.volume import Geometry, Volume

RAS = np.diag([-1.0, -1.0, 1.0])
CPU = torch.device("cpu")
SPEC = Preprocess(spacing_mm=(1.0, 1.0, 3.0), hu_window=(208.0, 596.0), clip=False, crop_foreground=False)


def made(spacing_mm: tuple[float, float, float], axes: np.ndarray = RAS) -> Volume:
    values = np.random.default_rng(0).integers(-1024, 3071, (9, 8, 7)).astype(np.int16)
    return Volume(values, Geometry.from_parts(values.shape, spacing_mm, (0.0, 0.0, 0.0), axes))


def test_deepgrow_subtracts_208_and_divides_by_388() -> None:
    volume = made((1.0, 1.0, 3.0))
    image = prepare(volume, load_recipe("deepgrow_3d").preprocess, CPU).image_XYZ
    assert np.abs(image.numpy() - (volume.array - 208.0) / 388.0).max() < 2e-6
    assert float(image.min()) < -3
    assert float(image.max()) > 7


def test_values_between_voxels_are_those_of_the_clipped_ones_inside_the_window() -> None:
    volume = made((0.7, 0.8, 2.0))
    clipped = prepare(volume, dataclasses.replace(SPEC, clip=True, hu_window=(-1024.0, 3071.0)), CPU).image_XYZ
    free = prepare(volume, dataclasses.replace(SPEC, hu_window=(-1024.0, 3071.0)), CPU).image_XYZ
    assert torch.allclose(free, clipped, atol=1e-5)


@pytest.mark.parametrize(
    ("axes", "slices"), [([[-1, 0, 0], [0, -1, 0], [0, 0, 1]], 7), ([[0, 0, 1], [1, 0, 0], [0, 1, 0]], 8)]
)
def test_slices_keep_their_spacing_in_any_axis_order(axes: list[list[int]], slices: int) -> None:
    spec = dataclasses.replace(SPEC, keep_slice_spacing=True)
    volume = made((0.9, 2.5, 5.0), np.array(axes, dtype=float))
    across = 5.0 if slices == 7 else 2.5
    prepared = prepare(volume, spec, CPU)
    assert prepared.geometry.size[2] == slices
    assert prepared.geometry.spacing_mm[2] == pytest.approx(across)
    assert prepare(volume, SPEC, CPU).geometry.spacing_mm[2] == pytest.approx(3.0)
