"""NRRD and MetaImage: what SimpleITK writes is read as SimpleITK reads it; hostile text headers are refused."""

import gzip
import random
import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from numpy.typing import NDArray

from ctseg.errors import ImageError
from ctseg.io.images import read_geometry, read_image, read_labels
from ctseg.volume import Geometry, Volume

Limit = Callable[[int], AbstractContextManager[None]]
SUFFIXES = [".nrrd", ".mha"]


@pytest.fixture
def image(ct: NDArray[np.int16], oblique: Geometry) -> SimpleITK.Image:
    image = SimpleITK.GetImageFromArray(ct.T)
    image.SetSpacing(oblique.spacing_mm)
    image.SetOrigin(oblique.origin_mm)
    image.SetDirection(oblique.direction.ravel())
    return image


def write(path: Path, image: SimpleITK.Image, compressed: bool = False) -> Path:
    SimpleITK.WriteImage(image, str(path), compressed)
    return path


def edit(path: Path, old: str, new: str) -> Path:
    data = path.read_bytes()
    assert old.encode() in data
    path.write_bytes(data.replace(old.encode(), new.encode(), 1))
    return path


def refusal(path: Path) -> str:
    """The message `read_image` refuses `path` with: one line that names it."""
    with pytest.raises(ImageError) as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith(f"cannot read '{path}': ")
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f4", "f8"])
def test_reads_what_simpleitk_writes(
    tmp_path: Path, image: SimpleITK.Image, oblique: Geometry, suffix: str, compressed: bool, dtype: str
) -> None:
    expected = (SimpleITK.GetArrayFromImage(image) % 100).astype(dtype)
    typed = SimpleITK.GetImageFromArray(expected)
    typed.CopyInformation(image)
    volume = read_image(write(tmp_path / f"ct{suffix}", typed, compressed))
    assert volume.array.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(volume.array, expected.T)
    np.testing.assert_allclose(volume.geometry.affine, oblique.affine, rtol=1e-12)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_extra_axis_of_one_is_dropped(tmp_path: Path, image: SimpleITK.Image, suffix: str) -> None:
    if suffix == ".mha":
        path = write(tmp_path / "ct.mha", SimpleITK.JoinSeries([image]))
    else:  # SimpleITK leaves out the space of a 4D NRRD; other writers put the single axis first
        path = edit(write(tmp_path / "ct.nrrd", image), "dimension: 3", "dimension: 4")
        path = edit(edit(path, "sizes: ", "sizes: 1 "), "directions: ", "directions: none ")
    volume = read_image(path)
    np.testing.assert_array_equal(volume.array, SimpleITK.GetArrayFromImage(image).T)
    np.testing.assert_allclose(volume.geometry.direction, np.reshape(image.GetDirection(), (3, 3)), atol=1e-12)


def test_big_endian_nrrd_and_mha(tmp_path: Path, image: SimpleITK.Image) -> None:
    """The same bytes read the other way round, as SimpleITK reads them."""
    paths = [
        edit(write(tmp_path / "ct.nrrd", image), "endian: little", "endian: big"),
        edit(write(tmp_path / "ct.mha", image), "ByteOrderMSB = False", "ByteOrderMSB = True"),
    ]
    for path in paths:
        expected = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
        np.testing.assert_array_equal(read_image(path).array, expected.T)
        assert not np.array_equal(expected, SimpleITK.GetArrayFromImage(image))


@pytest.mark.parametrize("space", ["right-anterior-superior", "left-anterior-superior", "RAS", "LPS"])
def test_nrrd_spaces_as_simpleitk_sees_them(tmp_path: Path, image: SimpleITK.Image, space: str) -> None:
    path = edit(write(tmp_path / "ct.nrrd", image), "left-posterior-superior", space)
    geometry, expected = read_geometry(path), SimpleITK.ReadImage(str(path))
    for index in [(0, 0, 0), (6, 10, 4), (3, 0, 2)]:
        position = (geometry.affine @ [*index, 1])[:3]
        np.testing.assert_allclose(position, expected.TransformIndexToPhysicalPoint(index), atol=1e-9)


@pytest.mark.parametrize(
    ("old", "new", "fragment"),
    [
        ("encoding: raw", "data file: other.raw\nencoding: raw", "its header names another file; save it as one file"),
        ("encoding: raw", "DataFile: LIST\nencoding: raw", "its header names another file"),
        ("encoding: raw", "content: x\rdata file: y\nencoding: raw", "its header names another file"),
        ("NRRD0004", "NOTNRRD4", "not NRRD: it must begin with 'NRRD000'"),
        ("space: left-posterior-superior", "space dimension: 3", "'space' must be one of left-posterior-superior"),
        ("space directions: (", "something: (", "no orientation: 'space directions' must give three of the axes a v"),
        ("space directions: (", "space directions: none (", "no orientation: 'space directions'"),
        ("space origin: (", "space origin: (nan,", "'space origin' must be 3 numbers, got '(nan,-12.5"),
        ("sizes: 7 11 5", "sizes: 7 11", "'sizes' must be 3 numbers, got '7 11'"),
        ("sizes: 7 11 5", "sizes: 7 -11 5", "'sizes' must be whole numbers in 1..2147483648, got '7 -11 5'"),
        ("sizes: 7 11 5", "sizes: 7 11 5e300", "'sizes' must be whole numbers"),
        ("sizes: 7 11 5", "sizes: 7 11 6", "truncated: its header promises 924 bytes, the file has 770"),
        ("sizes: 7 11 5", "sizes: 7 11 4", "something follows the voxels"),
        ("sizes: 7 11 5", "sizes: 2000 2000 2000", "at most 2147483648 voxels, its header promises 8e+09"),
        ("dimension: 3", "dimension: 2", "'dimension' must be one of 3, 4, 5; got '2'"),
        ("type: short", "type: block", "'type' must be one of signed char"),
        ("endian: little", "endian: middle", "'endian' must be one of little, big; got 'middle'"),
        ("encoding: raw", "encoding: ascii", "'encoding' must be one of raw, gzip, gz; got 'ascii'"),
        ("encoding: raw", "encoding: raw\nbyte skip: -1", "'byte skip' must be 0, got '-1'"),
        ("encoding: raw", 'encoding: raw\nspace units: "um" "um" "um"', "'space units' must be mm, got"),
        ("type: short", "type: short\ntype: float", "'type' must stand once, got it twice"),
    ],
)
def test_nrrd_rules(tmp_path: Path, image: SimpleITK.Image, old: str, new: str, fragment: str) -> None:
    assert fragment in refusal(edit(write(tmp_path / "ct.nrrd", image), old, new))


@pytest.mark.parametrize(
    ("old", "new", "fragment"),
    [
        ("File = LOCAL", "File = other.raw", "its voxels must be in the file itself (ElementDataFile = LOCAL), got an"),
        ("File = LOCAL", "File = LIST", "got another; save it as one file"),
        ("NDims = 3", "NDims = 3\nElementDataFile = x.raw", "got another"),
        ("NDims = 3", "Comment = ElementDataFile = LOCAL", "got another"),
        ("ElementDataFile = LOCAL", "", "not MetaImage: its header must end in 'ElementDataFile = LOCAL'"),
        ("ObjectType = Image", "ObjectType = Mesh", "'ObjectType' must be Image, got 'Mesh'"),
        ("NDims = 3", "NDims = 100", "'NDims' must be one of 3, 4, 5; got '100'"),
        ("BinaryData = True", "BinaryData = False", "'BinaryData' must be one of True; got 'False'"),
        ("TransformMatrix = ", "Something = ", "no orientation: 'TransformMatrix' must be given"),
        ("TransformMatrix = ", "TransformMatrix = 1 ", "'TransformMatrix' must be 9 numbers"),
        (
            "TransformMatrix = ",
            "TransformMatrix = 2 0 0 0 1 0 0 0 1\nX = ",
            "must hold unit vectors, got lengths [2.0, ",
        ),
        ("TransformMatrix = ", "TransformMatrix = 1 0 0 .6 .8 0 0 0 1\nX = ", "at right angles, got a shear of 0.6"),
        ("Offset = ", "Offset = inf ", "'Offset' must be 3 numbers"),
        ("Offset = ", "Offset = 1 2 inf\nX = ", "the affine must be finite"),
        ("ElementSpacing = ", "ElementSpacing = 1 0 1\nX = ", "'ElementSpacing' must be positive, got '1 0 1'"),
        ("ElementSpacing = ", "ElementSpacing = 1 nan 1\nX = ", "'ElementSpacing' must be positive"),
        ("DimSize = 7 11 5", "DimSize = 7 11 6", "truncated: its header promises 924 bytes, the file has 770"),
        ("DimSize = 7 11 5", "DimSize = 7 11 0", "'DimSize' must be whole numbers"),
        ("ElementType = MET_SHORT", "ElementType = MET_OTHER", "'ElementType' must be one of MET_CHAR, MET_UCHAR"),
        ("NDims = 3", "NDims = 3\nElementNumberOfChannels = 3", "'ElementNumberOfChannels' must be 1, got '3'"),
        ("NDims = 3", "NDims = 3\nHeaderSize = -1", "'HeaderSize' must be 0, got '-1'"),
        ("NDims = 3", "NDims = 3\nNDims = 3", "'NDims' must stand once"),
    ],
)
def test_mha_rules(tmp_path: Path, image: SimpleITK.Image, old: str, new: str, fragment: str) -> None:
    assert fragment in refusal(edit(write(tmp_path / "ct.mha", image), old, new))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_vectors_and_series_are_refused(tmp_path: Path, image: SimpleITK.Image, suffix: str) -> None:
    colour = write(tmp_path / f"colour{suffix}", SimpleITK.Compose([image] * 3))
    assert ("further axes of [3]" if suffix == ".nrrd" else "Channels' must be 1, got '3'") in refusal(colour)
    series = write(tmp_path / f"series{suffix}", SimpleITK.JoinSeries([image] * 2))
    assert ("'space' must be one of" if suffix == ".nrrd" else "further axes of [2]; split it") in refusal(series)


def test_all_problems_of_a_header_at_once(tmp_path: Path, image: SimpleITK.Image) -> None:
    path = edit(write(tmp_path / "ct.nrrd", image), "type: short", "type: block")
    message = refusal(edit(path, "endian: little\nencoding: raw", "encoding: ascii"))
    assert all(f"'{key}' must be one of" in message for key in ("type", "encoding"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damaged_compressed_voxels(tmp_path: Path, image: SimpleITK.Image, suffix: str) -> None:
    """SimpleITK 2.5 returns a picture for most of these."""
    data = write(tmp_path / f"ct{suffix}", image, compressed=True).read_bytes()
    path = tmp_path / f"damaged{suffix}"
    for damaged, fragment in [
        (data[:-20], "truncated: the compressed data end early"),
        (data[:-40] + bytes([data[-40] ^ 1]) + data[-39:], "copy it again from its source"),
        (data[:-1] + bytes([data[-1] ^ 1]), "the compressed data are damaged"),
        (data + b"garbage after the end", "something follows" if suffix == ".mha" else "are damaged"),
    ]:
        path.write_bytes(damaged)
        assert fragment in refusal(path)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_hostile_sizes_allocate_nothing(
    tmp_path: Path, image: SimpleITK.Image, at_most: Limit, suffix: str, ct: NDArray[np.int16]
) -> None:
    path = edit(write(tmp_path / f"ct{suffix}", image, compressed=True), "7 11 5", "1290 1290 1290")
    header = write(tmp_path / f"bomb{suffix}", image).read_bytes()[: -ct.nbytes]
    header = header.replace(b"encoding: raw", b"encoding: gzip").replace(
        b"CompressedData = False", b"CompressedData = True"
    )
    pack = gzip.compress if suffix == ".nrrd" else zlib.compress
    (tmp_path / f"bomb{suffix}").write_bytes(header + pack(bytes(2**26)))
    with at_most(8 * 2**20):
        assert "compressed bytes cannot hold them" in refusal(path)
        assert "more data than the 770 bytes" in refusal(tmp_path / f"bomb{suffix}")


def test_a_header_without_end_is_refused_quickly(tmp_path: Path) -> None:
    for name, start in (("a.nrrd", b"NRRD0004\n"), ("a.mha", b"ObjectType = Image\nElementDataFile =")):
        for filler in (b"\r", b" ", b"\n ", b"x"):
            (tmp_path / name).write_bytes(start + filler * 2**20)
            refusal(tmp_path / name)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_any_damaged_header_is_read_or_refused(
    tmp_path: Path, image: SimpleITK.Image, suffix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    dice, whole = random.Random(3), write(tmp_path / f"ct{suffix}", image).read_bytes()
    path = tmp_path / f"damaged{suffix}"
    outcomes, messages = set(), []
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(dice.choice([1, 1, 3])):
            data[dice.randrange(len(whole) - 770)] = dice.randrange(256)
        path.write_bytes(data)
        try:
            outcomes.add(type(read_image(path)))
        except ImageError as error:
            outcomes.add(ImageError)
            messages.append(str(error))
    assert outcomes == {Volume, ImageError}
    assert not any("\n" in message for message in messages)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["ct-64.nrrd", "ct-64-transformed.nrrd"])
def test_real_ct_equals_simpleitk(real_data: Path, name: str) -> None:
    volume = read_image(real_data / "cip_lung64" / name)
    expected = SimpleITK.ReadImage(str(real_data / "cip_lung64" / name))
    np.testing.assert_array_equal(volume.array, SimpleITK.GetArrayFromImage(expected).T)
    np.testing.assert_allclose(volume.geometry.spacing_mm, expected.GetSpacing())
    np.testing.assert_allclose(volume.geometry.origin_mm, expected.GetOrigin())
    np.testing.assert_allclose(volume.geometry.direction.ravel(), expected.GetDirection(), atol=1e-12)


def test_real_labels(real_data: Path) -> None:
    path = real_data / "cip_lung64" / "wholeLung-64.nrrd"
    labels = read_labels(path)
    assert labels.array.dtype == np.uint8
    np.testing.assert_array_equal(labels.array, SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))).T)
    with pytest.raises(ImageError, match=r"labels must be whole numbers in 0\.\.255, got \d+ voxels that are not"):
        read_labels(real_data / "cip_lung64" / "lm-64.nrrd")


def test_byte_orders_that_contradict_each_other_are_refused(tmp_path: Path, image: SimpleITK.Image) -> None:
    path = write(tmp_path / "ct.mha", image)
    edit(path, "BinaryDataByteOrderMSB = False", "BinaryDataByteOrderMSB = False\nElementByteOrderMSB = True")
    assert "'BinaryDataByteOrderMSB' and 'ElementByteOrderMSB' must agree; correct the header" in refusal(path)
