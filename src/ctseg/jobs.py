"""Which CTs `ctseg infer` is asked for, and where each mask goes. Light: found before a model is loaded."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ctseg import slurm
from ctseg.datalists import LIST_SUFFIXES
from ctseg.dicom_jobs import check_distinct, find_ct_series, is_dicom_or_zip
from ctseg.errors import CtsegError
from ctseg.manifest import IMAGE_SUFFIXES, image_stem, is_image_name, read_manifest
from ctseg.progress import Progress, Silent

if TYPE_CHECKING:
    from ctseg.io.dicom.read import Gaps, Tilt
    from ctseg.io.dicom.series import Series

MASKS_RECORD = "ctseg_model.json"
"""Names the model whose masks a folder holds."""
FAILURES = "failures.csv"
"""Lists the CTs of an output folder that failed, with the reasons."""
RUN_MANIFEST = "ctseg_run.json"
"""Says how the masks of an output folder were made, and from what."""
Format = Literal["nifti", "nrrd", "mha", "dicom-seg", "rtstruct"]
ENDINGS: dict[Format, str] = {
    "nifti": "_seg.nii.gz",
    "nrrd": "_seg.nrrd",
    "mha": "_seg.mha",
    "dicom-seg": "_seg.dcm",
    "rtstruct": "_rtstruct.dcm",
}
"""What the names of masks end in; other forms of the first three, such as `_seg.nii`, come from their CTs' names."""


DICOM_FORMATS: tuple[Format, ...] = ("dicom-seg", "rtstruct")


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which model segments, and how it runs.

    Attributes:
        path: Its file.
        device: As for `ctseg.engine.runtime.start_runtime`.
        precision: The same.
        backend: As for `ctseg.engine.model.load_model`.
        fast: Whether reduced precision is welcome on a CPU.
    """

    path: Path
    device: str = "auto"
    precision: str = "auto"
    backend: str | None = None
    fast: bool = False


@dataclass(frozen=True, kw_only=True)
class Options:
    """How CTs are read from DICOM, how their masks are made, and what these are written as.

    Attributes:
        series: Rule that picks series, see `ctseg.io.dicom.rule`; None: every CT series.
        gaps: What to do about missing slices.
        tilt: What to do about a tilted gantry.
        keep_identifiers: Masks of DICOM series are named by SeriesInstanceUID, not by a pseudonym.
        format: Of the masks; None: that of the CT, NIfTI for DICOM.
        seg_type: Of a DICOM SEG.
        keep_empty_frames: A DICOM SEG has a frame also where a structure is not.
        fast: Windows that would hardly change the mask are left out, and reduced precision is welcome.
        overwrite: Masks that are there are made anew.
        overlays: A picture is drawn of every mask.
    """

    series: str | None = None
    gaps: Gaps = "error"
    tilt: Tilt = "error"
    keep_identifiers: bool = False
    format: Format | None = None
    seg_type: Literal["binary", "labelmap"] = "binary"
    keep_empty_frames: bool = False
    fast: bool = False
    overwrite: bool = False
    overlays: bool = False

    @property
    def needs_voxels(self) -> bool:
        """Whether writing a mask needs the CT's voxels and not only its grid, as pictures and DICOM do."""
        return self.overlays or self.format in DICOM_FORMATS

    def record(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """The options that make other masks of these jobs under the same names."""
        of_series = {"gaps": self.gaps, "tilt": self.tilt} if any(job.series is not None for job in jobs) else {}
        of_seg = {"seg_type": self.seg_type, "keep_empty_frames": self.keep_empty_frames}
        return {"fast": self.fast} | of_series | (of_seg if self.format == "dicom-seg" else {})


PLAIN = Options()


@dataclass(frozen=True)
class Job:
    """One CT and where its mask goes.

    Attributes:
        image: The CT's file. For a DICOM series, what it lies in and its number there, for people.
        mask: The mask's file.
        series: The DICOM series that is the CT, if it is one.
    """

    image: Path
    mask: Path
    series: Series | None = None

    @property
    def files(self) -> set[Path]:
        """What the CT is made of: a mask is out of date when one of these is newer."""
        return {self.image} if self.series is None else {one.source.path for one in self.series}

    @property
    def num_bytes(self) -> int:
        """Of the CT's files, unpacked from an archive.

        Raises:
            OSError: if one cannot be looked at.
        """
        if self.series is None:
            return self.image.stat().st_size
        sources = {(one.source.path, one.source.member): one.source for one in self.series}
        return sum(source.num_bytes for source in sources.values())

    @property
    def is_done(self) -> bool:
        """True if the mask is there and not older than the CT."""
        try:
            return self.mask.stat().st_mtime_ns >= max(file.stat().st_mtime_ns for file in self.files)
        except OSError:
            return False


def is_mask_name(path: Path) -> bool:
    """True for a file that is called as masks are."""
    name = path.name.lower()
    return name.endswith((*ENDINGS.values(), *(f"_seg{suffix}" for suffix in IMAGE_SUFFIXES)))


@dataclass(frozen=True)
class Shard:
    """One of several parts, of which each CT is in exactly one."""

    index: int = 0
    count: int = 1

    def __str__(self) -> str:
        return f"{self.index + 1}/{self.count}"

    @property
    def failures(self) -> str:
        """The name of the list of CTs that failed: each part its own, so that none overwrites another's."""
        return self._own(FAILURES)

    @property
    def run_manifest(self) -> str:
        """The name of the manifest of its run, likewise."""
        return self._own(RUN_MANIFEST)

    def _own(self, name: str) -> str:
        stem, suffix = name.split(".")
        return name if self.count == 1 else f"{stem}-{self.index + 1}-of-{self.count}.{suffix}"

    def take(self, jobs: Sequence[Job]) -> list[Job]:
        """Every `count`-th job: CTs of one folder, often alike in size, are spread over all parts."""
        return list(jobs[self.index :: self.count])

    def divided(self, index: int, count: int) -> Shard:
        """A part of this part."""
        return Shard(self.index + self.count * index, self.count * count)


def choose_shard(text: str | None, environ: Mapping[str, str]) -> Shard:
    """The part of the CTs that `--shard` and the surroundings mean.

    Args:
        text: "I/N", the I-th of N parts, from 1; "auto", this task's part of its Slurm job array; None, all.
        environ: What srun or torchrun has set: processes that were started together deal the part out among them.

    Raises:
        CtsegError: if `text` is neither, or several processes would do the same CTs.
    """
    processes, process = slurm.num_processes(environ), slurm.process_index(environ)
    if text is None and processes > 1:
        raise CtsegError(
            f"started as {processes} processes, which would all do the same CTs; add --shard 1/1 to deal them out"
        )
    if text == "auto":
        return Shard(*(slurm.array_part(environ) or (0, 1))).divided(process, processes)
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", "1/1" if text is None else text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise CtsegError(f"--shard {text}: expected auto or I/N with I from 1 to N, such as 3/8")
    return Shard(int(match[1]) - 1, int(match[2])).divided(process, processes)


def find_jobs(
    inputs: list[Path], output: Path, options: Options = PLAIN, progress: Progress | None = None
) -> list[Job]:
    """One job for each CT that `inputs` name, masks below `output`.

    Args:
        inputs: Image files, DICOM files, zip archives of DICOM, folders (searched with their subfolders for image
            files and DICOM), or lists (`.txt` with one path a line, or a JSON manifest, whose cases of all splits are
            taken).
        output: Folder of the masks. `a/ct.nii.gz` gives `ct_seg.nii.gz`; files from a folder keep their subfolder,
            and files whose names collide keep the part of their path that tells them apart. Masks of DICOM series
            are named by a pseudonym of their UID.
        options: Which series, and the masks' format.
        progress: Told how far the search for DICOM is.

    Raises:
        CtsegError: if an input does not exist, none names a CT, masks would lie among the inputs, or a CT that is not
            DICOM is to have a mask in DICOM.
    """
    found: list[tuple[Path, Path]] = []  # image, and its path relative to the output
    in_dicom: list[Path] = []
    for path in inputs:
        if path.is_dir():
            images, others = _files_below(path, output)
            found += [(image, image.relative_to(path)) for image in images]
            in_dicom += [path] if others else []
        elif path.name.lower().endswith(LIST_SUFFIXES):
            found += _told_apart([case.image for case in read_manifest(path).cases])
        elif path.exists():
            if is_image_name(path) or not is_dicom_or_zip(path):
                found.append((path, Path(path.name)))
            else:
                in_dicom.append(path)
        else:
            raise CtsegError(f"input '{path}': no such file or folder")
    jobs = [*_file_jobs(found, output, options), *_series_jobs(in_dicom, output, options, progress or Silent())]
    if not jobs:
        raise CtsegError(f"no CT in {', '.join(map(str, inputs))}; known: DICOM and {', '.join(IMAGE_SUFFIXES)}")
    return jobs


def _series_jobs(inputs: list[Path], output: Path, options: Options, progress: Progress) -> list[Job]:
    shown: dict[str, Path] = {}
    named = []
    for path in inputs:
        chosen = find_ct_series(path, options.series, progress, keep_identifiers=options.keep_identifiers)
        for name, series in chosen.named:
            shown.setdefault(name, Path(f"{path} #{series.number}"))
            named.append((name, series))
    ending = ENDINGS[options.format or "nifti"]
    return [Job(shown[name], output / f"{name}{ending}", series) for name, series in check_distinct(named)]


def _file_jobs(found: list[tuple[Path, Path]], output: Path, options: Options) -> list[Job]:
    """The jobs of image files, each given with its path relative to the output."""
    if found and options.format in ("dicom-seg", "rtstruct"):
        raise CtsegError(
            f"--format {options.format}: refers to the DICOM images of the CT, and '{found[0][0]}' is none; "
            f"give the DICOM series, or choose nifti, nrrd or mha"
        )
    located = {_located(image): (image, relative) for image, relative in found}  # a CT that is named twice counts once
    unique = list(located.values())
    if len({relative for _, relative in unique}) < len(unique):
        unique = _told_apart([image for image, _ in unique])
    jobs = [Job(image, output / _mask_name(relative, options.format)) for image, relative in unique]
    for job in jobs:
        if _located(job.mask) in located:
            raise CtsegError(
                f"'{job.mask}' is an input and would be the mask of '{job.image}'; choose another --output"
            )
    shared = next((mask for mask, count in Counter(job.mask for job in jobs).items() if count > 1), None)
    if shared is not None:
        raise CtsegError(f"several CTs would have the mask '{shared}'; leave --format out, or segment them one by one")
    return jobs


def _located(image: Path) -> Path:
    """The absolute path of a file in its real folder: one for each file, whatever way it is named."""
    return image.parent.resolve() / image.name


def _files_below(folder: Path, output: Path) -> tuple[list[Path], bool]:
    """The image files in a folder that are no masks of ours, and whether there are other files, DICOM perhaps."""
    inside = output.resolve()
    if folder.resolve().is_relative_to(inside):
        raise CtsegError(
            f"output '{output}': must not be the input folder '{folder}' or hold it, as masks would be taken for CTs; "
            f"choose another --output"
        )
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    of_masks = {record.parent for record in folder.rglob(MASKS_RECORD)}
    files = [p for p in files if not _located(p).is_relative_to(inside) and of_masks.isdisjoint((p.parent, *p.parents))]
    images = [p for p in files if is_image_name(p)]
    return images, len(images) < len(files)


def _told_apart(images: list[Path]) -> list[tuple[Path, Path]]:
    """Images by file name alone where that is unique, else by the path below their common folder."""
    repeated = {name for name, n in Counter(image.name for image in images).items() if n > 1}
    common = Path(os.path.commonpath([_located(image).parent for image in images])) if images else Path()
    named = [_located(image).relative_to(common) if image.name in repeated else Path(image.name) for image in images]
    return list(zip(images, named, strict=True))


def _mask_name(relative: Path, form: Format | None) -> Path:
    """`a/ct.nii.gz` -> `a/ct_seg.nii.gz`; `ct.dcm` -> `ct.dcm_seg.nii.gz`, never written as reading refuses it."""
    stem = image_stem(relative)
    suffix = relative.name[len(stem) :]
    if suffix.lower() not in IMAGE_SUFFIXES:
        return relative.with_name(f"{relative.name}_seg.nii.gz")
    if form is not None:
        return relative.with_name(f"{stem}{ENDINGS[form]}")
    return relative.with_name(f"{stem}_seg{suffix}")
