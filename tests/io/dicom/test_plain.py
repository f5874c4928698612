"""Headers of ordinary files, walked without pydicom, against pydicom's own reader."""

import io
import random
from collections.abc import Callable
from pathlib import Path

import pydicom
import pydicom.data
import pytest
from pydicom.dataelem import RawDataElement
from pydicom.filewriter import dcmwrite
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian, JPEG2000Lossless

from ctseg.io.dicom import headers
from ctseg.io.dicom.files import list_sources
from ctseg.io.dicom.plain import PlainHeader, plain_header
from ctseg.io.dicom.silence import pydicom_silent

Maker = Callable[..., Path]
WANTED = headers._KEPT
CHARACTER_SET = 0x00080005


def assert_same_as_pydicom(found: PlainHeader, data: bytes) -> None:
    with pydicom_silent():
        dataset = pydicom.dcmread(io.BytesIO(data), force=True)
    raw = {tag: element for tag, element in dataset.items() if isinstance(element, RawDataElement)}
    pixels = next(raw[tag] for tag in (0x7FE00008, 0x7FE00009, 0x7FE00010) if tag in raw)
    length = None if pixels.length == 0xFFFFFFFF else pixels.length
    assert (found.offset, found.length) == (pixels.value_tell, length)
    assert found.syntax == dataset.file_meta.TransferSyntaxUID
    expected = {tag: (raw[tag].VR, raw[tag].value) for tag in raw if tag in WANTED and raw[tag].length}
    elements = {tag: (element.VR, element.value) for tag, element in found.elements.items()}
    _, characters = elements.pop(CHARACTER_SET, ("", b""))
    assert elements == expected
    said = dataset.get("SpecificCharacterSet") or ""  # converted when it was met
    assert characters.decode().strip() == (said if isinstance(said, str) else "\\".join(said))


def first_file(folder: Path) -> bytes:
    return min(folder.iterdir()).read_bytes()


def test_every_test_file_of_pydicom():
    plain = 0
    for path in sorted(Path(pydicom.data.__file__).parent.rglob("*")):
        data = path.read_bytes() if path.is_file() else b""
        found = plain_header(data, WANTED)
        if found is not None:
            plain += 1
            assert_same_as_pydicom(found, data)
    assert plain > 80


def test_every_real_file(real_data: Path):
    sources, _ = list_sources(sorted(real_data.rglob("*.zip")))
    plain = 0
    for source in sources:
        with source.open() as file:
            data = file.read()
        found = plain_header(data, WANTED)
        if found is not None:
            plain += 1
            assert_same_as_pydicom(found, data)
    assert plain > 250


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_damaged_headers_are_read_as_pydicom_does_or_left_to_it(series_plan, make_series: Maker, syntax: str):
    data = first_file(make_series(series_plan(syntax=syntax, tags={"SpecificCharacterSet": "ISO_IR 100"})))
    pixels = data.rindex(b"\xe0\x7f\x10\x00")
    chance = random.Random(syntax)
    read = 0
    for _ in range(3000):
        damaged = bytearray(data)
        for _ in range(chance.choice([1, 1, 2, 5])):
            place = chance.randrange(128, pixels + 12)
            damaged[place] = chance.choice(
                [0, 0xFF, chance.randrange(256), damaged[place] ^ (1 << chance.randrange(8))]
            )
        found = plain_header(bytes(damaged), WANTED)
        if found is not None:
            read += 1
            assert_same_as_pydicom(found, bytes(damaged))
    assert 500 < read < 2900


@pytest.mark.parametrize("implicit", [True, False])
def test_sequences_without_a_length_are_stepped_over(series_plan, make_series: Maker, implicit: bool):
    syntax = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    dataset = pydicom.dcmread(min(make_series(series_plan(syntax=syntax)).iterdir()))
    inner = pydicom.Dataset()
    inner.ReferencedSOPInstanceUID = "1.2.3"
    dataset.ReferencedStudySequence = [inner]
    dataset["ReferencedStudySequence"].is_undefined_length = True
    buffer = io.BytesIO()
    dcmwrite(buffer, dataset)
    assert b"\xfe\xff\xdd\xe0" in buffer.getvalue()
    found = plain_header(buffer.getvalue(), WANTED)
    assert found is not None
    assert_same_as_pydicom(found, buffer.getvalue())


def test_where_compressed_pixels_begin(series_plan, make_series: Maker):
    data = first_file(make_series(series_plan(size=(64, 48, 1), syntax=JPEG2000Lossless)))
    found = plain_header(data[:4000], WANTED)
    assert found is not None
    assert found.length is None
    assert data[found.offset : found.offset + 4] == b"\xfe\xff\x00\xe0"


class TestLeftToPydicom:
    @pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99"])
    def test_big_endian_and_deflated(self, series_plan, make_series: Maker, syntax: str):
        assert plain_header(first_file(make_series(series_plan(syntax=syntax))), WANTED) is None

    def test_frames_with_places_of_their_own(self, series_plan, make_enhanced: Maker):
        assert plain_header(make_enhanced(series_plan()).read_bytes(), WANTED) is None

    @pytest.mark.parametrize(
        ("before", "after"),
        [
            (b"DICM\x02\x00", b"DICX\x02\x00"),
            (b"\x02\0\0\0UL\x04\0", b"\x02\0\0\0UL\x05\0"),
            (b"\x28\x00\x10\x00US", b"\x28\x00\x10\x00ZZ"),
            (b"\x28\x00\x10\x00US", b"\x02\x00\x10\x00US"),
            (b"\x28\x00\x10\x00US", b"\xfe\xff\x0d\xe0US"),
            (b"\x08\x00\x05\x00CS\x0a\x00ISO_IR 100", b"\x08\x00\x05\x00CS\x0a\x00ISO_IR\x00100"),
            (b"1.2.840.10008.1.2.1\0", b"1.2.840.10009.1.2.1\0"),
        ],
    )
    def test_what_is_not_as_in_an_ordinary_file(self, series_plan, make_series: Maker, before: bytes, after: bytes):
        data = first_file(make_series(series_plan(tags={"SpecificCharacterSet": "ISO_IR 100"})))
        assert plain_header(data, WANTED) is not None
        assert before in data
        assert plain_header(data.replace(before, after), WANTED) is None

    def test_explicit_data_that_call_themselves_implicit(self, series_plan, make_series: Maker):
        data = first_file(make_series(series_plan()))
        said = b"\x02\x00\x10\x00UI\x14\x001.2.840.10008.1.2.1\0"
        assert plain_header(data.replace(said, said[:-3] + b"\0\0\0"), WANTED) is None

    def test_a_header_that_goes_on(self, series_plan, make_series: Maker):
        data = first_file(make_series(series_plan()))
        found = plain_header(data, WANTED)
        assert found is not None
        for end in range(0, found.offset - 8, 7):
            assert plain_header(data[:end], WANTED) is None
