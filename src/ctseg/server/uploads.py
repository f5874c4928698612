"""Files that clients send: only images and single DICOM files, never an archive, read before they count."""

from __future__ import annotations

import io
import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from fastapi import UploadFile
from pydicom.filereader import read_partial
from pydicom.uid import DeflatedExplicitVRLittleEndian

from ctseg.io.dicom.frames import CT_CLASSES
from ctseg.io.dicom.headers import is_deflated
from ctseg.io.dicom.pixels import read_voxels
from ctseg.io.dicom.series import Slice
from ctseg.io.dicom.silence import pydicom_silent
from ctseg.manifest import IMAGE_SUFFIXES, image_stem, is_image_name
from ctseg.server.finder import DICOM_SUFFIX, image_in_file, lone_slice
from ctseg.server.images import Image, SeriesImage
from ctseg.server.problems import Invalid, WrongFile
from ctseg.server.service import Service
from ctseg.server.texts import read_json

META_BYTES, META_GROUP = 2**16, 2
"""Where a DICOM file says what it is, before its header."""


@contextmanager
def received(service: Service, file: UploadFile, *more: str) -> Iterator[Path]:
    """The path of an uploaded file, beside the studies but hidden; it is gone afterwards, unless it was moved.

    Args:
        service: Whose studies folder takes it.
        file: As FastAPI received it.
        more: Suffixes that are taken beside those of images, such as `.dcm`.

    Raises:
        WrongFile: if its name is not that of an image, or it is called `.dcm` and is something else.
    """
    name = Path((file.filename or "").replace("\\", "/")).name
    suffix = name[len(image_stem(Path(name))) :].lower()
    if not (is_image_name(Path(name)) or suffix in more):
        kinds = ", ".join((*IMAGE_SUFFIXES, *more))
        raise WrongFile(f"file: expected one image ({kinds}), got {suffix[:20] or 'a name without suffix'!r}")
    with tempfile.TemporaryDirectory(prefix=".ctseg-upload-", dir=service.datastore.folder) as folder:
        path = Path(folder) / f"upload{suffix}"
        with path.open("wb") as target:
            shutil.copyfileobj(file.file, target, 2**20)
        if suffix == DICOM_SUFFIX and not _is_dicom(path):
            raise WrongFile("file: '.dcm' must be DICOM of a CT with its preamble, neither deflated nor an archive")
        yield path


def _is_dicom(path: Path) -> bool:
    """Whether it begins as DICOM does, names a CT, and nothing of it has to be unpacked to read its header."""
    with path.open("rb") as file:
        start = file.read(META_BYTES)
    if start[128:132] != b"DICM" or start[:2] == b"PK" or is_deflated(start):
        return False
    try:
        with pydicom_silent():
            meta = read_partial(io.BytesIO(start), lambda tag, _vr, _length: tag.group != META_GROUP).file_meta
        return meta.MediaStorageSOPClassUID in CT_CLASSES and meta.TransferSyntaxUID != DeflatedExplicitVRLittleEndian
    except Exception:  # pydicom raises anything on hostile bytes
        return False


def open_image(service: Service, path: Path) -> Image:
    """The CT in a received file; of DICOM the headers are read, in turn with others.

    Raises:
        ImageError: if DICOM holds no CT that can be read.
    """
    with service.unpacking if path.suffix == DICOM_SUFFIX else nullcontext():
        return image_in_file(path)


def add_image(service: Service, file: UploadFile, image_id: str | None = None) -> str:
    """The id of an uploaded image, which is from now on one of the studies.

    DICOM is called by its series' pseudonym and lies in a folder of that name, where slices that are sent one by one
    come together; they are an image once they are a volume without gaps.

    Raises:
        ImageError: if it is not a CT that can be trusted.
        Conflict: if it is there already.
    """
    stem = image_stem(Path((file.filename or "").replace("\\", "/")))
    wanted = image_stem(Path(image_id)) if image_id and is_image_name(Path(image_id)) else image_id
    with received(service, file, DICOM_SUFFIX) as path:
        if path.suffix == DICOM_SUFFIX:
            with service.unpacking:
                lone = lone_slice(path)
            if lone is not None:
                return _add_slice(service, path, *lone)
        image = open_image(service, path)
        service.check_size(image)
        with service.unpacking:
            image.read()
        if not isinstance(image, SeriesImage):
            return service.datastore.add_image(wanted or stem, path)
        service.datastore.add_dicom(image.id, path)
        return image.id


def _add_slice(service: Service, path: Path, series_id: str, one: Slice) -> str:
    service.check_voxels(math.prod(one.size))
    with service.unpacking:
        read_voxels([one], [0], 1)
    service.datastore.add_dicom(series_id, path, position_mm=one.position_mm)
    return series_id


def plain_object(text: str, what: str = "params") -> dict[str, Any]:
    """The JSON object in `text`; NaN and infinity are refused.

    Raises:
        Invalid: if it is something else.
    """
    data = read_json(text or "{}", what)
    if not isinstance(data, dict):
        raise Invalid(f"{what}: expected a JSON object, got {type(data).__name__}")
    return data
