"""Archives of strangers: what is unpacked, and all that is refused before a byte is written."""

import gzip
import io
import os
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

import pytest

from ctseg.errors import DownloadError, OutputError
from ctseg.progress import Silent
from ctseg.sources import unpack as module
from ctseg.sources.unpack import Member, opened, unpack

FILES = {"set/images/a.nii": b"image" * 1000, "set/labels/a.nii": b"label", "set/dataset.json": b"{}"}


def make_tar(path: Path, members: dict[str, bytes], how: str = "w", **change: object) -> Path:
    """A tar of these files; `change` sets attributes of every header."""
    with tarfile.open(path, how) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            for key, value in change.items():
                setattr(info, key, value)
            archive.addfile(info, io.BytesIO(content))
    return path


def make_zip(path: Path, members: dict[str, bytes], **change: object) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            for key, value in change.items():
                setattr(info, key, value)
            archive.writestr(info, content)
    return path


def extract(path: Path, folder: Path, max_bytes: int = 10**9) -> dict[str, bytes]:
    folder.mkdir()
    with opened(path, max_bytes) as members:
        unpack([(member, member.path) for member in members], folder, Silent(), "unpacking")
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def refusal(path: Path, max_bytes: int = 10**9) -> str:
    with pytest.raises(DownloadError) as caught, opened(path, max_bytes):
        pass
    text = str(caught.value)
    assert text.startswith(f"archive '{path}': ")
    return text


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_tar(tmp_path: Path, mode: str):
    assert extract(make_tar(tmp_path / "a", FILES, mode), tmp_path / "out") == FILES


def test_zip(tmp_path: Path):
    assert extract(make_zip(tmp_path / "a.zip", FILES), tmp_path / "out") == FILES


def test_a_real_tar_of_the_system(tmp_path: Path):
    """With folders, dates, owners and a leading ./, as GNU tar writes it."""
    import subprocess

    for name, content in FILES.items():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(content)
    subprocess.run(["tar", "-cf", tmp_path / "a.tar", "-C", tmp_path / "in", "."], check=True)
    assert extract(tmp_path / "a.tar", tmp_path / "out") == FILES


def test_names_of_any_length_and_script(tmp_path: Path):
    files = {"ä/" + "long " * 40: b"1", "x" * 250 + "/y": b"2"}
    assert extract(make_tar(tmp_path / "a", files), tmp_path / "tar") == files
    assert extract(make_zip(tmp_path / "b", files), tmp_path / "zip") == files


def test_junk_of_macos_is_left_out(tmp_path: Path):
    junk = {"set/images/._a.nii": b"x", "__MACOSX/set/a.nii": b"x", "set/.DS_Store": b"x", "._set": b"x"}
    assert extract(make_tar(tmp_path / "a", {**junk, **FILES}), tmp_path / "out") == FILES


def test_permissions_are_those_of_new_files(tmp_path: Path):
    extract(make_tar(tmp_path / "a", FILES, mode=0o6777), tmp_path / "out")
    (tmp_path / "mine").touch()
    expected = stat.S_IMODE((tmp_path / "mine").stat().st_mode)
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").rglob("*") if p.is_file()} == {expected}


@pytest.mark.parametrize("make", [make_tar, make_zip])
@pytest.mark.parametrize("name", ["/etc/passwd", "../out", "a/../../b", "..", "C:/x", "a\\..\\b", "a/..", "//x/y"])
def test_names_that_lead_out(tmp_path: Path, make: Callable[..., Path], name: str):
    assert "leads out of the folder" in refusal(make(tmp_path / "a", {"good": b"1", name: b"2"}))


@pytest.mark.parametrize("make", [make_tar, make_zip])
@pytest.mark.parametrize(("name", "why"), [("a\x1b[31m", "control characters"), ("a/" + "x" * 300, "no usable name")])
def test_names_nobody_can_want(tmp_path: Path, make: Callable[..., Path], name: str, why: str):
    text = refusal(make(tmp_path / "a", {name: b"2"}))
    assert why in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.BLKTYPE, "a device"),
        (tarfile.FIFOTYPE, "a device"),
    ],
)
def test_links_and_devices_in_a_tar(tmp_path: Path, kind: bytes, why: str):
    with tarfile.open(tmp_path / "a", "w") as archive:
        info = tarfile.TarInfo("good")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)
    assert refusal(tmp_path / "a") == f"archive '{tmp_path / 'a'}': must not be unpacked: 'good': {why}"


def test_a_sparse_file_of_a_real_tar(tmp_path: Path):
    import subprocess

    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(10**8)
    subprocess.run(["tar", "--sparse", "-cf", tmp_path / "a.tar", "-C", tmp_path, "sparse"], check=True)
    assert (tmp_path / "a.tar").stat().st_size < 20_000
    assert "a sparse file" in refusal(tmp_path / "a.tar") or "unpacks to more" in refusal(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("mode", "why"), [(stat.S_IFLNK, "a link"), (stat.S_IFCHR, "a device"), (stat.S_IFIFO, "a device")]
)
def test_links_and_devices_in_a_zip(tmp_path: Path, mode: int, why: str):
    path = make_zip(tmp_path / "a", {"good": b"/etc/passwd"}, external_attr=(mode | 0o777) << 16)
    assert refusal(path).endswith(f"'good': {why}")


def test_an_encrypted_member(tmp_path: Path):
    path = make_zip(tmp_path / "a", {"good": b"12345"})
    data = bytearray(path.read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.find(mark) + at] |= 1
    path.write_bytes(data)
    assert refusal(path).endswith("'good': encrypted")


@pytest.mark.parametrize("make", [make_tar, make_zip])
@pytest.mark.parametrize("names", [("a/x", "A/X"), ("a/x", "a/x"), ("a", "a/b"), ("a/b", "a"), ("é", "e\u0301")])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_at_one_place(tmp_path: Path, make: Callable[..., Path], names: tuple[str, str]):
    if make is make_tar or names[0] != names[1]:
        path = make(tmp_path / "a", dict.fromkeys(names, b"1"))
    if names[0] == names[1]:
        with zipfile.ZipFile(tmp_path / "b", "w") as archive:
            archive.writestr(names[0], b"1")
            archive.writestr(names[1], b"2")
        path = tmp_path / "b"
    assert "the same place as another member" in refusal(path)


def test_every_problem_is_named_up_to_ten(tmp_path: Path):
    text = refusal(make_tar(tmp_path / "a", {f"../{n}": b"" for n in range(14)}))
    assert "must not be unpacked: 11 problems" in text
    assert "... and 4 more" in text


def test_a_bomb_is_known_by_its_headers(tmp_path: Path):
    path = make_zip(tmp_path / "a", {"zeros": bytes(80 * 2**20)})
    assert path.stat().st_size < 100_000
    assert "unpacks to more than 0.1 GB; refused" in refusal(path)
    path = make_tar(tmp_path / "b", {"zeros": bytes(80 * 2**20)}, "w:xz")
    assert "unpacks to more than 0.1 GB; refused" in refusal(path)
    assert "unpacks to more than 0.0 GB; refused" in refusal(make_tar(tmp_path / "c", FILES), max_bytes=100)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_name_of_gigabytes_is_not_read_into_memory(tmp_path: Path, kind: bytes):
    import resource

    info = tarfile.TarInfo("name")
    info.type, info.size = kind, 600 * 2**20
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with gzip.open(tmp_path / "a", "wb", compresslevel=1) as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(600):
            file.write(bytes(2**20))
    text = refusal(tmp_path / "a")
    assert "a header of it is too long" in text or "damaged" in text
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024


def pax(**values: str) -> bytes:
    """A header of text and its content, as POSIX has it: "LENGTH KEY=VALUE" lines."""
    content = b""
    for key, value in values.items():
        line = f" {key}={value}\n".encode()
        length = len(line) + 1
        while len(str(length)) + len(line) != length:
            length = len(str(length)) + len(line)
        content += str(length).encode() + line
    return header("pax", tarfile.XHDTYPE, len(content)) + content + bytes(-len(content) % 512)


def header(name: str, kind: bytes, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def test_a_tar_with_the_end_of_a_zip_is_judged_as_a_tar(tmp_path: Path):
    content = header("long", tarfile.GNUTYPE_LONGNAME, 2**21) + b"a" * 2**21 + header("x", tarfile.REGTYPE, 0)
    (tmp_path / "a").write_bytes(gzip.compress(content + bytes(1024)) + b"PK\5\6" + bytes(18))
    assert zipfile.is_zipfile(tmp_path / "a")
    assert tarfile.is_tarfile(tmp_path / "a"), "with nobody to stop it, it is read whole"
    assert "a header of it is too long" in refusal(tmp_path / "a")


@pytest.mark.parametrize(
    "about",
    [
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "5"},
        {"GNU.sparse.size": "5", "GNU.sparse.map": "0,5"},
        {"GNU.sparse.size": "5", "GNU.sparse.numblocks": "1", "GNU.sparse.offset": "0", "GNU.sparse.numbytes": "5"},
    ],
)
def test_the_map_of_a_sparse_file_is_not_read(tmp_path: Path, about: dict[str, str]):
    (tmp_path / "a").write_bytes(pax(**about) + header("x", tarfile.REGTYPE, 512) + b"1\n0\n5\n".ljust(512, b"\0"))
    assert "a sparse file is in it" in refusal(tmp_path / "a")


def test_texts_of_many_members_are_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    one = pax(comment="a" * 1000)
    content = b"".join(one + header(f"f{n}", tarfile.REGTYPE, 0) for n in range(100)) + bytes(1024)
    (tmp_path / "a").write_bytes(content)
    assert len(extract(tmp_path / "a", tmp_path / "out")) == 100
    monkeypatch.setattr(module, "MAX_TEXTS_BYTES", 50_000)
    assert "a header of it is too long, or all of them are; refused" in refusal(tmp_path / "a")


def test_text_for_all_members_is_not_kept_with_each(tmp_path: Path):
    """A megabyte of keys in each of many members would be a thousandfold of the archive."""
    text = pax(**{f"{n:x}": "" for n in range(5000)})
    everywhere = header("pax", tarfile.XGLTYPE, len(text) - 512) + text[512:]
    (tmp_path / "a").write_bytes(
        everywhere + b"".join(header(f"f{n}", tarfile.REGTYPE, 0) for n in range(50)) + bytes(1024)
    )
    with module._open(tmp_path / "a") as archive:
        members = archive.getmembers()
        assert len(members) == 50
        assert not any(member.pax_headers for member in members)


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_negative_size_does_not_lead_back(tmp_path: Path, kind: bytes):
    (tmp_path / "a").write_bytes(header("first", tarfile.REGTYPE, 0) + header("back", kind, -1024) + bytes(2**20))
    assert "'back': of negative size" in refusal(tmp_path / "a")


def test_a_negative_size_in_text_does_not_lead_back(tmp_path: Path):
    (tmp_path / "a").write_bytes(pax(size="-2048") + header("back", tarfile.REGTYPE, 0) + bytes(1024))
    assert "'back': of negative size" in refusal(tmp_path / "a")


def test_the_directory_of_a_zip_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_DIRECTORY_BYTES", 1000)
    monkeypatch.setattr(zipfile.ZipFile, "__init__", lambda *_: pytest.fail("it was read"))
    entry = b"PK\1\2" + bytes(42)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, 100 * len(entry), 0, 0)
    (tmp_path / "a").write_bytes(100 * entry + end)
    assert "of names; refused" in refusal(tmp_path / "a")


def test_a_header_that_claims_a_terabyte_costs_nothing(tmp_path: Path):
    info = tarfile.TarInfo("huge")
    info.size = 2**40
    (tmp_path / "a").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    assert "unpacks to more than" in refusal(tmp_path / "a")


def test_overlapping_members_of_a_zip(tmp_path: Path):
    """Two entries of the directory that lead to the same bytes."""
    path = make_zip(tmp_path / "a", {"one": os.urandom(5000), "two": os.urandom(5000)})
    data = bytearray(path.read_bytes())
    second = data.rfind(b"PK\x01\x02")
    struct.pack_into("<I", data, second + 42, 0)
    path.write_bytes(data)
    assert "a part of another member" in refusal(path)


def test_a_zip_whose_member_is_larger_than_it_says(tmp_path: Path):
    path = make_zip(tmp_path / "a", {"one": b"x" * 5000})
    data = bytearray(path.read_bytes())
    for mark, at in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", data, data.find(mark) + at, 100)
    path.write_bytes(data)
    with pytest.raises(DownloadError, match="'one' in the archive"):
        extract(path, tmp_path / "out")
    assert sum(p.stat().st_size for p in (tmp_path / "out").iterdir()) <= 100


def test_a_member_without_end_is_cut_off(tmp_path: Path):
    """Whatever a decompressor gives, no more than the header said reaches the disk."""
    member = Member(PurePosixPath("one"), 2**20, lambda: io.BytesIO(bytes(2**22)))
    with pytest.raises(DownloadError, match="'one' in the archive is not of the size that its header says"):
        unpack([(member, member.path)], tmp_path, Silent(), "unpacking")
    assert (tmp_path / "one").stat().st_size == 2**20


@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_damage(tmp_path: Path, make: Callable[..., Path]):
    path = make(tmp_path / "a", {"one": os.urandom(50_000)})
    whole = path.read_bytes()
    path.write_bytes(whole[:20_000])
    with pytest.raises(DownloadError, match=r"damaged|not of the size"):
        extract(path, tmp_path / "cut")
    path.write_bytes(os.urandom(5000))
    assert "damaged, or neither tar nor zip" in refusal(path)
    path.write_bytes(b"")
    assert "damaged, or neither tar nor zip" in refusal(path)


def test_a_changed_byte_in_a_zip(tmp_path: Path):
    path = make_zip(tmp_path / "a", {"one": os.urandom(50_000)})
    data = bytearray(path.read_bytes())
    data[20_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DownloadError, match="'one' in the archive is damaged"):
        extract(path, tmp_path / "out")


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("make", [make_tar, make_zip])
def test_random_damage_is_never_a_traceback_or_a_file_outside(tmp_path: Path, make: Callable[..., Path], seed: int):
    import random

    rng = random.Random(seed)
    path = make(tmp_path / "a", FILES)
    data = bytearray(path.read_bytes())
    for _ in range(rng.choice((1, 5, 50))):
        data[rng.randrange(len(data))] = rng.randrange(256)
    path.write_bytes(data)
    try:
        extract(path, tmp_path / "out")
    except DownloadError:
        pass
    except OutputError as error:
        pytest.fail(str(error))
    assert {p.name for p in tmp_path.iterdir()} <= {"a", "out"}


def test_too_many_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_MEMBERS", 2)
    assert "more than 2 members; refused" in refusal(make_tar(tmp_path / "a", FILES))


def test_too_little_space_is_known_before_the_first_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(OutputError, match="free space"):
        extract(make_tar(tmp_path / "a", FILES), tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_disk_that_fills_up(tmp_path: Path, mount: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch):
    folder = mount("size=64k")
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10**9}))
    with pytest.raises(OutputError, match="No space left on device"):
        extract(make_tar(tmp_path / "a", {"big": bytes(200_000)}), folder / "out")


def test_members_know_their_sizes(tmp_path: Path):
    with opened(make_tar(tmp_path / "a", FILES), 10**9) as members:
        assert {str(m.path): m.num_bytes for m in members} == {name: len(data) for name, data in FILES.items()}
        assert members[0].path == PurePosixPath("set/images/a.nii")
