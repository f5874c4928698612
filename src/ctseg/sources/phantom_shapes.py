"""Shapes as signed distances in millimetres: the geometry that made CT is drawn from.

A distance is negative inside, 0 on the surface and exact to first order near it, which is what partial volume needs.
Coordinates arrive as float32 arrays that broadcast against each other, so that a tube that does not change along z
costs no more than one slice. Space is the patient's LPS: x to the left, y to the back, z to the head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]
"""float32 wherever voxels are many."""
Field = Callable[[FloatArray, FloatArray, FloatArray], FloatArray]
"""Signed distance at (x, y, z), all in millimetres."""
Triple = tuple[float, float, float]

_FAR = 1e4


@dataclass(frozen=True)
class Shape:
    """A closed surface and a box around it.

    Attributes:
        distance: Signed distance to the surface, negative inside.
        low_mm: Lowest x, y, z the shape reaches.
        high_mm: Highest x, y, z the shape reaches.
    """

    distance: Field
    low_mm: Triple = (-_FAR, -_FAR, -_FAR)
    high_mm: Triple = (_FAR, _FAR, _FAR)


def rotation(angles_degrees: Triple) -> NDArray[np.float64]:
    """3x3 rotation about x, then y, then z."""
    (sx, sy, sz), (cx, cy, cz) = np.sin(np.radians(angles_degrees)), np.cos(np.radians(angles_degrees))
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return np.asarray(about_z @ about_y @ about_x, dtype=np.float64)


def ellipsoid(center_mm: Triple, radii_mm: Triple, angles_degrees: Triple = (0.0, 0.0, 0.0)) -> Shape:
    """An ellipsoid, turned by `angles_degrees` about its centre."""
    turn = rotation(angles_degrees)
    reach = np.sqrt(((turn * np.asarray(radii_mm)) ** 2).sum(axis=1))
    rows = [[float(v) for v in row] for row in turn.T / np.asarray(radii_mm)[:, None]]
    weights = [1.0 / r**2 for r in radii_mm]
    least_slope = 1.0 / min(radii_mm)

    def distance(x: FloatArray, y: FloatArray, z: FloatArray) -> FloatArray:
        shifted = x - center_mm[0], y - center_mm[1], z - center_mm[2]
        u2, v2, w2 = (_linear(row, shifted) ** 2 for row in rows)
        slope = np.sqrt(u2 * weights[0] + v2 * weights[1] + w2 * weights[2])
        field: FloatArray = (u2 + v2 + w2 - 1.0) / np.maximum(2.0 * slope, least_slope)
        return field

    low, high = np.asarray(center_mm) - reach, np.asarray(center_mm) + reach
    return Shape(distance, _triple(low), _triple(high))


def tube(center_mm: tuple[float, float], radii_mm: tuple[float, float], low_z_mm: float, high_z_mm: float) -> Shape:
    """An elliptic cylinder along z, between two heights."""
    (cx, cy), (rx, ry) = center_mm, radii_mm
    least_slope = 1.0 / min(radii_mm)

    def distance(x: FloatArray, y: FloatArray, z: FloatArray) -> FloatArray:
        u2, v2 = ((x - cx) / rx) ** 2, ((y - cy) / ry) ** 2
        slope = np.maximum(2.0 * np.sqrt(u2 / rx**2 + v2 / ry**2), least_slope)
        sides: FloatArray = (u2 + v2 - 1.0) / slope
        if low_z_mm <= -_FAR and high_z_mm >= _FAR:
            return sides
        ended: FloatArray = np.maximum(sides, np.maximum(low_z_mm - z, z - high_z_mm))
        return ended

    return Shape(distance, (cx - rx, cy - ry, low_z_mm), (cx + rx, cy + ry, high_z_mm))


def endless_tube(center_mm: tuple[float, float], radii_mm: tuple[float, float]) -> Shape:
    """An elliptic cylinder along z without ends."""
    return tube(center_mm, radii_mm, -_FAR, _FAR)


def capsule(start_mm: Triple, end_mm: Triple, radius_mm: float) -> Shape:
    """A round rod between two points: a stretch of vessel."""
    axis = [float(b - a) for a, b in zip(start_mm, end_mm, strict=True)]
    length2 = sum(a * a for a in axis)

    def distance(x: FloatArray, y: FloatArray, z: FloatArray) -> FloatArray:
        x, y, z = x - start_mm[0], y - start_mm[1], z - start_mm[2]
        along = np.clip((axis[0] * x + axis[1] * y + axis[2] * z) / length2, 0.0, 1.0)
        parts = (x - axis[0] * along) ** 2 + (y - axis[1] * along) ** 2 + (z - axis[2] * along) ** 2
        field: FloatArray = np.sqrt(parts) - radius_mm
        return field

    ends = np.array([start_mm, end_mm])
    return Shape(distance, _triple(ends.min(axis=0) - radius_mm), _triple(ends.max(axis=0) + radius_mm))


def half_space(normal: Triple, offset_mm: float) -> Shape:
    """The points with `normal` . p <= `offset_mm`; `normal` is made a unit vector."""
    unit = [n / float(np.linalg.norm(normal)) for n in normal]
    return Shape(lambda x, y, z: _linear(unit, (x, y, z)) - offset_mm)


def torso(center_y_mm: float, radii_mm: tuple[float, float], sway: float, wave_mm: float, phase: float) -> Shape:
    """A trunk along z without ends: a section between ellipse and rectangle whose width changes slowly with height.

    Args:
        center_y_mm: The section's centre; x = 0.
        radii_mm: Half width and half depth.
        sway: Relative change of the radii along z.
        wave_mm: Height over which the width changes, in mm per radian.
        phase: Where the widest place is, in radians.
    """
    rx, ry = radii_mm
    boxy = 0.45

    def distance(x: FloatArray, y: FloatArray, z: FloatArray) -> FloatArray:
        swell = 1.0 / (1.0 + sway * np.sin(z / wave_mm + phase))
        u2, v2 = (x * (swell / rx)) ** 2, ((y - center_y_mm) * (swell / ry)) ** 2
        level = (1.0 - boxy) * (u2 + v2) + boxy * np.sqrt(u2 * u2 + v2 * v2)
        slope = np.maximum(2.0 * np.sqrt(u2 / rx**2 + v2 / ry**2), 1.0 / ry)
        field: FloatArray = (level - 1.0) / slope
        return field

    wide = 1.0 + abs(sway)
    low = (-rx * wide, center_y_mm - ry * wide, -_FAR)
    return Shape(distance, low, (rx * wide, center_y_mm + ry * wide, _FAR))


def below_domes(domes: list[tuple[Triple, Triple]]) -> Shape:
    """All that lies below the highest of some domes: each (top x, y, z) and (fall in z, at half width, half depth)."""

    def distance(x: FloatArray, y: FloatArray, z: FloatArray) -> FloatArray:
        height, steep = None, None
        for (cx, cy, top), (fall, rx, ry) in domes:
            u, v = (x - cx) / rx, (y - cy) / ry
            one = top - fall * (u * u + v * v)
            slope = 1.0 / np.sqrt(1.0 + (2.0 * fall) ** 2 * ((u / rx) ** 2 + (v / ry) ** 2))
            steep = slope if height is None or steep is None else np.where(one > height, slope, steep)
            height = one if height is None else np.maximum(height, one)
        assert height is not None
        assert steep is not None
        field: FloatArray = (z - height) * steep
        return field

    return Shape(distance)


def union(*shapes: Shape) -> Shape:
    """Where any of the shapes is."""

    def distance(x: FloatArray, y: FloatArray, z: FloatArray) -> FloatArray:
        fields = [shape.distance(x, y, z) for shape in shapes]
        for field in fields[1:]:
            fields[0] = np.minimum(fields[0], field)
        return fields[0]

    low = np.min([shape.low_mm for shape in shapes], axis=0)
    high = np.max([shape.high_mm for shape in shapes], axis=0)
    return Shape(distance, _triple(low), _triple(high))


def intersection(*shapes: Shape) -> Shape:
    """Where all of the shapes are."""

    def distance(x: FloatArray, y: FloatArray, z: FloatArray) -> FloatArray:
        fields = [shape.distance(x, y, z) for shape in shapes]
        for field in fields[1:]:
            fields[0] = np.maximum(fields[0], field)
        return fields[0]

    low = np.max([shape.low_mm for shape in shapes], axis=0)
    high = np.min([shape.high_mm for shape in shapes], axis=0)
    return Shape(distance, _triple(low), _triple(high))


def boxed(shape: Shape, low_mm: Triple, high_mm: Triple) -> Shape:
    """The shape, evaluated only within a box that is known to hold what matters of it."""
    low, high = np.maximum(shape.low_mm, low_mm), np.minimum(shape.high_mm, high_mm)
    return Shape(shape.distance, _triple(low), _triple(high))


def outside(shape: Shape) -> Shape:
    """Where the shape is not."""
    return Shape(lambda x, y, z: -shape.distance(x, y, z))


def grown(shape: Shape, by_mm: float) -> Shape:
    """The shape with its surface moved outwards, or inwards if `by_mm` is negative."""
    low, high = np.asarray(shape.low_mm) - by_mm, np.asarray(shape.high_mm) + by_mm
    return Shape(lambda x, y, z: shape.distance(x, y, z) - by_mm, _triple(low), _triple(high))


def shell(shape: Shape, thickness_mm: float) -> Shape:
    """What lies within half of `thickness_mm` of the shape's surface."""
    half = thickness_mm / 2
    low, high = np.asarray(shape.low_mm) - half, np.asarray(shape.high_mm) + half
    return Shape(lambda x, y, z: np.abs(shape.distance(x, y, z)) - half, _triple(low), _triple(high))


def rough(shape: Shape, amplitude_mm: float, wave_mm: float, phases: Triple) -> Shape:
    """The shape with a surface that bulges and dents by up to `amplitude_mm`, about every `wave_mm`.

    The distance stays exact to first order only where `amplitude_mm` is well below `wave_mm` / 2 pi.
    """
    k = 2 * np.pi / wave_mm

    def distance(x: FloatArray, y: FloatArray, z: FloatArray) -> FloatArray:
        # Three waves along no axis of the grid, so that no row of bumps shows.
        u = np.sin(k * (0.8 * x + 0.6 * y + 0.1 * z) + phases[0])
        v = np.sin(k * (0.7 * y - 0.2 * x + 0.7 * z) + phases[1])
        w = np.sin(k * (0.8 * z - 0.6 * x + 0.2 * y) + phases[2])
        field: FloatArray = shape.distance(x, y, z) - np.float32(amplitude_mm / 3) * (u + v + w)
        return field

    low, high = np.asarray(shape.low_mm) - amplitude_mm, np.asarray(shape.high_mm) + amplitude_mm
    return Shape(distance, _triple(low), _triple(high))


def _linear(row: list[float], point: tuple[FloatArray, FloatArray, FloatArray]) -> FloatArray:
    """`row` . `point`, without the terms that are zero, so that the result stays as small as it can."""
    terms = [factor * axis for factor, axis in zip(row, point, strict=True) if factor]
    return sum(terms[1:], terms[0])


def _triple(values: NDArray[np.float64]) -> Triple:
    x, y, z = values
    return float(x), float(y), float(z)
