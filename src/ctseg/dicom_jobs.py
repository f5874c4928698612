"""Which DICOM series `ctseg infer` and `ctseg convert` are asked for, and what is made of them is called."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ctseg.errors import CtsegError
from ctseg.files import ZIP_MARKS
from ctseg.progress import Progress

if TYPE_CHECKING:
    from ctseg.io.dicom.read import Found
    from ctseg.io.dicom.series import Series

STRICT = {"gaps": "error", "tilt": "error"}
"""Policies that refuse a series which another one would repair: what was made under these is the same under any."""
_DICOM_MARK = b"DICM"
_SHOWN_REJECTED = 5


@dataclass(frozen=True)
class ChosenSeries:
    """The CT series that are meant.

    Attributes:
        named: The name of each, and itself.
        rejected: (name, reason) of each DICOM file that cannot be used.
    """

    named: list[tuple[str, Series]]
    rejected: tuple[tuple[str, str], ...]


def is_dicom_or_zip(path: Path) -> bool:
    """True for a file that begins as DICOM or as a zip archive, whatever its name."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            start = file.read(132)
    except OSError:
        return False
    return start[128:] == _DICOM_MARK or start[:4] in ZIP_MARKS


def find_ct_series(path: Path, rule: str | None, progress: Progress, *, keep_identifiers: bool) -> ChosenSeries:
    """The CT series in a folder, zip archive or file, and the name of each: all, or those that `rule` leaves.

    The rule is asked for each study by itself, so that `thinnest` means the thinnest of every study.

    Raises:
        CtsegError: if the rule is wrong, or leaves nothing of the CT series that there are.
        ImageError: if the files cannot be searched.
    """
    from ctseg.io.dicom.names import series_name
    from ctseg.io.dicom.read import find_series, select_series
    from ctseg.io.dicom.rule import choose

    choose([], rule)  # a wrong rule is told before the search
    found = find_series([path], progress)
    rejected = note_rejected(found, progress, keep_identifiers=keep_identifiers)
    studies: dict[str, list[Series]] = {}
    for series in found.series:
        studies.setdefault(str(series.value("StudyInstanceUID")), []).append(series)
    chosen = [series for study in studies.values() for series in choose(study, rule)]
    if not chosen and rule is not None and found.series:
        select_series(found, rule)  # which tells what there is
    named = [(series_name(s, found.series, keep_identifiers=keep_identifiers), s) for s in chosen]
    return ChosenSeries(named, rejected)


def note_rejected(found: Found, progress: Progress, *, keep_identifiers: bool) -> tuple[tuple[str, str], ...]:
    """The (name, reason) of each DICOM file that cannot be used; `progress` is told of the first of them."""
    rejected = found.left_out(keep_identifiers=keep_identifiers)
    for name, reason in rejected[:_SHOWN_REJECTED]:
        progress.note(f"left out '{name}': {reason}")
    if len(rejected) > _SHOWN_REJECTED:
        progress.note(f"{len(rejected) - _SHOWN_REJECTED} more files left out; `ctseg dicom ls` lists them")
    return rejected


def check_distinct(named: list[tuple[str, Series]]) -> list[tuple[str, Series]]:
    """`named` with what was found twice, by its folder and by itself say, listed once.

    Raises:
        CtsegError: if different images have one name.
    """
    distinct: dict[str, Series] = {}
    for name, series in named:
        if _images(distinct.setdefault(name, series)) != _images(series):
            raise CtsegError(
                f"series '{name}' lies in parts in several inputs; give the folder that holds all of it, alone"
            )
    return list(distinct.items())


def _images(series: Series) -> set[tuple[Path, str | None, int | None]]:
    return {(one.source.path.resolve(), one.source.member, one.frame) for one in series}
