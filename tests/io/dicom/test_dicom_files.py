"""Which files are looked into: folders, archives, links; and which archives are refused."""

import io
import os
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest

from ctseg.errors import ImageError
from ctseg.io.dicom import files
from ctseg.io.dicom.files import Source, list_sources
from ctseg.io.dicom.read import find_series, read_series, select_series

Maker = Callable[..., Path]


def pack(folder: Path, archive: Path, inside: str = "study/series") -> Path:
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as packed:
        for path in sorted(folder.iterdir()):
            packed.write(path, f"{inside}/{path.name}")
    return archive


def test_members_of_one_name_are_refused(make_series: Maker, tmp_path: Path):
    """Programs read the first or the last of them: a CT would lack slices."""
    files = sorted(make_series().iterdir())
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "twice.zip", "w") as packed:
        warnings.simplefilter("ignore", UserWarning)  # zipfile's own, about the names
        for number, path in enumerate(files):
            packed.write(path, f"IM{number % 4}.dcm")
    assert "several members have one name" in refusal(tmp_path / "twice.zip")


def refusal(path: Path) -> str:
    with pytest.raises(ImageError) as caught:
        find_series([path])
    assert str(caught.value).startswith(f"cannot read '{path}': ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def voxels(*paths: Path):
    return read_series(select_series(find_series(paths), None)).volume.array


def test_folder_nested_folders_zip_and_files_read_the_same(make_series: Maker, tmp_path: Path):
    folder = make_series()
    expected = voxels(folder)
    deep = tmp_path / "deep" / "er" / "est"
    deep.mkdir(parents=True)
    for n, path in enumerate(sorted(folder.iterdir())):
        ([deep, *deep.parents][n % 3] / path.name.removesuffix(".dcm")).write_bytes(path.read_bytes())
    for paths in ([tmp_path / "deep"], [pack(folder, tmp_path / "s.zip")], sorted(folder.iterdir()), [folder, folder]):
        np.testing.assert_array_equal(voxels(*paths), expected)


def test_an_archive_beside_other_files_in_a_folder(make_series: Maker, tmp_path: Path):
    folder = make_series()
    expected = voxels(folder)
    (tmp_path / "archive").mkdir()
    pack(folder, tmp_path / "archive" / "s.zip")
    (tmp_path / "archive" / "notes.txt").write_text("hello")
    (tmp_path / "archive" / "empty").touch()
    found = find_series([tmp_path / "archive"])
    assert (len(found.series), found.not_dicom, found.rejected) == (1, 2, ())
    np.testing.assert_array_equal(read_series(found.series[0]).volume.array, expected)


def test_an_enhanced_file_in_an_archive(make_enhanced: Maker, make_series: Maker, tmp_path: Path):
    path = make_enhanced()
    with zipfile.ZipFile(tmp_path / "e.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.write(path, "e")
    np.testing.assert_array_equal(voxels(tmp_path / "e.zip"), voxels(make_series()))


def test_files_without_preamble_are_known_by_their_content(make_series: Maker):
    folder = make_series()
    expected = voxels(folder)
    for path in folder.iterdir():
        dataset = pydicom.dcmread(path)
        buffer = io.BytesIO()
        pydicom.dcmwrite(buffer, pydicom.Dataset(dataset), implicit_vr=False, little_endian=True)
        path.write_bytes(buffer.getvalue())
        assert path.read_bytes()[128:132] != b"DICM"
    np.testing.assert_array_equal(voxels(folder), expected)


def test_a_dicomdir_and_other_objects_are_no_series(make_series: Maker, series_plan):
    folder = make_series(series_plan(drop=["PixelData", "Rows"], tags={"Modality": "RTSTRUCT"}))
    make_series()
    header = pydicom.FileMetaDataset()
    header.MediaStorageSOPClassUID = "1.2.840.10008.1.3.10"
    header.MediaStorageSOPInstanceUID = "1.2.3"
    header.TransferSyntaxUID = "1.2.840.10008.1.2.1"
    directory = pydicom.FileDataset(None, {}, file_meta=header, preamble=bytes(128))
    directory.FileSetID = "X"
    pydicom.dcmwrite(folder / "DICOMDIR", directory, enforce_file_format=True)
    found = find_series([folder])
    assert [other.kind for other in found.others] == []
    assert found.not_dicom == 1


def test_a_damaged_archive_below_a_folder_is_left_out(make_series: Maker):
    folder = make_series()
    (folder / "notes.zip").write_bytes(b"PK\x03\x04 and no more")
    found = find_series([folder])
    assert len(found.series[0]) == 6
    assert [name for name, _ in found.rejected] == [f"{folder}: file #1"]
    assert found.rejected[0][1].startswith("not a sound zip archive")
    assert "not a sound zip archive" in refusal(folder / "notes.zip")


def test_names_inside_what_the_user_named_are_not_told(make_series: Maker, tmp_path: Path):
    """Archives name folders by patient; only who keeps identifiers gets to see that."""
    folder = make_series(name="archive/Muster^Maria_19500101")
    path = folder / "slice003.dcm"
    path.write_bytes(path.read_bytes()[:-60])
    zipped = pack(folder, tmp_path / "s.zip", inside="Muster^Maria_19500101")
    for root, full in ((tmp_path / "archive", path), (zipped, f"{zipped}:Muster^Maria_19500101/slice003.dcm")):
        (series,) = find_series([root]).series
        told = [problem.text for problem in series.problems]
        if not told:
            with pytest.raises(ImageError) as caught:
                read_series(series)
            told = [str(caught.value)]
        assert f"'{root}: file #4'" in told[0]
        assert "Muster" not in told[0]
        assert series.slices[0].source.shown == f"{root}: file #1"
        sources, _ = list_sources([root])
        assert sources[3].full == str(full)


def test_a_file_that_is_gone_does_not_tell_its_name(make_series: Maker, tmp_path: Path):
    folder = make_series(name="archive/Muster^Maria")
    (series,) = find_series([tmp_path / "archive"]).series
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(ImageError) as caught:
        read_series(series)
    assert "No such file" in str(caught.value)
    assert "Muster" not in str(caught.value)


def test_what_the_user_named_is_told_without_uids():
    path = Path("1.2.840.99999.1") / "a.dcm"
    assert Source(Path("a.dcm"), root=Path("a.dcm"), number=7).shown == "a.dcm"
    assert Source(path, root=path, number=7).shown == "<uid>/a.dcm: file #7"
    assert Source(path, root=path.parent, number=7).shown == "<uid>: file #7"


def test_missing_paths_and_devices(tmp_path: Path):
    assert "no such file or folder" in refusal(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    assert "got a device or pipe" in refusal(tmp_path / "pipe")
    assert list_sources([tmp_path])[0] == []


def test_links_out_of_the_folder_are_left_out_and_told(make_series: Maker, tmp_path: Path):
    folder = make_series()
    outside = make_series(name="outside")
    (folder / "in").symlink_to(folder / "slice000.dcm")
    (folder / "out").symlink_to(outside / "slice000.dcm")
    (folder / "out folder").symlink_to(outside)
    (folder / "loop").symlink_to(folder)
    (folder / "dangling").symlink_to(folder / "gone")
    sources, left_out = list_sources([folder])
    assert len(sources) == 6
    assert sorted(source.path.name for source, _ in left_out) == ["dangling", "loop", "out", "out folder"]


def test_too_many_files(make_series: Maker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "MAX_FILES", 5)
    assert "more than 5 files; name the folder of a study" in refusal(make_series())


class TestArchives:
    def test_more_than_allowed_is_refused_before_unpacking(self, make_series: Maker, tmp_path: Path, monkeypatch):
        archive = pack(make_series(), tmp_path / "s.zip")
        monkeypatch.setattr(files, "MAX_UNPACKED_BYTES", 1000)
        assert "it would unpack to" in refusal(archive)
        monkeypatch.setattr(files, "MAX_FILES", 5)
        assert "6 members, at most 5" in refusal(archive)

    def test_a_bomb_is_only_tasted(self, tmp_path: Path, at_most):
        with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as packed:
            for n in range(5):
                packed.writestr(f"{n}.dcm", bytes(2**24))
        with at_most(2**21):
            found = find_series([tmp_path / "bomb.zip"])
        assert (found.series, found.not_dicom) == ((), 5)

    def test_a_bomb_that_begins_as_ct(self, make_series: Maker, tmp_path: Path, at_most):
        """What follows the pixels is never unpacked."""
        folder = make_series()
        expected = voxels(folder)
        with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as packed:
            for path in folder.iterdir():
                packed.writestr(path.name, path.read_bytes() + bytes(2**24))
        with at_most(2**22):
            np.testing.assert_array_equal(voxels(tmp_path / "bomb.zip"), expected)

    def test_overlapping_members_are_refused(self, tmp_path: Path):
        """All entries of the directory point at one member, as the densest bombs do."""
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w", zipfile.ZIP_STORED) as packed:
            packed.writestr("a", bytes(1000))
        raw = data.getvalue()
        start, size = raw.index(b"PK\x01\x02"), raw.index(b"PK\x05\x06") - raw.index(b"PK\x01\x02")
        entry, count = raw[start : start + size], 50
        end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, size * count, start, 0)
        entries = b"".join(entry[:46] + bytes([97 + n % 26]) + entry[47:] for n in range(count))
        (tmp_path / "o.zip").write_bytes(raw[:start] + entries + end)
        assert "larger than it can hold" in refusal(tmp_path / "o.zip")

    def test_a_member_that_promises_more_than_deflate_can_pack(self, tmp_path: Path):
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as packed:
            packed.writestr("a", b"x" * 1000)
        raw = bytearray(data.getvalue())
        place = raw.index(b"PK\x01\x02") + 24
        raw[place : place + 4] = struct.pack("<L", 2**30)
        (tmp_path / "l.zip").write_bytes(raw)
        assert "larger than it can hold" in refusal(tmp_path / "l.zip")

    def test_encrypted_members_are_told(self, make_series: Maker, tmp_path: Path):
        archive = pack(make_series(), tmp_path / "s.zip")
        raw = bytearray(archive.read_bytes())
        place = raw.index(b"PK\x01\x02") + 8
        raw[place] |= 1
        archive.write_bytes(raw)
        found = find_series([archive])
        assert len(found.series[0]) == 5
        assert found.rejected[0][1] == "encrypted; unpack it with its password"

    def test_paths_that_lead_out_are_only_names(self, make_series: Maker, tmp_path: Path):
        archive = pack(make_series(), tmp_path / "s.zip", inside="../../../../tmp/out")
        before = sorted(tmp_path.rglob("*"))
        assert len(find_series([archive]).series[0]) == 6
        assert sorted(tmp_path.rglob("*")) == before

    @pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
    def test_a_truncated_archive(self, make_series: Maker, tmp_path: Path, keep: float):
        archive = pack(make_series(), tmp_path / "s.zip")
        archive.write_bytes(archive.read_bytes()[: int(keep * archive.stat().st_size)])
        assert "not a sound zip archive" in refusal(archive)

    def test_a_damaged_member_is_told_when_it_is_read(self, series_plan, make_series: Maker, tmp_path: Path):
        """The header is sound, and what lies behind it is first unpacked with the pixels."""
        noise = np.random.default_rng(0)
        plan = series_plan(size=(200, 200, 3), hu=lambda p: noise.integers(0, 1000, p.shape[:-1]))
        archive = pack(make_series(plan), tmp_path / "s.zip")
        raw = bytearray(archive.read_bytes())
        place = raw.index(b"PK\x03\x04", 10) - 30  # in the pixels of the first member
        raw[place] ^= 0xFF
        archive.write_bytes(raw)
        (series,) = find_series([archive]).series
        with pytest.raises(ImageError, match="cannot read") as caught:
            read_series(series)
        assert "study/series" not in str(caught.value)
