"""Masks as the bytes of a file, on their way to a client."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from isal import igzip
from numpy.typing import NDArray

from ctseg.io.images import WRITERS, read_labels
from ctseg.server.problems import Invalid
from ctseg.volume import Geometry, Volume

DTYPES = ("uint8", "uint16", "int16", "uint32", "int32", "float32")
"""What masks may be written as: each holds every label value."""
MEDIA_TYPES = {".nii.gz": "application/gzip", ".nii": "application/octet-stream", ".nrrd": "application/octet-stream"}


def mask_bytes(mask: NDArray[np.uint8], geometry: Geometry) -> bytes:
    """The `.nii.gz` file of a label map."""
    return volume_bytes(Volume(mask, geometry))


def volume_bytes(volume: Volume, suffix: str = ".nii.gz") -> bytes:
    """The file of a volume, in the format of `suffix`, one of MEDIA_TYPES; nothing of it stays on the disk."""
    with tempfile.TemporaryDirectory(prefix="ctseg-mask-") as folder:
        path = Path(folder) / f"mask{suffix}"
        WRITERS[suffix](path, volume)
        return path.read_bytes()


def mask_of_bytes(content: bytes) -> NDArray[np.uint8]:
    """The label map that `mask_bytes` made `.nii.gz` bytes of."""
    with tempfile.TemporaryDirectory(prefix="ctseg-mask-") as folder:
        path = Path(folder) / "mask.nii.gz"
        path.write_bytes(content)
        return read_labels(path).array


@dataclass(frozen=True)
class ResultForm:
    """What a client wants a mask as: MONAI Label's and AIAA's `result_extension`, `result_dtype`, `result_compress`."""

    suffix: str = ".nii.gz"
    dtype: str = "uint8"
    compressed: bool = True

    def content(self, mask: NDArray[np.uint8], geometry: Geometry) -> bytes:
        """The file of a label map."""
        content = volume_bytes(Volume(mask.astype(self.dtype, copy=False), geometry), self.suffix)
        return content if self.compressed or self.suffix != ".nrrd" else _uncompressed_nrrd(content)


def result_form(params: Mapping[str, Any]) -> ResultForm:
    """What `params` asks for; keys that are missing or null leave it as it is by default.

    Raises:
        Invalid: if that is not to be had.
    """
    suffix = _one_of("result_extension", params.get("result_extension") or ".nii.gz", tuple(MEDIA_TYPES))
    dtype = _one_of("result_dtype", params.get("result_dtype") or "uint8", DTYPES)
    return ResultForm(suffix, dtype, params.get("result_compress") is not False)


def _one_of(key: str, value: Any, known: Sequence[str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise Invalid(f"{key}: expected one of {', '.join(known)}, got {str(value)[:20]!r}")
    return value


def _uncompressed_nrrd(content: bytes) -> bytes:
    """The same NRRD file with its voxels as they are, for viewers that unpack nothing."""
    header, _, packed = content.partition(b"\n\n")
    voxels: bytes = igzip.decompress(packed)
    return header.replace(b"encoding: gzip", b"encoding: raw") + b"\n\n" + voxels
