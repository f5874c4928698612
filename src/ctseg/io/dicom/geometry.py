"""How the slices of a series lie: sorted, measured, and judged by their positions along the normal.

Positions decide; SliceThickness, SpacingBetweenSlices, SliceLocation and InstanceNumber may lie.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ctseg.io.dicom.frames import numbers
from ctseg.io.dicom.series import Finding, SeriesGeometry, Slice
from ctseg.progress import printable

POSITION_TOLERANCE_MM = 1e-2
"""Slices nearer to each other are at one position."""
INCREMENT_TOLERANCE = 1e-2
"""Distances between neighbours may differ by this share of the usual one, and POSITION_TOLERANCE_MM more."""
LINE_TOLERANCE = 0.1
"""No slice may lie further from where even steps would put it, as a share of the usual distance."""
DRIFT_TOLERANCE_PIXELS = 0.1
"""Slices that lie further off the normal through the first one make a tilted stack."""

SHOWN = 5
"""How many places of one kind a finding names."""


def sort_slices(slices: Sequence[Slice]) -> list[Slice]:
    """The slices ascending along the normal of the first; as they are if one lacks its position or axes."""
    places = np.array([one.position_mm for one in slices]) @ slices[0].normal
    return list(slices) if np.isnan(places).any() else [slices[n] for n in np.argsort(places, kind="stable")]


def at_one_position(slices: Sequence[Slice]) -> list[list[Slice]]:
    """Sorted slices in runs that share a position: single ones, and duplicates."""
    runs: list[list[Slice]] = []
    for one in slices:
        if runs and np.abs(runs[-1][0].position_mm - one.position_mm).max() <= POSITION_TOLERANCE_MM:
            runs[-1].append(one)
        else:
            runs.append([one])
    return runs


def measure(slices: Sequence[Slice]) -> SeriesGeometry:
    """How sorted slices with positions and axes lie; those at one position count once."""
    alone = [run[0] for run in at_one_position(slices)]
    offsets = np.array([one.position_mm for one in alone]) - alone[0].position_mm
    along = offsets @ alone[0].normal
    drift = offsets @ alone[0].axes.T
    steps = np.diff(along)
    usual = float(np.sort(steps)[(len(steps) - 1) // 2]) if len(steps) else None
    tilt = math.degrees(math.atan2(float(np.linalg.norm(drift[-1])), float(along[-1]))) if len(alone) > 1 else 0.0
    return SeriesGeometry(
        along_mm=along, drift_mm=drift, increment_mm=usual, missing=_missing(steps, usual), tilt_degrees=tilt
    )


def geometry_problems(slices: Sequence[Slice], geometry: SeriesGeometry) -> list[Finding]:
    """What keeps the slices from being one even stack: "gaps", "spacing", "tilt"."""
    if geometry.increment_mm is None:
        return [Finding("single", "all slices lie at one position: no volume")] if len(slices) > 1 else []
    if geometry.increment_mm <= POSITION_TOLERANCE_MM:
        return [Finding("spacing", "slices do not advance along their normal; their positions or axes are wrong")]
    found = []
    uneven = _uneven(geometry)
    if uneven:
        found.append(Finding("spacing", uneven))
    elif geometry.missing:
        found.append(Finding("gaps", _gap_text(slices, geometry)))
    drift_pixels = np.abs(geometry.drift_mm / np.array(slices[0].spacing_mm)).max()
    if drift_pixels > DRIFT_TOLERANCE_PIXELS:
        far = float(np.linalg.norm(geometry.drift_mm, axis=1).max())
        found.append(
            Finding(
                "tilt",
                f"slices drift by {far:.1f} mm in their plane (gantry tilt {geometry.tilt_degrees:.1f} degrees); "
                f"--tilt shear makes the grid rectangular",
            )
        )
    return found


def _missing(steps: NDArray[np.float64], usual: float | None) -> tuple[tuple[int, int], ...]:
    """For each step that is a whole multiple (2 or more) of the usual one: (its number, slices missing)."""
    if usual is None or usual <= POSITION_TOLERANCE_MM:
        return ()
    multiples = np.round(steps / usual)
    tolerance = np.minimum(multiples * (POSITION_TOLERANCE_MM + INCREMENT_TOLERANCE * usual), usual / 4)
    gaps = (multiples >= 2) & (np.abs(steps - multiples * usual) <= tolerance)
    return tuple((int(n), int(multiples[n]) - 1) for n in np.flatnonzero(gaps))


def _uneven(geometry: SeriesGeometry) -> str | None:
    """Why steps other than gaps are not even, or None."""
    usual = geometry.increment_mm or 0.0
    steps = np.diff(geometry.along_mm)
    multiples = np.ones(len(steps))
    for index, count in geometry.missing:
        multiples[index] = count + 1
    single = multiples == 1
    advice = "ask for a reconstruction with even spacing"
    if (np.abs(steps - usual)[single] > POSITION_TOLERANCE_MM + INCREMENT_TOLERANCE * usual).any():
        counts = Counter(f"{step:.2f}" for step in steps).most_common(SHOWN)
        common = ", ".join(f"{count} x {step}" for step, count in counts)
        return f"distances between slices vary: {common} mm; {advice}"
    grid = np.concatenate([[0.0], np.cumsum(multiples)])
    off = np.abs(geometry.along_mm - grid * geometry.along_mm[-1] / grid[-1]).max()
    if off > LINE_TOLERANCE * usual:
        return f"distances between slices vary: even steps would be off by up to {off:.2f} mm; {advice}"
    return None


def _gap_text(slices: Sequence[Slice], geometry: SeriesGeometry) -> str:
    origin = float(slices[0].position_mm @ slices[0].normal)
    places = [
        f"{count} between {origin + geometry.along_mm[n]:.1f} and {origin + geometry.along_mm[n + 1]:.1f}"
        for n, count in geometry.missing[:SHOWN]
    ]
    more = f" and {len(geometry.missing) - SHOWN} more gaps" if len(geometry.missing) > SHOWN else ""
    total = sum(count for _, count in geometry.missing)
    return (
        f"missing slices of {geometry.increment_mm:.2f} mm: {total} ({', '.join(places)} mm{more}); find them, or "
        f"--gaps fill interpolates them, --gaps ignore closes up"
    )


def geometry_notes(slices: Sequence[Slice], geometry: SeriesGeometry) -> Iterator[Finding]:
    """What is odd about how the slices lie, and does no harm."""
    shared = len(slices) - len(geometry.along_mm)
    if shared:
        yield Finding("duplicates", f"{shared} slices lie where another does; equal ones are dropped when it is read")
    usual = geometry.increment_mm
    if usual is None:
        return
    for keyword, code, word in (
        ("SliceThickness", "thickness", "is"),
        ("SpacingBetweenSlices", "spacing-between-slices", "says"),
    ):
        says = {float(numbers(one.value(keyword), 1)[0]) for one in slices} - {math.nan}
        wrong = sorted(s for s in says if abs(s - usual) > POSITION_TOLERANCE_MM + INCREMENT_TOLERANCE * usual)
        if wrong:
            yield Finding(code, f"{keyword} {word} {shown(wrong)} mm, slices lie {usual:.2f} mm apart; positions count")


def shown(values: Sequence[object]) -> str:
    """The first few values in one line, bounded in length."""
    text = ", ".join(f"{v:g}" if isinstance(v, float) else printable(str(v))[:32] for v in values[:SHOWN])
    return text + (", ..." if len(values) > SHOWN else "")
