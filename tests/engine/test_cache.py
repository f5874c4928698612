"""The cache gives back what this user kept, and nothing that is damaged or that another one may have written."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ctseg.engine import cache
from ctseg.engine.cache import Entry, cache_folder, cache_key, can_keep, read_entry, write_entry

KEY = cache_key({"model": "a", "precision": "float32"})
KEPT = Entry({"backend": "torch", "note": "größer\n"}, b"\n\x00bytes\n")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of one test."""
    monkeypatch.setenv("CTSEG_CACHE", str(tmp_path / "some" / "cache"))
    return tmp_path / "some" / "cache"


@pytest.fixture
def kept(folder: Path) -> Path:
    """The file of one entry."""
    write_entry(KEY, KEPT)
    (path,) = folder.iterdir()
    return path


def test_what_was_kept_comes_back() -> None:
    assert read_entry(KEY) is None
    assert can_keep()
    write_entry(KEY, KEPT)
    assert read_entry(KEY) == KEPT
    assert read_entry(cache_key({"model": "a", "precision": "bfloat16"})) is None
    write_entry(KEY, Entry({}, b""))
    assert read_entry(KEY) == Entry({}, b"")


def test_keys_depend_on_every_fact_but_not_on_their_order() -> None:
    assert cache_key({"a": 1, "b": 2}) == cache_key({"b": 2, "a": 1})
    assert len({cache_key(facts) for facts in ({}, {"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"})}) == 5


def test_only_this_user_may_read_and_write(kept: Path) -> None:
    umask = os.umask(0)
    try:
        write_entry(KEY, KEPT)
    finally:
        os.umask(umask)
    assert stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("position", [0, 70, -1])
def test_a_flipped_byte_makes_it_no_entry(kept: Path, position: int) -> None:
    data = bytearray(kept.read_bytes())
    data[position] ^= 1
    kept.write_bytes(data)
    assert read_entry(KEY) is None


@pytest.mark.parametrize("length", [0, 10, 64, 65, 100])
def test_a_file_cut_off_is_no_entry(kept: Path, length: int) -> None:
    kept.write_bytes(kept.read_bytes()[:length])
    assert read_entry(KEY) is None


@pytest.mark.parametrize("mode", [0o620, 0o602])
def test_a_file_others_may_write_to_is_not_read(kept: Path, mode: int) -> None:
    kept.chmod(mode)
    assert read_entry(KEY) is None


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_folder_others_may_write_to_is_not_used(kept: Path, mode: int) -> None:
    kept.parent.chmod(mode)
    assert cache_folder() is None
    assert read_entry(KEY) is None
    kept.unlink()
    write_entry(KEY, KEPT)
    assert not kept.exists()


@pytest.mark.parametrize("whose", ["file", "folder", "link"])
def test_what_another_user_owns_is_not_read(kept: Path, whose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    if whose == "link":
        link = kept.parent.with_name("link")
        link.symlink_to(kept.parent)
        monkeypatch.setenv("CTSEG_CACHE", str(link))
        assert read_entry(KEY) == KEPT
        os.chown(link, 12345, 12345, follow_symlinks=False)
    else:
        os.chown(kept if whose == "file" else kept.parent, 12345, 12345)
    assert read_entry(KEY) is None


def test_a_link_in_place_of_an_entry_is_not_followed(kept: Path, tmp_path: Path) -> None:
    moved = kept.rename(tmp_path / "elsewhere")
    kept.symlink_to(moved)
    assert read_entry(KEY) is None


def test_a_pipe_in_place_of_an_entry_does_not_block(kept: Path) -> None:
    kept.unlink()
    os.mkfifo(kept)
    assert read_entry(KEY) is None


def test_a_file_in_place_of_the_folder_is_no_cache(folder: Path) -> None:
    folder.parent.mkdir()
    folder.write_text("x")
    assert cache_folder(create=True) is None
    write_entry(KEY, KEPT)
    assert read_entry(KEY) is None


def test_a_full_disk_is_no_error(mount, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = mount("size=64k,mode=0700")
    monkeypatch.setenv("CTSEG_CACHE", str(disk))
    write_entry(KEY, Entry({}, bytes(200_000)))
    assert read_entry(KEY) is None
    assert list(disk.iterdir()) == []


def test_a_read_only_cache_is_read(mount, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = mount("size=64k,mode=0700")
    monkeypatch.setenv("CTSEG_CACHE", str(disk))
    write_entry(KEY, KEPT)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert read_entry(KEY) == KEPT
    other = cache_key({"model": "b"})
    write_entry(other, KEPT)
    assert read_entry(other) is None
    assert not can_keep()


@pytest.mark.parametrize("variables", [{}, {"XDG_CACHE_HOME": "relative"}, {"XDG_CACHE_HOME": "/xdg"}])
def test_without_a_variable_it_lies_where_caches_lie(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variables: dict[str, str]
) -> None:
    monkeypatch.delenv("CTSEG_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    wanted = tmp_path / ".cache" / "ctseg"
    if variables.get("XDG_CACHE_HOME") == "/xdg":
        variables = {"XDG_CACHE_HOME": str(tmp_path / "xdg")}
        wanted = tmp_path / "xdg" / "ctseg"
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder(create=True) == wanted


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("CTSEG_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder(create=True) is None
    write_entry(KEY, KEPT)


def test_the_least_recently_used_entries_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MAX_BYTES", 4000)
    keys = [cache_key({"n": n}) for n in range(5)]
    for age, key in enumerate(keys[:3]):
        write_entry(key, Entry({}, bytes(1000)))
        long_ago = time.time() - 1000 + age
        os.utime(folder / f"{key}.cached", (long_ago, long_ago))
    assert read_entry(keys[0]) is not None  # now it is the one used last
    write_entry(keys[3], Entry({}, bytes(1000)))
    assert [read_entry(key) is not None for key in keys[:4]] == [True, False, True, True]
    write_entry(keys[4], Entry({}, bytes(2001)))  # would push out nearly all others
    assert read_entry(keys[4]) is None
    assert read_entry(keys[0]) is not None


def test_what_a_killed_process_left_goes_after_a_while(kept: Path) -> None:
    old, new = kept.with_name(f".{kept.name}.1-a.tmp"), kept.with_name(f".{kept.name}.2-b.tmp")
    for leftover in (old, new):
        leftover.write_bytes(b"half")
    os.utime(old, (0, 0))
    strange = kept.with_name("notes.txt")
    strange.write_text("the user's own")
    write_entry(KEY, KEPT)
    assert sorted(kept.parent.iterdir()) == sorted([kept, new, strange])


WRITER = """
import sys
from ctseg.engine.cache import Entry, read_entry, write_entry
for n in range(200):
    write_entry(sys.argv[1], Entry({"by": sys.argv[2]}, sys.argv[2].encode() * 100_000))
    entry = read_entry(sys.argv[1])
    assert entry is not None and entry.content == entry.about["by"].encode() * 100_000
"""


def test_processes_at_once_read_whole_entries() -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, KEY, name]) for name in "ab"]
    assert [writer.wait(60) for writer in writers] == [0, 0]
