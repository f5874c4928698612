"""The anatomy of one made patient: organs as shapes with Hounsfield units, drawn at random.

Coordinates are millimetres in LPS of an adult 340 mm wide, centred on the body's axis at the height of the spleen.
Structures are painted in the order listed, each over what lies below it, so later ones dent earlier ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ctseg.sources.phantom_organs import draw_bowel, draw_kidneys, draw_liver, draw_spleen, draw_stomach, draw_vessels
from ctseg.sources.phantom_shapes import (
    FloatArray,
    Shape,
    below_domes,
    boxed,
    ellipsoid,
    endless_tube,
    grown,
    half_space,
    intersection,
    outside,
    torso,
    tube,
)
from ctseg.sources.phantom_tissue import VALUE, Contrast, Layer, Spaces, Structure, draw_contrast, near, scaled


def draw_anatomy(rng: np.random.Generator) -> list[Structure]:
    """One patient's structures in painting order, the table first."""
    hu = draw_contrast(rng)
    trunk, spaces = draw_trunk(rng, hu)
    return [
        draw_table(rng),
        *trunk,
        *_draw_chest(rng, hu, spaces),
        *draw_ribs(rng, hu, spaces),
        *draw_bowel(rng, hu, spaces),
        *draw_liver(rng, hu, spaces),
        draw_spleen(rng, hu, spaces),
        *draw_stomach(rng, hu, spaces),
        *draw_kidneys(rng, hu),
        *draw_vessels(rng, hu),
        *draw_spine(hu, draw_vertebrae(rng)),
    ]


def draw_table(rng: np.random.Generator) -> Structure:
    """A curved shell of carbon fibre around foam, below the patient."""
    top, curve = 122.0, rng.uniform(900, 2000)

    def distance(x: FloatArray, y: FloatArray, z: FloatArray) -> FloatArray:
        return np.maximum(np.abs(y - top - 10 + x * x / curve) - 9.0, np.abs(x) - 190.0)

    shape = Shape(distance, (-190.0, top - 40, -1e4), (190.0, top + 20, 1e4))
    return Structure(shape, (Layer(0, rng.uniform(-350, -150)), Layer(3, rng.uniform(-960, -900))), is_table=True)


def draw_trunk(rng: np.random.Generator, hu: Contrast) -> tuple[list[Structure], Spaces]:
    """Skin and fat, the muscle wall with the cavity's fat, and the spaces inside."""
    fat_mm, wall_mm = rng.uniform(7, 22), rng.uniform(13, 18)
    sway, wave, phase = rng.uniform(0.01, 0.035), rng.uniform(70, 110), rng.uniform(0, 2 * np.pi)
    radii = (170.0, 115.0)

    def section(inset_x: float, inset_front: float, inset_back: float) -> Shape:
        half_depth = radii[1] - (inset_front + inset_back) / 2
        return torso((inset_front - inset_back) / 2, (radii[0] - inset_x, half_depth), sway, wave, phase)

    skin = section(0, 0, 0)
    muscle = section(fat_mm, fat_mm * 0.9, fat_mm * 0.6)
    cavity = section(fat_mm + wall_mm, fat_mm * 0.9 + wall_mm * 0.7, fat_mm * 0.6 + wall_mm * 1.3)
    domes = below_domes(
        [
            ((-68.0, rng.uniform(-8, 8), rng.uniform(66, 84)), (60.0, 85.0, 90.0)),
            ((66.0, rng.uniform(-8, 10), rng.uniform(56, 76)), (60.0, 85.0, 90.0)),
        ]
    )
    abdomen = intersection(grown(cavity, -rng.uniform(0.5, 3.5)), grown(domes, -rng.uniform(2.5, 5)))
    trunk = [
        Structure(skin, (Layer(0, 10), Layer(2, hu.fat))),
        Structure(muscle, (Layer(0, hu.muscle, VALUE["muscle"]),)),
        Structure(cavity, (Layer(0, hu.fat + 5, 0),)),
    ]
    return trunk, Spaces(cavity, abdomen, domes)


def _draw_chest(rng: np.random.Generator, hu: Contrast, spaces: Spaces) -> list[Structure]:
    """Diaphragm, lungs and the lower heart."""
    pleura = grown(spaces.cavity, -1.5)
    above = outside(spaces.domes)
    medial = rng.uniform(22, 30)
    apex = half_space((0, 0, 1), 235)
    left = intersection(pleura, above, half_space((-1, 0.25, 0), -medial), apex)
    right = intersection(pleura, above, half_space((1, 0.25, 0), -medial + 4), apex)
    left, right = boxed(left, (-10, -120, -90), (180, 120, 240)), boxed(right, (-180, -120, -90), (10, 120, 240))
    heart = ellipsoid(near(rng, (14, -30, 126), (7, 5, 5)), scaled((58, 44, 46), rng.uniform(0.9, 1.05)), (0, -20, 30))
    sheet = intersection(grown(spaces.domes, 1.5), outside(grown(spaces.domes, -2.5)), spaces.cavity)
    sheet = boxed(sheet, (-180, -120, -90), (180, 120, 90))
    return [
        Structure(sheet, (Layer(0, hu.muscle),)),
        Structure(left, (Layer(0, hu.lung, VALUE["left lung"]),)),
        Structure(right, (Layer(0, hu.lung, VALUE["right lung"]),)),
        Structure(
            intersection(heart, above),
            (Layer(-3, hu.fat, 0), Layer(0, hu.muscle + 25, VALUE["heart"]), Layer(9, hu.vessel, VALUE["heart"])),
        ),
    ]


def draw_ribs(rng: np.random.Generator, hu: Contrast, spaces: Spaces) -> list[Structure]:
    """Rods in the wall that fall towards the front, ending at the costal margin."""
    period, start, fall = rng.uniform(24, 29), rng.uniform(0, 25), rng.uniform(0.4, 0.6)
    shell = spaces.cavity.distance

    def distance(x: FloatArray, y: FloatArray, z: FloatArray) -> FloatArray:
        height = z - fall * y - start
        height = height - period * np.round(height / period)
        rods = np.sqrt((shell(x, y, z) - 5.5) ** 2 + (0.7 * height) ** 2) - 4.3
        front = 0.8 * (-55.0 - y) - 0.3 * (z - 20.0)
        field: FloatArray = np.maximum(rods, np.maximum(front, -75.0 - z))
        return field

    ribs = Shape(distance, (-175.0, -115.0, -76.0), (175.0, 115.0, 260.0))
    return [Structure(ribs, (Layer(0, hu.cortical, VALUE["bone"]), Layer(1.8, hu.marrow, VALUE["bone"])))]


@dataclass(frozen=True)
class Vertebrae:
    """Where the vertebrae are: bodies around `body`, one every `period_mm`, one of them at height `start_mm`."""

    period_mm: float
    start_mm: float
    body = endless_tube((0, 33), (21, 16.5))
    half_height_mm = 11.5

    @property
    def bodies(self) -> Shape:
        """The bodies of all vertebrae."""
        return _repeated(self.body, self.half_height_mm, self.period_mm, self.start_mm)


def draw_vertebrae(rng: np.random.Generator) -> Vertebrae:
    """Their distance and heights."""
    return Vertebrae(float(rng.uniform(29, 33)), float(rng.uniform(0, 30)))


def draw_spine(hu: Contrast, vertebrae: Vertebrae) -> list[Structure]:
    """Muscles beside it, vertebrae and discs in turn, the arch with its canal and process."""
    muscle, bone = Layer(0, hu.muscle, VALUE["muscle"]), VALUE["bone"]
    period, start = vertebrae.period_mm, vertebrae.start_mm
    bony = (Layer(0, hu.cortical, bone), Layer(1.8, hu.marrow, bone))
    beside = [endless_tube((side * 33, 78), (27, 19)) for side in (-1, 1)]
    psoas = [tube((side * 29, 38), (12, 15), -400, -20) for side in (-1, 1)]
    crura = [tube((side * 15, 12), (9, 14), -60, 60) for side in (-1, 1)]
    arch = endless_tube((0, 60), (17, 15))
    wings = endless_tube((0, 62), (42, 6))
    process = endless_tube((0, 84), (3.5, 20))
    return [
        *[Structure(shape, (Layer(-1, hu.fat + 20, 0), muscle)) for shape in (*crura, *psoas, *beside)],
        Structure(vertebrae.body, (Layer(0, hu.muscle + 25, 0),)),
        Structure(vertebrae.bodies, bony),
        Structure(_repeated(wings, 6, period, start), bony),
        Structure(_repeated(process, 11, period, start - 10), bony),
        Structure(_repeated(arch, 12.5, period, start), bony),
        Structure(endless_tube((0, 59), (9.5, 8)), (Layer(-1, hu.fat + 60, 0), Layer(0, 30, 0))),
    ]


def _repeated(shape: Shape, half_height_mm: float, period_mm: float, start_mm: float) -> Shape:
    """The shape cut into equal pieces along z."""

    def distance(x: FloatArray, y: FloatArray, z: FloatArray) -> FloatArray:
        height = z - start_mm
        height = height - period_mm * np.round(height / period_mm)
        pieces: FloatArray = np.maximum(shape.distance(x, y, z), np.abs(height) - half_height_mm)
        return pieces

    return Shape(distance, shape.low_mm, shape.high_mm)
