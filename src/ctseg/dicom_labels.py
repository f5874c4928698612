"""Training data from DICOM: CTs and the SEG and RTSTRUCT drawn on them as images, label maps and a manifest."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom

from ctseg.dicom_jobs import STRICT, note_rejected
from ctseg.errors import CtsegError, ImageError
from ctseg.files import make_folder, output_errors, write_json
from ctseg.io.dicom.headers import read_dataset
from ctseg.io.dicom.labels import Overlap, read_labels, regions_of
from ctseg.io.dicom.names import patient_name, series_name
from ctseg.io.dicom.read import Found, Gaps, OtherObject, Tilt, find_series, read_series
from ctseg.io.dicom.referenced import CTFinder
from ctseg.io.dicom.regions import Choice, Region, choose_regions
from ctseg.io.dicom.series import Series
from ctseg.io.dicom.silence import pydicom_silent
from ctseg.io.images import check_ct, write_image, write_labels
from ctseg.privacy import without_uids
from ctseg.progress import Progress
from ctseg.provenance import differences, merged_entries, own_manifest, read_object

Kind = Literal["SEG", "RTSTRUCT"]
KINDS: tuple[Kind, ...] = ("SEG", "RTSTRUCT")
MANIFEST = "data.json"
MAKER = "ctseg labels"
RECORD = "ctseg_labels.json"
"""Says how the label maps in a folder were made; written before the first of them."""
_STRICT = {"only": None, "merge": False, "overlap": "error", "allow_missing": False, **STRICT}


@dataclass(frozen=True, kw_only=True)
class Options:
    """How label maps are made.

    Attributes:
        choices: Which regions become which value.
        only: Objects of the other kind are left aside.
        merge: Regions of several objects of one CT become one label map; else that is an error.
        overlap: Where regions of two values overlap: refuse, or keep the one that `choices` name first or last.
        allow_missing: A CT may lack some of the structures, not all.
        gaps: What to do about missing slices of a CT.
        tilt: What to do about a tilted gantry.
        keep_identifiers: Names are those of series and patients, not pseudonyms.
        overwrite: Replace what is there.
    """

    choices: tuple[Choice, ...]
    only: Kind | None = None
    merge: bool = False
    overlap: Overlap = "error"
    allow_missing: bool = False
    gaps: Gaps = "error"
    tilt: Tilt = "error"
    keep_identifiers: bool = False
    overwrite: bool = False

    @property
    def record(self) -> dict[str, Any]:
        """What makes other label maps, or other names, of the same CT."""
        return {"choices": [*map(str, self.choices)], "keep_identifiers": self.keep_identifiers} | {
            name: getattr(self, name) for name in _STRICT
        }


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """What became of one CT, or of one object that no CT was found for.

    Attributes:
        source: What it is, without identifiers unless they were to be kept.
        status: "done", "skipped" (it was there) or "failed".
        image: Of the CT, None where it failed.
        label: Of the label map, None where it failed.
        patient: A pseudonym; None where unknown.
        regions: Label value -> names of the regions that it was made of.
        volumes_ml: Label value -> volume.
        notes: What was left out or repaired.
        error: Why it failed.
    """

    source: str
    status: str
    image: Path | None = None
    label: Path | None = None
    patient: str | None = None
    regions: dict[int, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    volumes_ml: dict[int, float] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class RegionCount:
    """How often regions of one name occur in an archive."""

    name: str
    kind: str
    objects: int
    codes: tuple[str, ...]
    numbers: tuple[int, ...]


def count_regions(paths: Sequence[Path], progress: Progress) -> list[RegionCount]:
    """The names of all segments and ROIs in folders, archives and files, the most frequent first.

    Raises:
        CtsegError: if there is no SEG or RTSTRUCT.
    """
    regions: dict[tuple[str, str], list[Region]] = defaultdict(list)
    with pydicom_silent():
        found_all = find_series(paths, progress)
        note_rejected(found_all, progress, keep_identifiers=False)
        for other in _objects(found_all, None, paths):
            try:
                for region in regions_of(other.header):
                    regions[region.name, other.kind].append(region)
            except ImageError as error:
                progress.note(f"left out '{other.source.shown}': {error}")
    counts = [
        RegionCount(
            name=name,
            kind=kind,
            objects=len(found),
            codes=tuple(sorted({code for region in found for code in region.codes})),
            numbers=tuple(sorted({region.number for region in found})),
        )
        for (name, kind), found in regions.items()
    ]
    return sorted(counts, key=lambda count: (-count.objects, count.name.casefold()))


def collect_labels(paths: Sequence[Path], folder: Path, options: Options, progress: Progress) -> list[Labelled]:
    """Writes every CT that has a SEG or RTSTRUCT, its label map, and a manifest that lists them all as `training`.

    Args:
        paths: Folders, zip archives and files of DICOM, of any number of patients.
        folder: Gets `images`, `labels` and the manifest; what is there already is kept.
        options: How label maps are made.
        progress: Told of each CT.

    Returns:
        One for each CT with segmentations, and one for each segmentation without CT.

    Raises:
        CtsegError: if there is no SEG or RTSTRUCT, or the folder holds labels that were made otherwise.
        OutputError: if results cannot be written.
    """
    found = find_series(paths, progress)
    note_rejected(found, progress, keep_identifiers=options.keep_identifiers)
    results: list[Labelled] = []
    with pydicom_silent():
        objects = _objects(found, options.only, paths)
        finder = CTFinder(found.series)
        of_series: dict[int, list[OtherObject]] = defaultdict(list)
        for other in objects:
            try:
                of_series[finder.find(other.header).number].append(other)
            except ImageError as error:
                shown = other.source.named(keep_identifiers=options.keep_identifiers)
                results.append(Labelled(source=shown, status="failed", error=f"{other.kind} '{shown}': {error}"))
    named = _named([one for one in found.series if one.number in of_series], found, options)
    manifest = own_manifest(folder / MANIFEST, MAKER)
    if named:
        _claim(folder, set(named), options)
    progress.start("converting", len(of_series))
    for name, series in named.items():
        results.append(_try(name, series, of_series[series.number], folder, options))
        progress.advance(results[-1].error or results[-1].status)
    progress.finish()
    _write_manifest(folder, manifest, results, options)
    return results


def _named(wanted: list[Series], found: Found, options: Options) -> dict[str, Series]:
    named: dict[str, Series] = {}
    for series in wanted:
        name = series_name(series, found.series, keep_identifiers=options.keep_identifiers)
        if name in named:
            raise CtsegError(f"series #{named[name].number} and #{series.number} are the same images; leave one out")
        named[name] = series
    return named


def _objects(found: Found, only: Kind | None, paths: Sequence[Path]) -> list[OtherObject]:
    objects = [other for other in found.others if other.kind in (KINDS if only is None else (only,))]
    if not objects:
        raise CtsegError(
            f"no {only or 'SEG or RTSTRUCT'} in {', '.join(map(str, paths))}; `ctseg dicom ls` lists what there is"
        )
    return objects


def _try(name: str, series: Series, objects: list[OtherObject], folder: Path, options: Options) -> Labelled:
    source = f"series #{series.number}"
    patient = patient_name(series, keep_identifiers=options.keep_identifiers)
    image, label = folder / "images" / f"{name}.nii.gz", _label_path(folder, name)
    if image.exists() and label.exists() and not options.overwrite and not _is_older(label, series, objects):
        return Labelled(source=source, status="skipped", image=image, label=label, patient=patient)
    try:
        with pydicom_silent():
            datasets = _chosen(objects, options)
        ct = read_series(series, gaps=options.gaps, tilt=options.tilt)
        check_ct(ct.volume, Path(source))
        with pydicom_silent():
            made = read_labels(
                datasets, ct, options.choices, overlap=options.overlap, allow_missing=options.allow_missing
            )
    except ImageError as error:
        text = str(error) if options.keep_identifiers else without_uids(str(error))
        return Labelled(source=source, status="failed", patient=patient, error=f"{source}: {text}")
    for path in (image, label):
        make_folder(path.parent)
    write_image(image, ct.volume)
    write_labels(label, made.labels.array, made.labels.geometry)  # last: where it is, the case is done
    counts = np.bincount(made.labels.array.ravel(order="K"), minlength=256)
    voxel_ml = made.labels.geometry.voxel_volume_ml
    return Labelled(
        source=source,
        status="done",
        image=image,
        label=label,
        patient=patient,
        regions={value: tuple(region.name for region in regions) for value, regions in made.regions.items()},
        volumes_ml={value: float(counts[value]) * voxel_ml for value in made.regions},
        notes=(*(finding.text for finding in ct.report.repaired), *made.notes),
    )


def _is_older(label: Path, series: Series, objects: list[OtherObject]) -> bool:
    """Whether a file that a label map is made of is newer than it."""
    paths = {one.source.path for one in series} | {other.source.path for other in objects}
    return label.stat().st_mtime_ns < max(path.stat().st_mtime_ns for path in paths)


def _chosen(objects: list[OtherObject], options: Options) -> list[pydicom.Dataset]:
    """The objects of one CT that have a chosen region, whole; all of them if none has, for the message.

    Raises:
        ImageError: if there are several, and they are not to be merged.
    """
    having = [other for other in objects if choose_regions(regions_of(other.header), options.choices)]
    if len(having) > 1 and not options.merge:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(other.kind for other in having).items()))
        raise ImageError(f"several objects have regions that match ({kinds}); choose with --only, or --merge them")
    return [read_dataset(other.source) for other in having or objects]


def _label_path(folder: Path, name: str) -> Path:
    return folder / "labels" / f"{name}.nii.gz"


def _claim(folder: Path, names: set[str], options: Options) -> None:
    """Records how the folder's label maps are made, so that two ways never mix, whenever a run is cut off.

    Raises:
        CtsegError: if it holds label maps made in another way, unless they are to be overwritten and all are.
    """
    before = read_object(folder / RECORD)
    there = {path.name for path in (folder / "labels").glob("*.nii.gz")}
    different = ["of unknown origin"] if not before else differences(before, options.record, _STRICT)
    if there and different:
        mine = {_label_path(folder, name) for name in names}
        left = sorted(there - {path.name for path in mine})
        if not options.overwrite:
            raise CtsegError(
                f"'{folder}' holds labels that were made in another way ({'; '.join(different)}); "
                f"choose another --output, or --overwrite"
            )
        if left:
            raise CtsegError(
                f"'{folder}' holds {len(left)} labels made in another way that would stay, e.g. '{left[0]}'; "
                f"choose another --output"
            )
        with output_errors(folder):
            for path in mine:
                path.unlink(missing_ok=True)
    make_folder(folder)
    write_json(folder / RECORD, options.record)


def _write_manifest(folder: Path, before: Mapping[str, Any], results: Sequence[Labelled], options: Options) -> None:
    entries: list[dict[str, Any]] = []
    for one in results:
        if one.image is not None and one.label is not None:
            entry = {key: p.relative_to(folder).as_posix() for key, p in (("image", one.image), ("label", one.label))}
            entries.append(entry | ({} if one.patient is None else {"patient": one.patient}))
    entries = merged_entries(before, "training", ("image", "label"), folder, entries)
    if not entries:
        return
    names: dict[str, str] = {}
    for choice in options.choices:
        names.setdefault(str(choice.value), choice.pattern.strip("/"))
    write_json(
        folder / MANIFEST,
        {
            "name": folder.resolve().name,
            "licence": "unknown",
            "source": MAKER,
            "labels": {"0": "background", **names},
            "choices": [*map(str, options.choices)],
            "training": entries,
        },
    )
