"""The organs of the abdomen, drawn at random, each in the adult frame of `phantom_anatomy`."""

from __future__ import annotations

import numpy as np

from ctseg.sources.phantom_shapes import (
    capsule,
    ellipsoid,
    endless_tube,
    grown,
    half_space,
    intersection,
    outside,
    tube,
    union,
)
from ctseg.sources.phantom_tissue import VALUE, Contrast, Layer, Spaces, Structure, near, scaled

_BOWEL_LOOPS = 70


def draw_bowel(rng: np.random.Generator, hu: Contrast, spaces: Spaces) -> list[Structure]:
    """Loops below the stomach, some with gas; the colon's left bend, close under the spleen."""
    value = VALUE["bowel"]
    loops = [
        (near(rng, (0, -28, -180), (95, 42, 145)), near(rng, (20, 17, 17), (6, 4, 4))) for _ in range(_BOWEL_LOOPS)
    ]
    loops += [(near(rng, (90, -48 + 11 * n, -18 - 24 * n), (7, 7, 5)), (20.0, 20.0, 22.0)) for n in range(5)]
    structures = []
    for center, radii in loops:
        loop = intersection(ellipsoid(center, radii, (0, 0, rng.uniform(-40, 40))), spaces.abdomen)
        content = float(rng.choice([rng.uniform(10, 40), rng.uniform(-200, 60), rng.uniform(60, 160)]))
        structures.append(Structure(loop, (Layer(-1, hu.fat, 0), Layer(0, hu.wall, value), Layer(2.5, content, value))))
        if rng.uniform() < 0.3:
            gas = intersection(grown(loop, -2.5), half_space((0, 1, 0), center[1] - rng.uniform(-6, 8)))
            structures.append(Structure(gas, (Layer(0, -950, value),)))
    return structures


def draw_liver(rng: np.random.Generator, hu: Contrast, spaces: Spaces) -> list[Structure]:
    """Two lobes under the right dome, cut off towards the stomach; its veins and the gall bladder."""
    size = rng.uniform(0.9, 1.08)
    right = ellipsoid(near(rng, (-66, -2, -2), (5, 6, 8)), scaled((82, 84, 82), size), (0, rng.uniform(-15, 5), 0))
    left = ellipsoid(near(rng, (4, -46, 22), (12, 5, 8)), scaled((72, 34, 40), size), (0, rng.uniform(-25, -5), 0))
    under = half_space((0.62, 0.28, -0.72), rng.uniform(18, 32))
    liver = intersection(union(right, left), spaces.abdomen, under)
    veins = [
        capsule((-24, 4, 56), (rng.uniform(-95, -70), rng.uniform(-40, 20), rng.uniform(20, 45)), rng.uniform(3, 5)),
        capsule((-24, 4, 56), (-40, rng.uniform(-60, -40), rng.uniform(20, 40)), rng.uniform(3, 5)),
        capsule((-22, -10, 0), (rng.uniform(-95, -70), rng.uniform(-20, 30), rng.uniform(-15, 10)), rng.uniform(4, 6)),
    ]
    bladder = ellipsoid(near(rng, (-52, -52, -42), (8, 6, 8)), scaled((15, 22, 17), rng.uniform(0.7, 1.1)))
    return [
        Structure(liver, (Layer(-1.5, hu.fat, 0), Layer(0, hu.liver, VALUE["liver"]))),
        *[Structure(intersection(vein, liver), (Layer(0, hu.vein),)) for vein in veins],
        Structure(bladder, (Layer(0, hu.wall, 0), Layer(1.5, rng.uniform(2, 18), 0))),
    ]


def draw_spleen(rng: np.random.Generator, hu: Contrast, spaces: Spaces) -> Structure:
    """A crescent under the left dome, flat along the wall, hollowed where stomach and hilum lie."""
    size = float(np.exp(rng.uniform(np.log(0.74), np.log(1.15))))
    center = near(rng, (88, 30, 2), (5, 9, 10))
    turn = (rng.uniform(-35, -5), rng.uniform(-12, 12), rng.uniform(22, 50))
    slim = rng.uniform(0.88, 1.12)
    full = ellipsoid(center, scaled((31 * slim, 51, 57 / slim), size), turn)
    inward = np.array([-np.cos(np.radians(turn[2])), -np.sin(np.radians(turn[2])), 0]) * rng.uniform(45, 54) * size
    x, y, z = (float(c + d) for c, d in zip(center, inward, strict=True))
    hollow = ellipsoid((x, y - 6, z), scaled((30, 40, 62), size), turn)
    spleen = intersection(full, outside(hollow), spaces.abdomen)
    return Structure(spleen, (Layer(-rng.uniform(0, 2), hu.fat, 0), Layer(0, hu.spleen, VALUE["spleen"])))


def draw_stomach(rng: np.random.Generator, hu: Contrast, spaces: Spaces) -> list[Structure]:
    """A bag from the left dome to the midline: wall, contents, and air at the front; the pancreas behind it."""
    size = rng.uniform(0.85, 1.25)
    fundus = ellipsoid(near(rng, (50, -22, 20), (7, 8, 6)), scaled((36, 36, 46), size), (25, 20, 0))
    antrum = ellipsoid(near(rng, (14, -50, -28), (10, 6, 8)), scaled((50, 20, 20), size), (0, -20, 0))
    bag = intersection(union(fundus, antrum), spaces.abdomen)
    level = half_space((0, 1, 0), rng.uniform(-62, -25))
    wall = rng.uniform(3, 5)
    pancreas = union(
        ellipsoid(near(rng, (38, 4, -12), (8, 5, 6)), (34, 11, 13), (0, -25, 20)),
        ellipsoid(near(rng, (-8, -12, -30), (6, 4, 6)), (20, 14, 20)),
    )
    value = VALUE["stomach"]
    return [
        Structure(pancreas, (Layer(-1, hu.fat, 0), Layer(0, hu.wall + 12, VALUE["pancreas"]))),
        Structure(
            bag, (Layer(-rng.uniform(0, 2), hu.fat, 0), Layer(0, hu.wall, value), Layer(wall, hu.stomach, value))
        ),
        Structure(intersection(grown(bag, -wall), level), (Layer(0, -960, value),)),
    ]


def draw_kidneys(rng: np.random.Generator, hu: Contrast) -> list[Structure]:
    """Cortex, medulla and the fat of the sinus, inside a rim of fat."""
    structures = []
    for name, side, height in (("right kidney", -1.0, -56.0), ("left kidney", 1.0, -44.0)):
        x, y, z = near(rng, (61, 40, height), (4, 5, 12))
        size, lean = rng.uniform(0.88, 1.1), rng.uniform(8, 20)
        kidney = ellipsoid((side * x, y, z), scaled((29, 26, 54), size), (12, -side * lean, side * 30))
        sinus = ellipsoid((side * (x - 16), y - 4, z), scaled((15, 9, 26), size), (12, -side * lean, side * 30))
        value = VALUE[name]
        rim = Layer(-rng.uniform(1, 7), hu.fat, 0)
        structures += [
            Structure(kidney, (rim, Layer(0, hu.cortex, value), Layer(9, hu.medulla, value))),
            Structure(sinus, (Layer(0, hu.fat + 30, 0),)),
        ]
    return structures


def draw_vessels(rng: np.random.Generator, hu: Contrast) -> list[Structure]:
    """Aorta and inferior vena cava, and the splenic vein on its way to the liver."""
    aorta = endless_tube((rng.uniform(8, 16), rng.uniform(2, 6)), (rng.uniform(9, 12), rng.uniform(9, 12)))
    cava = tube((rng.uniform(-28, -22), rng.uniform(0, 6)), (rng.uniform(11, 14), rng.uniform(8, 11)), -400, 84)
    splenic = capsule((-12, -6, -8), (rng.uniform(58, 66), rng.uniform(14, 22), rng.uniform(-2, 8)), rng.uniform(3, 5))
    portal = capsule((-12, -6, -8), (-34, -14, 6), rng.uniform(6, 8))
    return [
        Structure(splenic, (Layer(0, hu.vein, 0),)),
        Structure(portal, (Layer(0, hu.vein, 0),)),
        Structure(cava, (Layer(-1, hu.fat, 0), Layer(0, hu.vein, VALUE["inferior vena cava"]))),
        Structure(aorta, (Layer(-1.5, hu.fat, 0), Layer(0, hu.vessel, VALUE["aorta"]))),
    ]
