"""CTs from one format to another: one file, or a whole archive to a tidy data set with its manifest."""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctseg.dicom_jobs import STRICT, find_ct_series, note_rejected
from ctseg.errors import CtsegError, ImageError, OutputError
from ctseg.files import is_there, make_folder, write_json
from ctseg.io.dicom.names import patient_name
from ctseg.io.dicom.read import DicomCT, Gaps, Tilt, find_series, read_extent, read_series, select_series
from ctseg.io.dicom.series import Series
from ctseg.io.dicom.write import write_series
from ctseg.io.images import OTHER_SUFFIXES, read_geometry, read_image, read_labels, write_image
from ctseg.manifest import IMAGE_SUFFIXES, image_stem, is_image_name
from ctseg.privacy import without_uids
from ctseg.progress import Progress
from ctseg.provenance import differences, merged_entries, own_manifest
from ctseg.volume import Geometry, Volume

SUFFIXES = {"nifti": ".nii.gz", "nrrd": ".nrrd", "mha": ".mha", "dicom": ""}
"""What each format's files end in; DICOM is a folder."""
MANIFEST = "data.json"
MAKER = "ctseg convert"
IMAGES = "images"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How CTs are read and named.

    Attributes:
        rule: Which DICOM series, see `select_series`; None: the only one, or in an archive every CT.
        gaps: What to do about missing slices.
        tilt: What to do about a tilted gantry.
        labels: Image files hold label maps, not CT.
        overwrite: Replace what is there.
        keep_identifiers: Name DICOM series and patients as they are, not by pseudonyms.
    """

    rule: str | None = None
    gaps: Gaps = "error"
    tilt: Tilt = "error"
    labels: bool = False
    overwrite: bool = False
    keep_identifiers: bool = False

    @property
    def record(self) -> dict[str, Any]:
        """What makes other files, or other names, of the same CT."""
        return {"gaps": self.gaps, "tilt": self.tilt, "keep_identifiers": self.keep_identifiers}


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What became of one CT.

    Attributes:
        source: What it was made of, without identifiers unless they were to be kept.
        output: The file, or the folder of a DICOM series.
        status: "done", "skipped" (it was there) or "failed".
        error: Why it failed.
        seconds: That it took.
        largest_change_hu: Between a voxel and what was stored; only DICOM rounds.
        grid: Size, spacing and axes of what was written.
        dicom: The geometry report of a DICOM series.
        patient: Whose it is: a pseudonym, unless identifiers were to be kept; None where unknown.
    """

    source: str
    output: Path
    status: str
    error: str = ""
    seconds: float = 0.0
    largest_change_hu: float = 0.0
    grid: dict[str, Any] | None = None
    dicom: dict[str, Any] | None = None
    patient: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {**dataclasses.asdict(self), "output": str(self.output)}


@dataclass(frozen=True)
class Converted:
    """What became of all that a source holds.

    Attributes:
        results: One for each CT.
        rejected: (name, reason) of each DICOM file that cannot be used, and belongs to no series.
    """

    results: list[Conversion]
    rejected: tuple[tuple[str, str], ...] = ()

    def to_dicts(self) -> list[dict[str, Any]]:
        """The report, as data for JSON: the CTs, then the files that were left out."""
        left_out = [{"source": name, "status": "left out", "error": reason} for name, reason in self.rejected]
        return [*(result.to_dict() for result in self.results), *left_out]


@dataclass(frozen=True)
class _Task:
    """One CT to convert: where from, where to."""

    shown: str
    output: Path
    read: Callable[[], Volume | DicomCT]
    grid: Callable[[], Geometry]
    """Of its header."""
    overwrite: bool
    patient: str | None = None


def check_target(output: Path) -> None:
    """Passes for names of image files that can be written, and of folders.

    Raises:
        CtsegError: if the name ends like an image format that is not written.
    """
    name = output.name.lower()
    foreign = None if is_image_name(output) else next((s for s in OTHER_SUFFIXES if name.endswith(s)), None)
    if foreign is not None:
        raise CtsegError(
            f"target '{output}': '{foreign}' is not written; end it in one of {', '.join(IMAGE_SUFFIXES)}, or name a "
            f"folder (--format dicom for a DICOM series)"
        )


def convert_one(source: Path, output: Path, options: Options, progress: Progress) -> Converted:
    """Converts the one CT in `source` to the image file, or the folder of a DICOM series, `output`.

    Raises:
        CtsegError: if there is not exactly one, it cannot be trusted, or `output` is there and not to be replaced.
    """
    check_target(output)
    if is_there(output) and not options.overwrite:
        raise OutputError(f"'{output}' is there already; --overwrite replaces it")
    if is_image_name(source) and source.is_file():
        return Converted([_convert(_image_task(source, output, options))])
    _check_no_labels(source, options)
    found = find_series([source], progress)
    rejected = note_rejected(found, progress, keep_identifiers=options.keep_identifiers)
    series = select_series(found, options.rule)
    return Converted([_convert(_series_task(source, series, output, options))], rejected)


def convert_all(source: Path, folder: Path, form: str, options: Options, progress: Progress) -> Converted:
    """Converts every CT in `source` to `folder`/images and lists them in a manifest; what is there is kept.

    Args:
        source: A folder (with its subfolders) of DICOM and image files, a zip archive of DICOM, or one file.
        folder: Of the data set.
        form: A key of SUFFIXES.
        options: A rule picks among the DICOM series.
        progress: Told of each.

    Returns:
        One result for each CT, those with an error among them.

    Raises:
        CtsegError: if there is no CT at all, two would have one name, or the folder holds another manifest.
        OutputError: if results cannot be written.
    """
    if folder.resolve().is_relative_to(source.resolve()):
        raise CtsegError(f"output '{folder}': must not lie in the source '{source}'; choose another folder")
    check_target(folder)
    manifest = _manifest_before(folder, options)
    tasks, rejected = _tasks(source, folder / IMAGES, SUFFIXES[form], options, progress)
    if not tasks:
        raise CtsegError(f"no CT in '{source}'; `ctseg dicom ls {source}` lists what it holds")
    _check_names(tasks)
    make_folder(folder / IMAGES)
    results = []
    progress.start("converting", len(tasks))
    for task in tasks:
        results.append(_try(task))
        progress.advance(f"{task.output.name}: {results[-1].error or results[-1].status}")
    progress.finish()
    if form != "dicom":
        _write_manifest(folder, manifest | options.record, [one for one in results if one.status != "failed"])
    return Converted(results, rejected)


def _tasks(
    source: Path, images: Path, suffix: str, options: Options, progress: Progress
) -> tuple[list[_Task], tuple[tuple[str, str], ...]]:
    """What is to be converted, and what was left out."""
    if is_image_name(source) and source.is_file():
        return [_image_task(source, images / f"{image_stem(source)}{suffix}", options)], ()
    tasks = list(_image_tasks(source, images, suffix, options))
    chosen = find_ct_series(source, options.rule, progress, keep_identifiers=options.keep_identifiers)
    if chosen.named:
        _check_no_labels(source, options)
    tasks += [_series_task(source, series, images / f"{name}{suffix}", options) for name, series in chosen.named]
    return tasks, chosen.rejected


def _check_no_labels(source: Path, options: Options) -> None:
    if options.labels:
        raise CtsegError(
            f"--labels is for image files, and '{source}' holds DICOM; `ctseg labels` makes label maps of SEG and "
            f"RTSTRUCT"
        )


def _image_tasks(source: Path, images: Path, suffix: str, options: Options) -> Iterator[_Task]:
    for path in sorted(source.rglob("*")) if source.is_dir() else []:
        if is_image_name(path) and path.is_file() and not path.name.startswith("."):
            below = path.relative_to(source).with_name(f"{image_stem(path)}{suffix}")
            yield _image_task(path, images / below, options)


def _image_task(path: Path, output: Path, options: Options) -> _Task:
    read = read_labels if options.labels else read_image
    return _Task(without_uids(str(path)), output, lambda: read(path), lambda: read_geometry(path), options.overwrite)


def _series_task(source: Path, series: Series, output: Path, options: Options) -> _Task:
    shown = f"{source} #{series.number}"
    return _Task(
        shown if options.keep_identifiers else without_uids(shown),
        output,
        lambda: read_series(series, gaps=options.gaps, tilt=options.tilt),
        lambda: read_extent(series, gaps=options.gaps, tilt=options.tilt).geometry,
        options.overwrite,
        patient_name(series, keep_identifiers=options.keep_identifiers),
    )


def _check_names(tasks: list[_Task]) -> None:
    shared = [output for output, count in Counter(task.output for task in tasks).items() if count > 1]
    if shared:
        raise CtsegError(
            f"{len(shared)} names would stand for several CTs, e.g. '{shared[0].name}'; convert one by one"
        )


def _try(task: _Task) -> Conversion:
    try:
        if is_there(task.output) and not task.overwrite:
            _check_same_grid(task)
            return Conversion(source=task.shown, output=task.output, status="skipped", patient=task.patient)
        return _convert(task)
    except ImageError as error:
        return Conversion(source=task.shown, output=task.output, status="failed", error=str(error))


def _check_same_grid(task: _Task) -> None:
    """Raises ImageError if the file that is there is of another CT, or of a series that has become longer."""
    if not is_image_name(task.output):
        return
    there, wanted = read_geometry(task.output), task.grid()
    if not there.agrees_with(wanted):
        raise ImageError(
            f"'{task.output}' is there and holds another CT ({'x'.join(map(str, there.size))} voxels, this one has "
            f"{'x'.join(map(str, wanted.size))}); choose another output, or --overwrite to replace it"
        )


def _convert(task: _Task) -> Conversion:
    started = time.perf_counter()
    if not is_image_name(task.output):
        _check_replaceable(task.output)
    content = task.read()
    volume, report = (content.volume, content.report.to_dict()) if isinstance(content, DicomCT) else (content, None)
    change = 0.0
    make_folder(task.output.parent)
    if is_image_name(task.output):
        write_image(task.output, volume)
    else:
        change = write_series(task.output, volume, "converted by ctseg", replace=task.overwrite)
    return Conversion(
        source=task.shown,
        output=task.output,
        status="done",
        seconds=time.perf_counter() - started,
        largest_change_hu=change,
        grid=describe_grid(volume.geometry),
        dicom=report,
        patient=task.patient,
    )


def _check_replaceable(folder: Path) -> None:
    """Passes if there is nothing, or a folder of DICOM files only: nothing else is ever deleted."""
    if is_there(folder) and not (folder.is_dir() and all(p.is_file() and p.suffix == ".dcm" for p in folder.iterdir())):
        raise OutputError(f"'{folder}' is no folder of nothing but DICOM files (.dcm); choose another one")


def describe_grid(geometry: Geometry) -> dict[str, Any]:
    """Size, spacing, origin and axes as plain data."""
    return {
        "size": list(geometry.size),
        "spacing_mm": list(geometry.spacing_mm),
        "origin_mm_lps": list(geometry.origin_mm),
        "direction_lps": geometry.direction.tolist(),
        "axes": geometry.axis_codes,
    }


def _manifest_before(folder: Path, options: Options) -> dict[str, Any]:
    """The manifest of earlier runs that this one goes on with."""
    manifest = own_manifest(folder / MANIFEST, MAKER)
    different = differences(manifest, options.record, STRICT) if manifest else []
    if different and not options.overwrite:
        raise CtsegError(
            f"'{folder}' holds CTs that were made in another way ({', '.join(different)}); choose another folder, or "
            f"--overwrite"
        )
    return {} if different else manifest


def _write_manifest(folder: Path, before: dict[str, Any], results: list[Conversion]) -> None:
    entries = []
    for result in results:
        patient = {} if result.patient is None else {"patient": result.patient}
        entries.append({"image": result.output.relative_to(folder).as_posix(), **patient})
    entries = merged_entries(before, "test", ("image",), folder, entries)
    common = {"name": folder.resolve().name, "licence": "unknown", "source": MAKER}
    write_json(folder / MANIFEST, {**common, **{key: before[key] for key in Options().record}, "test": entries})
