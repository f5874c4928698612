"""Which CTs `ctseg infer` is asked for, and where each mask goes. Light: found before a model is loaded."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ctseg.errors import CtsegError
from ctseg.manifest import IMAGE_SUFFIXES, image_stem, read_manifest

FAILURES = "failures.csv"
"""Lists the CTs of an output folder that failed, with the reasons."""


@dataclass(frozen=True)
class Job:
    """One CT and where its mask goes."""

    image: Path
    mask: Path


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
