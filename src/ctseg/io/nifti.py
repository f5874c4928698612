"""NIfTI-1 and -2, `.nii` and `.nii.gz`. nibabel parses the header; the voxels do not pass through it.

Functions here raise ImageError with the reason only; `images` adds the path.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from isal import igzip
from numpy.typing import NDArray

from ctseg.errors import ImageError
from ctseg.io import Header, data_problems, gzip_writer, in_file_order, stream_errors
from ctseg.volume import Geometry, LabelStream, Volume

MAX_FORM_CONFLICT_VOXELS = 0.5
"""A file whose sform and qform place a corner further apart than this says two things about where the patient is."""
MAX_QUATERNION_EXCESS = 1e-3
"""How far above 1 the squared length of a quaternion's b, c, d may lie: float32 rounding, no more."""

_TYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
_OTHER_TYPES = {128: "RGB", 2304: "RGBA", 32: "complex", 1792: "complex", 2048: "complex", 1536: "float128"}
_UNITS = {1: "metres", 3: "microns"}


def read_header(path: Path) -> Header:
    """The header of a `.nii` or `.nii.gz` file; no voxel is read.

    Raises:
        ImageError: if the file is not NIfTI or its compressed data are damaged.
    """
    encoding = "gzip" if path.name.lower().endswith(".gz") else "raw"
    fields, endian = _parse(_read_start(path, encoding))
    problems: list[str] = []
    size = _size([int(n) for n in fields["dim"]], problems)
    dtype = _dtype(int(fields["datatype"]), endian, problems)
    geometry = Geometry(size, np.diag([-1.0, -1.0, 1.0, 1.0]) @ _affine_ras(fields, size, problems))
    unit = int(fields["xyzt_units"]) & 7
    if unit not in (0, 2):
        problems.append(f"coordinates must be millimetres, got {_UNITS.get(unit, f'unit code {unit}')}; convert them")
    skip = _data_offset(fields, problems)
    slope, intercept = _scaling(float(fields["scl_slope"]), float(fields["scl_inter"]), problems)
    if not problems:
        problems += data_problems(size, dtype, encoding, path.stat().st_size, skip)
    return Header(
        problems=problems,
        geometry=geometry,
        dtype=dtype,
        encoding=encoding,
        skip=skip,
        slope=slope,
        intercept=intercept,
    )


def write(path: Path, volume: Volume | LabelStream, *, compressed: bool) -> None:
    """Writes voxels with nothing but their grid in the header; `path` may have any suffix."""
    with path.open("wb") as file:
        header = _new_header(volume.geometry, volume.dtype)
        if not compressed:
            file.write(header)
            file.writelines(in_file_order(volume))
            return
        with gzip_writer(file) as stream:
            stream.write(header)
            for part in in_file_order(volume):
                stream.write(part)


def _read_start(path: Path, encoding: str) -> bytes:
    with path.open("rb") as file, stream_errors():
        packed = file.read(2) == b"\x1f\x8b"
        if encoding == "gzip" and not packed:
            raise ImageError(
                "'.nii.gz' must be gzip data, got something else; if it is plain NIfTI rename it to '.nii'"
            )
        if encoding == "raw" and packed:
            raise ImageError("'.nii' must not be compressed, got gzip data; rename it to '.nii.gz'")
        file.seek(0)
        stream = igzip.IGzipFile(fileobj=file, mode="rb") if packed else file
        start: bytes = stream.read(540)
        return start


def _parse(start: bytes) -> tuple[Any, str]:
    """The header's fields by name, unchecked, and their byte order."""
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    lengths = {start[:4]: "<", start[3::-1]: ">"}
    for kind, magic in ((Nifti1Header, b"n+1"), (Nifti2Header, b"n+2")):
        length = kind.template_dtype.itemsize
        endian = lengths.get(length.to_bytes(4, "little"))
        if endian is None or len(start) < length:
            continue
        fields = kind(start[:length], endian, check=False)
        found = bytes(fields["magic"].item())
        if not found.startswith(magic):
            raise ImageError(
                f"not one-file NIfTI: its magic must be '{magic.decode()}', got {found!r}; "
                "convert .hdr/.img pairs and Analyze files to .nii.gz first"
            )
        return fields, endian
    raise ImageError("not NIfTI: it must begin with a header of 348 or 540 bytes; is the suffix right?")


def _size(dim: list[int], problems: list[str]) -> tuple[int, int, int]:
    axes = dim[1 : dim[0] + 1] if 1 <= dim[0] <= 7 else []
    if not axes:
        problems.append(f"the number of axes must be 1..7, got {dim[0]}; the header is damaged")
    elif len(axes) < 3:
        problems.append(f"a volume has three axes, got a {len(axes)}D image of {_times(axes)}; stack its slices first")
    elif min(axes) < 1:
        problems.append(f"every axis must have a voxel, got {_times(axes)}; the header is damaged")
    elif math.prod(axes[3:]) > 1:
        problems.append(f"one volume per file, got {math.prod(axes[3:])} ({_times(axes)}); split it into 3D files")
    else:
        return axes[0], axes[1], axes[2]
    return 1, 1, 1


def _times(axes: list[int]) -> str:
    return " x ".join(map(str, axes))


def _dtype(code: int, endian: str, problems: list[str]) -> np.dtype[Any]:
    if code not in _TYPES:
        name = _OTHER_TYPES.get(code, f"type code {code}")
        problems.append(f"voxels must be plain integers or floats, got {name}; convert them to int16")
    return np.dtype(endian + _TYPES.get(code, "u1"))


def _affine_ras(fields: Any, size: tuple[int, int, int], problems: list[str]) -> NDArray[np.float64]:
    """The sform, else the qform; both must say the same."""
    sform = _sform(fields) if int(fields["sform_code"]) > 0 else None
    qform = _qform(fields, problems) if int(fields["qform_code"]) > 0 else None
    if sform is not None and qform is not None:
        geometry = Geometry(size, sform)
        apart = geometry.corner_distance_voxels(Geometry(size, qform))
        if np.isfinite(apart) and apart > MAX_FORM_CONFLICT_VOXELS:
            apart_mm = apart * min(geometry.spacing_mm)
            problems.append(
                f"sform/qform conflict: they must agree within half a voxel, got {apart_mm:.3g} mm "
                f"({apart:.3g} voxels) at a corner; set the wrong one's code to 0"
            )
    if sform is None and qform is None:
        problems.append(
            "no orientation: sform_code and qform_code are both 0, so left and right are unknown; "
            "convert the original series again, or set the code if you know the affine is right"
        )
    return next((affine for affine in (sform, qform) if affine is not None), np.eye(4))


def _sform(fields: Any) -> NDArray[np.float64]:
    return np.array([fields["srow_x"], fields["srow_y"], fields["srow_z"], [0, 0, 0, 1]], dtype=np.float64)


def _qform(fields: Any, problems: list[str]) -> NDArray[np.float64] | None:
    """The affine of the quaternion, or None if it cannot be one.

    nibabel's `get_qform` refuses a qfac of 0 and rounding in the quaternion, which the NIfTI standard allows.
    """
    from nibabel.quaternions import quat2mat

    quaternion = np.array([fields["quatern_b"], fields["quatern_c"], fields["quatern_d"]], dtype=np.float64)
    origin_mm = np.array([fields["qoffset_x"], fields["qoffset_y"], fields["qoffset_z"]], dtype=np.float64)
    spacing_mm = np.array(fields["pixdim"][1:4], dtype=np.float64)
    length = float((quaternion**2).sum())
    if not (np.isfinite(spacing_mm).all() and (spacing_mm > 0).all()):
        problems.append(f"qform: spacing must be positive, got {spacing_mm.tolist()}; correct pixdim")
    elif not (length <= 1 + MAX_QUATERNION_EXCESS and np.isfinite(origin_mm).all()):
        problems.append("qform: its quaternion must have length 1 and its offset be finite; correct or unset it")
    else:
        real = math.sqrt(max(0.0, 1.0 - length))
        affine = np.eye(4)
        affine[:3, :3] = quat2mat([real, *quaternion]) * spacing_mm
        affine[:3, 2] *= -1.0 if fields["pixdim"][0] < 0 else 1.0
        affine[:3, 3] = origin_mm
        return affine
    return None


def _data_offset(fields: Any, problems: list[str]) -> int:
    offset, smallest = float(fields["vox_offset"]), int(fields.single_vox_offset)
    if not (offset >= smallest and offset.is_integer()):
        problems.append(f"voxels must begin at byte {smallest} or later, got {offset:g}; the header is damaged")
        return smallest
    return int(offset)


def _scaling(slope: float, intercept: float, problems: list[str]) -> tuple[float, float]:
    """Slope and intercept; a slope of 0 or NaN means the values are stored unscaled."""
    if slope == 0 or not math.isfinite(slope):
        return 1.0, 0.0
    if not math.isfinite(intercept):
        problems.append(f"scl_inter must be finite, got {intercept}; the header is damaged")
    return slope, intercept


def _new_header(geometry: Geometry, dtype: np.dtype[Any]) -> bytes:
    """The bytes before the voxels of a little-endian file: NIfTI-1, or NIfTI-2 where an axis is too long for it.

    Readers differ in which of sform and qform they use, so both are set. A qform cannot hold shear: it is left out
    where it would say something else.
    """
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header

    header = (Nifti1Header if max(geometry.size) < 2**15 else Nifti2Header)(endianness="<")
    header.set_data_dtype(dtype)
    header.set_data_shape(geometry.size)
    header.set_xyzt_units("mm")
    header["scl_slope"], header["scl_inter"] = 1, 0
    header["vox_offset"] = header.single_vox_offset
    header["magic"] = header.single_magic
    header.set_sform(geometry.affine_ras, code="scanner")
    header.set_qform(geometry.affine_ras, code="scanner")
    if not Geometry(geometry.size, header.get_qform()).agrees_with(Geometry(geometry.size, header.get_sform())):
        header["qform_code"] = 0
    no_extensions = bytes(4)
    return bytes(header.binaryblock) + no_extensions
