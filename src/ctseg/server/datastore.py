"""The studies folder: images as they are, labels below `labels/TAG/`, and an index of what the files cannot say.

An image's id is its file's name without the suffix. A request's id is only ever looked up among those of the images
that were found, never made into a path. The index holds the names of label values and notes about images and labels;
without it the files are found as before, and values are named `label_N`. An index that is damaged is set aside.
"""

from __future__ import annotations

import copy
import fcntl
import json
import logging
import os
import re
import shutil
import threading
import time
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
from ctseg.server.texts import check_json, is_text
from ctseg.volume import Geometry

LOG = logging.getLogger("ctseg.server")
FINAL, ORIGINAL = "final", "original"
"""The tags of labels that a person has finished, and that a model has made."""
REPLACED = "replaced"
"""Folder, below that of a tag, of the labels that newer ones took the place of."""
MAX_INFO_BYTES = 2**16
SETTLED_NS = 2 * 10**9
"""A folder that changed this long ago shows every change in its time; clocks of file systems are coarse."""
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
        self._images: dict[str, Path] = {}
        self._scanned_ns = 0
        self._claim: int | None = _claim(self._labels)
        for left in self.folder.glob(".ctseg-upload-*"):  # of a server that was killed
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
        self._index = _read_index(self._labels / "index.json")
        for value, name in (structures or {}).items():
            if name not in self.structures and str(value) not in self._index["structures"]:
                self._index["structures"][str(value)] = name
        self._name_values_of_files()

    def close(self) -> None:
        """Lets another server have the folder."""
        with self._lock:
            claim, self._claim = self._claim, None
        if claim is not None:
            os.close(claim)

    @property
    def structures(self) -> dict[str, int]:
        """Name -> value in every label map of this folder."""
        with self._lock:
            return {name: int(value) for value, name in self._index["structures"].items()}

    def images(self) -> dict[str, Path]:
        """Id -> file, in order of the files' names; of two files with one id, the first."""
        changed_ns = self.folder.stat().st_mtime_ns
        with self._lock:
            settled = time.time_ns() - changed_ns > SETTLED_NS
            if changed_ns != self._scanned_ns or not settled:
                self._images = self._scan()
                self._scanned_ns = changed_ns
            return dict(self._images)

    def _scan(self) -> dict[str, Path]:
        found: dict[str, Path] = {}
        for path in sorted(self.folder.iterdir()):
            wanted = is_image_name(path) and is_text(path.name) and not path.name.startswith(".")
            if wanted and self._is_inside(path):
                found.setdefault(image_stem(path), path)
        return found

    def image(self, image_id: str) -> Path:
        """The file of an image.

        Raises:
            NotHere: if there is none of that id.
        """
        path = self.images().get(image_id)
        if path is None or not path.is_file():
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
            mask: On the image's grid; its values are those of `names`, else of this folder, which must know them.
            geometry: The grid.
            names: Value -> name; values are changed to those of this folder.
            info: Kept in the index.

        Raises:
            NotHere: if there is no such image.
            Invalid: if the tag or a name is wrong, a value has no name, or the mask lies on another grid.
        """
        with self._lock:
            self._check_grid(image_id, geometry)
            path = self._new_label_path(image_id, tag)
            if names is None:
                self._check_known(mask)
            write = mask if names is None else self._renumbered(mask, names)
            notes = None if info is None else _checked_info(self._with_values(info))
            self._keep_replaced(path)
            write_labels(path, write, geometry)
            self._note_file(tag, path)
            of_tag = self._index["labels"].setdefault(tag, {})
            of_tag.pop(image_id, None)  # what was noted about the label before is not true of this one
            if notes is not None:
                of_tag[image_id] = notes
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
            whole = np.zeros(geometry.size, dtype=np.uint8, order="F")
            if path.is_file():
                present = read_labels(path)
                if not present.geometry.agrees_with(geometry):
                    raise Conflict("the label that is there lies on another grid than its image; move it away")
                whole = np.asfortranarray(present.array)
                self._name_values(whole)  # a new structure must not take the value of one without a name
            value = self._value(name)
            whole[whole == value] = 0
            whole[mask > 0] = value
            self._keep_replaced(path)
            write_labels(path, whole, geometry)
            self._note_file(tag, path)
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
        for value in _values(mask):
            if value not in names:
                raise Invalid(f"label value {value}: has no name among those given; name every value")
            table[value] = self._value(names[value])
        return table[mask]

    def _check_known(self, mask: NDArray[np.uint8]) -> None:
        known = set(self.structures.values())
        unknown = [value for value in _values(mask) if value not in known]
        if unknown:
            raise Invalid(
                f"label value {unknown[0]}: this folder knows no structure of it; send the names of the values"
            )

    def _with_values(self, info: Mapping[str, Any]) -> dict[str, Any]:
        """Notes whose `label_info` has the values of this folder, not those the client sent."""
        params, known = info.get("params"), self.structures
        if not isinstance(params, dict) or not isinstance(params.get("label_info"), list):
            return dict(info)
        named = [one for one in params["label_info"] if isinstance(one, dict) and str(one.get("name")) in known]
        stored = [{**one, "idx": known[str(one["name"])]} for one in named]
        return {**info, "params": {**params, "label_info": stored}}

    def _name_values(self, mask: NDArray[np.uint8]) -> None:
        for value in _values(mask):
            if str(value) not in self._index["structures"]:
                self._index["structures"][str(value)] = self._free_name(f"label_{value}")

    def _free_name(self, name: str) -> str:
        taken = self.structures
        while name in taken:
            name += "_"
        return name

    def _name_values_of_files(self) -> None:
        """Names what label files hold that this index has not seen, such as those put there by hand."""
        changed = False
        for tag, folder in self._tags().items():
            for path in sorted(folder.glob("*.nii.gz")):
                if not is_text(path.name) or self._index["files"].get(f"{tag}/{path.name}") == _version(path):
                    continue
                try:
                    self._name_values(read_labels(path).array)
                except CtsegError as error:
                    LOG.warning("a label with the tag %s cannot be read: %s", tag, type(error).__name__)
                self._note_file(tag, path)
                changed = True
        if changed:
            self._write_index()

    def _note_file(self, tag: str, path: Path) -> None:
        self._index["files"][f"{tag}/{path.name}"] = _version(path)

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
    """The index, or an empty one if there is none; of a damaged one, which is set aside, what can be used.

    Raises:
        CtsegError: if it cannot be read.
    """
    index: dict[str, Any] = {"structures": {}, "images": {}, "labels": {}, "files": {}}
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return index
    except OSError as error:
        raise CtsegError(f"labels/index.json: cannot be read: {error.strerror}; make it readable") from error
    except (ValueError, RecursionError):
        data = None
    for key in index:
        if isinstance(data, dict) and isinstance(data.get(key), dict):
            index[key] = data[key]
    index["structures"] = _usable_structures(index["structures"])
    index["labels"] = {tag: notes for tag, notes in index["labels"].items() if isinstance(notes, dict)}
    if not isinstance(data, dict) or any(data.get(key, {}) != index[key] for key in index):
        _set_aside(path)
    return index


def _usable_structures(structures: dict[str, Any]) -> dict[str, str]:
    usable: dict[str, str] = {}
    for value, name in structures.items():
        right_value = value.isascii() and value.isdecimal() and len(value) <= 3 and 1 <= int(value) <= MAX_STRUCTURES
        if right_value and isinstance(name, str) and is_text(name) and name not in usable.values():
            usable[str(int(value))] = name
    return usable


def _set_aside(path: Path) -> None:
    number = 1
    while (kept := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    with output_errors(path.parent):
        path.rename(kept)
    LOG.warning("labels/index.json is damaged; it is now %s, and values without a name are called label_N", kept.name)


def _values(mask: NDArray[np.uint8]) -> list[int]:
    """The values in a label map but 0, in order."""
    present: list[int] = np.flatnonzero(np.bincount(mask.ravel(order="K"), minlength=256)).tolist()
    return [value for value in present if value]


def _version(path: Path) -> list[int]:
    """Changes when the file does."""
    status = path.stat()
    return [status.st_mtime_ns, status.st_size]


def _checked_info(info: Mapping[str, Any]) -> dict[str, Any]:
    check_json(info, "notes")
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
