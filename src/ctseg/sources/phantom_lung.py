"""Made CT of the chest with pneumonia: the label is the lungs, diseased parts included.

Consolidations are as dense as the chest wall they lie against and ground glass blurs what is lung and what is not:
what makes lungs with pneumonia hard to segment by a threshold. Windpipe, bronchi, gas in stomach and bowel and the air
around the patient are as dark as lung and are not lung. Everything else is as in `phantom`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ctseg.sources.made import MadeCase, MadeData, case_streams
from ctseg.sources.phantom_anatomy import draw_ribs, draw_spine, draw_table, draw_trunk, draw_vertebrae
from ctseg.sources.phantom_organs import draw_liver, draw_spleen, draw_stomach
from ctseg.sources.phantom_plan import PhantomSize, ScanPlan, draw_plan
from ctseg.sources.phantom_scan import scan
from ctseg.sources.phantom_shapes import (
    Shape,
    Triple,
    boxed,
    capsule,
    ellipsoid,
    grown,
    half_space,
    intersection,
    outside,
    rough,
    union,
)
from ctseg.sources.phantom_tissue import ORGANS, VALUE, Contrast, Layer, Spaces, Structure, draw_contrast, near, scaled
from ctseg.volume import Geometry

GENERATOR_VERSION = 1
"""Grows whenever the same seed gives other voxels."""
GROUND_GLASS, CONSOLIDATION, AIRWAY = 15, 16, 17
STRUCTURES = {
    **ORGANS,
    str(GROUND_GLASS): "ground glass",
    str(CONSOLIDATION): "consolidation",
    str(AIRWAY): "airway",
}
"""Label value (as a string) -> name of the structure in a case's `organs`."""
LUNG_VALUES = (VALUE["left lung"], VALUE["right lung"], GROUND_GLASS, CONSOLIDATION)
"""What the label counts as lung."""
CHEST = PhantomSize((200.0, 238.0), (0.8, 0.9), 6_000_000)
"""A child, scanned from the neck's base to the upper abdomen."""

_MIDDLE_MM = 92.0
"""Height of the chest's middle above the origin of the anatomy, which is the spleen."""
_HEALTHY_SHARE = 0.2


@dataclass(frozen=True)
class _Lungs:
    """Both lungs, and where their vessels and airways enter."""

    left: Shape
    right: Shape
    hila: tuple[Triple, Triple]

    @property
    def sides(self) -> tuple[Shape, Shape]:
        return self.left, self.right


def lung_data() -> MadeData:
    """The chest as a kind of made data."""
    return MadeData(
        name="phantom_lung",
        label="lung",
        label_values=LUNG_VALUES,
        structures=STRUCTURES,
        version=GENERATOR_VERSION,
        make=lambda seed, index: make_lung(seed, index),
    )


def plan_lung(seed: int, index: int, *, size: PhantomSize = CHEST, grid: Geometry | None = None) -> ScanPlan:
    """The grid and the patient's place in it; the plan that `make_lung` follows."""
    return draw_plan(case_streams(seed, index)[0], size, grid, middle_mm=_MIDDLE_MM)


def make_lung(seed: int, index: int, *, size: PhantomSize = CHEST, grid: Geometry | None = None) -> MadeCase:
    """Case `index` of `seed`: CT and ground truth; arguments as `make_phantom`."""
    anatomy, noise = case_streams(seed, index)[1:]
    return MadeCase(*scan(draw_chest(anatomy), plan_lung(seed, index, size=size, grid=grid), noise))


def draw_chest(rng: np.random.Generator) -> list[Structure]:
    """One patient's structures in painting order, the table first."""
    hu = draw_contrast(rng)
    trunk, spaces = draw_trunk(rng, hu)
    lungs = _draw_lungs(rng, spaces)
    return [
        draw_table(rng),
        *trunk,
        *_paint_lungs(hu, spaces, lungs),
        *_draw_lung_vessels(rng, hu, lungs),
        *_draw_findings(rng, lungs),
        *_draw_mediastinum(rng, hu, lungs),
        *draw_ribs(rng, hu, spaces),
        *_draw_shoulders(rng, hu),
        *draw_liver(rng, hu, spaces),
        draw_spleen(rng, hu, spaces),
        *draw_stomach(rng, hu, spaces),
        *draw_spine(hu, draw_vertebrae(rng)),
        *_draw_airways(rng, hu, lungs),
    ]


def _draw_lungs(rng: np.random.Generator, spaces: Spaces) -> _Lungs:
    """Two cones with round tips between the ribs, the diaphragm and the mediastinum, which has a convex side."""
    pleura = grown(spaces.cavity, -1.5)
    above = outside(spaces.domes)
    tip = float(rng.uniform(205, 228))
    medial = float(rng.uniform(20, 28))
    sides = []
    for side in (1.0, -1.0):
        cone = ellipsoid((side * 66, 4, tip - 200), (92, 118, 200))
        inner = half_space((-side, 0.25, 0), -medial + (4 if side < 0 else 0))
        lung = intersection(pleura, above, cone, inner)
        low, high = ((-8, -120, -90), (180, 120, 235)) if side > 0 else ((-180, -120, -90), (8, 120, 235))
        sides.append(boxed(lung, low, high))
    height = float(rng.uniform(112, 124))
    hila: tuple[Triple, Triple] = ((medial + 12, 4.0, height), (-medial - 10, 4.0, height))
    return _Lungs(sides[0], sides[1], hila)


def _paint_lungs(hu: Contrast, spaces: Spaces, lungs: _Lungs) -> list[Structure]:
    sheet = intersection(grown(spaces.domes, 1.5), outside(grown(spaces.domes, -2.5)), spaces.cavity)
    values = (VALUE["left lung"], VALUE["right lung"])
    return [
        Structure(boxed(sheet, (-180, -120, -90), (180, 120, 90)), (Layer(0, hu.muscle),)),
        *[Structure(lung, (Layer(0, hu.lung, v),)) for lung, v in zip(lungs.sides, values, strict=True)],
    ]


def _draw_lung_vessels(rng: np.random.Generator, hu: Contrast, lungs: _Lungs) -> list[Structure]:
    """Trees of vessels that fork from each hilum; they belong to the lung and keep its label."""
    structures = []
    for lung, hilum, side in zip(lungs.sides, lungs.hila, (1.0, -1.0), strict=True):
        ends = [near(rng, (side * 88, 5, 95), (38, 62, 95)) for _ in range(9)]
        for end in ends:
            x, y, z = (float(h + 0.55 * (e - h)) for h, e in zip(hilum, end, strict=True))
            fork: Triple = (x, y, z)
            twigs = [near(rng, end, (16, 20, 22)) for _ in range(3)]
            tree = [capsule(hilum, fork, rng.uniform(2.4, 3.8)), *(capsule(fork, t, 1.5) for t in twigs)]
            structures += [Structure(intersection(branch, lung), (Layer(0, hu.vessel - 20),)) for branch in tree]
    return structures


def _draw_findings(rng: np.random.Generator, lungs: _Lungs) -> list[Structure]:
    """Ground glass and consolidations, mostly at the back, below, and against the pleura; some patients have none."""
    if rng.uniform() < _HEALTHY_SHARE:
        return []
    glass, dense = [], []
    severity = rng.uniform(0.3, 1.0)
    for lung, side in zip(lungs.sides, (1.0, -1.0), strict=True):
        for _ in range(int(rng.integers(1, 2 + round(6 * severity)))):
            glass += _ground_glass(rng, lung, _place(rng, side))
        for _ in range(int(rng.integers(0, 2 + round(3 * severity)))):
            dense += _consolidation(rng, lung, _place(rng, side), side)
    return [*glass, *dense]


def _place(rng: np.random.Generator, side: float) -> Triple:
    """Near the wall at the back and the sides, more often below than above."""
    around = np.radians(rng.uniform(-40, 80))
    radius = rng.uniform(0.62, 1.0)
    x, y = side * (66 + 66 * radius * np.cos(around)), 4 + 92 * radius * np.sin(around)
    return float(x), float(y), float(20 + 150 * rng.beta(1.2, 1.8))


def _phases(rng: np.random.Generator) -> Triple:
    a, b, c = rng.uniform(0, 2 * np.pi, 3)
    return float(a), float(b), float(c)


def _ground_glass(rng: np.random.Generator, lung: Shape, center: Triple) -> list[Structure]:
    """A hazy patch with an edge that fades over two steps."""
    size = rng.uniform(10, 30)
    blob = ellipsoid(center, near(rng, (size, size, 1.1 * size), (3, 3, 4)), (0, 0, rng.uniform(0, 90)))
    patch = intersection(rough(blob, 4.5, 26, _phases(rng)), lung)
    hu = rng.uniform(-640, -420)
    layers = (Layer(0, hu - 110, GROUND_GLASS), Layer(4, hu, GROUND_GLASS))
    return [Structure(patch, layers)]


def _consolidation(rng: np.random.Generator, lung: Shape, center: Triple, side: float) -> list[Structure]:
    """A patch without air but that of its bronchi, as dense as muscle, with a rim of ground glass."""
    size = rng.uniform(9, 30)
    radii = near(rng, (0.8 * size, size, 1.1 * size), (2, 2, 3))
    blob = rough(ellipsoid(center, radii, (0, 0, rng.uniform(0, 90))), 4, 22, _phases(rng))
    patch = intersection(blob, lung)
    rim = intersection(grown(blob, 4), lung)
    structures = [
        Structure(rim, (Layer(0, rng.uniform(-520, -350), GROUND_GLASS),)),
        Structure(patch, (Layer(0, rng.uniform(15, 65), CONSOLIDATION),)),
    ]
    inward: Triple = (-side * 0.8 * size, -0.2 * size, 0.3 * size)
    for _ in range(int(rng.integers(0, 3))):
        start = near(rng, center, (0.4 * size, 0.4 * size, 0.4 * size))
        end = (start[0] + inward[0], start[1] + inward[1], start[2] + inward[2])
        bronchus = intersection(capsule(start, end, 1.6), patch)
        structures.append(Structure(bronchus, (Layer(0, -850, CONSOLIDATION),)))
    return structures


def _draw_mediastinum(rng: np.random.Generator, hu: Contrast, lungs: _Lungs) -> list[Structure]:
    """The heart in its fat, the great vessels, the arch of the aorta."""
    heart = ellipsoid(near(rng, (16, -32, 102), (6, 5, 4)), scaled((56, 43, 44), rng.uniform(0.88, 1.05)), (0, -20, 30))
    value = VALUE["heart"]
    arch = [
        capsule((6, -22, 130), (-8, -26, 158), 13),
        capsule((-8, -26, 158), (10, -4, 172), 12),
        capsule((10, -4, 172), (20, 14, 158), 12),
    ]
    pulmonary = union(capsule((10, -26, 130), (14, -8, 138), 12), *(capsule((8, -6, 134), h, 8) for h in lungs.hila))
    branches = [capsule((x, -12, 174), (2.2 * x, -14, 235), rng.uniform(4, 6)) for x in (-10, 2, 14)]
    return [
        Structure(heart, (Layer(-2.5, hu.fat, 0), Layer(0, hu.muscle + 25, value), Layer(9, hu.vessel, value))),
        Structure(pulmonary, (Layer(0, hu.vessel - 10, 0),)),
        Structure(capsule((-26, -22, 118), (-26, -24, 225), 8), (Layer(-1, hu.fat, 0), Layer(0, hu.vein, 0))),
        Structure(union(*arch), (Layer(-1, hu.fat, 0), Layer(0, hu.vessel, VALUE["aorta"]))),
        Structure(
            capsule((20, 14, 158), (16, 12, -140), 11), (Layer(-1, hu.fat, 0), Layer(0, hu.vessel, VALUE["aorta"]))
        ),
        *[Structure(branch, (Layer(0, hu.vessel, 0),)) for branch in branches],
    ]


def _draw_shoulders(rng: np.random.Generator, hu: Contrast) -> list[Structure]:
    """Breastbone and collar bones."""
    bone = VALUE["bone"]
    bony = (Layer(0, hu.cortical, bone), Layer(1.8, hu.marrow, bone))
    breastbone = ellipsoid((0, -88, 130), (17, 6.5, 75), (6, 0, 0))
    collar = [capsule((s * 16, -82, 205), (s * 110, -40, 232 + rng.uniform(-6, 6)), 6) for s in (-1, 1)]
    return [Structure(shape, bony) for shape in (breastbone, *collar)]


def _draw_airways(rng: np.random.Generator, hu: Contrast, lungs: _Lungs) -> list[Structure]:
    """Windpipe and main bronchi: air that is not lung. The gullet behind them."""
    fork: Triple = (float(rng.uniform(-4, 4)), float(rng.uniform(0, 8)), lungs.hila[0][2] + float(rng.uniform(22, 30)))
    pipe = capsule(fork, (fork[0], fork[1] - 8, 300), rng.uniform(6.5, 9))
    bronchi = [capsule(fork, hilum, rng.uniform(4.5, 6)) for hilum in lungs.hila]
    wall, air = Layer(-1.5, hu.muscle, 0), Layer(0, -985, AIRWAY)
    gullet = capsule((fork[0] + 4, 18, 60), (fork[0] + 4, 14, 240), 6)
    return [Structure(gullet, (Layer(0, hu.wall, 0),)), *[Structure(tube, (wall, air)) for tube in (pipe, *bronchi)]]
