"""Public data sets: what their shipped manifests say about fetching them, and the way from archives to a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from ctseg.errors import DownloadError, ManifestError, list_problems
from ctseg.files import write_json
from ctseg.manifest import read_manifest, shipped_manifest
from ctseg.progress import Progress
from ctseg.sources.archives import (
    SOURCE_FILE,
    Archive,
    Order,
    becoming,
    check_obtainable,
    keep_archives,
    obtain,
    proved,
    read_record,
    record,
    workplace,
)
from ctseg.sources.fetch import Fetched
from ctseg.sources.unpack import Member, opened, unpack
from ctseg.strict import Range, read_dataclass

UNPACKED_RATIO = 4
"""A data set's images are compressed already; it may unpack to so many times its stated size."""
SPARE = 1.5
"""An archive may be so many times as large as stated, for rounding and new releases."""
SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class Download:
    """The table `download` of a manifest."""

    purpose: str
    gigabytes: Annotated[float, Range(above=0, at_most=10_000)]
    """Of all archives, about."""
    archives: tuple[Archive, ...]
    steps: tuple[str, ...] = ()
    """How a person gets the archives where a login is needed."""


@dataclass(frozen=True, kw_only=True)
class DataSet:
    """A public data set."""

    name: str
    folder: str
    """Below the folder of data sets."""
    licence: str
    source: str
    download: Download
    files: tuple[PurePosixPath, ...]
    """Those of its manifest, which it must have to be whole; relative to its folder."""


def data_sets() -> dict[str, DataSet]:
    """Every shipped data set that can be downloaded, by name."""
    found = {}
    for path in sorted(shipped_manifest("msd_spleen").parent.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if "download" in content:
            found[path.stem] = read_data_set(path, content)
    return found


def read_data_set(path: Path, content: Mapping[str, Any]) -> DataSet:
    """The data set that a manifest with a table `download` describes.

    Raises:
        ManifestError: naming every problem of the table at once.
    """
    problems: list[str] = []
    download = read_dataclass(Download, content["download"], "download", problems)
    if download is None:
        raise ManifestError(list_problems(f"manifest '{path}'", problems))
    manifest = read_manifest(path, Path())
    files = [file for case in manifest.cases for file in (case.image, case.label) if file is not None]
    return DataSet(
        name=path.stem,
        folder=str(content.get("folder", path.stem)),
        licence=manifest.licence,
        source=manifest.source,
        download=download,
        files=tuple(PurePosixPath(file.as_posix()) for file in files),
    )


def download_data_set(
    data_set: DataSet, base: Path, given: Path | None, keep_archive: bool, progress: Progress
) -> dict[str, Any] | None:
    """What `SOURCE_FILE` of the whole data set says, or None if it was there without ctseg.

    It lies in `base / data_set.folder`, which exists only when it is whole. A stop at any point loses nothing but the
    piece being unpacked: the same call goes on.

    Args:
        data_set: Which one.
        base: The folder of data sets.
        given: A file or a folder with the archives, to be taken instead of the network.
        keep_archive: Leaves fetched archives in `base`.
        progress: Told of every megabyte.

    Raises:
        DownloadError: if the archives cannot be had, are not what they should be, or another folder is in the way.
        OutputError: if the disk is full or cannot be written to.
    """
    target = base / data_set.folder
    download = data_set.download
    max_bytes = int(download.gigabytes * SPARE * 1e9)
    order = Order(name=data_set.name, archives=download.archives, max_bytes=max_bytes, steps=download.steps)
    if not target.exists():
        check_obtainable(order, given)
    with workplace(target) as work:
        if work is None:
            return _there(data_set, target)
        fetched = obtain(order, given, work, progress)
        about = record(data_set.name, data_set.licence, data_set.source, fetched)
        with proved(fetched, work), becoming(target, work) as folder:
            for archive, file in zip(download.archives, fetched, strict=True):
                _unpack(data_set, archive, file, folder, progress)
            write_json(folder / SOURCE_FILE, about)
            if keep_archive:
                keep_archives(fetched, work)
    return about


def missing_files(data_set: DataSet, folder: Path) -> list[PurePosixPath]:
    """Files of the data set's manifest that are not in `folder`."""
    return [file for file in data_set.files if not (folder / file).is_file()]


def _there(data_set: DataSet, folder: Path) -> dict[str, Any] | None:
    missing = missing_files(data_set, folder)
    if missing:
        raise DownloadError(
            f"'{folder}' is there but lacks {len(missing)} of {len(data_set.files)} files of '{data_set.name}' "
            f"({_some(missing)}); move it away and run again"
        )
    return read_record(folder)


def _unpack(data_set: DataSet, archive: Archive, file: Fetched, folder: Path, progress: Progress) -> None:
    wanted = [path.relative_to(archive.into) for path in data_set.files if path.is_relative_to(archive.into)]
    with opened(file.path, int(data_set.download.gigabytes * UNPACKED_RATIO * 1e9)) as members:
        root, missing = find_root(members, wanted)
        if missing:
            raise DownloadError(
                f"archive '{file.path}': lacks {len(missing)} of {len(wanted)} files of '{data_set.name}' "
                f"({_some(missing)}); is it the right one?"
            )
        inside = [(m, archive.into / m.path.relative_to(root)) for m in members if m.path.is_relative_to(root)]
        unpack(inside, folder, progress, f"unpacking {file.path.name}")


def find_root(members: tuple[Member, ...], wanted: list[PurePosixPath]) -> tuple[PurePosixPath, list[PurePosixPath]]:
    """The folder in an archive below which most of the wanted files lie, and those that do not."""
    paths = {member.path for member in members}
    by_name: dict[str, list[PurePosixPath]] = {}
    for path in paths:
        by_name.setdefault(path.name, []).append(path)
    roots = {
        PurePosixPath(*path.parts[: -len(w.parts)])
        for w in wanted
        for path in by_name.get(w.name, ())
        if _ends(path, w)
    }
    lacking = {root: [w for w in wanted if root / w not in paths] for root in roots or {PurePosixPath()}}
    root = min(lacking, key=lambda r: (len(lacking[r]), len(r.parts), str(r)))
    return root, lacking[root]


def _ends(path: PurePosixPath, end: PurePosixPath) -> bool:
    return path.parts[-len(end.parts) :] == end.parts


def _some(paths: list[PurePosixPath]) -> str:
    more = f", ... and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return ", ".join(str(path) for path in paths[:SHOWN]) + more
