"""Long work beside the answering of requests, one piece of a kind at a time: fine-tuning and segmenting many images."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ctseg.errors import CtsegError
from ctseg.files import atomic_path, make_folder, write_json
from ctseg.io.images import read_labels, write_labels
from ctseg.progress import printable
from ctseg.server.datastore import FINAL
from ctseg.server.images import Image
from ctseg.server.problems import Busy, Conflict, Invalid, TooMany
from ctseg.workspace import new_run

if TYPE_CHECKING:
    from ctseg.server.service import Served, Service

LOG = logging.getLogger("ctseg.server")
KEPT_LINES = 200
BUSY_SECONDS = 1.0
"""After it was told that too many wait, the segmenting of many images asks again."""
STOP_SECONDS = 30.0
"""After a request to stop, a training may save so long before it is ended."""
VALIDATION_SHARE = 5
"""One of so many labelled images is kept for validation; fewer are all for training."""
MAX_EPOCHS = 10_000


@dataclass
class Task:
    """What MONAI Label tells of a piece of work: SUBMITTED, RUNNING, DONE, ERROR or STOPPED, and its last lines."""

    request: dict[str, Any]
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    status: str = "SUBMITTED"
    start: float = field(default_factory=time.time)
    end: float | None = None
    details: deque[str] = field(default_factory=lambda: deque(["started"], maxlen=KEPT_LINES))
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def is_running(self) -> bool:
        """True until it has ended."""
        return self.end is None

    def finish(self, status: str) -> None:
        """Says how it ended."""
        self.status, self.end = status, time.time()

    def told(self) -> dict[str, Any]:
        """Plain data."""
        end = {} if self.end is None else {"end_ts": _stamp(self.end)}
        about = {"id": self.id, "status": self.status, "request": self.request, "start_ts": _stamp(self.start)}
        return {**about, **end, "details": list(self.details), "result": self.result}


class Tasks:
    """The tasks of one kind, of which one runs at a time; the newest are remembered."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._tasks: deque[Task] = deque(maxlen=20)
        self._lock = threading.Lock()
        self._stop: Callable[[], None] = lambda: None

    @property
    def all(self) -> list[Task]:
        """Oldest first."""
        with self._lock:
            return list(self._tasks)

    @property
    def running(self) -> Task | None:
        """The one that runs."""
        return next((task for task in self.all if task.is_running), None)

    def begin(self, request: dict[str, Any], start: Callable[[Task], Callable[[], None]]) -> Task:
        """A new task, begun by `start`, which returns how to stop it.

        Raises:
            TooMany: if one is running.
        """
        with self._lock:
            if any(task.is_running for task in self._tasks):
                raise TooMany(f"{self._what} is running already; wait, or stop it first")
            task = Task(request)
            self._stop = start(task)
            self._tasks.append(task)
        return task

    def close(self) -> None:
        """Stops the running task and waits until it has saved what it has."""
        task, until = self.stop(), time.monotonic() + STOP_SECONDS
        while task is not None and task.is_running and time.monotonic() < until:
            time.sleep(0.05)

    def stop(self) -> Task | None:
        """Asks the running task to stop; it, or None if none runs."""
        task = self.running
        if task is not None:
            task.status = "STOPPED"
            self._stop()
        return task


def start_training(service: Service, served: Served, params: Mapping[str, Any]) -> Callable[[Task], Callable[[], None]]:
    """What `Tasks.begin` takes to fine-tune a model on the images with final labels, in a process of its own.

    Raises:
        Invalid: if the model or the number of epochs cannot be used.
        Conflict: if nothing is labelled yet.
    """
    epochs = params.get("max_epochs", served.model.recipe.training.epochs)
    if not isinstance(epochs, int) or isinstance(epochs, bool) or not 1 <= epochs <= MAX_EPOCHS:
        raise Invalid(f"max_epochs: expected a whole number from 1 to {MAX_EPOCHS}, got {str(epochs)[:40]!r}")
    if served.model.path.suffix != ".pt":
        raise Invalid(f"model '{served.name}': an exported model cannot be trained; serve its checkpoint")

    def start(task: Task) -> Callable[[], None]:
        run = new_run(served.model.recipe, "finetuned").absolute()
        folder = make_folder(run.with_name(f"{run.name}-data"))  # stays: a stopped run goes on with it
        manifest = _write_manifest(service, served, folder)
        write_json(folder / "recipe.json", served.model.recipe.to_dict())
        options = {
            "--from": served.model.path.absolute(),
            "--manifest": manifest,
            "--prepared": folder / "prepared",
            "--output": run,
            "--device": str(served.model.runtime.device),
            "--set": f"training.epochs={epochs}",
        }
        command = [sys.executable, "-m", "ctseg", "finetune", str(folder / "recipe.json")]
        process = subprocess.Popen(
            command + [str(word) for pair in options.items() for word in pair],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C in the terminal is for the server, which stops it in an orderly way
        )
        task.status = "RUNNING"
        task.result = {"run": run.name}
        threading.Thread(target=_follow, args=(task, process), name="train", daemon=True).start()
        return lambda: _stop(process)

    return start


def start_batch(service: Service, served: Served, images: list[str], tag: str) -> Callable[[Task], Callable[[], None]]:
    """What `Tasks.begin` takes to segment images one by one and save the masks with a tag; others go in between."""
    loop = asyncio.get_running_loop()

    async def run(task: Task) -> None:
        failed = 0
        for number, image_id in enumerate(images, start=1):
            if task.status == "STOPPED":
                break
            try:
                await _segment_and_save(service, served, image_id, tag)
            except CtsegError:
                failed += 1
            except Exception as error:  # of one image: the others can still be done; its text may name a patient
                LOG.error("segmenting many images: one failed: %s", type(error).__name__)
                failed += 1
            task.details.append(f"{number} of {len(images)} images, {failed} failed")
        task.result = {"total": len(images), "failed": failed}
        task.finish("STOPPED" if task.status == "STOPPED" else "ERROR" if failed else "DONE")

    def start(task: Task) -> Callable[[], None]:
        task.status = "RUNNING"
        future = asyncio.run_coroutine_threadsafe(run(task), loop)
        future.add_done_callback(lambda done: None if task.end is not None else task.finish("ERROR"))
        return lambda: None

    return start


async def _segment_and_save(service: Service, served: Served, image_id: str, tag: str) -> None:
    store = service.datastore
    image = await asyncio.to_thread(store.image, image_id)
    while True:
        try:
            found = await service.segment(None, served, image)
            break
        except Busy:
            await asyncio.sleep(BUSY_SECONDS)
    notes = {"params": {"label_names": served.labels}}  # Slicer names what it loads by them
    await asyncio.to_thread(store.save_label, image_id, tag, found.mask, found.geometry, names=served.names, info=notes)


def _write_manifest(service: Service, served: Served, folder: Path) -> Path:
    """The data list of a training on what has final labels."""
    store = service.datastore
    images = store.images()
    cases = []
    for image_id, label in store.labelled(FINAL).items():
        used = label if served.takes_clicks else _relabelled(label, store.structures, served.labels, folder / "labels")
        if used is not None:
            cases.append({"image": str(_image_file(images[image_id], folder / "images")), "label": str(used)})
    if not cases:
        wanted = "" if served.takes_clicks else f" with {', '.join(served.labels)}"
        raise Conflict(f"training needs images with final labels{wanted}; there are none yet")
    held = cases[::VALIDATION_SHARE] if len(cases) >= VALIDATION_SHARE else []
    names = {str(value): name for name, value in store.structures.items()}
    labels = names if served.takes_clicks else served.model.recipe.labels
    splits = {"training": [case for case in cases if case not in held], "validation": held}
    write_json(folder / "manifest.json", {"name": "studies", "labels": {"0": "background", **labels}, **splits})
    return folder / "manifest.json"


def _image_file(image: Image, folder: Path) -> Path:
    """A CT as a file that training reads: itself, or a NIfTI of a DICOM series."""
    content = image.content()
    if isinstance(content, Path):
        return content
    path = make_folder(folder) / image.name
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return path


def _relabelled(label: Path, structures: dict[str, int], wanted: dict[str, int], folder: Path) -> Path | None:
    """A label map with the values that a model has for the structures, others left out; None if none of them is in."""
    volume = read_labels(label)
    table = np.zeros(256, dtype=np.uint8)
    for name, value in wanted.items():
        if name in structures:
            table[structures[name]] = value
    mapped = table[volume.array]
    if not mapped.any():
        return None
    path = make_folder(folder) / label.name
    write_labels(path, mapped, volume.geometry)
    return path


def _follow(task: Task, process: subprocess.Popen[str]) -> None:
    """Keeps what a process says until it ends."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip():
            task.details.append(printable(line.rstrip()))
    code = process.wait()
    process.stdout.close()
    task.result = {**task.result, "exit_code": code}
    task.details.append(json.dumps({"exit_code": code}))
    task.finish("STOPPED" if task.status == "STOPPED" else "DONE" if code == 0 else "ERROR")


def _stop(process: subprocess.Popen[str]) -> None:
    """Lets a training save and end; after some time it is killed."""
    process.terminate()

    def kill() -> None:
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()

    threading.Thread(target=kill, name="stop", daemon=True).start()


def _stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
