"""MONAI Label's long work: fine-tuning on what is labelled, and segmenting many images."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Body
from starlette.concurrency import run_in_threadpool

from ctseg.server.batch import start_batch
from ctseg.server.datastore import FINAL, ORIGINAL, check_tag
from ctseg.server.own_api import ServiceHere
from ctseg.server.problems import Invalid, NotHere
from ctseg.server.tasks import Tasks
from ctseg.server.training import start_training

Params = Annotated[dict[str, Any] | None, Body()]

router = APIRouter()


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
    tag = check_tag(str((params or {}).get("label_tag") or ORIGINAL))
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


def _status(tasks: Tasks, every: bool, only_running: bool) -> dict[str, Any] | list[dict[str, Any]]:
    found = [task for task in tasks.all if task.is_running] if only_running else tasks.all
    if not found:
        raise NotHere("nothing is running" if only_running else "nothing was started yet")
    return [task.told() for task in found] if every else found[-1].told()
