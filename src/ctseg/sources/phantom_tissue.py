"""What made patients consist of: structures, their layers and Hounsfield units, and the spaces organs keep to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ctseg.sources.phantom_shapes import Shape, Triple

ORGANS = {
    "1": "spleen",
    "2": "right kidney",
    "3": "left kidney",
    "4": "liver",
    "5": "stomach",
    "6": "aorta",
    "7": "left lung",
    "8": "right lung",
    "9": "bone",
    "10": "inferior vena cava",
    "11": "bowel",
    "12": "heart",
    "13": "muscle",
    "14": "pancreas",
}
"""Label value (as a string) -> name of the structure in `Phantom.organs`; 0 is everything else."""

VALUE = {name: int(value) for value, name in ORGANS.items()}
"""Name -> label value."""
AIR_HU = -1000.0


@dataclass(frozen=True)
class Layer:
    """What lies deeper than `depth_mm` below a shape's surface; a negative depth is a rim around it.

    Attributes:
        depth_mm: Where the layer starts, measured inwards.
        hu: Its mean Hounsfield units.
        value: Its label value; None leaves the labels as they are.
    """

    depth_mm: float
    hu: float
    value: int | None = None


@dataclass(frozen=True)
class Structure:
    """A shape and its layers, from the outermost inwards."""

    shape: Shape
    layers: tuple[Layer, ...]
    is_table: bool = False
    """The table stays level when the patient lies turned."""


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """Mean Hounsfield units of one patient, most of them set by how much contrast medium has arrived."""

    spleen: float
    liver: float
    cortex: float
    medulla: float
    vessel: float
    vein: float
    wall: float
    stomach: float
    muscle: float
    fat: float
    lung: float
    marrow: float
    cortical: float


def draw_contrast(rng: np.random.Generator) -> Contrast:
    """Portal-venous enhancement, early to late, with the spread between patients: the soft organs overlap."""
    phase = rng.uniform(0.55, 1.15)
    return Contrast(
        spleen=52 + 58 * phase + rng.normal(0, 5),
        liver=56 + 45 * phase + rng.normal(0, 7),
        cortex=60 + 110 * phase + rng.normal(0, 10),
        medulla=45 + 85 * phase + rng.normal(0, 10),
        vessel=50 + 90 * phase + rng.normal(0, 8),
        vein=45 + 85 * phase + rng.normal(0, 8),
        wall=50 + 40 * phase + rng.normal(0, 5),
        stomach=float(rng.choice([rng.uniform(0, 40), rng.uniform(60, 130)])),
        muscle=55 + 13 * phase + rng.normal(0, 3),
        fat=rng.uniform(-115, -95),
        lung=rng.uniform(-890, -810),
        marrow=rng.uniform(140, 230),
        cortical=rng.uniform(380, 600),
    )


@dataclass(frozen=True)
class Spaces:
    """The spaces organs must keep to."""

    cavity: Shape
    abdomen: Shape
    """Below the diaphragm, inside the cavity."""
    domes: Shape


def near(rng: np.random.Generator, middle: Triple, spread: Triple) -> Triple:
    """A point no further than `spread` from `middle` along each axis."""
    x, y, z = (float(rng.uniform(m - s, m + s)) for m, s in zip(middle, spread, strict=True))
    return x, y, z


def scaled(radii: Triple, factor: float) -> Triple:
    """The radii times a factor."""
    return radii[0] * factor, radii[1] * factor, radii[2] * factor
