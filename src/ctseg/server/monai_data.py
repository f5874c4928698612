"""MONAI Label's datastore: images and labels, and which image is to be labelled next."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body, Form, Response, UploadFile
from fastapi.responses import FileResponse

from ctseg.server.datastore import FINAL, read_label_of
from ctseg.server.images import FileImage, Image, SeriesImage
from ctseg.server.own_api import ServiceHere
from ctseg.server.problems import Invalid, NotHere
from ctseg.server.service import Service
from ctseg.server.uploads import add_image, plain_object, received

STRATEGIES = {
    "random": "A random image without a final label; one that was handed out lately is less likely",
    "first": "The first image without a final label",
    "least-annotated": "The image with the fewest labels that was not handed out for the longest time",
}
Params = Annotated[dict[str, Any] | None, Body()]
FormJson = Annotated[str, Form()]

router = APIRouter()


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
    return _objects(service) if output == "all" else statistics(service)


@router.put("/datastore/", summary="Add an image", include_in_schema=False)
@router.put("/datastore/image", summary="Add an image")
def put_image(
    service: ServiceHere, file: UploadFile, image: str | None = None, params: FormJson = "{}"
) -> dict[str, Any]:
    """Its id is `image`, else the file's name without the suffix, of DICOM a pseudonym; none is ever replaced."""
    plain_object(params)
    return {"image": add_image(service, file, image)}


@router.get("/datastore/image", summary="An image's file", response_class=Response)
def get_image(service: ServiceHere, image: str) -> Response:
    """The file as it is; of a DICOM series a NIfTI with nothing but its voxels and their grid."""
    found = service.datastore.image(image)
    service.check_size(found)
    with service.unpacking:
        content = found.content()
    if isinstance(content, Path):
        return FileResponse(content, media_type="application/octet-stream", filename=found.name)
    headers = {"Content-Disposition": f'attachment; filename="{found.name}"'}
    return Response(content, media_type="application/octet-stream", headers=headers)


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
    with received(service, label, ".bin") as path:
        of = service.datastore.image(image)
        if path.suffix != ".bin":
            service.check_size(FileImage(path))
        with service.unpacking:
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


def checksum(service: Service, image: Image) -> str:
    """The word SHA256, a colon and the digest of a file, read once while it does not change."""
    service.check_size(image)
    with service.unpacking:
        digest = service.cache.get(("checksum", *image.version()), image.sha256, lambda _: 256)
    return f"SHA256:{digest}"


def statistics(service: Service) -> dict[str, Any]:
    """How many images there are, and labels of each tag."""
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
    for image_id, image in store.images().items():
        labels = {tag: {"ext": ".nii.gz", "info": store.label_info(image_id, tag)} for tag in store.labels(image_id)}
        suffix = image.name[len(image_id) :]
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
    image = images[chosen]
    known = {"id": chosen, "name": image.name, "path": image.name, "checksum": checksum(service, image)}
    if isinstance(image, SeriesImage):  # OHIF opens the study
        known |= {"StudyInstanceUID": image.study_uid, "SeriesInstanceUID": image.uid}
    return {**store.image_info(chosen), **known}


def _handed_out(info: dict[str, Any]) -> float:
    """When an image was handed out last, 0 for never."""
    notes = info.get("strategy")
    times = [note.get("ts") for note in notes.values() if isinstance(note, dict)] if isinstance(notes, dict) else []
    now = time.time()
    return float(max((t for t in times if isinstance(t, int | float) and 0 <= t <= now), default=0))


def _names(label_info: Any) -> dict[int, str] | None:
    """Value -> name of what Slicer sends: `[{"name": "spleen", "idx": 1}]`."""
    if not label_info:
        return None
    try:
        return {int(one["idx"]): str(one["name"]) for one in label_info}
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise Invalid("label_info: expected a list of objects with a name and an idx") from error
