"""Lossless JPEG: the pixels that were packed, or a refusal; GDCM is a judge that takes more damage."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGLossless

from codestreams import damaged, dataset, outcome
from ctseg.errors import ImageError
from ctseg.io.dicom import jpeg_lossless
from ctseg.io.dicom.codestream import check_codestream
from ctseg.io.dicom.read import find_series, read_series

Maker = Callable[..., Path]
pytest.importorskip("imagecodecs")


def predictions(values: NDArray[np.int64], bits: int, predictor: int) -> NDArray[np.int64]:
    """Table H.1 of ITU-T T.81, one pixel after another."""
    result = np.zeros_like(values)
    for y, x in np.ndindex(*values.shape):
        if (y, x) == (0, 0):
            result[y, x] = 2 ** (bits - 1)
        elif y == 0:
            result[y, x] = values[y, x - 1]
        elif x == 0:
            result[y, x] = values[y - 1, x]
        else:
            a, b, c = (int(n) for n in (values[y, x - 1], values[y - 1, x], values[y - 1, x - 1]))
            choices = (a, b, c, a + b - c, a + ((b - c) >> 1), b + ((a - c) >> 1), (a + b) >> 1)
            result[y, x] = choices[predictor - 1]
    return result


def packed(array: NDArray[Any], bits: int, predictor: int = 1, extra: bytes = b"", fill: bytes = b"") -> bytes:
    """A lossless JPEG, written as the standard says: categories to 14 have codes of 4 bits, then of 5 and of 6."""
    values = array.astype(np.int64)
    differences = (values - predictions(values, bits, predictor) + 2**15) % 2**16 - 2**15
    code = ""
    for difference in (int(d) for d in differences.flat):
        category = abs(difference).bit_length()
        code += f"{category:04b}" if category < 15 else ("11110", "111110")[category - 15]
        if 0 < category < 16:
            code += f"{difference if difference > 0 else difference + 2**category - 1:0{category}b}"
    code += "1" * (-len(code) % 8)
    scan = bytes(int(code[n : n + 8], 2) for n in range(0, len(code), 8)).replace(b"\xff", b"\xff\0")
    rows, columns = array.shape
    frame = bytes([bits, *rows.to_bytes(2, "big"), *columns.to_bytes(2, "big"), 1, 1, 0x11, 0])
    table = bytes([0, 0, 0, 0, 15, 1, 1, *[0] * 10, *range(17)])
    segments = ((0xC3, frame), (0xC4, table), (0xDA, bytes([1, 1, 0, predictor, 0, 0])))
    parts = (bytes([0xFF, marker]) + (len(data) + 2).to_bytes(2, "big") + data for marker, data in segments)
    return b"\xff\xd8" + extra + b"".join(parts) + scan + fill + b"\xff\xd9"


def image(bits: int, shape: tuple[int, int] = (12, 17)) -> NDArray[Any]:
    """A slope with noise, and values of the whole range."""
    rng = np.random.default_rng(bits)
    values = (np.add.outer(np.arange(shape[0]), np.arange(shape[1])) + rng.integers(0, 4, shape)) % 2**bits
    values[::5, ::3] = rng.integers(0, 2**bits, values[::5, ::3].shape)
    return values.astype(np.uint8 if bits <= 8 else np.uint16)


def size_of(array: NDArray[Any]) -> tuple[int, int]:
    return array.shape[1], array.shape[0]


def by_gdcm(frame: bytes, shape: tuple[int, int], bits: int) -> NDArray[Any] | None:
    return outcome(dataset(frame, JPEGLossless, shape, bits, signed=False), "gdcm")


@pytest.mark.parametrize("predictor", range(1, 8))
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_what_was_packed_comes_out(bits: int, predictor: int) -> None:
    array = image(bits)
    frame = packed(array, bits, predictor)
    assert check_codestream(frame, size_of(array), 8 * array.itemsize) == bits
    assert jpeg_lossless.is_simple(frame)
    stored = jpeg_lossless.decode(frame, size_of(array))
    assert stored.dtype == array.dtype
    np.testing.assert_array_equal(stored, array)
    theirs = by_gdcm(frame, array.shape, bits)
    assert theirs is not None
    np.testing.assert_array_equal(stored, theirs)


def test_the_difference_of_half_the_range_has_no_bits_of_its_own() -> None:
    array = np.array([[0x8000, 0, 0x8000, 0], [0, 0x8000, 1, 0x8001]], np.uint16)
    np.testing.assert_array_equal(jpeg_lossless.decode(packed(array, 16), (4, 2)), array)


@pytest.mark.parametrize("predictor", range(1, 8))
@pytest.mark.parametrize("cut", [1, 2, 5, 40])
def test_a_scan_cut_short_is_refused_though_gdcm_takes_it(cut: int, predictor: int) -> None:
    array = image(12)
    frame = packed(array, 12, predictor)
    frame = frame[: -2 - cut].rstrip(b"\xff") + frame[-2:]
    assert by_gdcm(frame, array.shape, 12) is not None
    with pytest.raises(ImageError, match=r"its lossless JPEG is damaged: .*; copy it again from its source"):
        jpeg_lossless.decode(frame, size_of(array))


def test_values_of_more_bits_than_promised_are_refused() -> None:
    array = image(12)
    array[5, 5] = 2**12
    with pytest.raises(ImageError, match="values of more than 12 bits"):
        jpeg_lossless.decode(packed(array, 12), size_of(array))


def test_a_scan_with_bytes_too_many_is_refused() -> None:
    array = image(12)
    frame = packed(array, 12)
    with pytest.raises(ImageError, match="its pixels take"):
        jpeg_lossless.decode(frame[:-2] + b"\x12" + frame[-2:], size_of(array))


@pytest.mark.parametrize("end", [b"", b"\xff", b"\xff\xd0", b"\xff\xda"])
def test_a_scan_without_its_end_is_refused(end: bytes) -> None:
    array = image(12)
    with pytest.raises(ImageError, match="its lossless JPEG is damaged"):
        jpeg_lossless.decode(packed(array, 12)[:-2] + end, size_of(array))


def test_ones_before_the_end_and_anything_after_it_do_no_harm() -> None:
    array = image(12)
    frame = packed(array, 12, fill=b"\xff\xff\xff") + b"\0\0anything"
    np.testing.assert_array_equal(jpeg_lossless.decode(frame, size_of(array)), array)


def test_codes_for_more_bits_than_a_difference_has_are_refused() -> None:
    array = image(12)
    frame = packed(array, 12).replace(bytes(range(17)), bytes([*range(16), 125]))
    with pytest.raises(ImageError, match="differences of 125 bits"):
        jpeg_lossless.decode(frame, size_of(array))


def test_another_size_than_promised_is_refused() -> None:
    with pytest.raises(ImageError, match=r"unpacks to \(17, 12\), not \(17, 13\)"):
        jpeg_lossless.decode(packed(image(12), 12), (17, 13))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\xff\xda\0\x08\x01\x01\0\x01\0\0", b"\xff\xdd\0\x04\0\x10\xff\xda\0\x08\x01\x01\0\x01\0\0"),  # restarts
        (b"\xff\xda\0\x08\x01\x01\0\x01\0\0", b"\xff\xda\0\x08\x01\x01\0\x01\0\x01"),  # the lowest bit is left out
        (b"\xff\xda\0\x08\x01\x01\0\x01\0\0", b"\xff\xda\0\x08\x01\x01\0\0\0\0"),  # no predictor
        (b"\xff\xc3", b"\xff\xc1"),  # not lossless
        (b"\x0f\x01\x01", b"\x0f\0\x02"),  # codes that mean nothing
    ],
)
def test_other_kinds_are_left_to_gdcm(old: bytes, new: bytes) -> None:
    frame = packed(image(12), 12)
    assert old in frame
    assert not jpeg_lossless.is_simple(frame.replace(old, new))


def test_without_imagecodecs_gdcm_has_them_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jpeg_lossless, "find_spec", lambda name: None)
    assert not jpeg_lossless.is_simple(packed(image(12), 12))


@pytest.mark.parametrize("predictor", [1, 6])
def test_damage_is_refused_far_more_often_than_by_gdcm(predictor: int) -> None:
    """Some damage nobody can tell: a bit that turns one value into another, and a little in the padding of the end."""
    array = image(12, (48, 64))
    frame = packed(array, 12, predictor)
    chance, code = random.Random(predictor), frame.index(b"\xff\xda") + 10
    wrong = {"ours": 0, "gdcm": 0}
    taken = differ = 0
    for _ in range(1000):
        data = damaged(frame, code, 300, chance)
        try:
            check_codestream(data, size_of(array), 16)
        except ImageError:
            continue
        theirs = by_gdcm(data, array.shape, 12)
        wrong["gdcm"] += theirs is not None and not np.array_equal(theirs, array)
        if not jpeg_lossless.is_simple(data):
            continue
        try:
            ours = jpeg_lossless.decode(data, size_of(array))
        except ImageError:
            continue
        taken += 1
        sound = np.array_equal(ours, array)
        wrong["ours"] += not sound
        differ += not sound and (theirs is None or not np.array_equal(ours, theirs))
    assert taken > 20
    assert differ <= 1
    assert wrong["gdcm"] > 300
    assert wrong["ours"] * 3 < wrong["gdcm"]


@pytest.mark.parametrize("signed", [False, True])
def test_a_series_is_read_so(series_plan: Any, make_series: Maker, signed: bool) -> None:
    folder = make_series(series_plan(size=(16, 12, 3)))
    expected = read_series(find_series([folder]).series[0]).volume.array
    for path in sorted(folder.iterdir()):
        file = pydicom.dcmread(path)
        stored = file.pixel_array
        if signed:
            file.PixelRepresentation = 1
        file.PixelData = encapsulate([packed(stored.astype(np.uint16), 16)])
        file["PixelData"].VR = "OB"
        file.file_meta.TransferSyntaxUID = JPEGLossless
        file.save_as(path)
    found = find_series([folder]).series[0]
    np.testing.assert_array_equal(read_series(found).volume.array, expected)
