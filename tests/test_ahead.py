"""A file whose beginning was unpacked ahead reads as it does without, and nothing of it is left behind."""

import contextlib
import gc
import gzip
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ctseg import ahead
from ctseg.ahead import UnpackedAhead, forget_unpacked, stop_unpacking, take_unpacked, unpacking_ahead
from ctseg.errors import ImageError
from ctseg.io.images import read_image, write_image
from ctseg.io.stream import CTStream
from ctseg.volume import Geometry, Volume

SIZE = (60, 50, 40)


def open_files() -> list[str]:
    """Of this process, where the system tells."""
    names = []
    for path in Path("/proc/self/fd").glob("*"):
        with contextlib.suppress(FileNotFoundError):
            names.append(str(path.readlink()))
    return names


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Neither a thread nor a file."""
    yield
    gc.collect()
    assert [name for name in open_files() if ".nii.gz" in name] == []
    assert [thread.name for thread in threading.enumerate() if thread.name == "ctseg-unpack"] == []
    assert ahead._begun == {}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A CT of 240 000 bytes."""
    array = np.random.default_rng(0).integers(-1000, 1000, SIZE).astype(np.int16)
    path = tmp_path / "ct.nii.gz"
    write_image(path, Volume(array, Geometry(SIZE, np.diag([1.0, 1.0, 2.0, 1.0]))))
    return path


def read_all(stream: UnpackedAhead, size: int) -> bytes:
    """Everything, asked for in pieces of `size`."""
    target, parts = bytearray(size), []
    while count := stream.readinto(memoryview(target)):
        parts.append(bytes(target[:count]))
    assert stream.readinto(memoryview(target)) == 0
    return b"".join(parts)


@pytest.mark.parametrize("most", [0, 1, 100_000, 10**9])
@pytest.mark.parametrize("size", [777, 10**6])
def test_the_bytes_are_the_files(file: Path, most: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far the thread came."""
    monkeypatch.setattr(ahead, "MAX_BYTES", most)
    monkeypatch.setattr(ahead, "_CHUNK_BYTES", 30_000)
    stream = UnpackedAhead(file)
    assert read_all(stream, size) == gzip.decompress(file.read_bytes())
    stream.close()


def test_no_more_is_kept_than_may_be(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MAX_BYTES", 100_000)
    monkeypatch.setattr(ahead, "_CHUNK_BYTES", 30_000)
    stream = UnpackedAhead(file)
    stream._thread.join()
    assert sum(map(len, stream._chunks)) == 120_000
    stream.close()
    assert stream._chunks == []


@pytest.mark.parametrize("most", [0, 100_000, 10**9])
def test_a_ct_is_the_same(file: Path, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "MAX_BYTES", most)
    wanted = read_image(file)
    with unpacking_ahead(file):
        assert list(ahead._begun) == [file]
        read = read_image(file)
        assert list(ahead._begun) == [], "it was taken"
    with unpacking_ahead(file):
        stream = CTStream(file)
        assert list(ahead._begun) == [file]
        planes = stream.planes(3, 40)
        assert list(ahead._begun) == []
        stream.finish()
    np.testing.assert_array_equal(read.array, wanted.array)
    np.testing.assert_array_equal(planes, wanted.array.T[3:])


@pytest.mark.parametrize("most", [0, 100_000, 10**9])
@pytest.mark.parametrize("damage", ["cut", "flipped", "text", "too short", "too long", "wrong checksum"])
def test_what_is_wrong_is_told_in_the_same_words(
    file: Path, damage: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ahead, "MAX_BYTES", most)
    monkeypatch.setattr(ahead, "_CHUNK_BYTES", 30_000)
    data = file.read_bytes()
    changed = {
        "cut": data[: len(data) // 2],
        "flipped": data[:90_000] + bytes([data[90_000] ^ 255]) + data[90_001:],
        "text": b"not packed at all",
        "too short": gzip.compress(gzip.decompress(data)[:-5000], 1),
        "too long": gzip.compress(gzip.decompress(data) + b"more", 1),
        "wrong checksum": data[:-8] + bytes(4) + data[-4:],
    }
    file.write_bytes(changed[damage])
    with pytest.raises(ImageError) as alone:
        read_image(file)
    with unpacking_ahead(file):
        assert list(ahead._begun) == [file]
        with pytest.raises(ImageError) as ours:
            read_image(file)
    assert str(ours.value) == str(alone.value)


@pytest.mark.parametrize("how", ["replaced", "longer", "rewritten"])
def test_a_file_that_has_changed_since_is_read_anew(file: Path, how: str, tmp_path: Path) -> None:
    """Its header is read only when its turn comes: voxels and header must be of the same file."""
    plain = bytearray(gzip.decompress(file.read_bytes()))
    status = write_stored(file, plain)
    plain[-2:] = b"\x07\x00"  # the last voxel
    with unpacking_ahead(file):
        if how == "replaced":
            write_stored(tmp_path / "other.nii.gz", plain)
            os.utime(tmp_path / "other.nii.gz", ns=(0, status.st_mtime_ns))
            (tmp_path / "other.nii.gz").replace(file)
        elif how == "longer":
            file.write_bytes(gzip.compress(plain, 1))
            os.utime(file, ns=(0, status.st_mtime_ns))
        else:
            write_stored(file, plain)
            os.utime(file, ns=(0, status.st_mtime_ns + 1))
        now = file.stat()
        changed = [n for n in ("st_ino", "st_size", "st_mtime_ns") if getattr(now, n) != getattr(status, n)]
        assert changed == [{"replaced": "st_ino", "longer": "st_size", "rewritten": "st_mtime_ns"}[how]]
        assert read_image(file).array[-1, -1, -1] == 7


def write_stored(path: Path, plain: bytes | bytearray) -> os.stat_result:
    """A gzip file whose size depends on that of its content alone."""
    path.write_bytes(gzip.compress(plain, 0))
    return path.stat()


def test_a_file_that_is_gone_since_is_not_taken(file: Path) -> None:
    with unpacking_ahead(file):
        file.unlink()
        assert take_unpacked(file) is None


def test_stopping_in_the_middle_loses_nothing(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "_CHUNK_BYTES", 1000)
    stream = UnpackedAhead(file)
    stream.stop()
    assert read_all(stream, 777) == gzip.decompress(file.read_bytes())
    stream.close()


def test_how_much_memory_it_takes(file: Path) -> None:
    assert stop_unpacking() == 0
    with unpacking_ahead(file):
        ahead._begun[file]._thread.join()
        assert stop_unpacking() == len(gzip.decompress(file.read_bytes()))
        forget_unpacked()
        assert stop_unpacking() == 0


def test_without_a_thread_it_is_read_as_ever(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        with unpacking_ahead(file):
            assert ahead._begun == {}
            assert read_image(file).geometry.size == SIZE


def test_what_nobody_takes_goes(file: Path) -> None:
    with unpacking_ahead(file):
        assert list(ahead._begun) == [file]
    with pytest.raises(KeyError), unpacking_ahead(file):
        raise KeyError


@pytest.mark.parametrize("kind", ["missing", "folder", "unreadable", "pipe"])
def test_what_cannot_be_opened_is_left_to_whoever_opens_it_again(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "ct.nii.gz"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "unreadable":
        path.write_bytes(b"x")
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user may read everything")
    with unpacking_ahead(path):
        assert take_unpacked(path) is None


def test_nothing_begins_without_a_file() -> None:
    with unpacking_ahead(None):
        assert ahead._begun == {}
