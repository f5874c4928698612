"""Files that clients send: only images, never an archive, read whole before anything is done with them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastapi import UploadFile

from ctseg.manifest import IMAGE_SUFFIXES, image_stem, is_image_name
from ctseg.server.images import FileImage
from ctseg.server.problems import Invalid, WrongFile
from ctseg.server.service import Service
from ctseg.server.texts import read_json


@contextmanager
def received(service: Service, file: UploadFile, *, raw: bool = False) -> Iterator[Path]:
    """The path of an uploaded file, beside the studies but hidden; it is gone afterwards, unless it was moved.

    Args:
        service: Whose studies folder takes it.
        file: As FastAPI received it.
        raw: A `.bin` file, of nothing but voxels, is taken too.

    Raises:
        WrongFile: if its name is not that of an image.
    """
    name = Path((file.filename or "").replace("\\", "/")).name
    if not (is_image_name(Path(name)) or (raw and name.endswith(".bin"))):
        kinds = ", ".join(IMAGE_SUFFIXES)
        raise WrongFile(
            f"file: expected one image ({kinds}), got {Path(name).suffix[:20] or 'a name without suffix'!r}"
        )
    suffix = ".bin" if raw and name.endswith(".bin") else name[len(image_stem(Path(name))) :].lower()
    with tempfile.TemporaryDirectory(prefix=".ctseg-upload-", dir=service.datastore.folder) as folder:
        path = Path(folder) / f"upload{suffix}"
        with path.open("wb") as target:
            shutil.copyfileobj(file.file, target, 2**20)
        yield path


def add_image(service: Service, file: UploadFile, image_id: str | None = None) -> str:
    """The id of an uploaded image, which is from now on one of the studies.

    Raises:
        ImageError: if it is not a CT that can be trusted.
        Conflict: if there is one of that id.
    """
    stem = image_stem(Path((file.filename or "").replace("\\", "/")))
    wanted = image_stem(Path(image_id)) if image_id and is_image_name(Path(image_id)) else image_id
    with received(service, file) as path:
        image = FileImage(path)
        service.check_size(image)
        with service.unpacking:
            image.read()
        return service.datastore.add_image(wanted or stem, path)


def plain_object(text: str, what: str = "params") -> dict[str, Any]:
    """The JSON object in `text`; NaN and infinity are refused.

    Raises:
        Invalid: if it is something else.
    """
    data = read_json(text or "{}", what)
    if not isinstance(data, dict):
        raise Invalid(f"{what}: expected a JSON object, got {type(data).__name__}")
    return data
