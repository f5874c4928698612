"""The bank: prepared cases on disk, memory-mapped, or on the GPU when they fit.

`prepare_bank` does the deterministic part of the recipe once per case: read, resample, window, crop to the body. A
case is a folder of `.npy` files that can be memory-mapped; it is made again only when its image, its label or the
recipe's preprocessing changes. Several are prepared at once; the result does not depend on how many. Intensities are
stored as float16: half the memory, and their rounding (2e-4 of the window) is below what mixed precision does to the
network's input anyway.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ctseg.engine.estimate import check_space, estimate
from ctseg.errors import CtsegError, ImageError, ManifestError, Stopped, list_problems
from ctseg.files import make_folder, output_errors, sync_contents
from ctseg.io.images import read_image, read_labels
from ctseg.manifest import Case
from ctseg.organs import index_organs
from ctseg.preprocess import prepare, prepare_labels
from ctseg.progress import Progress
from ctseg.recipe import Recipe
from ctseg.sampling import CaseArrays
from ctseg.volume import Volume
from ctseg.workers import in_parallel, num_workers

FORMAT = 2
MAX_ORGANS = 255
"""Label values that a recipe with clicks takes."""
SECTIONS = "sections"
"""Of organs, in `case.json`: see `organs.index_organs`."""
LEFTOVER_SECONDS = 24 * 3600
GPU_SHARE = 0.5
"""The bank moves to the GPU when it needs at most this share of the free memory there."""


@dataclass
class Room:
    """Bytes of a GPU that prepared cases may still take."""

    num_bytes: float = 0.0

    @classmethod
    def on(cls, device: torch.device, max_bytes: int | None = None) -> Room:
        """GPU_SHARE of what is free, or of `max_bytes` where that is less; none on a CPU."""
        if device.type != "cuda":
            return cls()
        free, _ = torch.cuda.mem_get_info(device)
        return cls(GPU_SHARE * (free if max_bytes is None else min(free, max_bytes)))

    def take(self, num_bytes: int) -> bool:
        """Whether they fit; they are taken then."""
        fits = num_bytes <= self.num_bytes
        self.num_bytes -= num_bytes if fits else 0
        return fits


@dataclass(frozen=True)
class BankReport:
    """What `prepare_bank` did: names of cases made now, cases that were ready, bytes of all."""

    made: tuple[str, ...]
    ready: tuple[str, ...]
    folder: Path
    num_bytes: int


def bank_folder(root: Path, recipe: Recipe) -> Path:
    """Where the recipe's prepared cases lie below `root`: one folder per recipe and preprocessing."""
    labels = "organs" if recipe.clicks is not None else len(recipe.labels)
    text = json.dumps([FORMAT, asdict(recipe.preprocess), labels], sort_keys=True)
    return root / f"{recipe.slug}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def case_folder(folder: Path, case: Case) -> Path:
    """Where a case lies in a bank's folder; cases of one name from different files do not meet."""
    files = [str(f.resolve()) for f in (case.image, case.label) if f is not None]
    return folder / f"{case.name[:50]}-{hashlib.sha256(json.dumps(files).encode()).hexdigest()[:8]}"


def prepare_bank(
    cases: tuple[Case, ...],
    recipe: Recipe,
    root: Path,
    progress: Progress,
    stop_requested: Callable[[], bool] = lambda: False,
    workers: int | None = None,
) -> BankReport:
    """Prepares every labelled case that is not ready yet; a killed run goes on where it stopped.

    Args:
        cases: The cases.
        recipe: How to prepare them.
        root: The folder of prepared cases of all recipes.
        progress: Told of every case.
        stop_requested: Asked before each case.
        workers: Cases at once; default as many as CPUs and memory allow.

    Raises:
        ManifestError: naming every case that cannot be prepared, after all others are done.
        OutputError: before anything is prepared, if the disk has too little space.
        Stopped: after a stop request.
    """
    folder = make_folder(bank_folder(root, recipe))
    _remove_leftovers(folder)
    todo = [case for case in cases if not _is_ready(case_folder(folder, case), case)]
    pending = set(todo)
    ready = tuple(case.name for case in cases if case not in pending)
    estimates = [estimate(case, recipe.preprocess) for case in todo]
    check_space(folder, estimates, progress)
    at_once = num_workers([e.memory_bytes for e in estimates], workers)
    problems: dict[Case, str | None] = {}
    progress.start(f"preparing {recipe.name}", len(cases))
    for name in ready:
        progress.advance(name)
    for case, problem in in_parallel(partial(_try_case, folder, recipe), todo, at_once, stop_requested):
        problems[case] = problem
        progress.advance(case.name)
    if len(problems) < len(todo):
        number = len(ready) + sum(problem is None for problem in problems.values())
        raise Stopped(
            f"stopped by a signal while preparing, {number} cases are ready; the same command goes on, a training with "
            f"--resume"
        )
    progress.finish()
    told = [f"{case.name}: {problems[case]}" for case in todo if problems[case] is not None]
    if told:
        raise ManifestError(list_problems("data set", told))
    num_bytes = sum(f.stat().st_size for case in cases for f in case_folder(folder, case).iterdir())
    return BankReport(tuple(case.name for case in todo), ready, folder, num_bytes)


def _try_case(folder: Path, recipe: Recipe, case: Case) -> str | None:
    """Prepares a case; why it cannot be, or None."""
    try:
        _prepare_case(case_folder(folder, case), case, recipe)
    except ImageError as error:
        return str(error)
    return None


def open_bank(
    cases: tuple[Case, ...], folder: Path, device: torch.device, room: Room | None = None
) -> list[CaseArrays]:
    """The prepared cases, in order: on a GPU when all fit into the `room` that is left for them, else memory-mapped."""
    host = [_open_case(case_folder(folder, case), case) for case in cases]
    if device.type != "cuda":
        return host
    needed = sum(c.host_image.nbytes + c.host_label.nbytes for c in host)
    return [_on_device(c, device) for c in host] if (room or Room.on(device)).take(needed) else host


def bank_fingerprint(cases: tuple[Case, ...], folder: Path) -> str:
    """A digest of the prepared cases' names, voxels and weights; the same wherever the bank lies.

    Raises:
        CtsegError: if a case is not prepared.
    """
    parts = [[case.name, _description(case_folder(folder, case))["sha256"], case.weight] for case in cases]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def organ_sections(case: Case, folder: Path) -> list[list[int]]:
    """The sections of a case that was prepared for a recipe with clicks, see `organs.index_organs`."""
    sections: list[list[int]] = _description(case_folder(folder, case))[SECTIONS]
    return sections


def _description(folder: Path) -> dict[str, Any]:
    try:
        description: dict[str, Any] = json.loads((folder / "case.json").read_text())
    except (OSError, ValueError) as error:
        raise CtsegError(f"prepared case '{folder}': cannot be read ({error}); delete it and prepare again") from error
    return description


def read_case(case: Case, binarize_labels: bool = False) -> tuple[Volume, Volume]:
    """The case's image and label, known to lie on one grid; with `binarize_labels` every value above 0 becomes 1.

    Raises:
        ImageError: if either cannot be read or their grids differ.
    """
    if case.label is None:
        raise ImageError(f"case '{case.name}' has no label")
    image, labels = read_image(case.image), read_labels(case.label)
    if not image.geometry.agrees_with(labels.geometry):
        raise ImageError(
            f"'{case.label}' does not lie on its image's grid: label {_grid(labels)}, image {_grid(image)}"
        )
    return image, Volume((labels.array > 0).astype(np.uint8), labels.geometry) if binarize_labels else labels


def _grid(volume: Volume) -> str:
    g = volume.geometry
    spacing = "x".join(f"{s:.4g}" for s in g.spacing_mm)
    origin = ", ".join(f"{o:.2f}" for o in g.origin_mm)
    return f"{'x'.join(map(str, g.size))} voxels of {spacing} mm at ({origin}) {g.axis_codes}"


def _fingerprint(case: Case) -> list[Any]:
    files = [f for f in (case.image, case.label) if f is not None]
    return [[str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns] for f in files]


def _remove_leftovers(folder: Path) -> None:
    """Removes what killed runs have left half made; what is younger than a day may still be worked on."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > LEFTOVER_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _is_ready(folder: Path, case: Case) -> bool:
    try:
        return bool(json.loads((folder / "case.json").read_text())["source"] == _fingerprint(case))
    except (OSError, ValueError, KeyError):
        return False


def _prepare_case(folder: Path, case: Case, recipe: Recipe) -> None:
    source, spec = _fingerprint(case), recipe.preprocess
    num_labels = MAX_ORGANS if recipe.clicks is not None else len(recipe.labels)
    image, labels = read_case(case, spec.binarize_labels)
    highest = int(labels.array.max())
    if highest > num_labels:
        raise ImageError(f"'{case.label}': label value {highest}, but the recipe has values 1..{num_labels}")
    image_XYZ = prepare(image, spec, torch.device("cpu")).image_XYZ.numpy()
    # On the image's grid, to the last digit: the label's header may differ in its rounding.
    label_XYZ = prepare_labels(Volume(labels.array, image.geometry), spec)
    if spec.crop_foreground:
        box = _foreground_box(image_XYZ)
        image_XYZ, label_XYZ = image_XYZ[box], label_XYZ[box]
    arrays: dict[str, NDArray[Any]] = {
        "image": image_XYZ.astype(np.float16),
        "label": label_XYZ.astype(np.uint8, copy=False),
        "foreground": np.flatnonzero(label_XYZ).astype(np.int32),
    }
    about: dict[str, Any] = {}
    if recipe.clicks is not None:
        arrays["foreground"], about[SECTIONS] = index_organs(arrays["label"])
    description = {"source": source, "shape": list(image_XYZ.shape), "sha256": _digest(arrays), **about}
    _write_case(folder, case, arrays, description)


def _digest(arrays: dict[str, NDArray[Any]]) -> str:
    digest = hashlib.sha256()
    for array in arrays.values():
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _foreground_box(image_XYZ: NDArray[np.float32]) -> tuple[slice, ...]:
    """The box of voxels above 0; the whole array if there is none."""
    box = []
    for axis in range(3):
        hits = np.flatnonzero((image_XYZ > 0).any(axis=tuple(a for a in range(3) if a != axis)))
        box.append(slice(int(hits[0]), int(hits[-1]) + 1) if len(hits) else slice(None))
    return tuple(box)


def _write_case(folder: Path, case: Case, arrays: dict[str, NDArray[Any]], description: dict[str, Any]) -> None:
    """All files of a case in a temporary folder, then one rename; `case.json` marks a whole case."""
    # Two nodes may have the same process numbers and make the same case.
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    with output_errors(folder):
        try:
            temporary.mkdir(parents=True)
            for name, array in arrays.items():
                np.save(temporary / f"{name}.npy", np.ascontiguousarray(array))
            (temporary / "case.json").write_text(json.dumps(description))
            sync_contents(temporary)
            while not _is_ready(folder, case):  # else another run has made it meanwhile, and may be reading it
                shutil.rmtree(folder, ignore_errors=True)
                try:
                    temporary.rename(folder)
                    break
                except OSError as error:  # it has made it just now
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                        raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _open_case(folder: Path, case: Case) -> CaseArrays:
    try:
        image, label, foreground = (_map_array(folder / f"{part}.npy") for part in ("image", "label", "foreground"))
    except (OSError, ValueError, EOFError) as error:
        raise CtsegError(f"prepared case '{folder}': cannot be read ({error}); delete it and prepare again") from error
    tensors = torch.from_numpy(image), torch.from_numpy(label)
    return CaseArrays(case.name, *tensors, image, label, foreground, case.weight)


def _map_array(path: Path) -> NDArray[Any]:
    """The array memory-mapped copy-on-write (torch wants writable memory; the file itself is never changed)."""
    array: NDArray[Any] = (
        np.load(path, mmap_mode="c", allow_pickle=False) if path.stat().st_size > 128 else np.load(path)
    )
    return array


def _on_device(case: CaseArrays, device: torch.device) -> CaseArrays:
    return replace(case, image_XYZ=case.image_XYZ.to(device), label_XYZ=case.label_XYZ.to(device))
