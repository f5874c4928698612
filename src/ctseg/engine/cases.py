"""Reading one CT and writing its mask, whether they are image files or DICOM."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

import ctseg
from ctseg.engine.model import Model
from ctseg.errors import ImageError
from ctseg.files import Digest, digest_of, make_folder
from ctseg.io import Extent
from ctseg.io.images import check_ct, read_extent, read_image, write_labels
from ctseg.io.stream import CTStream
from ctseg.jobs import DICOM_FORMATS, Job, Options
from ctseg.volume import Geometry, Volume

if TYPE_CHECKING:
    from ctseg.io.dicom.read import DicomCT


@dataclass(frozen=True, eq=False)
class ReadCase:
    """A CT in memory, or about to be read.

    Attributes:
        volume: Hounsfield units; zeros that take no memory where its voxels are not held.
        dicom: The series it was made of, None for an image file.
        notes: What was odd about a DICOM series, and what was repaired.
        stream: Its planes, where they are to be read while the CT is prepared.
    """

    volume: Volume
    dicom: DicomCT | None = None
    notes: tuple[str, ...] = ()
    stream: CTStream | None = None

    @property
    def without_voxels(self) -> ReadCase:
        """What an image file of the mask needs: the CT's grid and the notes."""
        return ReadCase(_no_voxels(self.volume.geometry), None, self.notes)


def case_extent(job: Job, options: Options) -> Extent:
    """What reading the CT of a job takes, by its headers.

    Raises:
        ImageError: if its headers show that it cannot be trusted.
    """
    if job.series is None:
        return read_extent(job.image)
    from ctseg.io.dicom import read

    return read.read_extent(job.series, gaps=options.gaps, tilt=options.tilt)


def read_case(job: Job, options: Options, scratch: Path | None = None) -> ReadCase:
    """The CT of a job, its voxels on the disk of `scratch` if that is given.

    Raises:
        ImageError: if it cannot be trusted or is not a CT.
        OutputError: if there is no room in `scratch`.
    """
    if job.series is None:
        return ReadCase(read_image(job.image, scratch))
    from ctseg.io.dicom.read import read_series

    dicom = read_series(job.series, gaps=options.gaps, tilt=options.tilt, scratch=scratch)
    check_ct(dicom.volume, job.image)
    repaired = (f"repaired: {finding.text}" for finding in dicom.report.repaired)
    return ReadCase(dicom.volume, dicom, (*repaired, *(finding.text for finding in dicom.report.notes)))


def open_case(job: Job) -> ReadCase:
    """The CT of an image file that streams, see `Extent`, with only its header read.

    Raises:
        ImageError: if its header shows that it cannot be trusted.
    """
    stream = CTStream(job.image)
    return ReadCase(_no_voxels(stream.geometry), stream=stream)


def _no_voxels(geometry: Geometry) -> Volume:
    return Volume(np.broadcast_to(np.int16(0), geometry.size), geometry)


def write_mask(job: Job, case: ReadCase, mask: NDArray[np.uint8], model: Model, options: Options) -> tuple[str, ...]:
    """Writes the mask of a job, on the CT's own grid; notes on what its header lacked.

    Raises:
        ImageError: if the CT does not allow the format that was chosen.
        OutputError: if the mask cannot be written.
    """
    make_folder(job.mask.parent)
    if case.dicom is None or options.format not in DICOM_FORMATS:
        write_labels(job.mask, mask, case.volume.geometry)
        return ()
    from ctseg.codes import Algorithm, structures_of
    from ctseg.io.dicom.rtstruct import write_rtstruct
    from ctseg.io.dicom.seg import write_seg

    structures = structures_of(model.recipe)
    algorithm = Algorithm(name=model.recipe.name, version=ctseg.__version__, model=model.sha256[:16])
    if options.format == "rtstruct":
        return write_rtstruct(job.mask, case.dicom, mask, structures, algorithm)
    return write_seg(
        job.mask,
        case.dicom,
        mask,
        structures,
        algorithm,
        seg_type=options.seg_type,
        keep_empty_frames=options.keep_empty_frames,
    )


def digest_input(job: Job) -> Digest:
    """The digest of a CT's files, which are read for it: a fraction of the time that reading the CT takes.

    Of a DICOM series it is that of the sorted SHA-256 of its files, one a line, and their bytes unpacked from an
    archive: the same for a folder and a zip archive of it.

    Raises:
        ImageError: if they cannot be read.
    """
    if job.series is None:
        return digest_file(job.image)
    from ctseg.io.dicom.headers import BROKEN_FILE, reason

    digests = []
    for source in {(one.source.path, one.source.member): one.source for one in job.series}.values():
        try:
            with source.open() as file:
                digests.append(digest_of(file))
        except BROKEN_FILE as error:
            raise ImageError(f"cannot read '{source.shown}': {reason(error)}") from error
    lines = "".join(f"{sha256}\n" for sha256 in sorted(one.sha256 for one in digests))
    return Digest(hashlib.sha256(lines.encode()).hexdigest(), sum(one.num_bytes for one in digests))


def digest_file(image: Path) -> Digest:
    """The digest of a CT's file.

    Raises:
        ImageError: if it cannot be read.
    """
    try:
        with image.open("rb") as file:
            return digest_of(file)
    except OSError as error:
        raise ImageError(f"cannot read '{image}': {error.strerror or error}; check the path") from error
