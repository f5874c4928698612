"""Files that clients send: only images and single DICOM files, never an archive, read before they count."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import UploadFile

from ctseg.io.dicom.pixels import read_voxels
from ctseg.manifest import IMAGE_SUFFIXES, image_stem, is_image_name
from ctseg.server.finder import DICOM_SUFFIX, image_in_file, lone_slice
from ctseg.server.images import SeriesImage
from ctseg.server.problems import Invalid, WrongFile
from ctseg.server.service import Service
from ctseg.server.texts import read_json


@contextmanager
def received(service: Service, file: UploadFile, *more: str) -> Iterator[Path]:
    """The path of an uploaded file, beside the studies but hidden; it is gone afterwards, unless it was moved.

    Args:
        service: Whose studies folder takes it.
        file: As FastAPI received it.
        more: Suffixes that are taken beside those of images, such as `.dcm`.

    Raises:
        WrongFile: if its name is not that of an image.
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
            raise WrongFile("file: '.dcm' must be one DICOM file with its preamble, not an archive or something else")
        yield path


def _is_dicom(path: Path) -> bool:
    """Whether it begins as DICOM does, and not as something that would be unpacked."""
    with path.open("rb") as file:
        start = file.read(132)
    return start[128:] == b"DICM" and start[:2] != b"PK"


def add_image(service: Service, file: UploadFile, image_id: str | None = None) -> str:
    """The id of an uploaded image, which is from now on one of the studies.

    DICOM is called by its series' pseudonym; slices that are sent one by one are an image from the second on.

    Raises:
        ImageError: if it is not a CT that can be trusted.
        Conflict: if there is one of that id.
    """
    stem = image_stem(Path((file.filename or "").replace("\\", "/")))
    wanted = image_stem(Path(image_id)) if image_id and is_image_name(Path(image_id)) else image_id
    with received(service, file, DICOM_SUFFIX) as path:
        series_id = _checked(service, path)
        added = service.datastore.add_image(wanted or stem, path)
    return series_id or added


def _checked(service: Service, path: Path) -> str | None:
    """The id of the series in a DICOM file, None for an image file.

    Raises:
        ImageError: if it is not a CT, or a slice of one, that can be trusted.
    """
    lone = lone_slice(path) if path.suffix == DICOM_SUFFIX else None
    if lone is not None:
        series_id, series = lone
        slices = list(series)
        service.check_voxels(math.prod(slices[0].size))
        with service.unpacking:
            read_voxels(slices, [0], 1)
        return series_id
    image = image_in_file(path)
    service.check_size(image)
    with service.unpacking:
        image.read()
    return image.id if isinstance(image, SeriesImage) else None


def plain_object(text: str, what: str = "params") -> dict[str, Any]:
    """The JSON object in `text`; NaN and infinity are refused.

    Raises:
        Invalid: if it is something else.
    """
    data = read_json(text or "{}", what)
    if not isinstance(data, dict):
        raise Invalid(f"{what}: expected a JSON object, got {type(data).__name__}")
    return data
