"""What a training sees as its cases: prepared cases, or, with clicks, every organ in each of them.

A recipe with clicks learns to segment whatever is clicked on, so an organ of a case is a sample of its own, in 2D the
organ in one slice. All samples of a case share its prepared image and label map; a sample is a part of the index.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path

import torch

from ctseg.engine.bank import Room, bank_folder, open_bank, organ_sections
from ctseg.errors import ManifestError
from ctseg.manifest import Case
from ctseg.recipe import Recipe
from ctseg.sampling import CaseArrays, Organ


@dataclasses.dataclass(frozen=True)
class OrganCount:
    """How many samples of one organ there are."""

    value: int
    organ: str
    samples: int
    voxels: int


def open_samples(
    cases: tuple[Case, ...],
    root: Path,
    recipe: Recipe,
    labels: Mapping[str, str],
    device: torch.device,
    room: Room | None = None,
) -> list[CaseArrays]:
    """The prepared cases, or their samples; `labels` names the values of a label map, `room` is as for `open_bank`.

    Raises:
        CtsegError: if a case is not prepared.
        ManifestError: if there are cases but no sample in them.
    """
    folder = bank_folder(root, recipe)
    arrays = open_bank(cases, folder, device, room)
    if recipe.clicks is None:
        return arrays
    samples = [
        dataclasses.replace(
            whole,
            name=f"{case.name} {organ_name(organ.value, labels)}",
            foreground=whole.foreground[part],
            organ=organ,
        )
        for case, whole in zip(cases, arrays, strict=True)
        for organ, part in _organs(organ_sections(case, folder), recipe)
    ]
    if cases and not samples:
        raise ManifestError(
            f"no label has an organ of {recipe.clicks.min_voxels} voxels or more at the recipe's spacing; give labels "
            f"that have, or lower clicks.min_voxels"
        )
    return samples


def count_organs(cases: tuple[Case, ...], root: Path, recipe: Recipe, labels: Mapping[str, str]) -> list[OrganCount]:
    """The samples of each organ in prepared cases, in the order of label values."""
    folder = bank_folder(root, recipe)
    samples: Counter[int] = Counter()
    voxels: Counter[int] = Counter()
    for case in cases:
        for organ, part in _organs(organ_sections(case, folder), recipe):
            samples[organ.value] += 1
            voxels[organ.value] += part.stop - part.start
    return [OrganCount(v, organ_name(v, labels), samples[v], voxels[v]) for v in sorted(samples)]


def organ_name(value: int, labels: Mapping[str, str]) -> str:
    """What a data list calls a label value."""
    return labels.get(str(value), f"label {value}")


def _organs(sections: list[list[int]], recipe: Recipe) -> Iterator[tuple[Organ, slice]]:
    """Every sample of a case: its organ, and which part of the case's index holds its voxels."""
    assert recipe.clicks is not None
    for _, group in groupby(sections, key=lambda row: row[:2] if recipe.is_2d else row[:1]):
        value, z, start, stop, low_x, high_x, low_y, high_y = zip(*group, strict=True)
        if stop[-1] - start[0] >= recipe.clicks.min_voxels:
            low, high = (min(low_x), min(low_y), min(z)), (max(high_x), max(high_y), max(z))
            organ = Organ(value[0], low, high, recipe.clicks.margin_voxels, recipe.clicks.partial_fraction)
            yield organ, slice(start[0], stop[-1])
