"""Which CTs `ctseg infer` is asked for, and where each mask goes. Light: found before a model is loaded."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ctseg import slurm
from ctseg.errors import CtsegError
from ctseg.manifest import IMAGE_SUFFIXES, image_stem, read_manifest

FAILURES = "failures.csv"
"""Lists the CTs of an output folder that failed, with the reasons."""


@dataclass(frozen=True)
class Job:
    """One CT and where its mask goes."""

    image: Path
    mask: Path


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
        return FAILURES if self.count == 1 else f"failures-{self.index + 1}-of-{self.count}.csv"

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


def find_jobs(inputs: list[Path], output: Path) -> list[Job]:
    """One job for each CT that `inputs` name, masks below `output`.

    Args:
        inputs: Image files, folders (searched with their subfolders), or lists (`.txt` with one path a line, or a
            JSON manifest, whose cases of all splits are taken).
        output: Folder of the masks. `a/ct.nii.gz` gives `ct_seg.nii.gz`; files from a folder keep their subfolder,
            and files whose names collide keep the part of their path that tells them apart.

    Raises:
        CtsegError: if an input does not exist, none names a CT, or masks would lie among the inputs.
    """
    found: list[tuple[Path, Path]] = []  # image, and its path relative to the output
    for path in inputs:
        if path.is_dir():
            found += [(image, image.relative_to(path)) for image in _images_below(path, output)]
        elif path.suffix in (".txt", ".json"):
            found += _told_apart([case.image for case in read_manifest(path).cases])
        elif path.exists():
            found.append((path, Path(path.name)))
        else:
            raise CtsegError(f"input '{path}': no such file or folder")
    if not found:
        raise CtsegError(f"no CT in {', '.join(map(str, inputs))}; known suffixes: {', '.join(IMAGE_SUFFIXES)}")
    located = {_located(image): (image, relative) for image, relative in found}  # a CT that is named twice counts once
    unique = list(located.values())
    if len({relative for _, relative in unique}) < len(unique):
        unique = _told_apart([image for image, _ in unique])
    jobs = [Job(image, output / _mask_name(relative)) for image, relative in unique]
    for job in jobs:
        if _located(job.mask) in located:
            raise CtsegError(
                f"'{job.mask}' is an input and would be the mask of '{job.image}'; choose another --output"
            )
    return jobs


def _located(image: Path) -> Path:
    """The absolute path of a file in its real folder: one for each file, whatever way it is named."""
    return image.parent.resolve() / image.name


def _images_below(folder: Path, output: Path) -> list[Path]:
    inside = output.resolve()
    if folder.resolve().is_relative_to(inside):
        raise CtsegError(
            f"output '{output}': must not be the input folder '{folder}' or hold it, as masks would be taken for CTs; "
            f"choose another --output"
        )
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name.lower().endswith(IMAGE_SUFFIXES))
    return [p for p in files if not p.name.startswith(".") and not _located(p).is_relative_to(inside)]


def _told_apart(images: list[Path]) -> list[tuple[Path, Path]]:
    """Images by file name alone where that is unique, else by the path below their common folder."""
    repeated = {name for name, n in Counter(image.name for image in images).items() if n > 1}
    common = Path(os.path.commonpath([_located(image).parent for image in images])) if images else Path()
    named = [_located(image).relative_to(common) if image.name in repeated else Path(image.name) for image in images]
    return list(zip(images, named, strict=True))


def _mask_name(relative: Path) -> Path:
    """`a/ct.nii.gz` -> `a/ct_seg.nii.gz`; `ct.dcm` -> `ct.dcm_seg.nii.gz`, never written as reading refuses it."""
    stem = image_stem(relative)
    suffix = relative.name[len(stem) :]
    if suffix.lower() not in IMAGE_SUFFIXES:
        return relative.with_name(f"{relative.name}_seg.nii.gz")
    return relative.with_name(f"{stem}_seg{suffix}")
