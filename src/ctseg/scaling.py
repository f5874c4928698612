"""What `preprocess.prepare` does, for recipes that do not clip intensities or that keep a CT's own slices."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from ctseg.arrays import to_work_on
from ctseg.preprocess import Prepared, prepare
from ctseg.specs import Preprocess
from ctseg.volume import Geometry, Volume, to_ras

if TYPE_CHECKING:
    import torch

WIDEST_HU = (-32768.0, 32768.0)
"""No scanner stores values beyond 16 bits. In float32 a window of this width is exact to 0.004 HU."""


def spec_for(spec: Preprocess, geometry: Geometry) -> Preprocess:
    """The spec with the spacing that it means for a CT on this grid."""
    if not spec.keep_slice_spacing:
        return spec
    ras = to_ras(Volume(np.broadcast_to(np.uint8(0), geometry.size), geometry)).geometry
    x_mm, y_mm, _ = spec.spacing_mm
    return dataclasses.replace(spec, spacing_mm=(x_mm, y_mm, ras.spacing_mm[2]))


def prepare_image(volume: Volume, spec: Preprocess, device: torch.device) -> Prepared:
    """As `prepare`, with values below 0 and above 1 where `spec.clip` is off."""
    spec = spec_for(spec, volume.geometry)
    if spec.clip:
        return prepare(volume, spec, device)
    prepared = prepare(volume, dataclasses.replace(spec, hu_window=WIDEST_HU), device)
    (low, high), (lowest, highest) = spec.hu_window, WIDEST_HU
    values_XYZ = to_work_on(prepared.image_XYZ)
    values_XYZ *= (highest - lowest) / (high - low)
    values_XYZ += (lowest - low) / (high - low)
    return prepared
