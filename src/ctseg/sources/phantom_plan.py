"""How made CT is taken: the patient's size and place, the voxel grid, the noise. Drawn without making a voxel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ctseg.sources.phantom_shapes import rotation
from ctseg.volume import Geometry, Volume, to_ras

REFERENCE_WIDTH_MM = 340.0
"""Body width at which anatomy is drawn."""

_DEPTH_MM = 230.0
_TABLE_MM = 24.0
"""Depth of the body at which anatomy is drawn, and of the table below it."""
_PIXEL_MM = (0.6, 0.98)
_SLICES_MM = (0.7, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0)
_COMMON_AXES = ("LPS", "LPS", "LPS", "LAS", "LAS", "RAS", "RAS", "RPS", "LPI")
_UNUSUAL_AXES_SHARE, _TILTED_SHARE = 0.3, 0.2

_LPS_OF_LETTER = {"L": (0, 1), "R": (0, -1), "P": (1, 1), "A": (1, -1), "S": (2, 1), "I": (2, -1)}


@dataclass(frozen=True)
class PhantomSize:
    """How large patients and their grids are.

    Attributes:
        body_width_mm: Smallest and largest width of the body.
        length_per_width: Shortest and longest scan along z, in body widths.
        max_voxels: Where the slice is fitted to the body, pixels or slices grow until a case has no more.
        matrix: Rows and columns of a slice; None fits the slice to the body.
    """

    body_width_mm: tuple[float, float]
    length_per_width: tuple[float, float]
    max_voxels: int
    matrix: int | None = None


SMALL = PhantomSize((200.0, 238.0), (0.56, 0.67), 8_000_000)
"""A child, scanned from the lung bases to the kidneys."""
ADULT = PhantomSize((320.0, 365.0), (0.8, 1.2), 512 * 512 * 600, matrix=512)
"""A grown patient in slices of 512 x 512."""


@dataclass(frozen=True, kw_only=True)
class ScanPlan:
    """Where the scanner looks and how well.

    Attributes:
        geometry: The voxel grid.
        body_width_mm: The body's width in this patient.
        stretch: Size of the patient along x, y, z relative to the anatomy.
        turn_degrees: How far the patient lies turned about z.
        center_mm: World position (LPS) of the anatomy's origin.
        noise_hu: Standard deviation of the noise at the body's edge.
    """

    geometry: Geometry
    body_width_mm: float
    stretch: tuple[float, float, float]
    turn_degrees: float
    center_mm: tuple[float, float, float]
    noise_hu: float


def centered_grid(
    size: tuple[int, int, int],
    spacing_mm: tuple[float, float, float],
    axis_codes: str = "LPS",
    *,
    center_mm: tuple[float, float, float] = (0.0, 0.0, 0.0),
    tilt_degrees: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> Geometry:
    """The grid whose middle is `center_mm` (LPS), its axes along `axis_codes`, then tilted about world x, y, z.

    `size` and `spacing_mm` are in the order of the array's axes: the first letter of `axis_codes` is the first axis.
    """
    direction = np.zeros((3, 3))
    for axis, letter in enumerate(axis_codes):
        world, sign = _LPS_OF_LETTER[letter]
        direction[world, axis] = sign
    direction = rotation(tilt_degrees) @ direction + 0.0  # no negative zeros
    half_mm = (np.asarray(size) - 1) / 2 * np.asarray(spacing_mm)
    x, y, z = np.asarray(center_mm) - direction @ half_mm
    return Geometry.from_parts(size, spacing_mm, (float(x), float(y), float(z)), direction)


def draw_plan(
    rng: np.random.Generator, size: PhantomSize, grid: Geometry | None = None, *, middle_mm: float = 0.0
) -> ScanPlan:
    """A random plan; with `grid` given, that grid, and the patient in its middle.

    `middle_mm` is the height of the scan's middle above the origin of the anatomy, which is the spleen.
    """
    width = float(rng.uniform(*size.body_width_mm))
    scale = width / REFERENCE_WIDTH_MM
    stretch = (scale, scale * float(rng.uniform(0.93, 1.06)), scale * float(rng.uniform(0.95, 1.05)))
    shift = [float(rng.uniform(-s, s)) for s in (3.0, 2.0, 6.0)]
    turn = float(rng.uniform(-5, 5))
    noise = float(rng.uniform(8, 18))
    geometry = _draw_grid(rng, size, stretch) if grid is None else grid
    thickness = _ras_grid(geometry).spacing_mm[2]
    x, y, z = (float(v) for v in (geometry.affine @ [*((n - 1) / 2 for n in geometry.size), 1.0])[:3])
    back = _TABLE_MM / 2 * scale  # the table lies in the field of view too
    return ScanPlan(
        geometry=geometry,
        body_width_mm=width,
        stretch=stretch,
        turn_degrees=turn,
        center_mm=(x + shift[0], y + shift[1] - back, z + shift[2] * scale - middle_mm * stretch[2]),
        noise_hu=noise * float(np.clip(np.sqrt(2.5 / thickness), 0.6, 2.0)),
    )


def _draw_grid(rng: np.random.Generator, size: PhantomSize, stretch: tuple[float, float, float]) -> Geometry:
    """A grid around the patient: spacing, axis order and tilt as scanners and converters leave them behind."""
    field_mm = np.array([REFERENCE_WIDTH_MM * 1.07 * stretch[0], (_DEPTH_MM + _TABLE_MM) * 1.05 * stretch[1]])
    length_mm = REFERENCE_WIDTH_MM * stretch[0] * float(rng.uniform(*size.length_per_width))
    thickness = float(rng.choice(_SLICES_MM))
    share = float(rng.uniform())
    if size.matrix is None:
        volume_mm3 = float(field_mm.prod()) * length_mm
        thickness = max(thickness, round(volume_mm3 / _PIXEL_MM[1] ** 2 / size.max_voxels + 0.005, 2))
        least = max(_PIXEL_MM[0], float(np.sqrt(volume_mm3 / thickness / size.max_voxels)))
        pixel = round(min(least + share * (_PIXEL_MM[1] - least), _PIXEL_MM[1]), 4)
        columns, rows = (round(n) for n in field_mm / pixel)
    else:
        columns = rows = size.matrix
        least = float(np.clip(field_mm.max() / size.matrix, *_PIXEL_MM))
        pixel = round(min(least * (1 + 0.15 * share), _PIXEL_MM[1]), 4)
    counts, spacing = (columns, rows, max(1, round(length_mm / thickness))), (pixel, pixel, thickness)
    codes = str(rng.choice(_COMMON_AXES))
    if rng.uniform() < _UNUSUAL_AXES_SHARE:
        codes = "".join(str(rng.choice(list(pair))) for pair in rng.permutation(["LR", "PA", "SI"]))
    tilted = rng.uniform() < _TILTED_SHARE
    tilt = (float(rng.uniform(-12, 12)), float(rng.uniform(-4, 4)), float(rng.uniform(-6, 6)))
    order = [_LPS_OF_LETTER[letter][0] for letter in codes]
    return centered_grid(
        (counts[order[0]], counts[order[1]], counts[order[2]]),
        (spacing[order[0]], spacing[order[1]], spacing[order[2]]),
        codes,
        center_mm=(float(rng.uniform(-40, 40)), float(rng.uniform(-220, 20)), float(rng.uniform(-900, 300))),
        tilt_degrees=tilt if tilted else (0.0, 0.0, 0.0),
    )


def _ras_grid(geometry: Geometry) -> Geometry:
    """The grid turned to RAS."""
    return to_ras(Volume(np.broadcast_to(np.uint8(0), geometry.size), geometry)).geometry
