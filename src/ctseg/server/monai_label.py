"""The REST API of MONAI Label, as its clients in 3D Slicer and OHIF speak it.

Voxels of clicks are those of the image file's own axes. Paths of this machine are never told: where MONAI Label sends
a path, clients get the file's name and fetch the image.
"""

from __future__ import annotations

import hmac
import json
import random
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Form, Query, Request, Response, UploadFile
from fastapi.responses import FileResponse, PlainTextResponse
from starlette.concurrency import run_in_threadpool

import ctseg
from ctseg.engine.checkpoint import file_sha256
from ctseg.server.datastore import FINAL, ORIGINAL, read_label_of
from ctseg.server.masks import MEDIA_TYPES, mask_bytes, uncompressed_nrrd
from ctseg.server.own_api import ServiceHere
from ctseg.server.problems import Invalid, NotHere, NoToken, WrongFile
from ctseg.server.run import LOG_LINES
from ctseg.server.service import Segmentation, Served, Service, version
from ctseg.server.sessions import Entry
from ctseg.server.tasks import Tasks, start_batch, start_training
from ctseg.server.transfer import clicks_in, image_for, keep_upload, multipart, one_file
from ctseg.server.uploads import add_image, plain_object, received

STRATEGIES = {
    "random": "A random image without a final label; one that was handed out lately is less likely",
    "first": "The first image without a final label",
    "least-annotated": "The image with the fewest labels that was not handed out for the longest time",
}
Params = Annotated[dict[str, Any] | None, Body()]
FormJson = Annotated[str, Form()]

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
        "datastore": _statistics(service),
    }


@router.post("/infer/{model}", summary="Segment an image, with clicks or without", response_class=Response)
async def infer(
    request: Request,
    service: ServiceHere,
    model: str,
    image: str = "",
    session_id: str = "",
    output: Literal["image", "json", "all"] | None = None,
    params: FormJson = "{}",
    file: UploadFile | None = None,
) -> Response:
    """A form with `params` and `image`, or one of them; `foreground` and `background` in `params` hold clicks."""
    served = service.model(model)
    given = plain_object(params)
    suffix = _suffix(given)
    started = time.perf_counter()
    async with image_for(service, image=image, session_id=session_id, file=file) as path:
        result = await segment_for(request, service, served, path, given)
    if given.get("save_label") is True and image and not served.takes_clicks:
        names = served.names
        tag, save = str(given.get("label_tag", ORIGINAL)), service.datastore.save_label
        await run_in_threadpool(save, image, tag, result.mask, result.geometry, names=names)
    told = json.dumps(
        {"label_names": served.labels, "latencies": {"total": round(time.perf_counter() - started, 3)}, "model": model}
    )
    if output == "json":
        return Response(told, media_type="application/json")
    content = await run_in_threadpool(mask_bytes, result.mask, result.geometry, suffix)
    if suffix == ".nrrd" and given.get("result_compress") is False:
        content = await run_in_threadpool(uncompressed_nrrd, content)
    if output == "image":
        headers = {"Content-Disposition": f'attachment; filename="mask{suffix}"'}
        return Response(content, media_type=MEDIA_TYPES[suffix], headers=headers)
    return multipart({"params": told}, content, suffix)


async def segment_for(
    request: Request, service: Service, served: Served, path: Path, params: dict[str, Any]
) -> Segmentation:
    """The mask of a model, by the clicks in `params` if it takes any."""
    if not served.takes_clicks:
        return await service.segment(request, served, path)
    geometry = await run_in_threadpool(service.check_size, path)
    return await service.segment_clicks(request, served, path, clicks_in(params, geometry))


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
        return FileResponse(entry.content.path, media_type="application/octet-stream", filename=entry.content.path.name)
    return _session_info(session_id, entry)


@router.delete("/session/{session_id}", summary="End a session")
def remove_session(service: ServiceHere, session_id: str) -> dict[str, Any]:
    """What it was."""
    return _session_info(session_id, service.uploads.remove(session_id))


@router.get("/datastore/", summary="Images and labels", response_model=None)
def datastore(
    service: ServiceHere, output: Literal["all", "train", "stats"] | None = None
) -> dict[str, Any] | list[dict[str, str]]:
    """Counts; with `all` every image with its labels, with `train` the pairs with final labels."""
    store = service.datastore
    if output == "train":
        images, folder = store.images(), store.folder
        pairs = store.labelled(FINAL).items()
        return [{"image": images[i].name, "label": str(label.relative_to(folder))} for i, label in pairs]
    return _objects(service) if output == "all" else _statistics(service)


@router.put("/datastore/", summary="Add an image", include_in_schema=False)
@router.put("/datastore/image", summary="Add an image")
def put_image(
    service: ServiceHere, file: UploadFile, image: str | None = None, params: FormJson = "{}"
) -> dict[str, Any]:
    """Its id is `image`, else the file's name without the suffix; one that is there is not replaced."""
    plain_object(params)
    return {"image": add_image(service, file, image)}


@router.get("/datastore/image", summary="An image's file", response_class=Response)
def get_image(service: ServiceHere, image: str) -> Response:
    """The file as it is."""
    path = service.datastore.image(image)
    return FileResponse(path, media_type="application/octet-stream", filename=path.name)


@router.head("/datastore/image", summary="Whether an image is there", response_class=Response)
def head_image(service: ServiceHere, image: str, check_sum: str | None = None) -> Response:
    """With `check_sum`, as SHA256:HEX, also whether it is that file."""
    digest = checksum(service, service.datastore.image(image))
    if check_sum is not None and check_sum.partition(":")[2].lower() != digest.partition(":")[2]:
        raise NotHere("image: its checksum is another one")
    return Response()


@router.get("/datastore/image/info", summary="Notes about an image")
def get_image_info(service: ServiceHere, image: str) -> dict[str, Any]:
    """What clients put there, and when it was handed out."""
    return service.datastore.image_info(image)


@router.put("/datastore/image/info", summary="Add notes about an image")
def put_image_info(service: ServiceHere, image: str, info: FormJson = "{}") -> dict[str, Any]:
    """A JSON object; other notes stay."""
    service.datastore.update_image_info(image, plain_object(info, "info"))
    return {}


@router.put("/datastore/label", summary="Save a label map")
def put_label(
    service: ServiceHere, image: str, label: UploadFile, tag: str = FINAL, params: FormJson = "{}"
) -> dict[str, Any]:
    """On the image's grid; `label_info` in `params`, a list of `name` and `idx`, names its values."""
    given = plain_object(params)
    with received(service, label, raw=True) as path:
        of = service.datastore.image(image)
        if path.suffix != ".bin":
            service.check_size(path)
        mask, geometry = read_label_of(path, of)
        names = _names(given.get("label_info"))
        service.datastore.save_label(image, tag or FINAL, mask, geometry, names=names, info={"params": given})
    return {"image": image, "label": image}


@router.get("/datastore/label", summary="A label map", response_class=Response)
def get_label(service: ServiceHere, label: str, tag: str = FINAL) -> Response:
    """A .nii.gz file; a label is called as its image."""
    path = service.datastore.label(label, tag)
    return FileResponse(path, media_type="application/octet-stream", filename=path.name)


@router.head("/datastore/label", summary="Whether a label is there", response_class=Response)
def head_label(service: ServiceHere, image: str, tag: str = FINAL) -> Response:
    """404 if not."""
    service.datastore.label(image, tag)
    return Response()


@router.get("/datastore/label/info", summary="Notes about a label")
def get_label_info(service: ServiceHere, label: str, tag: str = FINAL) -> dict[str, Any]:
    """What clients sent with it."""
    return service.datastore.label_info(label, tag)


@router.put("/datastore/label/info", summary="Add notes about a label")
def put_label_info(service: ServiceHere, label: str, tag: str = FINAL, info: FormJson = "{}") -> dict[str, Any]:
    """A JSON object; other notes stay."""
    service.datastore.update_label_info(label, tag, plain_object(info, "info"))
    return {}


@router.post("/activelearning/{strategy}", summary="The next image to label")
def post_next(service: ServiceHere, strategy: str, params: Params = None) -> dict[str, Any]:
    """Its id, name and checksum; empty if everything is labelled."""
    return _next_sample(service, strategy, params or {})


@router.get("/activelearning/{strategy}", summary="The next image to label")
def get_next(service: ServiceHere, strategy: str) -> dict[str, Any]:
    """As by POST."""
    return _next_sample(service, strategy, {})


@router.post("/train/{model}", summary="Fine-tune a model on the final labels")
def train_model(service: ServiceHere, model: str, params: Params = None) -> dict[str, Any]:
    """A process of its own, one at a time; `max_epochs` in the body."""
    given = params or {}
    own = given.get(model)
    given = {**given, **own} if isinstance(own, dict) else given
    served = service.model(model)
    return service.trainings.begin({"model": model, **given}, start_training(service, served, given)).told()


@router.post("/train/", summary="Fine-tune the first model that can be", include_in_schema=False)
def train_first(service: ServiceHere, params: Params = None) -> dict[str, Any]:
    """As `/train/{model}`, told under the model's name; the models named in the body go before."""
    named = [name for name in params or {} if name in service.models]
    name = (named or list(service.models))[0]
    return {name: train_model(service, name, params)}


@router.get("/train/", summary="How the training goes", response_model=None)
def train_status(
    service: ServiceHere, all: bool = False, check_if_running: bool = False
) -> dict[str, Any] | list[dict[str, Any]]:
    """The newest training, or all; 404 if there is none, or with `check_if_running` none runs."""
    return _status(service.trainings, all, check_if_running)


@router.delete("/train/", summary="Stop the training")
def train_stop(service: ServiceHere) -> dict[str, Any]:
    """It saves what it has; empty if none runs."""
    task = service.trainings.stop()
    return {} if task is None else task.told()


@router.post("/batch/infer/{model}", summary="Segment many images and save the masks")
async def batch_infer(
    service: ServiceHere,
    model: str,
    images: Literal["all", "unlabeled", "labeled"] = "all",
    params: Params = None,
) -> dict[str, Any]:
    """With the tag `original`, or `label_tag` of the body."""
    served = service.model(model, takes_clicks=False)
    tag = str((params or {}).get("label_tag") or ORIGINAL)
    store = service.datastore
    known, done = list(await run_in_threadpool(store.images)), await run_in_threadpool(store.labelled, FINAL)
    chosen = {"all": known, "labeled": list(done), "unlabeled": [i for i in known if i not in done]}[images]
    if not chosen:
        raise Invalid(f"images: there are none that are {images}")
    request = {"model": model, "images": images, "label_tag": tag}
    return service.batches.begin(request, start_batch(service, served, chosen, tag)).told()


@router.get("/batch/infer", summary="How the segmenting of many images goes", response_model=None)
def batch_status(
    service: ServiceHere, all: bool = False, check_if_running: bool = False
) -> dict[str, Any] | list[dict[str, Any]]:
    """As for training."""
    return _status(service.batches, all, check_if_running)


@router.delete("/batch/infer", summary="Stop the segmenting of many images")
def batch_stop(service: ServiceHere) -> dict[str, Any]:
    """After the image that is being segmented."""
    task = service.batches.stop()
    return {} if task is None else task.told()


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
    if not hmac.compare_digest(password.encode(), token.encode()):
        raise NoToken("password: is not the server's token")
    return {"access_token": token, "token_type": "bearer"}


@router.get("/auth/token/valid", summary="Whether the token is right")
def auth_valid() -> dict[str, Any]:
    """Only who has the token gets here."""
    return {"username": "user", "disabled": False}


def checksum(service: Service, path: Path) -> str:
    """The word SHA256, a colon and the digest of a file, read once while it does not change."""
    key = ("checksum", *version(path))
    return f"SHA256:{service.cache.get(key, lambda: file_sha256(path), lambda _: 256)}"


def _model_info(one: Served) -> dict[str, Any]:
    kind = "deepgrow" if one.takes_clicks else "segmentation"
    about = {"dimension": one.dimensions, "description": one.model.recipe.title}
    return {"type": kind, "labels": one.labels, **about, "config": {}}


def _trainer_info(one: Served) -> dict[str, Any]:
    config = {"max_epochs": one.model.recipe.training.epochs}
    return {"description": one.model.recipe.title, "config": config, "labels": one.labels}


def _statistics(service: Service) -> dict[str, Any]:
    store = service.datastore
    tags: dict[str, int] = {}
    images = store.images()
    for image_id in images:
        for tag in store.labels(image_id):
            tags[tag] = tags.get(tag, 0) + 1
    return {"total": len(images), "completed": tags.get(FINAL, 0), "label_tags": tags}


def _objects(service: Service) -> dict[str, Any]:
    store = service.datastore
    objects = {}
    for image_id, path in store.images().items():
        labels = {tag: {"ext": ".nii.gz", "info": store.label_info(image_id, tag)} for tag in store.labels(image_id)}
        suffix = path.name[len(image_id) :]
        objects[image_id] = {"image": {"ext": suffix, "info": store.image_info(image_id)}, "labels": labels}
    return {"name": "studies", "description": "", "images_dir": ".", "labels_dir": "labels", "objects": objects}


def _next_sample(service: Service, strategy: str, params: dict[str, Any]) -> dict[str, Any]:
    if strategy not in STRATEGIES:
        raise NotHere(f"strategy {strategy[:40]!r}: there is {', '.join(STRATEGIES)}")
    store = service.datastore
    images, done = store.images(), store.labelled(FINAL)
    handed = {i: _handed_out(store.image_info(i)) for i in images}
    open_images = [image_id for image_id in images if image_id not in done]
    if strategy == "least-annotated":
        candidates = sorted(images, key=lambda i: (len(store.labels(i)), handed[i]))
    elif strategy == "random" and open_images:
        now = time.time()
        candidates = random.choices(open_images, [max(now - handed[i], 1.0) for i in open_images])
    else:
        candidates = open_images
    if not candidates:
        return {}
    chosen = candidates[0]
    note = {"ts": int(time.time()), "client_id": str(params.get("client_id", ""))[:80]}
    before = store.image_info(chosen).get("strategy")
    store.update_image_info(chosen, {"strategy": {**(before if isinstance(before, dict) else {}), strategy: note}})
    name = images[chosen].name
    known = {"id": chosen, "name": name, "path": name, "checksum": checksum(service, images[chosen])}
    return {**store.image_info(chosen), **known}


def _handed_out(info: dict[str, Any]) -> float:
    """When an image was handed out last, 0 for never."""
    notes = info.get("strategy")
    times = [note.get("ts") for note in notes.values() if isinstance(note, dict)] if isinstance(notes, dict) else []
    return float(max((t for t in times if isinstance(t, int | float)), default=0))


def _status(tasks: Tasks, every: bool, only_running: bool) -> dict[str, Any] | list[dict[str, Any]]:
    found = [task for task in tasks.all if task.is_running] if only_running else tasks.all
    if not found:
        raise NotHere("nothing is running" if only_running else "nothing was started yet")
    return [task.told() for task in found] if every else found[-1].told()


def _names(label_info: Any) -> dict[int, str] | None:
    """Value -> name of what Slicer sends: `[{"name": "spleen", "idx": 1}]`."""
    if not label_info:
        return None
    try:
        return {int(one["idx"]): str(one["name"]) for one in label_info}
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise Invalid("label_info: expected a list of objects with a name and an idx") from error


def _session_info(session_id: str, entry: Entry[Any]) -> dict[str, Any]:
    times = {"create_ts": int(entry.created), "last_access_ts": int(entry.used), "expiry": int(entry.seconds)}
    return {"name": session_id, "path": "", "image": entry.content.path.name, "meta": {}, **times}


def _suffix(params: dict[str, Any]) -> str:
    suffix = params.get("result_extension", ".nii.gz")
    if not isinstance(suffix, str) or suffix not in MEDIA_TYPES:
        raise Invalid(f"result_extension: expected one of {', '.join(MEDIA_TYPES)}, got {str(suffix)[:20]!r}")
    return suffix


def _model_file(served: Served) -> Path:
    if not served.model.path.is_file():
        raise NotHere(f"model '{served.name}': its file is gone")
    return served.model.path
