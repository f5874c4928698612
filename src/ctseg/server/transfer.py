"""What the APIs of MONAI Label and AIAA have in common: clicks in parameters, images named three ways, multipart."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import Any

from fastapi import Request, UploadFile
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from ctseg.clicks import Click
from ctseg.engine.session import voxel_of
from ctseg.server.finder import DICOM_SUFFIX
from ctseg.server.images import Image
from ctseg.server.masks import MEDIA_TYPES
from ctseg.server.problems import Invalid
from ctseg.server.service import MAX_CLICKS, Segmentation, Served, Service, Upload
from ctseg.server.texts import read_json
from ctseg.server.uploads import open_image, received
from ctseg.volume import Geometry


@asynccontextmanager
async def image_for(
    service: Service, *, image: str | None = None, session_id: str | None = None, file: UploadFile | None = None
) -> AsyncIterator[Image]:
    """The image that is sent along, of a session, or of the studies; the first of these that is given.

    Raises:
        Invalid: if none is given.
        NotHere: if it is not there.
    """
    with ExitStack() as stack:
        if file is not None and file.filename:
            path = await run_in_threadpool(stack.enter_context, received(service, file, DICOM_SUFFIX))
            yield await run_in_threadpool(open_image, service, path)
        elif session_id:
            yield service.uploads.get(session_id).content.image
        elif image:
            yield await run_in_threadpool(service.datastore.image, image)
        else:
            raise Invalid("image: none given; name one of the studies or a session, or send a file")


def keep_upload(service: Service, file: UploadFile, seconds: int) -> str:
    """The id of a new session for an uploaded image.

    Raises:
        TooMany: if as many sessions are open as may be.
        ImageError: if it cannot be one.
    """
    service.uploads.check_room()
    with received(service, file, DICOM_SUFFIX) as path:
        service.check_size(open_image(service, path))
        folder = service.scratch / f"session-{secrets.token_hex(8)}"
        folder.mkdir(mode=0o700)
        kept = folder / path.name
        shutil.move(path, kept)
    return service.uploads.add(Upload(open_image(service, kept), kept), seconds if seconds > 0 else None)


async def segment_for(
    request: Request, service: Service, served: Served, image: Image, params: dict[str, Any]
) -> Segmentation:
    """The mask of a model, by the clicks in `params` if it takes any."""
    if not served.takes_clicks:
        return await service.segment(request, served, image)
    geometry = await run_in_threadpool(service.check_size, image)
    return await service.segment_clicks(request, served, image, clicks_in(params, geometry))


def clicks_in(params: Mapping[str, Any], geometry: Geometry) -> list[Click]:
    """The clicks in `foreground` and `background`: lists of voxels `[x, y, z]`, or such lists as JSON text.

    Raises:
        Invalid: if they are something else, or too many.
        ClickError: if one lies outside the image.
    """
    clicks = []
    for key, positive in (("foreground", True), ("background", False)):
        for point in _points(params.get(key), key):
            clicks.append(Click(voxel_of(point, geometry), positive))
    if len(clicks) > MAX_CLICKS:
        raise Invalid(f"foreground, background: at most {MAX_CLICKS} clicks, got {len(clicks)}")
    return clicks


def _points(value: Any, key: str) -> list[list[float]]:
    if isinstance(value, str):
        value = read_json(value, key)
    points = [] if value is None else value
    if not isinstance(points, list) or len(points) > MAX_CLICKS or not all(_is_point(point) for point in points):
        raise Invalid(f"{key}: expected a list of at most {MAX_CLICKS} voxels [x, y, z]")
    return [[float(number) for number in point] for point in points]


def _is_point(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(isinstance(n, int | float) and not isinstance(n, bool) and abs(n) < 1e9 for n in value)
    )


def multipart(fields: Mapping[str, str], content: bytes, suffix: str) -> Response:
    """A form with JSON fields and one file called `image`, as both APIs answer."""
    boundary = secrets.token_hex(16)
    parts = []
    for name, text in fields.items():
        head = f'Content-Disposition: form-data; name="{name}"\r\nContent-Type: application/json\r\n\r\n'
        parts.append(f"--{boundary}\r\n{head}{text}\r\n".encode())
    file_name = f"{secrets.token_hex(8)}{suffix}"
    head = f'Content-Disposition: form-data; name="image"; filename="{file_name}"\r\n'
    parts.append(f"--{boundary}\r\n{head}Content-Type: {MEDIA_TYPES[suffix]}\r\n\r\n".encode())
    parts += [content, f"\r\n--{boundary}--\r\n".encode()]
    return Response(b"".join(parts), media_type=f"multipart/form-data; boundary={boundary}")


def one_file(files: Sequence[UploadFile] | None) -> UploadFile:
    """The only file of a request.

    Raises:
        Invalid: if there are none or several.
    """
    if not files or len(files) != 1:
        raise Invalid(f"expected one image file, got {len(files or ())}; `ctseg convert` makes one file of a series")
    return files[0]
