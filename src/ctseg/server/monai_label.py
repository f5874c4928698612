"""The REST API of MONAI Label, as its clients in 3D Slicer and OHIF speak it.

Voxels of clicks are those of the image file's own axes. Paths of this machine are never told: where MONAI Label sends
a path, clients get the file's name and fetch the image.
"""

from __future__ import annotations

import hmac
import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Query, Request, Response, UploadFile
from fastapi.responses import FileResponse, PlainTextResponse
from starlette.concurrency import run_in_threadpool

import ctseg
from ctseg.server.datastore import ORIGINAL, check_tag
from ctseg.server.dicom_seg import MEDIA_TYPE as SEG_MEDIA_TYPE
from ctseg.server.dicom_seg import seg_writer
from ctseg.server.masks import MEDIA_TYPES, result_form
from ctseg.server.monai_data import STRATEGIES, FormJson, statistics
from ctseg.server.own_api import ServiceHere
from ctseg.server.problems import NotHere, NoToken, WrongFile
from ctseg.server.run import LOG_LINES
from ctseg.server.service import Served
from ctseg.server.sessions import Entry
from ctseg.server.transfer import image_for, keep_upload, multipart, one_file, segment_for
from ctseg.server.uploads import plain_object

router = APIRouter()


@router.get("/info/", summary="What is served")
def info(service: ServiceHere) -> dict[str, Any]:
    """Models, strategies, and how much is labelled."""
    names = [*dict.fromkeys([name for one in service.models.values() for name in one.labels])]
    trained = {key: one for key, one in service.models.items() if one.model.path.suffix == ".pt"}
    return {
        "name": "ctseg",
        "description": "CT segmentation; research use only",
        "version": ctseg.__version__,
        "labels": [*names, *(name for name in service.datastore.structures if name not in names)],
        "models": {key: _model_info(one) for key, one in service.models.items()},
        "trainers": {key: _trainer_info(one) for key, one in trained.items()},
        "strategies": {name: {"description": text} for name, text in STRATEGIES.items()},
        "scoring": {},
        "train_stats": {},
        "datastore": statistics(service),
    }


@router.post("/infer/{model}", summary="Segment an image, with clicks or without", response_class=Response)
async def infer(
    request: Request,
    service: ServiceHere,
    model: str,
    image: str = "",
    session_id: str = "",
    output: Literal["image", "json", "all", "dicom_seg"] | None = None,
    params: FormJson = "{}",
    file: UploadFile | None = None,
) -> Response:
    """A form with `params` and `image`, or one of them; `foreground` and `background` in `params` hold clicks.

    `output=dicom_seg` is for images that are DICOM series; `label_info` in `params` may name the segments.
    """
    served = service.model(model)
    given = plain_object(params)
    form = result_form(given)
    tag = check_tag(str(given.get("label_tag", ORIGINAL)))
    started = time.perf_counter()
    async with image_for(service, image=image, session_id=session_id, file=file) as found:
        as_seg = seg_writer(service, served, found, given) if output == "dicom_seg" else None
        result = await segment_for(request, service, served, found, given)
        seg = None if as_seg is None else await run_in_threadpool(as_seg, result.mask)
    if given.get("save_label") is True and image and not served.takes_clicks:
        names, save = served.names, service.datastore.save_label
        notes = {"params": {"label_names": served.labels}}
        await run_in_threadpool(save, image, tag, result.mask, result.geometry, names=names, info=notes)
    told = json.dumps(
        {"label_names": served.labels, "latencies": {"total": round(time.perf_counter() - started, 3)}, "model": model}
    )
    if seg is not None:
        headers = {"Content-Disposition": 'attachment; filename="mask.dcm"'}
        return Response(seg, media_type=SEG_MEDIA_TYPE, headers=headers)
    if output == "json":
        return Response(told, media_type="application/json")
    content = await run_in_threadpool(form.content, result.mask, result.geometry)
    if output == "image":
        headers = {"Content-Disposition": f'attachment; filename="mask{form.suffix}"'}
        return Response(content, media_type=MEDIA_TYPES[form.suffix], headers=headers)
    return multipart({"params": told}, content, form.suffix)


@router.put("/session/", summary="Send an image for a session of its own")
def create_session(
    service: ServiceHere,
    files: list[UploadFile] | None = None,
    image: UploadFile | None = None,
    uncompress: bool = False,
    expiry: Annotated[int, Query(ge=0)] = 0,
) -> dict[str, Any]:
    """MONAI Label's clients call the file `files`, AIAA's `image`; `expiry` in seconds may shorten its life."""
    if uncompress:
        raise WrongFile("uncompress: archives are not taken; send one image file")
    session_id = keep_upload(service, one_file(files or ([image] if image else None)), expiry)
    return {"session_id": session_id, "session_info": _session_info(session_id, service.uploads.get(session_id))}


@router.get("/session/{session_id}", summary="A session, or its image", response_model=None)
def get_session(
    service: ServiceHere, session_id: str, update_ts: bool = False, image: bool = False
) -> dict[str, Any] | Response:
    """When it was made and used; with `image` the file."""
    entry = service.uploads.get(session_id, touch=update_ts)
    if image:
        path = entry.content.path
        return FileResponse(path, media_type="application/octet-stream", filename=path.name)
    return _session_info(session_id, entry)


@router.delete("/session/{session_id}", summary="End a session")
def remove_session(service: ServiceHere, session_id: str) -> dict[str, Any]:
    """What it was."""
    return _session_info(session_id, service.uploads.remove(session_id))


@router.get("/logs/", summary="The newest lines of the log", response_class=PlainTextResponse)
def logs(lines: Annotated[int, Query(ge=1, le=5000)] = 300) -> str:
    """Request ids, calls and times; no names of images."""
    return "\n".join(list(LOG_LINES)[-lines:]) + "\n"


@router.get("/model/info/{model}", summary="A model's file")
def model_info(service: ServiceHere, model: str) -> dict[str, Any]:
    """Its checksum and when it was written."""
    served = service.model(model)
    path = _model_file(served)
    return {"checksum": f"SHA256:{served.model.sha256}", "modified_time": int(path.stat().st_mtime)}


@router.get("/model/{model}", summary="Download a model", response_class=Response)
def download_model(service: ServiceHere, model: str) -> Response:
    """The file that is served."""
    path = _model_file(service.model(model))
    return FileResponse(path, media_type="application/octet-stream", filename=f"{model}{path.suffix}")


@router.get("/auth/", summary="Whether a token is needed")
def auth(service: ServiceHere) -> dict[str, Any]:
    """MONAI Label's clients ask first."""
    return {"enabled": service.settings.token is not None, "client_id": "ctseg", "realm": ""}


@router.post("/auth/token", summary="A token for a password")
def auth_token(
    service: ServiceHere, password: Annotated[str, Form()] = "", username: Annotated[str, Form()] = ""
) -> dict[str, Any]:
    """The password is the server's token itself; the name is not looked at."""
    token = service.settings.token
    if token is None:
        return {"access_token": None, "token_type": None}
    if not hmac.compare_digest(password.encode(errors="surrogatepass"), token.encode()):
        raise NoToken("password: is not the server's token")
    return {"access_token": token, "token_type": "bearer"}


@router.get("/auth/token/valid", summary="Whether the token is right")
def auth_valid() -> dict[str, Any]:
    """Only who has the token gets here."""
    return {"username": "user", "disabled": False}


def _model_info(one: Served) -> dict[str, Any]:
    kind = "deepgrow" if one.takes_clicks else "segmentation"
    about = {"dimension": one.dimensions, "description": one.model.recipe.title}
    return {"type": kind, "labels": one.labels, **about, "config": {}}


def _trainer_info(one: Served) -> dict[str, Any]:
    config = {"max_epochs": one.model.recipe.training.epochs}
    return {"description": one.model.recipe.title, "config": config, "labels": one.labels}


def _session_info(session_id: str, entry: Entry[Any]) -> dict[str, Any]:
    times = {"create_ts": int(entry.created), "last_access_ts": int(entry.used), "expiry": int(entry.seconds)}
    return {"name": session_id, "path": "", "image": entry.content.path.name, "meta": {}, **times}


def _model_file(served: Served) -> Path:
    if not served.model.path.is_file():
        raise NotHere(f"model '{served.name}': its file is gone")
    return served.model.path
