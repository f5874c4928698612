"""How well single lesions are found: scores of the label's connected components.

Definitions, for one structure of one case:

- A lesion is a 26-connected component of the label: voxels that share a face, an edge or a corner are one lesion.
- It is found when the mask covers at least `min_overlap` of its voxels.
- Its Dice is that of the lesion against the union of the mask's components that touch it (share a voxel with it). A
  mask component that spans two lesions counts whole for both, so merging lesions costs Dice; a lesion that nothing
  touches has 0.
- A false positive is a component of the mask that shares no voxel with any lesion.

Reference for components: Rosenfeld and Pfaltz 1966, doi:10.1145/321356.321357.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctseg.metrics import mean_or_none

CONNECTIVITY = 26
ALL_VOLUMES = "all"


@dataclass(frozen=True)
class Lesion:
    """One lesion of the label: its volume, the share of it that the mask covers, its Dice (see the module's text)."""

    volume_ml: float
    overlap: float
    found: bool
    dice: float


@dataclass(frozen=True)
class CaseLesions:
    """The lesions of one structure of one case, largest first, and the mask's components that lie on none."""

    case: str
    structure: str
    lesions: tuple[Lesion, ...]
    false_positives: int

    @property
    def found(self) -> int:
        """How many lesions are found."""
        return sum(lesion.found for lesion in self.lesions)

    @property
    def sensitivity(self) -> float | None:
        """Share of lesions that are found; None where there are none."""
        return self.found / len(self.lesions) if self.lesions else None


@dataclass(frozen=True)
class LesionSummary:
    """Lesions of one volume class over all scored cases; false positives have no class, they stand in "all"."""

    structure: str
    volume_ml: str
    lesions: int
    found: int
    sensitivity: float | None
    mean_dice: float | None
    false_positives_per_case: float | None


def match_lesions(
    mask: NDArray[Any], label: NDArray[Any], voxel_ml: float, min_overlap: float, value: int = 1
) -> tuple[tuple[Lesion, ...], int]:
    """The lesions of `label` as `mask` finds them, largest first, and the number of false positives.

    Args:
        mask: Predicted label values, `[x, y, z]`.
        label: True label values, same shape.
        voxel_ml: Volume of one voxel.
        min_overlap: Least covered share of a lesion that counts as found, above 0.
        value: The structure's label value.

    Raises:
        ValueError: if the shapes differ.
    """
    if mask.shape != label.shape:
        raise ValueError(f"mask and label must have one shape, got {mask.shape} and {label.shape}")
    in_mask, in_label = mask == value, label == value
    box = _box(in_mask | in_label)
    parts, num_parts = components(in_mask[box])
    lesions, num_lesions = components(in_label[box])
    sizes = np.bincount(lesions.reshape(-1), minlength=num_lesions + 1)
    lesion, part, shared = _pairs(lesions, parts)
    covered = np.bincount(lesion, shared, num_lesions + 1)
    touching = np.bincount(lesion, np.bincount(parts.reshape(-1))[part], num_lesions + 1)
    found = [
        Lesion(
            volume_ml=float(sizes[n] * voxel_ml),
            overlap=float(covered[n] / sizes[n]),
            found=bool(covered[n] >= min_overlap * sizes[n]),
            dice=float(2 * covered[n] / (sizes[n] + touching[n])),
        )
        for n in range(1, num_lesions + 1)
    ]
    false_positives = num_parts - len(np.unique(part))
    return tuple(sorted(found, key=lambda lesion: -lesion.volume_ml)), false_positives


def components(binary: NDArray[np.bool_]) -> tuple[NDArray[np.unsignedinteger[Any]], int]:
    """The 26-connected components of a volume, numbered from 1 (0 is outside), and how many there are."""
    import cc3d

    if binary.size == 0:
        return np.zeros(binary.shape, np.uint16), 0
    numbered, count = cc3d.connected_components(binary, connectivity=CONNECTIVITY, return_N=True)
    return numbered, int(count)


def class_names(limits_ml: Sequence[float]) -> list[str]:
    """Names of the volume classes between the borders, smallest first: `< 1`, `1 to 10`, `>= 10`."""
    if not limits_ml:
        return []
    middle = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(limits_ml)]
    return [f"< {limits_ml[0]:g}", *middle, f">= {limits_ml[-1]:g}"]


def volume_class(volume_ml: float, limits_ml: Sequence[float]) -> str:
    """The name of the class a volume belongs to; a border belongs to the upper one."""
    names = class_names(limits_ml)
    return names[sum(volume_ml >= limit for limit in limits_ml)] if names else ALL_VOLUMES


def summarise_lesions(
    structure: str, cases: Iterable[CaseLesions], limits_ml: Sequence[float]
) -> tuple[LesionSummary, ...]:
    """One structure over cases: all lesions together, then each volume class, smallest first."""
    own = [case for case in cases if case.structure == structure]
    lesions = [lesion for case in own for lesion in case.lesions]
    false_positives = mean_or_none([float(case.false_positives) for case in own])
    rows = [_summary(structure, ALL_VOLUMES, lesions, false_positives)]
    for name in class_names(limits_ml):
        chosen = [lesion for lesion in lesions if volume_class(lesion.volume_ml, limits_ml) == name]
        rows.append(_summary(structure, name, chosen, None))
    return tuple(rows)


def _summary(structure: str, name: str, lesions: list[Lesion], false_positives: float | None) -> LesionSummary:
    found = sum(lesion.found for lesion in lesions)
    return LesionSummary(
        structure=structure,
        volume_ml=name,
        lesions=len(lesions),
        found=found,
        sensitivity=found / len(lesions) if lesions else None,
        mean_dice=mean_or_none([lesion.dice for lesion in lesions]),
        false_positives_per_case=false_positives,
    )


def _box(binary: NDArray[np.bool_]) -> tuple[slice, ...]:
    """The smallest box around all that is true; of no voxels if there is none."""
    box = []
    for axis in range(3):
        hits = np.flatnonzero(binary.any(axis=tuple(a for a in range(3) if a != axis)))
        box.append(slice(int(hits[0]), int(hits[-1]) + 1) if len(hits) else slice(0, 0))
    return tuple(box)


def _pairs(
    lesions: NDArray[np.unsignedinteger[Any]], parts: NDArray[np.unsignedinteger[Any]]
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]:
    """Each lesion and mask component that share voxels, with the number of these: three arrays of one length."""
    both = (lesions > 0) & (parts > 0)
    numbers, counts = np.unique(np.stack([lesions[both], parts[both]]).astype(np.intp), axis=1, return_counts=True)
    return numbers[0], numbers[1], counts
