"""Masks of DICOM series as DICOM SEG, for clients that ask for `output=dicom_seg`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import ctseg
from ctseg.codes import Algorithm, Structure, structures_of, uncoded
from ctseg.io.dicom.seg import write_seg
from ctseg.server.images import Image, SeriesImage
from ctseg.server.index import STRUCTURE_NAME
from ctseg.server.problems import Invalid
from ctseg.server.service import Served, Service
from ctseg.server.texts import shown

MEDIA_TYPE = "application/dicom"


def seg_writer(
    service: Service, served: Served, image: Image, params: Mapping[str, Any]
) -> Callable[[NDArray[np.uint8]], bytes]:
    """What makes a mask of the image the bytes of a DICOM SEG, read back and compared.

    It holds the patient's data, as the images of the series do. `label_info` in `params`, a list of objects with a name
    and, unless they are in order, an idx, may name the segments.

    Raises:
        Invalid: if the image is no DICOM series, as a SEG says of each frame which image it lies on, or `label_info` is
            not that. What is returned raises ImageError if the series has changed or does not allow a SEG.
    """
    if not isinstance(image, SeriesImage):
        raise Invalid("output: dicom_seg needs a DICOM series, the image is another file; ask for output=image")
    model = served.model
    known = structures_of(model.recipe)
    names = _names(params.get("label_info"), known)
    structures = [_called(one, names.get(one.value), served.takes_clicks) for one in known]
    algorithm = Algorithm(name=model.recipe.name, version=ctseg.__version__, model=model.sha256[:16])

    def write(mask: NDArray[np.uint8]) -> bytes:
        with service.unpacking, tempfile.TemporaryDirectory(prefix="seg-", dir=service.scratch) as folder:
            path = Path(folder) / "mask.dcm"
            write_seg(path, image.read_dicom(), mask, structures, algorithm)
            return path.read_bytes()

    return write


def _called(structure: Structure, name: str | None, by_clicks: bool) -> Structure:
    """A structure under a client's name for it; clicks segment anything, so that only the name says what it is."""
    if name is None:
        return structure
    return uncoded(structure.value, name) if by_clicks else replace(structure, name=name)


def _names(label_info: Any, structures: Sequence[Structure]) -> dict[int, str]:
    """Value -> name; values are those of the structures."""
    known = {one.value for one in structures}
    try:
        names = {int(one.get("idx", n)): one["name"] for n, one in enumerate(label_info or (), 1)}
    except (AttributeError, TypeError, ValueError, KeyError, OverflowError) as error:
        raise Invalid("label_info: expected a list of objects with a name and an idx") from error
    for value, name in names.items():
        if not isinstance(name, str) or not STRUCTURE_NAME.fullmatch(name) or "\\" in name:  # begins another value
            raise Invalid(f"label_info: expected a name of at most 64 characters without '\\', got {shown(str(name))}")
        if value not in known:
            raise Invalid(f"label_info: expected an idx of {', '.join(map(str, sorted(known)))}, got {value}")
    return names
