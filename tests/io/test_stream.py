"""A CT read plane by plane has the values of one read as a whole, and is refused for the same reasons."""

import gzip
import tracemalloc
from contextlib import closing
from pathlib import Path

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from ctseg.errors import ImageError
from ctseg.io.images import read_extent, read_image, write_image
from ctseg.io.stream import CTStream
from ctseg.volume import Geometry, Volume

SIZE = (7, 5, 12)
ASKED = {
    "plane_by_plane": [(n, n + 1) for n in range(12)],
    "at_once": [(0, 12)],
    "overlapping": [(0, 3), (2, 6), (5, 6), (5, 6), (5, 9), (8, 12)],
    "with_gaps": [(1, 3), (4, 5), (9, 11)],
    "nothing": [],
}


def nifti(path: Path, stored: NDArray[np.generic], slope: float = 1.0, intercept: float = 0.0) -> Path:
    """A file of these voxels and this scaling, made without ctseg."""
    header = nibabel.Nifti1Header(endianness=">" if stored.dtype.byteorder == ">" else "<")
    image = nibabel.Nifti1Image(stored, np.diag([-2.0, -2.0, 3.0, 1.0]), header)
    image.header.set_data_dtype(stored.dtype)
    image.header["vox_offset"], image.header["magic"] = 352, b"n+1"
    image.header["scl_slope"], image.header["scl_inter"] = slope, intercept
    data = bytes(image.header.binaryblock) + bytes(4) + stored.tobytes(order="F")
    path.write_bytes(gzip.compress(data, 1) if path.name.endswith(".gz") else data)
    return path


def noise(dtype: str = "<i2") -> NDArray[np.generic]:
    return np.random.default_rng(0).integers(0, 255, SIZE).astype(dtype)


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_planes_are_those_that_were_asked_for(tmp_path: Path, suffix: str, asked: list[tuple[int, int]]) -> None:
    array = noise()
    path = tmp_path / f"ct{suffix}"
    write_image(path, Volume(array, Geometry(SIZE, np.diag([1.0, 1.0, 2.0, 1.0]))))
    stream = CTStream(path)
    for first, stop in asked:
        np.testing.assert_array_equal(stream.planes(first, stop), array.T[first:stop])
    stream.finish()
    assert stream.geometry.size == SIZE


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    ("dtype", "slope", "intercept"),
    [
        ("<i2", 1, 0),
        (">i2", 1, 0),
        (">u2", 1, -1024),
        ("<u2", 1, -40_000),
        ("u1", 1, -1024),
        ("i1", 1, -1024),
        ("<i2", 0.5, 3),
        (">f4", 2, -1),
        ("<f4", 1, -1024),
        ("<f8", 1.25, 7.5),
        ("<f8", 1, 0),
        ("<i4", 1, 0),
        ("<i4", 2, 5),
    ],
)
def test_values_are_those_of_the_whole_ct(
    tmp_path: Path, dtype: str, slope: float, intercept: float, suffix: str
) -> None:
    """To the bit in float32, in which CTs are prepared; nibabel is the judge of both."""
    path = nifti(tmp_path / f"ct{suffix}", noise(dtype), slope, intercept)
    stream = CTStream(path)
    planes = np.concatenate([stream.planes(0, 5), stream.planes(5, 12)]).T.astype(np.float32)
    stream.finish()
    np.testing.assert_array_equal(planes, read_image(path).array.astype(np.float32))
    judge = nibabel.Nifti1Image.from_bytes((gzip.decompress if suffix == ".nii.gz" else bytes)(path.read_bytes()))
    np.testing.assert_allclose(planes, judge.get_fdata(), rtol=1e-6)
    assert read_extent(path).streams


def test_wide_integers_that_are_shifted_are_read_as_a_whole(tmp_path: Path) -> None:
    """Only all of them together show whether their sums fit integers."""
    path = nifti(tmp_path / "ct.nii", noise("<i4"), 1, 5)
    assert not read_extent(path).streams
    with pytest.raises(ImageError, match="must be read as a whole"):
        CTStream(path)


def broken(kind: str, path: Path) -> Path:
    """A file that read_image refuses for what lies far behind its header."""
    array = np.random.default_rng(0).normal(size=(128, 96, 12)).astype(np.float32)
    if kind == "NaN":
        array[3, 2, 7] = array[3, 3, 8] = np.nan
    elif kind == "infinite":
        array[3, 2, 11] = np.inf
    elif kind == "constant":
        array[...] = 4
    nifti(path, array)
    data = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "checksum":
        path.write_bytes(data[:-8] + bytes(4) + data[-4:])
    elif kind == "more":
        path.write_bytes(gzip.compress(gzip.decompress(data) + bytes(4)))
    elif kind == "fewer":
        path.write_bytes(gzip.compress(gzip.decompress(data)[:-4]))
    return path


@pytest.mark.parametrize("asked", ["plane_by_plane", "with_gaps", "nothing"])
@pytest.mark.parametrize("kind", ["NaN", "infinite", "constant", "truncated", "checksum", "more", "fewer"])
def test_what_is_refused_as_a_whole_is_refused_at_the_end_with_the_same_words(
    tmp_path: Path, kind: str, asked: str
) -> None:
    path = broken(kind, tmp_path / "ct.nii.gz")
    with pytest.raises(ImageError) as whole:
        read_image(path)
    stream = CTStream(path)

    def read_all() -> None:
        with closing(stream):
            for first, stop in ASKED[asked]:
                stream.planes(first, stop)
            stream.finish()

    with pytest.raises(ImageError) as streamed:
        read_all()
    assert str(streamed.value) == str(whole.value)


def test_a_broken_header_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "ct.nii.gz"
    path.write_bytes(b"dear reader")
    with pytest.raises(ImageError, match=r"cannot read '.*': '.nii.gz' must be gzip data"):
        CTStream(path)


def test_only_what_was_asked_for_is_held(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(-500, 500, (256, 256, 100), dtype=np.int16)
    path = nifti(tmp_path / "ct.nii.gz", array)
    stream = CTStream(path)
    tracemalloc.start()
    try:
        for first in range(99):
            stream.planes(first, first + 2)
        stream.finish()
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < array.nbytes / 5
