"""Finds the CTs of a studies folder, and again what has changed: image files in it, and DICOM anywhere below it."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ctseg.dicom_jobs import is_dicom_or_zip
from ctseg.errors import ImageError
from ctseg.files import is_zip
from ctseg.io.dicom.files import MAX_FILES
from ctseg.io.dicom.names import series_name
from ctseg.io.dicom.read import Found, find_series, read_extent
from ctseg.io.dicom.series import Slice
from ctseg.io.dicom.silence import pydicom_silent
from ctseg.manifest import image_stem, is_image_name
from ctseg.server.images import FileImage, Image, SeriesImage, parts_of
from ctseg.server.texts import is_text

LOG = logging.getLogger("ctseg.server")
DICOM_SUFFIX = ".dcm"
"""Of files that clients send; in the studies folder DICOM may be called anything."""
SETTLED_NS = 2 * 10**9
"""A folder that changed this long ago shows every change in its time; clocks of file systems are coarse."""
LOOK_SECONDS = 30.0
"""How often the files of DICOM folders are looked at one by one; new and missing ones show at once in their folder."""
COPYING_SECONDS = 0.5
"""How often a place is looked at in which something has just been written."""


class Finder:
    """The CTs in one folder; its user sees to it that one thread asks at a time.

    Args:
        folder: Where they are.
        left_out: A folder in it without CTs.
    """

    def __init__(self, folder: Path, left_out: Path) -> None:
        self._folder = folder
        self._left_out = left_out
        self._scanned_ns = 0
        self._files: dict[str, Image] = {}
        self._places: dict[Path, _Place] = {}
        self._images: dict[str, Image] = {}

    def images(self) -> dict[str, Image]:
        """Id -> CT: files in order of their names, then DICOM series; of two with one id, the first."""
        changed_ns = self._folder.stat().st_mtime_ns
        has_changed = changed_ns != self._scanned_ns or not _is_settled(changed_ns)
        if has_changed:
            self._list()
            self._scanned_ns = changed_ns
        looked = [place.look() for place in self._places.values()]
        if any(looked) or has_changed:
            series = {one.id: one for place in reversed(self._places.values()) for one in place.series}
            self._images = {**self._files, **{key: one for key, one in series.items() if key not in self._files}}
        return self._images

    def _list(self) -> None:
        """The image files, and the places where DICOM may be: folders, archives, and all that lie in the open."""
        files: dict[str, Image] = {}
        places: dict[Path, tuple[Path, ...]] = {}
        loose: list[Path] = []
        for path in sorted(self._folder.iterdir()):
            if path.name.startswith(".") or path == self._left_out or not is_text(path.name):
                continue
            if path.is_dir() and not path.is_symlink():
                places[path] = (path,)
            elif self._is_inside(path) and is_image_name(path):
                files.setdefault(image_stem(path), FileImage(path))
            elif self._is_inside(path) and is_dicom_or_zip(path):
                if is_zip(path):
                    places[path] = (path,)
                else:
                    loose.append(path)
        if loose:
            places[self._folder] = tuple(loose)
        self._files = files
        self._places = {key: self._places.get(key, _Place()) for key in places}
        for key, place in self._places.items():
            place.lies_in(places[key])

    def _is_inside(self, path: Path) -> bool:
        """True for a file, also behind a link that does not lead out of the folder."""
        try:
            return path.is_file() and path.resolve().is_relative_to(self._folder)
        except OSError:
            return False


@dataclass(eq=False)
class _Place:
    """Where DICOM may be: a folder with all below it, an archive, or several files."""

    series: list[SeriesImage] = field(default_factory=list)
    _paths: tuple[Path, ...] = ()
    _folders: dict[str, int] = field(default_factory=dict)
    _print: int | None = None
    _due: float = 0.0
    _is_settled: bool = False

    def lies_in(self, paths: tuple[Path, ...]) -> None:
        """Says where to look from now on."""
        if paths != self._paths:
            self._paths, self._due = paths, 0.0

    def look(self) -> bool:
        """Reads the headers again if a file has changed, once all have been left alone for a while; True if so."""
        now = time.monotonic()
        if now < self._due and not (self._is_settled and self._folders_changed()):
            return False
        files, self._folders, newest_ns = self._walk()
        self._is_settled = _is_settled(newest_ns)
        changed = self._is_settled and files != self._print
        if changed:
            self.series = self._search()
            self._print = files
        self._due = now + (LOOK_SECONDS if self._is_settled else COPYING_SECONDS)
        return changed

    def _folders_changed(self) -> bool:
        return any(_mtime_ns(folder) != before for folder, before in self._folders.items())

    def _walk(self) -> tuple[int, dict[str, int], int]:
        """A number that changes when a file does, the folders and their times, and the newest time of all."""
        folders: dict[str, int] = {}
        statuses = []
        for path in self._files(folders):
            try:
                status = path.stat()
            except OSError:  # gone, or a broken link
                continue
            statuses.append((str(path), status.st_mtime_ns, status.st_size))
            if len(statuses) > MAX_FILES:
                break  # the search refuses them
        newest_ns = max([*folders.values(), *(mtime_ns for _, mtime_ns, _ in statuses)], default=0)
        return hash(tuple(statuses)), folders, newest_ns

    def _files(self, folders: dict[str, int]) -> Iterator[Path]:
        for root in self._paths:
            if not root.is_dir():
                yield root
            for parent, names, files in os.walk(root):
                names.sort()
                folders[parent] = _mtime_ns(parent)
                yield from (Path(parent, name) for name in sorted(files))

    def _search(self) -> list[SeriesImage]:
        """The CT series that can be read; the log tells what keeps others from it, and of none which.

        Raises:
            CtsegError: if there is no key for pseudonyms.
        """
        try:
            found = find_series(self._paths)
        except ImageError as error:
            LOG.warning("DICOM in the studies folder: one place cannot be searched: %s", type(error).__name__)
            return []
        images, problems = _readable(found)
        if problems:
            told = ", ".join(f"{code} ({number})" for code, number in sorted(problems.items()))
            LOG.warning("DICOM in the studies folder: CT series were left out: %s; `ctseg dicom ls` tells more", told)
        return images


def image_in_file(path: Path) -> Image:
    """The CT in a file that a client has sent: an image file, or a DICOM multi-frame file.

    Raises:
        ImageError: if DICOM holds no CT that can be read.
    """
    if path.suffix != DICOM_SUFFIX:
        return FileImage(path)
    images, problems = _readable(find_series([path]))
    if len(images) != 1:
        why = ", ".join(sorted(problems)) or "none was found"
        raise ImageError(f"file: expected one CT as a multi-frame DICOM file ({why}); `ctseg dicom ls` tells more")
    return images[0]


def lone_slice(path: Path) -> tuple[str, Slice] | None:
    """The id of the series that a DICOM file is one slice of, and the slice; None if it holds anything else.

    Raises:
        ImageError: if it does not say which series that is.
    """
    found = find_series([path]).series
    if len(found) != 1 or not found[0].is_ct or {problem.code for problem in found[0].problems} != {"single"}:
        return None
    if not found[0].uid:
        raise ImageError("file: a slice must have a SeriesInstanceUID, got none; export it again")
    with pydicom_silent():
        return series_name(found[0], found, keep_identifiers=False), next(iter(found[0]))


def _readable(found: Found) -> tuple[list[SeriesImage], Counter[str]]:
    """The CT series that can be read, and what keeps how many others from it."""
    images, problems = [], Counter[str]()
    with pydicom_silent():
        for series in found.series:
            if not series.is_ct:
                continue
            if series.problems:
                problems.update({problem.code for problem in series.problems})
                continue
            name = series_name(series, found.series, keep_identifiers=False)
            study_uid = str(series.value("StudyInstanceUID") or "")
            try:
                images.append(SeriesImage(name, series.uid, study_uid, parts_of(series), read_extent(series)))
            except ImageError:
                problems["grid"] += 1
    return images, problems


def _is_settled(changed_ns: int) -> bool:
    return time.time_ns() - changed_ns > SETTLED_NS


def _mtime_ns(path: str) -> int:
    try:
        return Path(path).stat().st_mtime_ns
    except OSError:
        return 0
