"""Files that were made or damaged to do harm: each one reads right or gives one clear line; nothing crashes or hangs.

Native decoders could take the process down, so the damaged files are read in a process of their own.
"""

import itertools
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gdcm
import numpy as np
import pydicom
import pydicom.data
import pytest
import SimpleITK
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless, generate_uid

from ctseg.errors import CtsegError, ImageError
from ctseg.io.dicom import seg_pixels
from ctseg.io.dicom.codestream import check_codestream
from ctseg.io.dicom.read import find_series, read_series
from ctseg.io.dicom.series import Series
from dicom_maker import CT_IMAGE

Maker = Callable[..., Path]

READER = """
import resource, sys
from pathlib import Path
from ctseg.errors import CtsegError
from ctseg.io.dicom.read import find_series, read_series
resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
done = [0, 0, 0]
for folder in sorted(Path(sys.argv[1]).iterdir()):
    found = find_series([folder])
    for name, reason in found.rejected:
        assert reason and "\\n" not in reason, reason
    done[2] += len(found.rejected)
    for series in found.series:
        try:
            read_series(series, gaps="fill", tilt="shear")
            done[0] += 1
        except CtsegError as error:
            assert "Traceback" not in str(error)
            done[1] += 1
print(*done)
"""


def read_all(folder: Path) -> tuple[int, int, int]:
    """In a process of its own, with each folder in `folder`: series read, series refused, files refused."""
    done = subprocess.run(
        [sys.executable, "-c", READER, str(folder)], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    read, refused, rejected = map(int, done.stdout.split())
    return read, refused, rejected


def test_every_test_file_of_pydicom_reads_or_gives_a_line():
    folder = Path(pydicom.data.__file__).parent
    found = find_series([folder])
    assert len(found.series) > 50
    assert len(found.others) > 5
    for name, reason in found.rejected:
        assert "\n" not in name + reason
        assert len(reason) < 400
    for series in found.series:
        outcome = outcome_of(series)
        assert outcome is None or outcome.startswith("cannot read series #")


def outcome_of(series: Series) -> str | None:
    """None if it reads, else the message."""
    try:
        read_series(series, gaps="fill", tilt="shear")
    except CtsegError as error:
        return str(error)
    return None


@pytest.mark.parametrize("num_bytes", [132, 200, 300, 350])
def test_a_slice_that_ends_in_its_header_is_missed(series_plan, make_series: Maker, num_bytes: int):
    """As an interrupted copy leaves it; without it the series would be a slice shorter, and nobody knew."""
    folder = make_series(series_plan())
    last = sorted(folder.iterdir())[-1]
    last.write_bytes(last.read_bytes()[:num_bytes])
    rejected = find_series([folder]).left_out(keep_identifiers=True)
    assert [name.rpartition("/")[2] for name, _ in rejected] == [last.name]


def test_pixels_that_are_floating_point_numbers_are_refused(series_plan, make_series: Maker):
    """Read as whole numbers they would be anything."""

    def as_float(dataset: pydicom.Dataset, _: int) -> None:
        dataset.FloatPixelData = np.frombuffer(dataset.PixelData, dtype=np.int16).astype(np.float32).tobytes()
        dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 32, 32, 31
        del dataset.PixelData

    message = outcome_of(find_series([make_series(series_plan(change=as_float))]).series[0])
    assert "its pixels are floating-point numbers" in str(message)


def test_slices_of_two_studies_are_noted(series_plan, make_series: Maker):
    """One series may not be in two studies, but SimpleITK writes each slice as a study of its own."""

    def another(dataset: pydicom.Dataset, number: int) -> None:
        dataset.StudyInstanceUID = f"1.2.3.{number // 3}"

    (series,) = find_series([make_series(series_plan(change=another))]).series
    assert ("study", "its slices belong to 2 studies; look whether they are one CT of one patient") in [
        (note.code, note.text) for note in series.notes
    ]


def test_an_archives_checksum_counts_though_much_follows_the_pixels(series_plan, make_series: Maker, tmp_path: Path):
    def padded(dataset: pydicom.Dataset, _: int) -> None:
        dataset.DataSetTrailingPadding = bytes(40_000)

    files = sorted(make_series(series_plan(change=padded)).iterdir())
    with zipfile.ZipFile(tmp_path / "flipped.zip", "w") as packed:
        for path in files:
            packed.write(path, path.name)
    data = bytearray((tmp_path / "flipped.zip").read_bytes())
    data[data.index(b"\xe0\x7f\x10\x00") + 40] ^= 0x40
    (tmp_path / "flipped.zip").write_bytes(data)
    assert "its pixels are damaged (the archive is damaged)" in str(
        outcome_of(find_series([tmp_path / "flipped.zip"]).series[0])
    )


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLSLossless])
def test_bits_above_the_stored_ones_are_cut_off_however_pixels_are_packed(series_plan, make_series: Maker, syntax: str):
    """Values of 12 bits, signed, in 16 bits whose upper four say nothing: those of negative ones are 0 here."""

    def twelve_bits(dataset: pydicom.Dataset, _: int) -> None:
        values = np.frombuffer(dataset.PixelData, dtype=np.uint16)
        dataset.PixelData = (values & 0x0FFF).tobytes()

    plan = {"size": (64, 48, 3), "rescale": lambda _: (1, 0), "hu": lambda points: points[..., 0] * 20 - 300}
    wanted = read_series(find_series([make_series(series_plan(**plan), "plain")]).series[0]).volume.array
    assert wanted.min() < 0 < wanted.max() < 2**11
    source = make_series(series_plan(**plan, syntax=syntax, change=twelve_bits), "packed")
    for path in source.iterdir():
        dataset = pydicom.dcmread(path)
        dataset.BitsStored, dataset.HighBit = 12, 11
        dataset.save_as(path)
    np.testing.assert_array_equal(read_series(find_series([source]).series[0]).volume.array, wanted)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_damaged_files(series_plan, make_series: Maker, tmp_path: Path, syntax: str):
    """Random bytes changed, runs overwritten, tails cut off: in the header, in the pixels, and anywhere."""
    source = make_series(series_plan(size=(64, 48, 2), syntax=syntax), "source")
    files = [path.read_bytes() for path in sorted(source.iterdir())]
    chance = random.Random(syntax)
    for number in range(60):
        folder = tmp_path / "damaged" / f"{number:03}"
        folder.mkdir(parents=True)
        for n, data in enumerate(files):
            (folder / f"{n}.dcm").write_bytes(damaged(bytearray(data), chance))
    read, refused, rejected = read_all(tmp_path / "damaged")
    assert read + refused + rejected > 50
    assert refused + rejected > 10


def damaged(data: bytearray, chance: random.Random) -> bytes:
    pixels = data.rindex(b"\xe0\x7f\x10\x00")
    low, high = chance.choice([(132, pixels), (pixels, len(data)), (0, len(data))])
    for _ in range(chance.choice([1, 3, 20])):
        place = chance.randrange(low, high)
        data[place] = chance.choice([0, 0xFF, 0x7F, chance.randrange(256), data[place] ^ (1 << chance.randrange(8))])
    if chance.random() < 0.2:
        place = chance.randrange(low, high)
        data[place : place + 8] = chance.randbytes(8)
    return bytes(data[: chance.randrange(low, high)] if chance.random() < 0.15 else data)


def jpeg_lossless(folder: Path) -> Path:
    """The folder, the pixels of its files packed as JPEG lossless by GDCM."""
    for path in folder.iterdir():
        reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
        reader.SetFileName(str(path))
        assert reader.Read()
        change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.JPEGLosslessProcess14_1))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer.SetFileName(str(path))
        writer.SetFile(reader.GetFile())
        writer.SetImage(change.GetOutput())
        assert writer.Write()
    return folder


def jpeg_of_12_bits(folder: Path, **tags: Any) -> Path:
    """A series of three slices, each the extended JPEG of 12 bits that comes with pydicom."""
    dataset = pydicom.dcmread(Path(pydicom.data.__file__).parent / "test_files" / "JPGExtended.dcm")
    folder.mkdir()
    common = {"Modality": "CT", "SOPClassUID": CT_IMAGE, "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"]}
    geometry = {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PixelSpacing": [1, 1], "RescaleSlope": 1}
    for n in range(3):
        place = {"ImagePositionPatient": [0, 0, 5 * n], "SOPInstanceUID": generate_uid(), "RescaleIntercept": -1024}
        for keyword, value in {**common, **geometry, **place, **tags}.items():
            setattr(dataset, keyword, value)
        dataset.save_as(folder / f"{n}.dcm")
    return folder


@pytest.mark.parametrize("kind", [JPEG2000Lossless, JPEGLSLossless, RLELossless, "lossless", "extended"])
def test_bits_that_the_compressed_pixels_do_not_have(series_plan, make_series: Maker, tmp_path: Path, kind: str):
    """GDCM writes past its memory, and ends the process, where more bits come than were promised."""
    if kind == "extended":
        source = jpeg_of_12_bits(tmp_path / "source")
    else:
        syntax = {"syntax": kind} if kind != "lossless" else {}
        source = make_series(series_plan(size=(64, 48, 2), **syntax), "source")
        source = jpeg_lossless(source) if kind == "lossless" else source
    datasets = [pydicom.dcmread(path) for path in sorted(source.iterdir())]
    lies = list(itertools.product((8, 16, 32), (1, 8, 12, 16, 32), (0, 1)))
    for number, (allocated, stored, signed) in enumerate(lies):
        folder = tmp_path / "lies" / f"{number:03}"
        folder.mkdir(parents=True)
        for n, dataset in enumerate(datasets):
            dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = allocated, stored, stored - 1
            dataset.PixelRepresentation = signed
            dataset.save_as(folder / f"{n}.dcm")
    read, refused, _ = read_all(tmp_path / "lies")
    assert read + refused == len(lies)
    assert refused >= 20
    if kind != RLELossless:
        message = outcome_of(find_series([tmp_path / "lies" / f"{len(lies) - 1:03}"]).series[0])
        bits = 12 if kind == "extended" else 16
        assert f"its compressed pixels have {bits} bits, its header promises 32" in str(message)


def test_bits_that_the_frames_of_a_seg_do_not_have(series_plan, make_series: Maker):
    dataset = pydicom.dcmread(make_series(series_plan(size=(64, 48, 1), syntax=JPEG2000Lossless)) / "slice000.dcm")
    dataset.NumberOfFrames = 1
    assert next(seg_pixels.decode(dataset, [0])).shape == (48, 64)
    dataset.BitsAllocated = 8
    with pytest.raises(ImageError, match="its compressed pixels have 16 bits, its header promises 8"):
        next(seg_pixels.decode(dataset, [0]))


@pytest.mark.parametrize("signed", [0, 1])
def test_a_jpeg_of_12_bits_is_read_as_gdcm_does(tmp_path: Path, signed: int):
    folder = jpeg_of_12_bits(tmp_path / "series", PixelRepresentation=signed)
    for path in folder.iterdir():  # its own quantisation leaves the highest bit unused
        data = path.read_bytes()
        table = data.index(b"\xff\xdb") + 5
        path.write_bytes(data[:table] + b"\x01" + b"\xff" * 63 + data[table + 64 :])
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames([str(path) for path in sorted(folder.iterdir())])
    expected = SimpleITK.GetArrayFromImage(reader.Execute()).T
    array = read_series(find_series([folder]).series[0]).volume.array
    assert (expected.min() < -1024) == bool(signed)
    np.testing.assert_array_equal(array, expected)


class TestBrokenSlices:
    """A slice that cannot be used is never dropped in silence: the series would end early."""

    @pytest.mark.parametrize("fault", ["cut short", "no rows", "no pixels"])
    def test_one_at_the_end_is_a_problem_of_its_series(self, series_plan, make_series: Maker, fault: str):
        folder = make_series(series_plan())
        path = folder / "slice005.dcm"
        if fault == "cut short":
            path.write_bytes(path.read_bytes()[:-300])
            assert b"\x20\0\x0e\0UI" in path.read_bytes()
        else:
            dataset = pydicom.dcmread(path)
            del dataset["Rows" if fault == "no rows" else "PixelData"]
            dataset.save_as(path)
        found = find_series([folder])
        (series,) = found.series
        assert (len(series), found.rejected) == (5, ())
        assert [problem.code for problem in series.problems] == ["broken-files"]
        expected = r"1 file.s. of this series cannot be read .the first, '.*series: file #6': .*; copy them again"
        with pytest.raises(ImageError, match=expected):
            read_series(series)

    def test_one_that_names_no_series_is_listed(self, make_series: Maker):
        folder = make_series()
        path = folder / "slice005.dcm"
        path.write_bytes(path.read_bytes()[:600])
        found = find_series([folder])
        assert found.rejected[0][0] == f"{folder}: file #6"
        assert not found.series[0].problems

    def test_a_series_of_which_nothing_is_left(self, make_series: Maker):
        folder = make_series()
        for path in folder.iterdir():
            path.write_bytes(path.read_bytes()[:-300])
        found = find_series([folder])
        assert (found.series, len(found.rejected)) == ((), 6)


def test_more_pixels_than_promised_are_refused(series_plan, make_series: Maker):
    """A header with fewer rows than there are would leave the rest of every image out."""
    folder = make_series(series_plan(tags={"Rows": 5}))
    message = outcome_of(find_series([folder]).series[0])
    assert "damaged header: 126 bytes of pixels, its header promises 90" in str(message)


def test_an_odd_number_of_bytes_is_padded(series_plan, make_series: Maker):
    plan = series_plan(bits=(8, 8), signed=False, rescale=lambda n: (1, -1024), hu=lambda p: p[..., 0] - 900)
    assert outcome_of(find_series([make_series(plan)]).series[0]) is None


def test_frames_without_a_place_are_refused(series_plan, make_series: Maker):
    def double(dataset, n: int) -> None:
        dataset.NumberOfFrames = 2
        dataset.PixelData = dataset.PixelData * 2

    (series,) = find_series([make_series(series_plan(change=double))]).series
    assert [problem.code for problem in series.problems] == ["frames"]
    assert "a file holds 2 frames without a place of their own" in str(outcome_of(series))


def test_a_copy_of_a_multi_frame_file_is_decoded_once(series_plan, make_enhanced: Maker, monkeypatch):
    from ctseg.io.dicom import pixels

    path = make_enhanced(series_plan(size=(9, 7, 40), syntax=RLELossless))
    path.with_name("copy.dcm").write_bytes(path.read_bytes())
    read_bytes, calls = pixels.read_bytes, []
    monkeypatch.setattr(pixels, "read_bytes", lambda *args: (calls.append(args), read_bytes(*args))[1])
    ct = read_series(find_series([path, path.with_name("copy.dcm")]).series[0])
    assert ct.report.dropped_duplicates == 40
    assert len(calls) == 3  # both for their digests, one for its voxels


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_control_characters_of_a_header_stay_off_the_terminal(series_plan, make_series: Maker):
    series = find_series([make_series(series_plan(tags={"Modality": "X\x1b[2J" + "y" * 99}), "kind")]).series[0]
    assert (series.kind[:6], len(series.kind)) == ("X?[2Jy", 64)
    series = find_series([make_series(series_plan(tags={"RescaleType": "X\x1b[2J"}), "units")]).series[0]
    assert "its values are X?[2J by RescaleType" in series.problems[0].text


def test_sequences_nested_without_end(series_plan, make_series: Maker):
    folder = make_series(series_plan())
    path = folder / "slice002.dcm"
    data = path.read_bytes()
    start = data.index(b"\x08\x00\x05\x00") if b"\x08\x00\x05\x00" in data else data.index(b"\x08\x00\x08\x00")
    deep = (b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff") * 20000
    path.write_bytes(data[:start] + deep + data[start:])
    found = find_series([folder])
    assert [name for name, _ in found.rejected] == [f"{folder}: file #3"]
    assert found.full_names == {f"{folder}: file #3": str(path)}


def test_a_header_that_is_sound_only_where_it_is_looked_at(series_plan, make_series: Maker):
    """Only some tags of a file are read at first; what else it says may turn out broken, or be gone."""
    folder = make_series(series_plan())
    series = find_series([folder]).series[0]
    for path in folder.iterdir():
        path.unlink()
    assert series.value("SeriesDescription") is None
    assert series.value("Modality") == "CT"
    with pytest.raises(ImageError, match=r"cannot read '.*series: file #1': No such file"):
        series.slices[0].header.get("PatientID")
    with pytest.raises(ImageError, match=r"cannot read series #1 .CT, 6 slices of 9 x 7, every 2.50 mm.: cannot read"):
        read_series(series)


def test_an_element_that_promises_4_gigabytes(series_plan, make_series: Maker, at_most):
    folder = make_series(series_plan())
    path = folder / "slice002.dcm"
    data = path.read_bytes()
    start = data.index(b"\x08\x00\x08\x00")
    path.write_bytes(data[:start] + b"\x07\x00\x01\x10OB\0\0\xfe\xff\xff\xff" + data[start:])
    with at_most(2**23):
        found = find_series([folder])
    assert len(found.rejected) == 1 or len(found.series[0]) == 5


@pytest.mark.parametrize(("syntax", "name"), [(JPEG2000Lossless, "jpeg2000"), (JPEGLSLossless, "jpegls")])
def test_a_codestream_larger_than_its_header_says_is_not_unpacked(
    series_plan, make_series: Maker, syntax: str, name: str, at_most
):
    folder = make_series(series_plan(size=(64, 48, 2), syntax=syntax))
    find_series([folder])
    for path in folder.iterdir():
        data = path.read_bytes()
        if name == "jpeg2000":
            start = data.index(b"\xff\x4f\xff\x51") + 8
            data = data[:start] + (60000).to_bytes(4, "big") * 2 + data[start + 8 :]
        else:
            start = data.index(b"\xff\xf7") + 5
            data = data[:start] + (60000).to_bytes(2, "big") * 2 + data[start + 4 :]
        path.write_bytes(data)
    with (
        at_most(2**25),
        pytest.raises(ImageError, match="its compressed pixels are 60000 x 60000 of 1 colours"),
    ):
        read_series(find_series([folder]).series[0])


FRAME = b"\xff\xc3\x00\x0b\x10\x00\x10\x00\x20\x01\x01\x11\x00"
JPEG2000 = b"\xff\x4f\xff\x51" + bytes(7) + b"\x20\0\0\0\x10" + bytes(25) + b"\x01\x8b"
SCAN = b"\xff\xda\x00\x08\x01\x01\x00\x01\x00\x00"
TABLES = b"\xff\xc4\x00\x15\x00" + b"\x02" + bytes(15) + b"\x05\x06"


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"\xff\xd8\xff\xe0\x00\x04ab" + FRAME + SCAN, None),
        (b"\xff\xd8\xff\xff" + FRAME + TABLES + SCAN, None),
        (b"\xff\xd8" + FRAME + b"\xdf" + TABLES[1:] + SCAN, "the markers of its JPEG are damaged"),
        (b"\xff\xd8" + FRAME, "the markers of its JPEG are damaged"),
        (b"\xff\xd8" + SCAN, "the markers of its JPEG are damaged"),
        (b"\xff\xd8" + b"\xff" * 100, "the markers of its JPEG are damaged"),
        (b"\xff\xd8" + b"\xff\xe0\x00\x00" * 10, "the markers of its JPEG are damaged"),
        (b"\xff\xd8" + FRAME + FRAME + SCAN, "the markers of its JPEG are damaged"),
        (b"\xff\xd8" + FRAME + TABLES.replace(b"\x02", b"\x03") + SCAN, "the markers of its JPEG are damaged"),
        (b"\xff\xd8" + FRAME + b"\xff\x2b\x00\x02" + SCAN, "the markers of its JPEG are damaged"),
        (b"\xff\xd8\xff\xc3\x00\x11\x10\x00\x10\x00\x20\x03" + bytes(9) + SCAN, "32 x 16 of 3 colours"),
        (b"\xff\xd8" + FRAME.replace(b"\x20\x01", b"\x21\x01") + SCAN, "33 x 16 of 1 colours"),
        (b"\0\0\0\x0cjP  " + bytes(40) + JPEG2000, None),
        (JPEG2000.replace(b"\x20", b"\x21"), "33 x 16 of 1 colours"),
        (b"\xff\xd8" + FRAME.replace(b"\x0b\x10", b"\x0b\x08") + SCAN, "have 8 bits, its header promises 16"),
        (b"\xff\xd8" + FRAME.replace(b"\x0b\x10", b"\x0b\x0c") + SCAN, None),
        (JPEG2000[:-1] + b"\x87", "have 8 bits, its header promises 16"),
        (JPEG2000[:-1], "have 0 bits, its header promises 16"),
        (b"", "no JPEG of any kind"),
    ],
)
def test_what_a_codestream_says_is_checked(data: bytes, fault: str | None):
    """A decoder of GDCM ends the process on broken markers."""
    if fault is None:
        check_codestream(data, (32, 16), 16)
    else:
        with pytest.raises(ImageError, match=fault):
            check_codestream(data, (32, 16), 16)


def test_a_deflated_bomb_is_not_inflated(series_plan, make_series: Maker, at_most, monkeypatch: pytest.MonkeyPatch):
    import zlib

    from ctseg.io.dicom import headers

    folder = make_series(series_plan(syntax="1.2.840.10008.1.2.1.99"))
    path = folder / "slice002.dcm"
    data = path.read_bytes()
    end = 144 + int.from_bytes(data[140:144], "little")
    element = b"\x07\x00\x01\x10OB\0\0" + (2**27).to_bytes(4, "little")
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    path.write_bytes(data[:end] + packer.compress(element + bytes(2**27)) + packer.flush())
    monkeypatch.setattr(headers, "MAX_HEADER_BYTES", 2**22)
    with at_most(2**25):
        found = find_series([folder])
    assert len(found.series[0]) == 5


def test_what_follows_the_pixels_of_a_deflated_file_is_not_inflated(series_plan, make_series: Maker, at_most):
    import zlib

    folder = make_series(series_plan(syntax="1.2.840.10008.1.2.1.99"))
    path = folder / "slice002.dcm"
    data = path.read_bytes()
    end = 144 + int.from_bytes(data[140:144], "little")
    whole = zlib.decompress(data[end:], -zlib.MAX_WBITS) + b"\xfc\xff\xfc\xffOB\0\0" + (2**27).to_bytes(4, "little")
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    path.write_bytes(data[:end] + packer.compress(whole + bytes(2**27)) + packer.flush())
    series = find_series([folder]).series[0]
    with at_most(2**24), pytest.raises(ImageError, match="more than its header promises"):
        read_series(series)


def test_absurd_positions_do_not_fill_the_memory(series_plan, make_series: Maker, at_most):
    def far(dataset, n: int) -> None:
        dataset.ImagePositionPatient = [0, 0, [0, 0.02, 0.04, 0.06, 0.08, 999999.98][n]]

    folder = make_series(series_plan(change=far, size=(64, 64, 6)))
    with at_most(2**24), pytest.raises(ImageError, match=r"at most 2147483648 voxels|distances between slices vary"):
        read_series(find_series([folder]).series[0], gaps="fill", tilt="shear")


def test_many_orientations_and_positions_are_quick(series_plan, make_enhanced: Maker):
    from time import perf_counter

    start = perf_counter()
    generator = np.random.default_rng(0)

    def turn(dataset, n: int) -> None:
        for item in dataset.PerFrameFunctionalGroupsSequence:
            angle = generator.uniform(0, 7)
            orientation = pydicom.Dataset()
            orientation.ImageOrientationPatient = [np.cos(angle), np.sin(angle), 0, -np.sin(angle), np.cos(angle), 0]
            item.PlaneOrientationSequence = [orientation]

    found = find_series([make_enhanced(series_plan(size=(2, 2, 400), change=turn))])
    assert len(found.series) > 200
    assert perf_counter() - start < 20
