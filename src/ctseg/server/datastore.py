"""The studies folder: CTs as they are, labels below `labels/TAG/`, and an index of what the files cannot say.

The id of an image file is its name without the suffix, that of a DICOM series a pseudonym. A request's id, which may
be a SeriesInstanceUID too, is only ever looked up among those of the CTs that were found, never made into a path.
"""

from __future__ import annotations

import fcntl
import logging
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
from ctseg.files import atomic_path, make_folder, output_errors
from ctseg.io.dicom.geometry import POSITION_TOLERANCE_MM
from ctseg.io.images import read_labels, write_labels
from ctseg.manifest import image_stem
from ctseg.server.finder import Finder
from ctseg.server.images import Image, SeriesImage
from ctseg.server.index import Index, checked_notes
from ctseg.server.problems import Conflict, Invalid, NotHere
from ctseg.server.texts import is_text, shown
from ctseg.volume import Geometry

LOG = logging.getLogger("ctseg.server")
FINAL, ORIGINAL = "final", "original"
"""The tags of labels that a person has finished, and that a model has made."""
REPLACED = "replaced"
"""Folder, below that of a tag, of the labels that newer ones took the place of."""

_TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
MAX_ID_BYTES = 200
"""The file of a label is called by it, and 255 bytes are what a file's name may have."""
_ID = re.compile(r"[\w(][\w .()+,=@-]{0,199}")


_FRAMES, _SLICE = "frames.dcm", "slice_"
"""Names of DICOM files that clients have sent; that of a slice goes on with its place in millimetres."""


def check_tag(tag: str) -> str:
    """`tag`, if labels can have it.

    Raises:
        Invalid: if not.
    """
    if not _TAG.fullmatch(tag) or tag == REPLACED:
        raise Invalid(f"tag {shown(tag)}: expected at most 64 letters, digits, '_' and '-', such as 'final'")
    return tag


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
        self._finder = Finder(self.folder, self._labels)
        self._claim: int | None = _claim(self._labels)
        for left in self.folder.glob(".ctseg-upload-*"):  # of a server that was killed
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
        self._index = Index(self._labels / "index.json")
        for value, name in (structures or {}).items():
            self._index.suggest(value, name)
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
            return self._index.structures

    def images(self) -> dict[str, Image]:
        """Id -> CT: files in order of their names, then DICOM series; of two with one id, the first."""
        with self._lock:
            return dict(self._finder.images())

    def find(self, wanted: str) -> tuple[str, Image]:
        """The id of a CT and itself; `wanted` is the id, or the SeriesInstanceUID of a DICOM series.

        Raises:
            NotHere: if there is none.
            Conflict: if several have this SeriesInstanceUID.
        """
        with self._lock:
            images = self._finder.images()
            if wanted in images:
                return wanted, images[wanted]
            series = [one for one in images.values() if isinstance(one, SeriesImage) and one.uid == wanted]
        if len(series) > 1:
            ids = ", ".join(one.id for one in series)
            raise Conflict(f"image: several series have this SeriesInstanceUID; name one of {ids}")
        if not series:
            raise NotHere(f"image {shown(wanted)}: not in the studies folder; GET /api/images lists what is")
        return series[0].id, series[0]

    def image(self, image_id: str) -> Image:
        """A CT.

        Raises:
            NotHere: if there is none of that id.
        """
        return self.find(image_id)[1]

    def add_image(self, image_id: str, source: Path) -> str:
        """Takes the file `source`, which has an image's suffix and lies in the same folder, in as a new image; its id.

        Raises:
            Conflict: if there is one of that id.
            Invalid: if it cannot be an id.
        """
        if not _ID.fullmatch(image_id) or len(image_id.encode()) > MAX_ID_BYTES:
            raise Invalid(f"image id {shown(image_id)}: expected at most 200 letters, digits and '_-.()+,=@ '")
        suffix = source.name[len(image_stem(source)) :].lower()
        with self._lock, output_errors(self.folder):
            target = self.folder / f"{image_id}{suffix}"
            if image_id in self.images() or os.path.lexists(target):
                raise Conflict(f"image {shown(image_id)}: is there already; choose another id")
            source.rename(target)
        return image_id

    def add_dicom(self, series_id: str, source: Path, position_mm: NDArray[np.float64] | None = None) -> None:
        """Takes the DICOM file `source`, which lies in the same folder, in as part of a series, in a folder of its own.

        Args:
            series_id: Of its series.
            source: The file.
            position_mm: Of its only slice; None if it is a whole series.

        Raises:
            Conflict: if it, or a slice at its place, is there already, or its series lies elsewhere.
        """
        folder = self.folder / series_id
        with self._lock, output_errors(self.folder):
            is_new = not os.path.lexists(folder)
            taken = folder.is_symlink() or (series_id in self.images() if is_new else position_mm is None)
            if taken or os.path.lexists(folder / _FRAMES):
                raise Conflict(f"image {shown(series_id)}: is there already")
            if position_mm is not None and any(_is_near(path, position_mm) for path in folder.glob(f"{_SLICE}*.dcm")):
                raise Conflict(f"image {shown(series_id)}: has a slice at this place already")
            name = _FRAMES if position_mm is None else f"{_SLICE}{'_'.join(f'{mm:+.3f}' for mm in position_mm)}.dcm"
            source.rename(make_folder(folder) / name)

    def labels(self, image_id: str) -> dict[str, Path]:
        """Tag -> file of an image's labels."""
        name = f"{image_id}.nii.gz"
        return {tag: folder / name for tag, folder in self._tags().items() if (folder / name).is_file()}

    def label(self, image_id: str, tag: str) -> Path:
        """The file of a label.

        Raises:
            NotHere: if there is none of that image and tag.
        """
        return self._label(image_id, tag)[1]

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
            info: Kept in the index, in place of what was noted about the label before.

        Raises:
            NotHere: if there is no such image.
            Invalid: if the tag or a name is wrong, a value has no name, or the mask lies on another grid.
        """
        with self._lock, self._index.naming():
            image_id = self._check_grid(image_id, geometry)
            path = self._new_label_path(image_id, tag)
            if names is None:
                self._index.check_known(mask)
            write = mask if names is None else self._index.renumbered(mask, names)
            notes = None if info is None else checked_notes(self._index.with_values(info))
            self._keep_replaced(path)
            write_labels(path, write, geometry)
            self._index.saw(tag, path)
            self._index.note_label(image_id, tag, notes)
            self._index.write()
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
        with self._lock, self._index.naming():
            path = self._new_label_path(self._check_grid(image_id, geometry), tag)
            whole = np.zeros(geometry.size, dtype=np.uint8, order="F")
            if path.is_file():
                present = read_labels(path)
                if not present.geometry.agrees_with(geometry):
                    raise Conflict("the label that is there lies on another grid than its image; move it away")
                whole = np.asfortranarray(present.array)
                self._index.name_values(whole)  # a new structure must not take the value of one without a name
            value = self._index.value_of(name)
            whole[whole == value] = 0
            whole[mask > 0] = value
            self._keep_replaced(path)
            write_labels(path, whole, geometry)
            self._index.saw(tag, path)
            self._index.write()
        return path, value

    def image_info(self, image_id: str) -> dict[str, Any]:
        """What was noted about an image."""
        with self._lock:
            return self._index.image_notes(self.find(image_id)[0])

    def update_image_info(self, image_id: str, info: Mapping[str, Any]) -> None:
        """Adds notes about an image."""
        with self._lock:
            image_id = self.find(image_id)[0]
            self._index.note_image(image_id, {**self._index.image_notes(image_id), **info})
            self._index.write()

    def label_info(self, image_id: str, tag: str) -> dict[str, Any]:
        """What was noted about a label."""
        with self._lock:
            return self._index.label_notes(self._label(image_id, tag)[0], tag)

    def update_label_info(self, image_id: str, tag: str, info: Mapping[str, Any]) -> None:
        """Adds notes about a label."""
        with self._lock:
            image_id = self._label(image_id, tag)[0]
            self._index.note_label(image_id, tag, {**self._index.label_notes(image_id, tag), **info})
            self._index.write()

    def _label(self, wanted: str, tag: str) -> tuple[str, Path]:
        try:
            image_id = self.find(wanted)[0]
            return image_id, self.labels(image_id)[tag]
        except (NotHere, KeyError) as error:
            raise NotHere(f"label of image {shown(wanted)} with tag {shown(tag)}: there is none") from error

    def _tags(self) -> dict[str, Path]:
        folders = (path for path in sorted(self._labels.iterdir()) if _TAG.fullmatch(path.name))
        return {path.name: path for path in folders if path.is_dir() and not path.is_symlink()}

    def _new_label_path(self, image_id: str, tag: str) -> Path:
        check_tag(tag)
        folder = self._labels / tag
        if folder.is_symlink():
            raise Invalid(f"tag {shown(tag)}: its folder is a link; replace it by a folder")
        return make_folder(folder) / f"{image_id}.nii.gz"

    def _check_grid(self, wanted: str, geometry: Geometry) -> str:
        """The id of an image that lies on this grid."""
        image_id, image = self.find(wanted)
        of_image = image.extent().geometry
        if not of_image.agrees_with(geometry):
            sizes = " and ".join(" x ".join(map(str, g.size)) for g in (geometry, of_image))
            raise Invalid(f"a label lies on its image's grid; label and image differ ({sizes} voxels); export it again")
        return image_id

    def _name_values_of_files(self) -> None:
        """Names what label files hold that this index has not seen, such as those put there by hand."""
        changed = False
        for tag, folder in self._tags().items():
            for path in sorted(folder.glob("*.nii.gz")):
                if not is_text(path.name) or self._index.knows(tag, path):
                    continue
                try:
                    self._index.name_values(read_labels(path).array)
                except CtsegError as error:
                    LOG.warning("a label with the tag %s cannot be read: %s", tag, type(error).__name__)
                self._index.saw(tag, path)
                changed = True
        if changed:
            self._index.write()

    def _keep_replaced(self, path: Path) -> None:
        if not path.is_file():
            return
        folder = make_folder(path.parent / REPLACED)
        number = 1
        while (kept := folder / f"{image_stem(path)}-{number:03d}.nii.gz").exists():
            number += 1
        with atomic_path(kept) as temporary:
            shutil.copyfile(path, temporary)  # the label stays where it is until the new one takes its place


def read_label_of(path: Path, image: Image) -> tuple[NDArray[np.uint8], Geometry]:
    """A label map and its grid; a `.bin` file holds nothing but a byte for each voxel of the image, x fastest.

    Raises:
        ImageError: if it cannot be trusted.
    """
    if path.suffix != ".bin":
        volume = read_labels(path)
        return volume.array, volume.geometry
    geometry = image.extent().geometry
    voxels = int(np.prod(geometry.size))
    if path.stat().st_size != voxels:
        raise ImageError(f"label: expected a byte for each of {voxels} voxels, got {path.stat().st_size} bytes")
    return np.fromfile(path, dtype=np.uint8).reshape(geometry.size, order="F"), geometry


def _is_near(path: Path, position_mm: NDArray[np.float64]) -> bool:
    """Whether the slice of this name lies at the place."""
    try:
        there_mm = [float(mm) for mm in path.stem.removeprefix(_SLICE).split("_")]
    except ValueError:  # someone else's file
        return False
    return len(there_mm) == 3 and bool(np.abs(position_mm - there_mm).max() <= 2 * POSITION_TOLERANCE_MM)


def _claim(folder: Path) -> int:
    """A lock that the kernel gives back when this process ends, however it ends."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise CtsegError(f"--studies {folder.parent}: another `ctseg serve` has this folder; stop it first") from error
    return descriptor
