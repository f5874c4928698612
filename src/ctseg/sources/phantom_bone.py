"""Made CT of spine, ribs and pelvis with bone lesions: the label is the lesions.

Lytic lesions replace bone by soft tissue and may break through its surface, blastic ones are denser than marrow, mixed
ones have a dense rim and lumps in a soft core. Their volumes span more than two orders of magnitude. Look-alikes are
not labelled: bone islands (small, and denser than 885 HU as in Ulano et al. 2016, AJR 207:362, where lesions stay
below), outgrowths at the edges of vertebrae, the vein in the middle of a vertebra, and chalk in the wall of the aorta.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from ctseg.sources.made import MadeCase, MadeData, case_streams
from ctseg.sources.phantom_anatomy import Vertebrae, draw_ribs, draw_spine, draw_table, draw_trunk, draw_vertebrae
from ctseg.sources.phantom_organs import draw_bowel, draw_kidneys, draw_liver, draw_spleen, draw_stomach, draw_vessels
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
    rough,
    shell,
    union,
)
from ctseg.sources.phantom_tissue import ORGANS, VALUE, Contrast, Layer, Structure, draw_contrast, near
from ctseg.volume import Geometry

GENERATOR_VERSION = 1
"""Grows whenever the same seed gives other voxels."""
LYTIC, BLASTIC, MIXED, LOOK_ALIKE = 15, 16, 17, 18
STRUCTURES = {
    **ORGANS,
    str(LYTIC): "lytic lesion",
    str(BLASTIC): "blastic lesion",
    str(MIXED): "mixed lesion",
    str(LOOK_ALIKE): "look-alike",
}
"""Label value (as a string) -> name of the structure in a case's `organs`."""
LESION_VALUES = (LYTIC, BLASTIC, MIXED)
"""What the label counts as bone lesion."""
TRUNK = PhantomSize((290.0, 335.0), (0.72, 0.85), 8_000_000)
"""A grown patient, scanned from the lower ribs to the pelvis."""
MAIN_ML, OTHER_ML = (8.0, 45.0), (0.1, 6.0)
"""Range of volumes wanted of a patient's largest lesion and of the others; drawn evenly on a logarithmic scale."""
MAIN_KINDS, OTHER_KINDS = (0.0, 0.65, 0.35), (0.35, 0.4, 0.25)
"""How often a patient's largest lesion and the others are lytic, blastic, mixed: most as in prostate cancer."""

_MIDDLE_MM = -95.0
"""Height of the scan's middle above the origin of the anatomy, which is the spleen."""
_APART_MM = 8.0
_LARGEST_RADIUS_MM = 42.0
_POINTS = 40_000


@dataclass(frozen=True)
class _Bone:
    """A bone that may hold lesions.

    Attributes:
        shape: Its surface.
        low_mm, high_mm: The part of it that is scanned.
        weight: How often it is hit.
        max_ml: The largest lesion it can hold, about.
    """

    shape: Shape
    low_mm: Triple
    high_mm: Triple
    weight: float
    max_ml: float


@dataclass(frozen=True)
class _Place:
    """Where a lesion lies and how far it reaches."""

    bone: _Bone
    center_mm: Triple
    radius_mm: float


def bone_data() -> MadeData:
    """Bone lesions as a kind of made data."""
    return MadeData(
        name="phantom_bone",
        label="bone lesion",
        label_values=LESION_VALUES,
        structures=STRUCTURES,
        version=GENERATOR_VERSION,
        make=lambda seed, index: make_bone(seed, index),
    )


def plan_bone(seed: int, index: int, *, size: PhantomSize = TRUNK, grid: Geometry | None = None) -> ScanPlan:
    """The grid and the patient's place in it; the plan that `make_bone` follows."""
    return draw_plan(case_streams(seed, index)[0], size, grid, middle_mm=_MIDDLE_MM)


def make_bone(seed: int, index: int, *, size: PhantomSize = TRUNK, grid: Geometry | None = None) -> MadeCase:
    """Case `index` of `seed`: CT and ground truth; arguments as `make_phantom`."""
    anatomy, noise = case_streams(seed, index)[1:]
    plan = plan_bone(seed, index, size=size, grid=grid)
    return MadeCase(*scan(draw_bony_trunk(anatomy, float(np.prod(plan.stretch))), plan, noise))


def draw_bony_trunk(rng: np.random.Generator, enlargement: float = 1.0) -> list[Structure]:
    """One patient's structures in painting order, the table first.

    Args:
        rng: Random numbers.
        enlargement: The patient's volume relative to the anatomy's, so that lesions have their volume in the patient.
    """
    hu = draw_contrast(rng)
    trunk, spaces = draw_trunk(rng, hu)
    vertebrae = draw_vertebrae(rng)
    ribs = draw_ribs(rng, hu, spaces)
    iliac, sacrum = _pelvis_shapes(rng)
    bony = (Layer(0, hu.cortical, VALUE["bone"]), Layer(1.8, hu.marrow, VALUE["bone"]))
    bones = [
        _Bone(vertebrae.bodies, (-21, 16, -190), (21, 50, 30), 0.45, 12.0),
        _Bone(iliac, (-140, -60, -235), (140, 80, -130), 0.25, 20.0),
        _Bone(sacrum, (-55, 25, -240), (55, 95, -185), 0.15, np.inf),
        _Bone(ribs[0].shape, (-175, -115, -70), (175, 115, 30), 0.15, 6.0),
    ]
    return [
        draw_table(rng),
        *trunk,
        *ribs,
        *draw_bowel(rng, hu, spaces),
        *draw_liver(rng, hu, spaces),
        draw_spleen(rng, hu, spaces),
        *draw_stomach(rng, hu, spaces),
        *draw_kidneys(rng, hu),
        *draw_vessels(rng, hu),
        *draw_spine(hu, vertebrae),
        Structure(iliac, bony),
        Structure(sacrum, bony),
        *_draw_look_alikes(rng, hu, vertebrae, bones),
        *_draw_lesions(rng, bones, enlargement),
    ]


def _pelvis_shapes(rng: np.random.Generator) -> tuple[Shape, Shape]:
    """Both iliac wings, thin curved plates that end in a crest, and the sacrum between them."""
    crest = float(rng.uniform(-158, -142))
    wings = []
    for side in (-1.0, 1.0):
        bowl = shell(ellipsoid((side * 40, -2, -190), (80, 72, 130), (0, side * 10, 0)), float(rng.uniform(11, 15)))
        outer = half_space((-side, 0, 0), -44)
        top = ellipsoid((side * 80, 20, crest - 118), (75, 82, 120))
        wing = intersection(bowl, outer, top, half_space((0, -1, -0.25), 88))
        low, high = ((44, -85, -320), (135, 90, -130)) if side > 0 else ((-135, -85, -320), (-44, 90, -130))
        wings.append(boxed(wing, low, high))
    sacrum = ellipsoid((0, 58, -232), (54, 25, 58), (-14, 0, 0))
    return union(*wings), sacrum


def _draw_lesions(rng: np.random.Generator, bones: list[_Bone], enlargement: float) -> list[Structure]:
    """One to five lesions, apart from each other; the first is a large one."""
    structures: list[Structure] = []
    taken: list[_Place] = []
    for n in range(int(rng.integers(1, 6))):
        low, high = MAIN_ML if n == 0 else OTHER_ML
        volume = float(np.exp(rng.uniform(np.log(low), np.log(high)))) / enlargement
        place = _find_place(rng, bones, volume, taken)
        if place is None:
            continue
        kind = int(rng.choice(LESION_VALUES, p=MAIN_KINDS if n == 0 else OTHER_KINDS))
        shape, radius = _sized(rng, place, kind, volume * 1000)
        taken.append(dataclasses.replace(place, radius_mm=radius))
        structures += _paint_lesion(rng, kind, shape, place.center_mm, radius)
    return structures


def _find_place(rng: np.random.Generator, bones: list[_Bone], volume_ml: float, taken: list[_Place]) -> _Place | None:
    """A place inside a bone that can hold the volume, clear of the lesions there are; None where none is found."""
    fit = [bone for bone in bones if bone.max_ml >= volume_ml]
    weights = np.array([bone.weight for bone in fit])
    radius = float(np.cbrt(volume_ml * 1000 / 4.19))
    for _ in range(20):
        bone = fit[int(rng.choice(len(fit), p=weights / weights.sum()))]
        center = _inner_point(rng, bone)
        clear = [
            np.linalg.norm(np.subtract(center, t.center_mm)) > 1.6 * radius + t.radius_mm + _APART_MM for t in taken
        ]
        if all(clear):
            return _Place(bone, center, radius)
    return None


def _inner_point(rng: np.random.Generator, bone: _Bone) -> Triple:
    """A random point well inside the bone."""
    x, y, z = rng.uniform(bone.low_mm, bone.high_mm, (_POINTS, 3)).T.astype(np.float32)
    depth = -bone.shape.distance(x, y, z)
    inner = np.flatnonzero(depth > 0.4 * depth.max())
    n = int(rng.choice(inner))
    return float(x[n]), float(y[n]), float(z[n])


def _sized(rng: np.random.Generator, place: _Place, kind: int, volume_mm3: float) -> tuple[Shape, float]:
    """The lesion's shape with the wanted volume inside the bone, or the largest it can have, and its radius.

    Lytic lesions may grow through the bone's surface by a few millimetres, others keep to it.
    """
    beyond = float(rng.uniform(0, 5)) if kind == LYTIC else float(rng.uniform(0, 0.8))
    room = grown(place.bone.shape, beyond)
    ratios = rng.uniform(0.75, 1.3, 3)
    turn = tuple(float(a) for a in rng.uniform(0, 90, 3))
    phases = tuple(float(a) for a in rng.uniform(0, 2 * np.pi, 3))
    assert len(turn) == len(phases) == 3

    def at(radius: float) -> Shape:
        a, b, c = (float(r * radius) for r in ratios)
        ball = ellipsoid(place.center_mm, (a, b, c), turn)
        return intersection(rough(ball, 0.22 * radius, 2.2 * radius, phases), room)

    low, high = 1.0, _LARGEST_RADIUS_MM
    for _ in range(9):
        middle = (low + high) / 2
        low, high = (middle, high) if _volume_mm3(at(middle), place.center_mm, middle) < volume_mm3 else (low, middle)
    return at(high), high


def _volume_mm3(shape: Shape, center_mm: Triple, radius_mm: float) -> float:
    """The shape's volume around a point, on a grid of 33 points a side."""
    reach, count = 1.7 * radius_mm, 33
    axis = np.linspace(-reach, reach, count, dtype=np.float32)
    x, y, z = (axis + np.float32(c) for c in center_mm)
    inside = shape.distance(x, y[:, None], z[:, None, None]) < 0
    return float(inside.sum()) * (2 * reach / (count - 1)) ** 3


def _paint_lesion(
    rng: np.random.Generator, kind: int, shape: Shape, center_mm: Triple, radius_mm: float
) -> list[Structure]:
    if kind == LYTIC:
        return [Structure(shape, (Layer(0, rng.uniform(15, 75), LYTIC),))]
    if kind == BLASTIC:
        return [Structure(shape, (Layer(0, rng.uniform(640, 860), BLASTIC),))]
    soft, dense = rng.uniform(20, 80), rng.uniform(640, 860)
    lumps = [
        ellipsoid(near(rng, center_mm, _cube(0.75 * radius_mm)), near(rng, _cube(0.38 * radius_mm), _cube(0.1)))
        for _ in range(int(rng.integers(3, 7)))
    ]
    rim_mm = min(4.0, 0.35 * radius_mm)
    return [
        Structure(shape, (Layer(0, dense, MIXED), Layer(rim_mm, soft))),
        *[Structure(intersection(lump, shape), (Layer(0, dense),)) for lump in lumps],
    ]


def _draw_look_alikes(
    rng: np.random.Generator, hu: Contrast, vertebrae: Vertebrae, bones: list[_Bone]
) -> list[Structure]:
    """What a reader knows not to call a lesion."""
    structures = []
    first = round((-190 - vertebrae.start_mm) / vertebrae.period_mm)
    heights = [vertebrae.start_mm + vertebrae.period_mm * n for n in range(first, first + 8)]
    for z in heights:
        vein = capsule((0, 40, z), (0, 52, z), float(rng.uniform(1.5, 2.6)))
        structures.append(Structure(vein, (Layer(0, 55, LOOK_ALIKE),)))
        if rng.uniform() < 0.35:
            around = np.radians(rng.uniform(180, 360))
            x, y = 22 * np.cos(around), 33 + 17.5 * np.sin(around)
            spur = ellipsoid((x, y, z + 11.5), (6, 5, 3.5))
            structures.append(Structure(spur, (Layer(0, hu.cortical + 60, LOOK_ALIKE),)))
    for _ in range(int(rng.integers(0, 4))):
        bone = bones[int(rng.integers(0, 3))]
        island = ellipsoid(_inner_point(rng, bone), near(rng, _cube(2.6), _cube(0.9)))
        structures.append(Structure(island, (Layer(0, rng.uniform(1050, 1350), LOOK_ALIKE),)))
    for _ in range(int(rng.integers(0, 6))):
        around = rng.uniform(0, 2 * np.pi)
        x, y = 12 + 10.5 * np.cos(around), 4 + 10.5 * np.sin(around)
        plaque = ellipsoid((x, y, float(rng.uniform(-200, 20))), (2, 2, rng.uniform(2, 7)), (0, 0, np.degrees(around)))
        structures.append(Structure(plaque, (Layer(0, rng.uniform(500, 900), LOOK_ALIKE),)))
    return structures


def _cube(value: float) -> Triple:
    return value, value, value
