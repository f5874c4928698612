"""ITK's one-file formats: NRRD (`.nrrd`) and MetaImage (`.mha`), read and written without ITK.

SimpleITK was tried first. Its MetaImage reader aborts the process on `NDims = 100`, returns noise for damaged voxels,
prints to the terminal, and a text header may make it open any other file. The headers are a few lines of text, so this
module reads them itself, strictly: a field that could move or change a voxel and is not understood is an error.
SimpleITK remains the judge in the tests.

Functions here raise ImageError with the reason only; `images` adds the path.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

from ctseg.errors import ImageError
from ctseg.io import MAX_VOXELS, Header, data_problems, gzip_writer, in_file_order
from ctseg.volume import Geometry, LabelStream, Volume

MAX_TEXT_HEADER_BYTES = 2**20
"""A text header is a few hundred bytes; one that does not end within this many is not one."""
UNIT_VECTOR_TOLERANCE = 1e-3
"""How far the length of a column of TransformMatrix may be from 1."""

_ONE_FILE = "save it as one file, header and voxels together"
_NRRD_TYPES = {
    "i1": "signed char, int8, int8_t",
    "u1": "uchar, unsigned char, uint8, uint8_t",
    "i2": "short, short int, signed short, signed short int, int16, int16_t",
    "u2": "ushort, unsigned short, unsigned short int, uint16, uint16_t",
    "i4": "int, signed int, int32, int32_t",
    "u4": "uint, unsigned int, uint32, uint32_t",
    "i8": "longlong, long long, long long int, signed long long, signed long long int, int64, int64_t",
    "u8": "ulonglong, unsigned long long, unsigned long long int, uint64, uint64_t",
    "f4": "float",
    "f8": "double",
}
_NRRD_DTYPES = {name: dtype for dtype, names in _NRRD_TYPES.items() for name in names.split(", ")}
_NRRD_ENCODINGS = {"raw": "raw", "gzip": "gzip", "gz": "gzip"}
_NRRD_SPACES = {
    **dict.fromkeys(("left-posterior-superior", "lps"), (1, 1, 1)),
    **dict.fromkeys(("right-anterior-superior", "ras"), (-1, -1, 1)),
    **dict.fromkeys(("left-anterior-superior", "las"), (1, -1, 1)),
}
_MHA_TYPES = "CHAR i1, UCHAR u1, SHORT i2, USHORT u2, INT i4, UINT u4, LONG_LONG i8, ULONG_LONG u8, FLOAT f4, DOUBLE f8"
_MHA_DTYPES = {f"MET_{name}": dtype for name, dtype in (pair.split() for pair in _MHA_TYPES.split(", "))}
_MHA_SAME = {"Position": "Offset", "Origin": "Offset", "Rotation": "TransformMatrix", "Orientation": "TransformMatrix"}
_MHA_PLAIN = {
    "ObjectType": "Image",
    "ElementNumberOfChannels": "1",
    "HeaderSize": "0",
    "ElementToIntensityFunctionSlope": "1",
    "ElementToIntensityFunctionOffset": "0",
    "DistanceUnits": "mm",
}


class _Fields(dict[str, str]):
    """The fields of a text header; a missing or malformed one becomes a line in `problems`."""

    def __init__(self) -> None:
        super().__init__()
        self.problems: list[str] = []

    def add(self, key: str, value: str) -> None:
        if key in self:
            self.problems.append(f"'{key}' must stand once, got it twice; correct the header")
        self[key] = value

    def choose(self, key: str, choices: Mapping[str, Any], default: Any) -> Any:
        """What `choices` says for the value of `key`; `default` and a problem where it says nothing."""
        given = self.get(key, "")
        for text in (given, given.lower()):  # NRRD's words may be in capitals
            if text in choices:
                return choices[text]
        self.problems.append(f"'{key}' must be one of {', '.join(choices)}; got {self.got(key)}")
        return default

    def numbers(self, key: str, count: int) -> list[float]:
        """The `count` numbers in the value of `key`; ones and a problem where it holds something else."""
        words = re.findall(r"[^\s,()]+", self.get(key, ""))
        try:
            numbers = [float(word) for word in words]
        except ValueError:
            numbers = []
        if len(numbers) == count:
            return numbers
        self.problems.append(f"'{key}' must be {count} numbers, got {self.got(key)}")
        return [1.0] * count

    def sizes(self, key: str, count: int) -> list[int]:
        """Like `numbers`, for numbers of voxels."""
        numbers = self.numbers(key, count)
        if all(1 <= n <= MAX_VOXELS and n.is_integer() for n in numbers):
            return [int(n) for n in numbers]
        self.problems.append(f"'{key}' must be whole numbers in 1..{MAX_VOXELS}, got {self.got(key)}")
        return [1] * count

    def got(self, key: str) -> str:
        """The value of `key` for a message: short, on one line."""
        return repr(self[key][:60]) if key in self else "none"


def read_nrrd_header(path: Path) -> Header:
    """The header of a `.nrrd` file; no voxel is read.

    Raises:
        ImageError: if the file is not NRRD, or names another file.
    """
    start = _read_start(path)
    if not start.startswith(b"NRRD000"):
        raise ImageError("not NRRD: it must begin with 'NRRD000'; is the suffix right?")
    if re.search(rb"(?im)(?:^|\r)[ \t]*data[ \t]*file[ \t]*:", start):
        raise ImageError(f"its voxels must be in the file itself, its header names another file; {_ONE_FILE}")
    end = re.search(rb"\r?\n\r?\n", start)
    if end is None:
        raise ImageError("truncated: its header has no end; copy it again from its source")
    fields = _Fields()
    for line in start[: end.start()].decode("latin-1").split("\n")[1:]:
        key, colon, value = line.partition(": ")
        if colon and not line.startswith("#"):
            fields.add(key.strip().lower(), value.strip())
    count = int(fields.choose("dimension", {"3": 3, "4": 4, "5": 5}, 3))
    sizes, affine = _nrrd_grid(fields, count)
    dtype = np.dtype(fields.choose("type", _NRRD_DTYPES, "u1"))
    if dtype.itemsize > 1:
        dtype = dtype.newbyteorder(fields.choose("endian", {"little": "<", "big": ">"}, "<"))
    for key in ("line skip", "lineskip", "byte skip", "byteskip"):
        if fields.get(key, "0") != "0":
            fields.problems.append(f"'{key}' must be 0, got {fields.got(key)}; {_ONE_FILE}")
    encoding = fields.choose("encoding", _NRRD_ENCODINGS, "raw")
    return _header(path, fields.problems, sizes, affine, dtype, encoding, end.end())


def read_mha_header(path: Path) -> Header:
    """The header of a `.mha` file; no voxel is read.

    Raises:
        ImageError: if the file is not MetaImage, or names another file.
    """
    start = _read_start(path)
    ends = list(re.finditer(rb"ElementDataFile", start, re.IGNORECASE))
    end = re.search(rb"\nElementDataFile *=([^\r\n]*)\r?\n", start)
    if not ends or end is None:
        raise ImageError("not MetaImage: its header must end in 'ElementDataFile = LOCAL'; is the suffix right?")
    if len(ends) > 1 or end[1].strip().upper() != b"LOCAL":
        raise ImageError(f"its voxels must be in the file itself (ElementDataFile = LOCAL), got another; {_ONE_FILE}")
    fields = _Fields()
    for line in start[: end.start()].decode("latin-1").split("\n"):
        key, _, value = line.partition("=")
        fields.add(_MHA_SAME.get(key.strip(), key.strip()), value.strip())
    for key, plain in _MHA_PLAIN.items():
        if fields.get(key, plain) != plain:
            fields.problems.append(f"'{key}' must be {plain}, got {fields.got(key)}; convert the file")
    count = int(fields.choose("NDims", {"3": 3, "4": 4, "5": 5}, 3))
    sizes, affine = _mha_grid(fields, count)
    bools = {"True": True, "False": False}
    fields.choose("BinaryData", {"True": True}, True)
    packed = "CompressedData" in fields and fields.choose("CompressedData", bools, False)
    msb = [key for key in ("BinaryDataByteOrderMSB", "ElementByteOrderMSB") if key in fields]
    orders = {bool(fields.choose(key, bools, False)) for key in msb}
    if len(orders) > 1:
        fields.problems.append(f"{' and '.join(repr(key) for key in msb)} must agree; correct the header")
    big = True in orders
    dtype = np.dtype(fields.choose("ElementType", _MHA_DTYPES, "u1")).newbyteorder(">" if big else "<")
    return _header(path, fields.problems, sizes, affine, dtype, "zlib" if packed else "raw", end.end())


def write_nrrd(path: Path, volume: Volume | LabelStream) -> None:
    """Writes voxels as NRRD with nothing but their grid in the header; `path` may have any suffix."""
    geometry = volume.geometry
    columns = [_vector(column) for column in geometry.affine[:3].T]
    lines = [
        "NRRD0004",
        f"type: {_NRRD_TYPES[_code(volume)].split(', ')[0]}",
        "dimension: 3",
        "space: left-posterior-superior",
        f"sizes: {_numbers(geometry.size)}",
        f"space directions: {' '.join(columns[:3])}",
        "kinds: domain domain domain",
        "endian: little",
        "encoding: gzip",
        f"space origin: {columns[3]}",
    ]
    with path.open("wb") as file:
        file.write("\n".join([*lines, "", ""]).encode())
        with gzip_writer(file) as stream:
            for part in in_file_order(volume):
                stream.write(part)


def write_mha(path: Path, volume: Volume | LabelStream) -> None:
    """Writes voxels as MetaImage with nothing but their grid in the header; `path` may have any suffix."""
    with path.open("wb") as file:
        file.write(_mha_text(volume, compressed_bytes=0))
        begin = file.tell()
        stream = isal_zlib.compressobj(1)
        for part in in_file_order(volume):
            file.write(stream.compress(part))
        file.write(stream.flush())
        text = _mha_text(volume, compressed_bytes=file.tell() - begin)
        file.seek(0)
        file.write(text)


def _code(volume: Volume | LabelStream) -> str:
    """The type of the voxels without its byte order, such as "i2"."""
    return str(volume.dtype.str[1:])


def _mha_text(volume: Volume | LabelStream, compressed_bytes: int) -> bytes:
    """The header; its length does not depend on `compressed_bytes`, which is known only when the voxels are written."""
    geometry = volume.geometry
    element_type = next(name for name, dtype in _MHA_DTYPES.items() if dtype == _code(volume))
    lines = [
        "ObjectType = Image",
        "NDims = 3",
        "BinaryData = True",
        "BinaryDataByteOrderMSB = False",
        "CompressedData = True",
        f"CompressedDataSize = {compressed_bytes:010d}",
        f"TransformMatrix = {_numbers(geometry.direction.T.ravel())}",
        f"Offset = {_numbers(geometry.origin_mm)}",
        f"ElementSpacing = {_numbers(geometry.spacing_mm)}",
        f"DimSize = {_numbers(geometry.size)}",
        f"ElementType = {element_type}",
        "ElementDataFile = LOCAL",
    ]
    return "\n".join([*lines, ""]).encode()


def _nrrd_grid(fields: _Fields, count: int) -> tuple[list[int], NDArray[np.float64]]:
    """The sizes of the three axes in space and the affine in LPS; further axes must have one voxel."""
    sizes = fields.sizes("sizes", count)
    directions = re.findall(r"none|\([^(),]+,[^(),]+,[^(),]+\)", fields.get("space directions", ""))
    to_lps = np.diag([*fields.choose("space", _NRRD_SPACES, (1, 1, 1)), 1.0])
    if set(re.findall(r'"([^"]*)"', fields.get("space units", ""))) - {"", "mm", "millimeter", "millimeters"}:
        fields.problems.append(f"'space units' must be mm, got {fields.got('space units')}; convert them")
    spatial = [n for n, direction in enumerate(directions) if direction != "none"]
    if len(directions) != count or len(spatial) != 3:
        fields.problems.append(
            "no orientation: 'space directions' must give three of the axes a vector, "
            f"got {fields.got('space directions')}; convert the original series again"
        )
        return sizes[:3], np.eye(4)
    _check_single(fields, [size for n, size in enumerate(sizes) if n not in spatial])
    fields["space directions"] = " ".join(directions[n] for n in spatial)
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(fields.numbers("space directions", 9), (3, 3)).T
    affine[:3, 3] = fields.numbers("space origin", 3)
    return [sizes[n] for n in spatial], to_lps @ affine


def _mha_grid(fields: _Fields, count: int) -> tuple[list[int], NDArray[np.float64]]:
    """The sizes of the first three axes and the affine in LPS; further axes must have one voxel."""
    sizes = fields.sizes("DimSize", count)
    _check_single(fields, sizes[3:])
    spacing_mm = np.array(fields.numbers("ElementSpacing", count)[:3])
    if not (spacing_mm > 0).all():
        fields.problems.append(f"'ElementSpacing' must be positive, got {fields.got('ElementSpacing')}; correct it")
    if "TransformMatrix" not in fields:
        fields.problems.append("no orientation: 'TransformMatrix' must be given; convert the original series again")
        return sizes[:3], np.eye(4)
    direction = np.array(fields.numbers("TransformMatrix", count * count)).reshape(count, count)[:3, :3].T
    lengths = np.sqrt((direction**2).sum(axis=0))
    if not fields.problems and not (np.abs(lengths - 1) <= UNIT_VECTOR_TOLERANCE).all():
        fields.problems.append(f"'TransformMatrix' must hold unit vectors, got lengths {lengths.round(4).tolist()}")
    affine = np.eye(4)
    affine[:3, :3] = direction * spacing_mm
    affine[:3, 3] = fields.numbers("Offset", count)[:3]
    return sizes[:3], affine


def _check_single(fields: _Fields, further_sizes: list[int]) -> None:
    if any(size > 1 for size in further_sizes):
        fields.problems.append(f"one scalar volume per file, got further axes of {further_sizes}; split it")


def _header(
    path: Path,
    problems: list[str],
    sizes: list[int],
    affine: NDArray[np.float64],
    dtype: np.dtype[Any],
    encoding: str,
    file_offset: int,
) -> Header:
    size = (sizes[0], sizes[1], sizes[2])
    if not problems:
        problems += data_problems(size, dtype, encoding, path.stat().st_size - file_offset)
    geometry = Geometry(size, affine)
    return Header(problems=problems, geometry=geometry, dtype=dtype, encoding=encoding, file_offset=file_offset)


def _read_start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_TEXT_HEADER_BYTES)


def _vector(values: NDArray[np.float64]) -> str:
    return f"({','.join(repr(float(value)) for value in values)})"


def _numbers(values: Iterable[float]) -> str:
    return " ".join(str(value) for value in np.asarray(values).tolist())
