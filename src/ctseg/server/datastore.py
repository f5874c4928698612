"""The studies folder: images as they are, labels below `labels/TAG/`, and an index of what the files cannot say.

An image's id is its file's name without the suffix. A request's id is only ever looked up among those of the images
that were found, never made into a path. The index holds the names of label values and notes about images and labels;
without it the files are found as before, and values are named `label_N`.
"""

from __future__ import annotations

import copy
import fcntl
import json
import os
import re
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctseg.errors import CtsegError, ImageError
from ctseg.files import atomic_path, make_folder, output_errors, write_json
from ctseg.io.images import read_geometry, read_labels, write_labels
from ctseg.manifest import image_stem, is_image_name
from ctseg.server.problems import Conflict, Invalid, NotHere
from ctseg.volume import Geometry

FINAL, ORIGINAL = "final", "original"
"""The tags of labels that a person has finished, and that a model has made."""
REPLACED = "replaced"
"""Folder, below that of a tag, of the labels that newer ones took the place of."""
MAX_INFO_BYTES = 2**16
MAX_STRUCTURES = 255

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_ID = re.compile(r"[\w(][\w .()+,=@-]{0,199}")
_STRUCTURE = re.compile(r"[^\s\x00-\x1f\x7f](?:[^\x00-\x1f\x7f]{0,62}[^\s\x00-\x1f\x7f])?")


class Datastore:
    """One studies folder; threads may share it, processes may not.

    Args:
        folder: It must exist and be writable.
        structures: Names that label values begin with: value -> name.

    Raises:
        CtsegError: if the folder is missing, or another server has it.
    """

    def __init__(self, folder: Path, structures: Mapping[int, str] | None = None) -> None:
        if not folder.is_dir():
            raise CtsegError(f"--studies {folder}: no such folder; name the folder of the images")
        self.folder = folder.resolve()
        self._labels = make_folder(self.folder / "labels")
        self._lock = threading.RLock()
        self._claim = _claim(self._labels)
        self._index = _read_index(self._labels / "index.json")
        for value, name in (structures or {}).items():
            if name not in self.structures and str(value) not in self._index["structures"]:
                self._index["structures"][str(value)] = name

    def close(self) -> None:
        """Lets another server have the folder."""
        os.close(self._claim)

    @property
    def structures(self) -> dict[str, int]:
        """Name -> value in every label map of this folder."""
        with self._lock:
            return {name: int(value) for value, name in self._index["structures"].items()}

    def images(self) -> dict[str, Path]:
        """Id -> file, in order of the files' names; of two files with one id, the first."""
        found: dict[str, Path] = {}
        for path in sorted(self.folder.iterdir()):
            if is_image_name(path) and not path.name.startswith(".") and self._is_inside(path):
                found.setdefault(image_stem(path), path)
        return found

    def image(self, image_id: str) -> Path:
        """The file of an image.

        Raises:
            NotHere: if there is none of that id.
        """
        path = self.images().get(image_id)
        if path is None:
            raise NotHere(f"image {_shown(image_id)}: not in the studies folder; GET /api/images lists what is")
        return path

    def add_image(self, image_id: str, source: Path) -> str:
        """Takes the file `source`, which has an image's suffix and lies in the same folder, in as a new image; its id.

        Raises:
            Conflict: if there is one of that id.
            Invalid: if it cannot be an id.
        """
        if not _ID.fullmatch(image_id):
            raise Invalid(f"image id {_shown(image_id)}: expected at most 200 letters, digits and '_-.()+,=@ '")
        suffix = source.name[len(image_stem(source)) :].lower()
        with self._lock, output_errors(self.folder):
            target = self.folder / f"{image_id}{suffix}"
            if image_id in self.images() or os.path.lexists(target):
                raise Conflict(f"image {_shown(image_id)}: is there already; choose another id")
            source.rename(target)
        return image_id

    def labels(self, image_id: str) -> dict[str, Path]:
        """Tag -> file of an image's labels."""
        name = f"{image_id}.nii.gz"
        return {tag: folder / name for tag, folder in self._tags().items() if (folder / name).is_file()}

    def label(self, image_id: str, tag: str) -> Path:
        """The file of a label.

        Raises:
            NotHere: if there is none of that image and tag.
        """
        path = self.labels(image_id).get(tag) if image_id in self.images() else None
        if path is None:
            raise NotHere(f"label of image {_shown(image_id)} with tag {_shown(tag)}: there is none")
        return path

    def labelled(self, tag: str = FINAL) -> dict[str, Path]:
        """Id -> label file, of the images that have a label with this tag."""
        folder = self._tags().get(tag)
        paths = {} if folder is None else {i: folder / f"{i}.nii.gz" for i in self.images()}
        return {image_id: path for image_id, path in paths.items() if path.is_file()}

    def save_label(
        self,
        image_id: str,
        tag: str,
        mask: NDArray[np.uint8],
        geometry: Geometry,
        *,
        names: Mapping[int, str] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> Path:
        """Writes the whole label map of an image; one that was there is kept in `replaced/`.

        Args:
            image_id: Of an image.
            tag: Of the label.
            mask: On the image's grid; its values are those of `names`, else of this folder.
            geometry: The grid.
            names: Value -> name; values are changed to those of this folder.
            info: Kept in the index.

        Raises:
            NotHere: if there is no such image.
            Invalid: if the tag or a name is wrong, or the mask lies on another grid.
        """
        with self._lock:
            self._check_grid(image_id, geometry)
            path = self._new_label_path(image_id, tag)
            write = mask if names is None else self._renumbered(mask, names)
            self._keep_replaced(path)
            write_labels(path, write, geometry)
            self._name_values(write)
            if info is not None:
                self._index["labels"].setdefault(tag, {})[image_id] = _checked_info(info)
            self._write_index()
        return path

    def save_structure(
        self, image_id: str, tag: str, name: str, mask: NDArray[np.uint8], geometry: Geometry
    ) -> tuple[Path, int]:
        """Puts one structure into the image's label map, in place of what it held of it; the file and the value.

        Other structures stay but where the new one lies: people who save different structures do not disturb one
        another.

        Raises:
            NotHere: if there is no such image.
            Invalid: if the tag or the name is wrong, or the mask or the label map lies on another grid.
        """
        with self._lock:
            self._check_grid(image_id, geometry)
            path = self._new_label_path(image_id, tag)
            value = self._value(name)
            whole = np.zeros(geometry.size, dtype=np.uint8, order="F")
            if path.is_file():
                present = read_labels(path)
                if not present.geometry.agrees_with(geometry):
                    raise Conflict("the label that is there lies on another grid than its image; move it away")
                whole = np.asfortranarray(present.array)
            whole[whole == value] = 0
            whole[mask > 0] = value
            self._keep_replaced(path)
            write_labels(path, whole, geometry)
            self._write_index()
        return path, value

    def image_info(self, image_id: str) -> dict[str, Any]:
        """What was noted about an image."""
        self.image(image_id)
        with self._lock:
            return copy.deepcopy(self._index["images"].get(image_id, {}))

    def update_image_info(self, image_id: str, info: Mapping[str, Any]) -> None:
        """Adds notes about an image."""
        self.image(image_id)
        with self._lock:
            merged = {**self._index["images"].get(image_id, {}), **info}
            self._index["images"][image_id] = _checked_info(merged)
            self._write_index()

    def label_info(self, image_id: str, tag: str) -> dict[str, Any]:
        """What was noted about a label."""
        self.label(image_id, tag)
        with self._lock:
            return copy.deepcopy(self._index["labels"].get(tag, {}).get(image_id, {}))

    def update_label_info(self, image_id: str, tag: str, info: Mapping[str, Any]) -> None:
        """Adds notes about a label."""
        self.label(image_id, tag)
        with self._lock:
            of_tag = self._index["labels"].setdefault(tag, {})
            of_tag[image_id] = _checked_info({**of_tag.get(image_id, {}), **info})
            self._write_index()

    def _is_inside(self, path: Path) -> bool:
        """True for a file, also behind a link that does not lead out of the folder."""
        try:
            return path.is_file() and path.resolve().is_relative_to(self.folder)
        except OSError:
            return False

    def _tags(self) -> dict[str, Path]:
        folders = (path for path in sorted(self._labels.iterdir()) if _TAG.fullmatch(path.name))
        return {path.name: path for path in folders if path.is_dir() and not path.is_symlink()}

    def _new_label_path(self, image_id: str, tag: str) -> Path:
        if not _TAG.fullmatch(tag) or tag == REPLACED:
            raise Invalid(f"tag {_shown(tag)}: expected at most 64 letters, digits, '_' and '-', such as 'final'")
        folder = self._labels / tag
        if folder.is_symlink():
            raise Invalid(f"tag {_shown(tag)}: its folder is a link; replace it by a folder")
        return make_folder(folder) / f"{image_id}.nii.gz"

    def _check_grid(self, image_id: str, geometry: Geometry) -> None:
        of_image = read_geometry(self.image(image_id))
        if not of_image.agrees_with(geometry):
            sizes = " and ".join(" x ".join(map(str, g.size)) for g in (geometry, of_image))
            raise Invalid(f"a label lies on its image's grid; label and image differ ({sizes} voxels); export it again")

    def _value(self, name: str) -> int:
        """The value of a structure, a new one if it is new."""
        if not _STRUCTURE.fullmatch(name):
            raise Invalid(f"label {_shown(name)}: expected a name of at most 64 characters")
        known = self.structures
        if name not in known:
            used = set(known.values())
            value = next((n for n in range(1, MAX_STRUCTURES + 1) if n not in used), None)
            if value is None:
                raise Conflict(f"label {_shown(name)}: there are {MAX_STRUCTURES} already; use one of them")
            self._index["structures"][str(value)] = name
            return value
        return known[name]

    def _renumbered(self, mask: NDArray[np.uint8], names: Mapping[int, str]) -> NDArray[np.uint8]:
        table = np.arange(256, dtype=np.uint8)
        present = np.flatnonzero(np.bincount(mask.ravel(order="K"), minlength=256))
        for value in present[present > 0].tolist():
            if value not in names:
                raise Invalid(f"label value {value}: has no name among those given; name every value")
            table[value] = self._value(names[value])
        return table[mask]

    def _name_values(self, mask: NDArray[np.uint8]) -> None:
        present = np.flatnonzero(np.bincount(mask.ravel(order="K"), minlength=256)).tolist()
        for value in present:
            if value and str(value) not in self._index["structures"]:
                self._index["structures"][str(value)] = f"label_{value}"

    def _keep_replaced(self, path: Path) -> None:
        if not path.is_file():
            return
        folder = make_folder(path.parent / REPLACED)
        number = 1
        while (kept := folder / f"{image_stem(path)}-{number:03d}.nii.gz").exists():
            number += 1
        with atomic_path(kept) as temporary:
            shutil.copyfile(path, temporary)  # the label stays where it is until the new one takes its place

    def _write_index(self) -> None:
        write_json(self._labels / "index.json", self._index)


def read_label_of(path: Path, image: Path) -> tuple[NDArray[np.uint8], Geometry]:
    """A label map and its grid; a `.bin` file holds nothing but a byte for each voxel of the image, x fastest.

    Raises:
        ImageError: if it cannot be trusted.
    """
    if path.suffix != ".bin":
        volume = read_labels(path)
        return volume.array, volume.geometry
    geometry = read_geometry(image)
    voxels = int(np.prod(geometry.size))
    if path.stat().st_size != voxels:
        raise ImageError(f"label: expected a byte for each of {voxels} voxels, got {path.stat().st_size} bytes")
    return np.fromfile(path, dtype=np.uint8).reshape(geometry.size, order="F"), geometry


def _claim(folder: Path) -> int:
    """A lock that the kernel gives back when this process ends, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise CtsegError(f"--studies {folder.parent}: another `ctseg serve` has this folder; stop it first") from error
    return descriptor


def _read_index(path: Path) -> dict[str, Any]:
    """The index, or an empty one in place of what is missing or damaged."""
    index: dict[str, Any] = {"structures": {}, "images": {}, "labels": {}}
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return index
    for key in index:
        if isinstance(data, dict) and isinstance(data.get(key), dict):
            index[key] = data[key]
    index["structures"] = {
        value: name
        for value, name in index["structures"].items()
        if value.isdecimal() and 1 <= int(value) <= MAX_STRUCTURES and isinstance(name, str)
    }
    return index


def _checked_info(info: Mapping[str, Any]) -> dict[str, Any]:
    try:
        text = json.dumps(info, allow_nan=False)
    except ValueError as error:
        raise Invalid("notes: expected JSON without NaN or infinity") from error
    if len(text) > MAX_INFO_BYTES:
        raise Invalid(f"notes: at most {MAX_INFO_BYTES} bytes, got {len(text)}")
    plain: dict[str, Any] = json.loads(text)
    return plain


def _shown(text: str) -> str:
    return repr(text[:80])
