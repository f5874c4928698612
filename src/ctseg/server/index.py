"""The index of a studies folder: what its files cannot say. Names of label values, and notes about images and labels.

Without it everything is found as before, and values are named `label_N`. One that is damaged is set aside.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctseg.errors import CtsegError
from ctseg.files import output_errors, write_json
from ctseg.server.problems import Conflict, Invalid
from ctseg.server.texts import check_json, is_text, shown

LOG = logging.getLogger("ctseg.server")
MAX_INFO_BYTES = 2**16
MAX_STRUCTURES = 255

STRUCTURE_NAME = re.compile(r"[^\s\x00-\x1f\x7f](?:[^\x00-\x1f\x7f]{0,62}[^\s\x00-\x1f\x7f])?")


class Index:
    """One index in memory and its file; its user sees to it that one thread changes it at a time.

    Raises:
        CtsegError: if the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._data = _read(path)

    @contextmanager
    def naming(self) -> Iterator[None]:
        """What values are named inside is forgotten if an error ends it: they are not in any file then."""
        before = dict(self._data["structures"])
        try:
            yield
        except BaseException:
            self._data["structures"] = before
            raise

    @property
    def structures(self) -> dict[str, int]:
        """Name -> value in every label map of this folder."""
        return {name: int(value) for value, name in self._data["structures"].items()}

    def suggest(self, value: int, name: str) -> None:
        """Names a value if neither is known yet."""
        if name not in self.structures and str(value) not in self._data["structures"]:
            self._data["structures"][str(value)] = name

    def value_of(self, name: str) -> int:
        """The value of a structure, a new one if it is new.

        Raises:
            Invalid: if it cannot be a name.
            Conflict: if there are as many as may be.
        """
        if not STRUCTURE_NAME.fullmatch(name):
            raise Invalid(f"label {shown(name)}: expected a name of at most 64 characters")
        known = self.structures
        if name not in known:
            used = set(known.values())
            value = next((n for n in range(1, MAX_STRUCTURES + 1) if n not in used), None)
            if value is None:
                raise Conflict(f"label {shown(name)}: there are {MAX_STRUCTURES} already; use one of them")
            self._data["structures"][str(value)] = name
            return value
        return known[name]

    def renumbered(self, mask: NDArray[np.uint8], names: Mapping[int, str]) -> NDArray[np.uint8]:
        """A label map whose values mean `names`, with the values of this folder.

        Raises:
            Invalid: if a value has no name.
        """
        table = np.arange(256, dtype=np.uint8)
        for value in _values(mask):
            if value not in names:
                raise Invalid(f"label value {value}: has no name among those given; name every value")
            table[value] = self.value_of(names[value])
        return table[mask]

    def check_known(self, mask: NDArray[np.uint8]) -> None:
        """Passes if every value of a label map has a name.

        Raises:
            Invalid: if one has not.
        """
        known = set(self.structures.values())
        unknown = [value for value in _values(mask) if value not in known]
        if unknown:
            raise Invalid(
                f"label value {unknown[0]}: this folder knows no structure of it; send the names of the values"
            )

    def name_values(self, mask: NDArray[np.uint8]) -> None:
        """Names the values of a label map that have no name."""
        for value in _values(mask):
            if str(value) not in self._data["structures"]:
                self._data["structures"][str(value)] = self._free_name(f"label_{value}")

    def image_notes(self, image_id: str) -> dict[str, Any]:
        """What was noted about an image."""
        notes: dict[str, Any] = copy.deepcopy(self._data["images"].get(image_id, {}))
        return notes

    def label_notes(self, image_id: str, tag: str) -> dict[str, Any]:
        """What was noted about a label."""
        notes: dict[str, Any] = copy.deepcopy(self._data["labels"].get(tag, {}).get(image_id, {}))
        return notes

    def note_image(self, image_id: str, notes: Mapping[str, Any]) -> None:
        """Takes the place of what was noted about an image.

        Raises:
            Invalid: if the notes are too large or no JSON.
        """
        self._data["images"][image_id] = checked_notes(notes)

    def note_label(self, image_id: str, tag: str, notes: Mapping[str, Any] | None) -> None:
        """Takes the place of what was noted about a label; None: nothing is.

        Raises:
            Invalid: if the notes are too large or no JSON.
        """
        of_tag = self._data["labels"].setdefault(tag, {})
        of_tag.pop(image_id, None)
        if notes is not None:
            of_tag[image_id] = checked_notes(notes)

    def with_values(self, info: Mapping[str, Any]) -> dict[str, Any]:
        """Notes whose `label_info` and `label_names` have the values of this folder, not those they came with."""
        params, known = info.get("params"), self.structures
        if not isinstance(params, dict):
            return dict(info)
        if isinstance(params.get("label_info"), list):
            named = [one for one in params["label_info"] if isinstance(one, dict) and str(one.get("name")) in known]
            params = {**params, "label_info": [{**one, "idx": known[str(one["name"])]} for one in named]}
        if isinstance(params.get("label_names"), dict):
            values = sorted((known[name], name) for name in params["label_names"] if name in known)
            params = {**params, "label_names": {name: value for value, name in values}}
        return {**info, "params": params}

    def knows(self, tag: str, path: Path) -> bool:
        """True if the values of a label file were named, and it has not changed since."""
        return bool(self._data["files"].get(f"{tag}/{path.name}") == _version(path))

    def saw(self, tag: str, path: Path) -> None:
        """Says that they are named."""
        self._data["files"][f"{tag}/{path.name}"] = _version(path)

    def write(self) -> None:
        """Writes the file, whole or not at all."""
        write_json(self._path, self._data)

    def _free_name(self, name: str) -> str:
        taken = self.structures
        while name in taken:
            name += "_"
        return name


def checked_notes(info: Mapping[str, Any]) -> dict[str, Any]:
    """Notes as plain JSON.

    Raises:
        Invalid: if they are too large, nested too deeply, or no JSON.
    """
    check_json(info, "notes")
    try:
        text = json.dumps(info, allow_nan=False)
    except ValueError as error:
        raise Invalid("notes: expected JSON without NaN or infinity") from error
    if len(text) > MAX_INFO_BYTES:
        raise Invalid(f"notes: at most {MAX_INFO_BYTES} bytes, got {len(text)}")
    plain: dict[str, Any] = json.loads(text)
    return plain


def _read(path: Path) -> dict[str, Any]:
    """The index, or an empty one if there is none; of a damaged one, which is set aside, what can be used."""
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
    index["images"] = _dicts(index["images"])
    index["labels"] = {tag: _dicts(notes) for tag, notes in _dicts(index["labels"]).items()}
    if not isinstance(data, dict) or any(data.get(key, {}) != index[key] for key in index):
        _set_aside(path)
    return index


def _dicts(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if isinstance(value, dict)}


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
