"""The AIAA v1 API of NVIDIA Clara, as its clients speak it; sessions are those of MONAI Label's API.

Clients send a form with `params` (JSON) and a file called `datapoint` or `image`, and get a form with `params`,
`points` and the mask.
"""

from __future__ import annotations

import json
from contextlib import AbstractAsyncContextManager
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Form, Request, Response, UploadFile
from numpy.typing import NDArray
from starlette.concurrency import run_in_threadpool

import ctseg
from ctseg.io.dicom.contours import outlines
from ctseg.io.images import read_labels
from ctseg.server.images import FileImage, Image
from ctseg.server.masks import result_form
from ctseg.server.own_api import ServiceHere
from ctseg.server.problems import Invalid, NotHere, SessionGone, TooLarge
from ctseg.server.service import Served, Service
from ctseg.server.transfer import image_for, multipart, one_file, segment_for
from ctseg.server.uploads import plain_object, received

MAX_POINTS = 500_000
"""Of all outlines of a mask: an organ has some thousands."""
ALL_POINTS = 10
"""From this `more_points` on, polygons have all their vertices; below, that share of them."""
Params = Annotated[str, Form()]

router = APIRouter(prefix="/v1")


@router.get("/models", summary="Models, one, or those that know a label", response_model=None)
def models(
    service: ServiceHere, model: str | None = None, label: str | None = None
) -> list[dict[str, Any]] | dict[str, Any]:
    """Name, labels, type and description of each."""
    if model:
        return _told(service.model(model))
    return [_told(one) for one in service.models.values() if label is None or label in one.labels]


@router.post("/segmentation", summary="Segment without clicks", response_class=Response)
async def segmentation(
    request: Request,
    service: ServiceHere,
    model: str,
    session_id: str | None = None,
    params: Params = "{}",
    datapoint: UploadFile | None = None,
    image: UploadFile | None = None,
) -> Response:
    """The mask, and its six extreme points as `points`."""
    served = service.model(model, takes_clicks=False)
    async with _image(service, session_id, datapoint or image) as found:
        return await _answer(request, service, served, found, plain_object(params), points=True)


@router.post("/deepgrow", summary="Segment by clicks", response_class=Response)
async def deepgrow(
    request: Request,
    service: ServiceHere,
    model: str,
    session_id: str | None = None,
    params: Params = "{}",
    datapoint: UploadFile | None = None,
    image: UploadFile | None = None,
) -> Response:
    """`params` holds `foreground` and `background`, lists of voxels `[x, y, z]`."""
    served = service.model(model, takes_clicks=True)
    async with _image(service, session_id, datapoint or image) as found:
        return await _answer(request, service, served, found, plain_object(params), points=False)


@router.post("/inference", summary="Segment with any model", response_class=Response)
async def inference(
    request: Request,
    service: ServiceHere,
    model: str,
    session_id: str | None = None,
    params: Params = "{}",
    datapoint: UploadFile | None = None,
    image: UploadFile | None = None,
) -> Response:
    """As the two above."""
    served = service.model(model)
    async with _image(service, session_id, datapoint or image) as found:
        return await _answer(request, service, served, found, plain_object(params), points=False)


@router.post("/mask2polygon", summary="Outlines of a mask, slice by slice")
def mask2polygon(
    service: ServiceHere,
    params: Params = "{}",
    datapoint: UploadFile | None = None,
    image: UploadFile | None = None,
) -> list[list[list[list[int]]]]:
    """For each slice its polygons, each a list of pixels `[x, y]`; holes are joined to what is around them."""
    more_points = plain_object(params).get("more_points", ALL_POINTS)
    if not isinstance(more_points, int) or isinstance(more_points, bool) or more_points < 1:
        raise Invalid(f"more_points: expected a whole number from 1, got {str(more_points)[:40]!r}")
    found = datapoint or image
    with received(service, one_file([found] if found else None)) as path:
        service.check_size(FileImage(path))
        with service.unpacking:
            mask = read_labels(path).array > 0
            return _outlines(mask, min(more_points, ALL_POINTS))


@router.post("/dextr3d", summary="Not supported")
def dextr3d() -> None:
    """DEXTR3D needs a network of its own."""
    raise Invalid("dextr3d: not supported here; use /v1/deepgrow, or /v1/segmentation")


@router.post("/fixpolygon", summary="Not supported")
def fixpolygon() -> None:
    """Polygons are edited in the client."""
    raise Invalid("fixpolygon: not supported here; correct the mask by clicks with /v1/deepgrow")


def _image(service: Service, session_id: str | None, file: UploadFile | None) -> AbstractAsyncContextManager[Image]:
    """AIAA's clients begin anew on one status only, whyever the session is not there."""
    if session_id:
        try:
            service.uploads.get(session_id)
        except NotHere as error:
            raise SessionGone("session: it has expired; open a new one") from error
        return image_for(service, session_id=session_id)
    return image_for(service, file=file)


async def _answer(
    request: Request, service: Service, served: Served, image: Image, params: dict[str, Any], *, points: bool
) -> Response:
    form = result_form(params)
    result = await segment_for(request, service, served, image, params)
    content = await run_in_threadpool(form.content, result.mask, result.geometry)
    if not points:
        return multipart({"params": "{}"}, content, form.suffix)
    extreme = extreme_points(result.mask)
    return multipart({"params": json.dumps({"points": extreme}), "points": json.dumps(extreme)}, content, form.suffix)


def extreme_points(mask: NDArray[np.uint8]) -> list[list[int]]:
    """Six voxels of a mask that reach furthest along x, y and z, down and up; none if it is empty."""
    points = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        used = np.flatnonzero(mask.any(axis=others))
        for end in used[[0, -1]] if len(used) else ():
            plane = np.argwhere(np.take(mask, int(end), axis=axis))
            middle = plane[len(plane) // 2].tolist()
            points.append([*middle[:axis], int(end), *middle[axis:]])
    return points


def _outlines(mask: NDArray[np.bool_], kept_of_ten: int) -> list[list[list[list[int]]]]:
    """The polygons of every slice.

    Raises:
        TooLarge: if they have too many points to be a person's or a network's.
    """
    slices, num_points = [], 0
    for z in range(mask.shape[2]):
        slices.append(_polygons(mask[:, :, z], kept_of_ten))
        num_points += sum(map(len, slices[-1]))
        if num_points > MAX_POINTS:
            raise TooLarge(f"image: its outlines have more than {MAX_POINTS} points; smooth or crop the mask")
    return slices


def _polygons(mask: NDArray[np.bool_], kept_of_ten: int) -> list[list[list[int]]]:
    """The outlines of one slice, in whole pixels, with that share of their vertices but at least four."""
    polygons = []
    for ring in outlines(mask):
        number = min(len(ring), max(4, len(ring) * kept_of_ten // ALL_POINTS))
        chosen = ring[np.linspace(0, len(ring), number, endpoint=False).astype(int)]
        polygons.append(np.floor(chosen + 0.5).astype(int).tolist())
    return polygons


def _told(one: Served) -> dict[str, Any]:
    return {
        "name": one.name,
        "labels": list(one.labels),
        "type": "deepgrow" if one.takes_clicks else "segmentation",
        "dimension": one.dimensions,
        "description": one.model.recipe.title,
        "version": ctseg.__version__,
    }
