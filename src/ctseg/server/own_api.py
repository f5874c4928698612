"""The server's own JSON API, below `/api`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Form, Request, Response, UploadFile
from fastapi.responses import FileResponse
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat
from starlette.concurrency import run_in_threadpool

from ctseg.clicks import Click
from ctseg.engine.session import voxel_of
from ctseg.io.images import read_labels
from ctseg.server.datastore import FINAL
from ctseg.server.images import FileImage
from ctseg.server.masks import MEDIA_TYPES, mask_bytes, mask_of_bytes
from ctseg.server.problems import Conflict, Invalid
from ctseg.server.service import MAX_CLICKS, ClickSession, Segmentation, Service
from ctseg.server.uploads import add_image, received

GZIP = MEDIA_TYPES[".nii.gz"]
MASK: dict[int | str, dict[str, Any]] = {
    200: {"content": {GZIP: {"schema": {"type": "string", "format": "binary"}}}, "description": "A .nii.gz file"}
}

router = APIRouter(prefix="/api")


def service_of(request: Request) -> Service:
    """The service of the app that got the request."""
    service: Service = request.app.state.service
    return service


ServiceHere = Annotated[Service, Depends(service_of)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


Place = Annotated[FiniteFloat, Field(ge=-1e6, le=1e6)]
"""A voxel's index, or millimetres."""


class NewSession(_Body):
    """Which image and which model."""

    image: str
    model: str


class NewClick(_Body):
    """A place, and whether the structure is there."""

    position: Annotated[list[Place], Field(min_length=3, max_length=3)]
    positive: bool = True
    coordinates: Literal["voxel", "lps", "ras"] = "voxel"


class Save(_Body):
    """What the structure is called, and whether it is final."""

    label: str
    tag: str = FINAL


@router.get("/models", summary="Models that are served")
def list_models(service: ServiceHere) -> list[dict[str, Any]]:
    """Names, what they do (clicks or automatic) and the structures they know."""
    return [
        {
            "name": one.name,
            "title": one.model.recipe.title,
            "kind": "clicks" if one.takes_clicks else "automatic",
            "dimensions": one.dimensions,
            "labels": one.labels,
        }
        for one in service.models.values()
    ]


@router.get("/images", summary="Images of the studies folder")
def list_images(service: ServiceHere) -> dict[str, Any]:
    """Ids, files, tags of their labels; and the names of all structures with their values."""
    store = service.datastore
    images = [
        {"id": image_id, "file": image.name, "labels": [{"tag": tag} for tag in store.labels(image_id)]}
        for image_id, image in store.images().items()
    ]
    return {"images": images, "structures": store.structures}


@router.post("/images", summary="Add an image", status_code=201)
def upload_image(service: ServiceHere, file: UploadFile, id: Annotated[str | None, Form()] = None) -> dict[str, str]:
    """Takes one NIfTI, NRRD or MHA file in; its id is its name without the suffix unless `id` is given.

    A DICOM file is called by its series' pseudonym, whatever is given.
    """
    return {"id": add_image(service, file, id)}


@router.get("/images/{image_id}/file", summary="An image as .nii.gz", responses=MASK, response_class=Response)
def image_file(service: ServiceHere, image_id: str) -> Response:
    """The file itself if it is `.nii.gz`, else converted; of a DICOM series nothing but its voxels and their grid."""
    image = service.datastore.image(image_id)
    service.check_size(image)
    with service.unpacking:
        content = image.nifti()
    if isinstance(content, bytes):
        return Response(content, media_type=GZIP)
    return FileResponse(content, media_type=GZIP, filename=image.name)


@router.get(
    "/images/{image_id}/labels/{tag}", summary="A label map as .nii.gz", responses=MASK, response_class=Response
)
def label_file(service: ServiceHere, image_id: str, tag: str) -> Response:
    """The whole label map of an image; /api/images names its values."""
    path = service.datastore.label(image_id, tag)
    return FileResponse(path, media_type=GZIP, filename=path.name)


@router.post("/sessions", summary="Begin to click on an image", status_code=201)
def open_session(service: ServiceHere, body: NewSession) -> dict[str, Any]:
    """A session without clicks; it expires when nobody uses it."""
    served = service.model(body.model, takes_clicks=True)
    image_id, image = service.datastore.find(body.image)
    version, geometry = image.version(), service.check_size(image)
    empty = mask_bytes(np.zeros(geometry.size, dtype=np.uint8, order="F"), geometry)
    session_id = service.click_sessions.add(ClickSession(image_id, image, version, served.name, mask=empty))
    return _told(service, session_id)


@router.get("/sessions/{session}", summary="A session's clicks")
def get_session(service: ServiceHere, session: str) -> dict[str, Any]:
    """Image, model and clicks in voxels, in order."""
    return _told(service, session)


@router.delete("/sessions/{session}", summary="End a session")
def delete_session(service: ServiceHere, session: str) -> dict[str, str]:
    """What was not saved is lost."""
    service.click_sessions.remove(session)
    return {"session": session}


@router.post("/sessions/{session}/clicks", summary="Click", responses=MASK, response_class=Response)
async def click(request: Request, service: ServiceHere, session: str, body: NewClick) -> Response:
    """The mask after one click more."""
    found = service.click_sessions.get(session).content
    async with found.lock:
        if len(found.clicks) >= MAX_CLICKS:
            raise Conflict(f"session: at most {MAX_CLICKS} clicks; undo some or reset")
        await run_in_threadpool(found.check_unchanged)
        geometry = await run_in_threadpool(service.check_size, found.image)
        new = Click(voxel_of(body.position, geometry, body.coordinates), body.positive)
        return await _answer(request, service, found, (*found.clicks, new))


@router.post("/sessions/{session}/undo", summary="Take the last click back", responses=MASK, response_class=Response)
async def undo(request: Request, service: ServiceHere, session: str) -> Response:
    """The mask without the last click."""
    found = service.click_sessions.get(session).content
    async with found.lock:
        await run_in_threadpool(found.check_unchanged)
        return await _answer(request, service, found, found.clicks[:-1])


@router.post("/sessions/{session}/reset", summary="Take all clicks back", responses=MASK, response_class=Response)
async def reset(request: Request, service: ServiceHere, session: str) -> Response:
    """The empty mask."""
    found = service.click_sessions.get(session).content
    async with found.lock:
        return await _answer(request, service, found, ())


@router.get("/sessions/{session}/mask", summary="The mask as it is", responses=MASK, response_class=Response)
def session_mask(service: ServiceHere, session: str) -> Response:
    """The mask after the last click."""
    return Response(service.click_sessions.get(session).content.mask, media_type=GZIP)


@router.post("/sessions/{session}/save", summary="Save the mask as a structure of the image's label map")
async def save(service: ServiceHere, session: str, body: Save) -> dict[str, Any]:
    """Other structures of the label map stay but where this one lies."""
    found = service.click_sessions.get(session).content

    def store() -> int:
        mask = mask_of_bytes(found.mask)
        if not mask.any():
            raise Invalid("save: the mask is empty; click first")
        found.check_unchanged()
        geometry = service.check_size(found.image)
        return service.datastore.save_structure(found.id, body.tag, body.label, mask, geometry)[1]

    async with found.lock:
        value = await run_in_threadpool(store)
    return {"image": found.id, "tag": body.tag, "label": body.label, "value": value}


@router.post("/segment", summary="Segment without clicks", responses=MASK, response_class=Response)
async def segment(request: Request, service: ServiceHere, body: NewSession) -> Response:
    """The label map of a model that needs no clicks; it is not saved."""
    served = service.model(body.model, takes_clicks=False)
    image = await run_in_threadpool(service.datastore.image, body.image)
    return await _file(await service.segment(request, served, image))


@router.put("/images/{image_id}/labels/{tag}", summary="Save a whole label map")
def put_label(
    service: ServiceHere, image_id: str, tag: str, file: UploadFile, model: str | None = None
) -> dict[str, Any]:
    """In place of the one there, kept in `replaced/`; its values are the folder's, or those of `model`."""
    names = None if model is None else service.model(model, takes_clicks=False).names
    with received(service, file) as path:
        service.check_size(FileImage(path))
        with service.unpacking:
            label = read_labels(path)
        service.datastore.save_label(image_id, tag, label.array, label.geometry, names=names)
    return {"image": image_id, "tag": tag, "structures": service.datastore.structures}


async def _answer(request: Request, service: Service, found: ClickSession, clicks: tuple[Click, ...]) -> Response:
    """The mask of `clicks`, which from now on are the session's."""
    result = await service.segment_clicks(request, service.model(found.model), found.image, clicks)
    found.mask = await run_in_threadpool(mask_bytes, result.mask, result.geometry)
    found.clicks = clicks
    return Response(found.mask, media_type=GZIP, headers=result.timing)


async def _file(result: Segmentation) -> Response:
    return Response(await run_in_threadpool(mask_bytes, result.mask, result.geometry), 200, result.timing, GZIP)


def _told(service: Service, session_id: str) -> dict[str, Any]:
    entry = service.click_sessions.get(session_id)
    found = entry.content
    clicks = [{"position": list(one.point), "positive": one.positive} for one in found.clicks]
    return {
        "session": session_id,
        "image": found.id,
        "model": found.model,
        "clicks": clicks,
        "seconds": entry.seconds,
    }
