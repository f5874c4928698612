"""NIfTI: its header rules, its byte orders and versions, and the stream of voxels."""

import gzip
import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK
from nibabel.nifti1 import Nifti1Header
from nibabel.nifti2 import Nifti2Header
from numpy.typing import NDArray

from ctseg.errors import ImageError
from ctseg.io.images import read_geometry, read_image, read_labels
from ctseg.volume import Geometry, Volume

Maker = Callable[..., bytes]
Limit = Callable[[int], AbstractContextManager[None]]
NAN = float("nan")


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(gzip.compress(data, 1) if path.name.endswith(".gz") else data)
    return path


def refusal(path: Path) -> str:
    """The message `read_image` refuses `path` with: one line that names it."""
    with pytest.raises(ImageError) as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith(f"cannot read '{path}': ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("kind", [Nifti1Header, Nifti2Header])
@pytest.mark.parametrize("dtype", ["u1", "i2", "u2", "i4", "f4", "f8"])
def test_every_version_type_and_byte_order(
    tmp_path: Path, nifti: Maker, ct: NDArray[np.int16], suffix: str, endian: str, kind: Any, dtype: str
) -> None:
    expected = (ct + 200).astype(dtype)
    path = write(tmp_path / f"ct{suffix}", nifti(expected, endian, kind))
    volume = read_image(path)
    assert volume.array.dtype == np.dtype(dtype)
    assert volume.array.dtype.isnative
    assert volume.array.flags.f_contiguous
    np.testing.assert_array_equal(volume.array, expected)
    np.testing.assert_array_equal(volume.array, np.asanyarray(nibabel.load(path).dataobj))
    np.testing.assert_allclose(volume.geometry.affine_ras, nibabel.load(path).affine)
    assert read_geometry(path).agrees_with(volume.geometry)


def test_geometry_is_the_one_simpleitk_sees(tmp_path: Path, nifti: Maker, ct: NDArray[np.int16]) -> None:
    path = write(tmp_path / "ct.nii.gz", nifti(ct))
    image, geometry = SimpleITK.ReadImage(str(path)), read_geometry(path)
    for index in [(0, 0, 0), (6, 10, 4), (3, 0, 2)]:
        expected = image.TransformIndexToPhysicalPoint(index)
        np.testing.assert_allclose((geometry.affine @ [*index, 1])[:3], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"sform_code": 0, "qform_code": 0}, "no orientation: sform_code and qform_code are both 0"),
        ({"srow_x": [0.7, 0, 0, 0]}, "sform/qform conflict: they must agree within half a voxel, got "),
        ({"xyzt_units": 1}, "coordinates must be millimetres, got metres; convert them"),
        ({"xyzt_units": 3}, "coordinates must be millimetres, got microns"),
        ({"xyzt_units": 5}, "coordinates must be millimetres, got unit code 5"),
        ({"datatype": 128}, "voxels must be plain integers or floats, got RGB"),
        ({"datatype": 32}, "plain integers or floats, got complex"),
        ({"datatype": 7777}, "plain integers or floats, got type code 7777"),
        ({"dim": [2, 7, 11, 1, 1, 1, 1, 1]}, "a volume has three axes, got a 2D image of 7 x 11"),
        ({"dim": [4, 7, 11, 5, 2, 1, 1, 1]}, "one volume per file, got 2 (7 x 11 x 5 x 2); split it"),
        ({"dim": [5, 7, 11, 5, 1, 3, 1, 1]}, "one volume per file, got 3"),
        ({"dim": [3, 7, 0, 5, 1, 1, 1, 1]}, "every axis must have a voxel, got 7 x 0 x 5"),
        ({"dim": [3, 7, -11, 5, 1, 1, 1, 1]}, "every axis must have a voxel, got 7 x -11 x 5"),
        ({"dim": [9, 7, 11, 5, 1, 1, 1, 1]}, "the number of axes must be 1..7, got 9"),
        ({"vox_offset": 100}, "voxels must begin at byte 352 or later, got 100"),
        ({"vox_offset": NAN}, "voxels must begin at byte 352 or later, got nan"),
        ({"scl_slope": 2, "scl_inter": NAN}, "scl_inter must be finite, got nan"),
        ({"srow_x": [0, 0, 0, 0], "srow_y": [0, 0, 0, 0], "qform_code": 0}, " x 0.0 x "),
        ({"srow_x": [NAN, 0, 0, 0]}, "the affine must be finite, got NaN or infinity"),
        ({"pixdim": [1, 0.7, -1.3, 2.5, 0, 0, 0, 0], "sform_code": 0}, "qform: spacing must be positive, got [0.6999"),
        ({"quatern_b": 3}, "qform: its quaternion must have length 1"),
        ({"qoffset_x": NAN, "sform_code": 0}, "its offset be finite"),
        ({"dim": [3, 7, 11, 6, 1, 1, 1, 1]}, "truncated: its header promises 1276 bytes, the file has 1122"),
        ({"dim": [3, 7, 11, 4, 1, 1, 1, 1]}, "something follows the voxels: its header promises 968 bytes"),
        ({"magic": b"ni1"}, "not one-file NIfTI: its magic must be 'n+1'"),
        ({"magic": b""}, "convert .hdr/.img pairs and Analyze files to .nii.gz first"),
    ],
)
def test_header_rules(
    tmp_path: Path, nifti: Maker, ct: NDArray[np.int16], fields: dict[str, Any], fragment: str
) -> None:
    assert fragment in refusal(write(tmp_path / "ct.nii", nifti(ct, **fields)))


def test_all_problems_of_a_header_at_once(tmp_path: Path, nifti: Maker, ct: NDArray[np.int16]) -> None:
    path = write(tmp_path / "ct.nii.gz", nifti(ct, sform_code=0, qform_code=0, xyzt_units=1, datatype=128))
    message = refusal(path)
    assert all(part in message for part in ("no orientation", "got metres", "got RGB"))


def test_conflict_names_its_distance(tmp_path: Path, nifti: Maker, ct: NDArray[np.int16], oblique: Geometry) -> None:
    row = oblique.affine_ras[0] + [0, 0, 0, 4.0]
    assert "got 4 mm (5.71 voxels) at a corner" in refusal(write(tmp_path / "ct.nii", nifti(ct, srow_x=row)))
    row = oblique.affine_ras[0] + [0, 0, 0, 0.3]
    volume = read_image(write(tmp_path / "near.nii", nifti(ct, srow_x=row)))
    assert volume.geometry.affine_ras[0, 3] == np.float32(row[3])


@pytest.mark.parametrize("qfac", [0.0, 1.0, -1.0])
def test_qform_alone(tmp_path: Path, nifti: Maker, ct: NDArray[np.int16], qfac: float) -> None:
    """A qfac of 0 counts as 1, as the standard says."""
    spacing_mm = [0.7, 1.3, 2.5, 0, 0, 0, 0]
    fields = {"sform_code": 0, "quatern_b": 0.6, "quatern_c": 0, "quatern_d": 0.8}
    path = write(tmp_path / "ct.nii", nifti(ct, pixdim=[qfac, *spacing_mm], **fields))
    reference = write(tmp_path / "reference.nii", nifti(ct, pixdim=[qfac or 1, *spacing_mm], **fields))
    affine = read_geometry(path).affine_ras
    np.testing.assert_allclose(affine, nibabel.load(reference).affine, atol=1e-5)
    assert np.sign(np.linalg.det(affine)) == (qfac or 1)


def test_shear(tmp_path: Path, nifti: Maker, ct: NDArray[np.int16], oblique: Geometry) -> None:
    rows = oblique.affine_ras[:3].copy()
    rows[:, 2] += 0.002 * rows[:, 0] * 2.5 / 0.7
    fields = dict(zip(("srow_x", "srow_y", "srow_z"), rows, strict=True))
    message = refusal(write(tmp_path / "ct.nii", nifti(ct, qform_code=0, **fields)))
    assert "axes must be at right angles, got a shear of 0.002 (at most 0.001)" in message


@pytest.mark.parametrize("extra", [(1,), (1, 1)])
def test_extra_axes_of_one_are_dropped(
    tmp_path: Path, nifti: Maker, ct: NDArray[np.int16], extra: tuple[int, ...]
) -> None:
    volume = read_image(write(tmp_path / "ct.nii", nifti(ct.reshape(*ct.shape, *extra, order="F"))))
    np.testing.assert_array_equal(volume.array, ct)


def test_a_single_slice_is_a_volume(tmp_path: Path, nifti: Maker, ct: NDArray[np.int16]) -> None:
    assert read_image(write(tmp_path / "ct.nii.gz", nifti(ct[:, :, :1]))).geometry.size == (7, 11, 1)


@pytest.mark.parametrize(
    ("dtype", "slope", "inter", "expected"),
    [
        ("i2", 0.0, 0.0, "i2"),
        ("i2", NAN, 5.0, "i2"),
        ("i2", 1.0, 0.0, "i2"),
        ("i2", 1.0, -1024.0, "i2"),
        ("u2", 1.0, -1024.0, "i2"),
        ("u1", 1.0, -1024.0, "i2"),
        ("u2", 1.0, 64000.0, "u2"),
        ("i2", 1.0, 40000.0, "i4"),
        ("i2", 1.0, 0.5, "f4"),
        ("i2", 2.0, -1024.0, "f4"),
        ("i2", -1.0, 0.0, "f4"),
        ("f4", 2.0, 1.0, "f4"),
        ("f8", 2.0, 1.0, "f4"),
    ],
)
def test_scaling(
    tmp_path: Path, nifti: Maker, ct: NDArray[np.int16], dtype: str, slope: float, inter: float, expected: str
) -> None:
    stored = (ct % 200).astype(dtype) if dtype == "u1" else (ct + 200).astype(dtype)
    path = write(tmp_path / "ct.nii.gz", nifti(stored, scl_slope=slope, scl_inter=inter))
    array = read_image(path).array
    assert array.dtype == np.dtype(expected)
    np.testing.assert_array_equal(array, np.asanyarray(nibabel.load(path).dataobj))


def test_extensions_are_skipped(tmp_path: Path, nifti: Maker, ct: NDArray[np.int16]) -> None:
    data = nifti(ct, vox_offset=384)
    data = data[:348] + b"\1\0\0\0" + (32).to_bytes(4, "little") + (6).to_bytes(4, "little") + b"n" * 24 + data[352:]
    for name in ("ct.nii", "ct.nii.gz"):
        np.testing.assert_array_equal(read_image(write(tmp_path / name, data)).array, ct)


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"dim": [3, 32767, 32767, 32767, 1, 1, 1, 1]}, "at most 2147483648 voxels, its header promises 3.52e+13"),
        ({"dim": [3, 1290, 1290, 1290, 1, 1, 1, 1]}, "compressed bytes cannot hold them"),
        ({"vox_offset": 2.0**40}, "compressed bytes cannot hold them"),
    ],
)
def test_hostile_headers_allocate_nothing(
    tmp_path: Path, nifti: Maker, ct: NDArray[np.int16], at_most: Limit, fields: dict[str, Any], fragment: str
) -> None:
    data = nifti(ct, **fields)
    path = write(tmp_path / "ct.nii.gz", data)
    with at_most(8 * 2**20):
        assert fragment in refusal(path)
        refusal(write(tmp_path / "ct.nii", data))


def test_a_bomb_is_not_unpacked(tmp_path: Path, nifti: Maker, ct: NDArray[np.int16], at_most: Limit) -> None:
    path = write(tmp_path / "ct.nii.gz", nifti(ct) + bytes(2**27))
    with at_most(8 * 2**20):
        assert "more data than the 770 bytes its header promises" in refusal(path)


def test_reading_needs_one_array(tmp_path: Path, nifti: Maker, at_most: Limit) -> None:
    array = np.random.default_rng(0).integers(-1000, 1000, (256, 256, 64)).astype(np.int16)
    path = write(tmp_path / "ct.nii.gz", nifti(array, ">"))
    with at_most(array.nbytes + 6 * 2**20):
        np.testing.assert_array_equal(read_image(path).array[::9], array[::9])


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        (lambda data: data[:-3], "truncated: the compressed data end early; copy it again"),
        (lambda data: data[: len(data) // 2], "truncated: the compressed data end early"),
        (lambda data: data[:-8] + bytes([data[-8] ^ 1]) + data[-7:], "the compressed data are damaged (CRC"),
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), "the compressed data are damaged (Incorrect length"),
        (lambda data: data + b"garbage after the end", "the compressed data are damaged (Not a gzipped file"),
        (lambda data: data + data, "more data than the 770 bytes its header promises"),
        (lambda data: gzip.compress(gzip.decompress(data)[:-9]), "truncated: 761 of 770 bytes of voxels"),
        (lambda data: gzip.compress(gzip.decompress(data)[:200]), "not NIfTI: it must begin with a header"),
    ],
)
def test_damaged_gzip(
    tmp_path: Path, nifti: Maker, ct: NDArray[np.int16], damage: Callable[[bytes], bytes], fragment: str
) -> None:
    path = tmp_path / "ct.nii.gz"
    path.write_bytes(damage(gzip.compress(nifti(ct))))
    assert fragment in refusal(path)


def test_several_gzip_members_are_one_file(tmp_path: Path, nifti: Maker, ct: NDArray[np.int16]) -> None:
    data, path = nifti(ct), tmp_path / "ct.nii.gz"
    path.write_bytes(gzip.compress(data[:500]) + gzip.compress(data[500:]) + bytes(16))
    np.testing.assert_array_equal(read_image(path).array, ct)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_any_damaged_header_is_read_or_refused(
    tmp_path: Path, nifti: Maker, ct: NDArray[np.int16], suffix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    dice, whole = random.Random(1), nifti(ct)
    path = tmp_path / f"ct{suffix}"
    outcomes, messages = set(), []
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(dice.choice([1, 1, 3])):
            data[dice.randrange(352)] = dice.randrange(256)
        try:
            outcomes.add(type(read_image(write(path, bytes(data)))))
        except ImageError as error:
            outcomes.add(ImageError)
            messages.append(str(error))
    assert outcomes == {Volume, ImageError}
    assert not any("\n" in message for message in messages)
    assert capfd.readouterr() == ("", "")


def test_any_damaged_gzip_is_read_or_refused(tmp_path: Path, nifti: Maker, ct: NDArray[np.int16]) -> None:
    dice, whole = random.Random(2), gzip.compress(nifti(ct))
    path = tmp_path / "ct.nii.gz"
    for _ in range(200):
        data = bytearray(whole)
        data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        path.write_bytes(data)
        try:
            np.testing.assert_array_equal(read_image(path).array, ct)
        except ImageError:
            continue


@pytest.mark.parametrize(
    "name",
    ["msd_spleen8/imagesTr/spleen_8.nii.gz", "crlm_abdomen/CRLM-CT-1004_ct.nii.gz", "sts_lesion/STS_001_ct.nii.gz"],
)
def test_real_ct_equals_nibabel(real_data: Path, name: str) -> None:
    volume, expected = read_image(real_data / name), nibabel.load(real_data / name)
    assert volume.array.dtype == expected.get_data_dtype()
    np.testing.assert_array_equal(volume.array, np.asanyarray(expected.dataobj))
    np.testing.assert_allclose(volume.geometry.affine_ras, expected.affine, rtol=1e-6)


@pytest.mark.parametrize("name", ["msd_spleen8/labelsTr/spleen_8.nii.gz", "sts_lesion/STS_001_lesion.nii.gz"])
def test_real_labels_equal_nibabel(real_data: Path, name: str) -> None:
    volume = read_labels(real_data / name)
    assert volume.array.dtype == np.uint8
    np.testing.assert_array_equal(volume.array, np.asanyarray(nibabel.load(real_data / name).dataobj))
