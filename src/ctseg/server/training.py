"""Fine-tuning a served model on the studies' images with final labels, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ctseg.files import atomic_path, folder_if_used, make_folder, write_json
from ctseg.io.images import read_labels, write_labels
from ctseg.progress import printable
from ctseg.server.datastore import FINAL
from ctseg.server.images import Image
from ctseg.server.problems import Conflict, Invalid
from ctseg.server.service import Served, Service
from ctseg.server.tasks import STOP_SECONDS, Task
from ctseg.workspace import new_run

VALIDATION_SHARE = 5
"""One of so many labelled images is kept for validation; fewer are all for training."""
MAX_EPOCHS = 10_000


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
        with folder_if_used(run.with_name(f"{run.name}-data")) as folder:  # stays: a stopped run goes on with it
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
        task.result = {"run": run.name}
        threading.Thread(target=_follow, args=(task, process), name="train", daemon=True).start()
        return lambda: _stop(process)

    return start


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
