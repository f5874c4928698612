"""One CT that the server knows, whether it is an image file or a DICOM series: its grid, its voxels, its bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ctseg.engine.cases import digest_file
from ctseg.errors import ImageError
from ctseg.io import Extent
from ctseg.io.dicom import read as dicom
from ctseg.io.dicom.series import Series
from ctseg.io.images import check_ct, read_extent, read_image
from ctseg.server.masks import volume_bytes
from ctseg.server.problems import NotHere
from ctseg.volume import Volume

Part = tuple[str, str | None, int | None]
"""A slice: the file, its entry in an archive, its frame."""


class Image(Protocol):
    """A CT; what can be told of its file is told of the one that clients get."""

    @property
    def name(self) -> str:
        """The name of the file that clients get."""

    def version(self) -> tuple[Hashable, ...]:
        """Changes when the CT does.

        Raises:
            NotHere: if it is gone.
        """

    def extent(self) -> Extent:
        """What reading it takes, by its headers.

        Raises:
            ImageError: if they show that it cannot be trusted.
        """

    def read(self) -> Volume:
        """The CT.

        Raises:
            ImageError: if it cannot be trusted or is not a CT.
        """

    def content(self) -> Path | bytes:
        """The file that clients get, or its bytes where there is none."""

    def sha256(self) -> str:
        """Of `content`."""

    def nifti(self) -> Path | bytes:
        """A `.nii.gz` file, or its bytes."""


@dataclass(frozen=True)
class FileImage:
    """A NIfTI, NRRD or MHA file."""

    path: Path

    @property
    def name(self) -> str:
        """See Image."""
        return self.path.name

    def version(self) -> tuple[Hashable, ...]:
        """See Image."""
        return _version([str(self.path)])

    def extent(self) -> Extent:
        """See Image."""
        return read_extent(self.path)

    def read(self) -> Volume:
        """See Image."""
        return read_image(self.path)

    def content(self) -> Path | bytes:
        """See Image."""
        return self.path

    def sha256(self) -> str:
        """See Image."""
        return digest_file(self.path).sha256

    def nifti(self) -> Path | bytes:
        """See Image."""
        return self.path if self.path.name.lower().endswith(".nii.gz") else volume_bytes(self.read())


@dataclass(frozen=True, eq=False)
class SeriesImage:
    """A DICOM series. Its headers are read anew with its voxels: those of all series would fill the memory.

    Attributes:
        id: A pseudonym.
        uid: SeriesInstanceUID, by which OHIF asks; not for logs.
        study_uid: StudyInstanceUID, which it opens; not for logs.
        parts: Its slices.
        known: What reading it takes.
    """

    id: str
    uid: str = field(repr=False)
    study_uid: str = field(repr=False)
    parts: frozenset[Part] = field(repr=False)
    known: Extent = field(repr=False)

    @property
    def name(self) -> str:
        """See Image."""
        return f"{self.id}.nii.gz"

    def version(self) -> tuple[Hashable, ...]:
        """See Image."""
        return _version(self._files)

    def extent(self) -> Extent:
        """See Image."""
        return self.known

    def read(self) -> Volume:
        """See Image."""
        return self.read_dicom().volume

    def read_dicom(self) -> dicom.DicomCT:
        """The CT and its images' headers.

        Raises:
            ImageError: if it cannot be trusted, is not a CT, or has changed.
        """
        found = dicom.find_series(Path(file) for file in self._files)
        series = next((one for one in found.series if parts_of(one) == self.parts), None)
        ct = None if series is None else dicom.read_series(series)
        if ct is None or not ct.volume.geometry.agrees_with(self.known.geometry):
            raise ImageError(f"image '{self.id}': its files have changed since they were listed; ask again in a minute")
        check_ct(ct.volume, Path(self.id))
        return ct

    def content(self) -> Path | bytes:
        """See Image."""
        return volume_bytes(self.read())

    def sha256(self) -> str:
        """See Image."""
        content = self.content()
        assert isinstance(content, bytes)
        return hashlib.sha256(content).hexdigest()

    def nifti(self) -> Path | bytes:
        """See Image."""
        return self.content()

    @property
    def _files(self) -> list[str]:
        return sorted({file for file, _, _ in self.parts})


def parts_of(series: Series) -> frozenset[Part]:
    """The slices of a series."""
    return frozenset((str(one.source.path), one.source.member, one.frame) for one in series)


def _version(files: list[str]) -> tuple[Hashable, ...]:
    try:
        statuses = [Path(file).stat() for file in files]
    except OSError as error:
        raise NotHere("image: its file is gone; GET /api/images lists what is there") from error
    return files[0], hash(tuple(files)), hash(tuple((status.st_mtime_ns, status.st_size) for status in statuses))
