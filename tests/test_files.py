"""Files are whole or absent, and every way a disk says no becomes one clear error."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from ctseg.errors import OutputError
from ctseg.files import atomic_folder, atomic_path, make_folder, output_errors, write_csv, write_json, write_text


def test_success_replaces_the_old_file_and_leaves_nothing_else(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == path.parent, "a rename across disks is a copy"
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: type[BaseException]):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fail() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise error("stop")

    with pytest.raises(OutputError if error is OSError else error, match="stop"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_wrote_nothing_is_an_error(tmp_path: Path):
    with pytest.raises(OutputError, match="No such file"), atomic_path(tmp_path / "a"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_synced_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    events = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("sync"), fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    write_text(tmp_path / "a", "x")
    assert events == ["sync", "rename", "sync"], "the file, then its name, then the folder that holds the name"


def test_full_disk(mount: Callable[[str], Path]):
    path = mount("size=64k") / "a.txt"
    write_text(path, "old")
    with pytest.raises(OutputError, match=r"cannot write '.*a\.txt': No space left on device; free space or choose"):
        write_text(path, "x" * 2**17)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]


def test_device_without_space():
    with (
        pytest.raises(OutputError, match="cannot write 'result': No space left on device"),
        output_errors(Path("result")),
    ):
        Path("/dev/full").write_text("x")


def test_target_is_a_folder(tmp_path: Path):
    (tmp_path / "a").mkdir()
    with pytest.raises(OutputError, match="Is a directory"):
        write_text(tmp_path / "a", "x")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_make_folder(tmp_path: Path):
    assert make_folder(tmp_path / "a" / "b").is_dir()
    assert make_folder(tmp_path / "a") == tmp_path / "a"
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match=r"cannot write '.*file.*': (File exists|Not a directory); free space or"):
            make_folder(path)


def test_read_only_disk(mount: Callable[[str], Path]):
    folder = mount("ro")
    with pytest.raises(OutputError, match=r"cannot write '.*disk': no permission to write here; free space or choose"):
        make_folder(folder)
    with pytest.raises(OutputError, match=r"cannot write '.*disk/a': Read-only file system"):
        write_text(folder / "a", "x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_folder_of_someone_else(tmp_path: Path):
    tmp_path.chmod(0o555)
    with pytest.raises(OutputError, match="no permission to write here"):
        make_folder(tmp_path)
    with pytest.raises(OutputError, match="Permission denied"):
        write_text(tmp_path / "a", "x")


def test_json(tmp_path: Path):
    write_json(tmp_path / "a.json", {"a": [1, None, "\u00e9"]})
    assert (tmp_path / "a.json").read_text() == '{\n "a": [\n  1,\n  null,\n  "\\u00e9"\n ]\n}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", float("nan"))
    assert (tmp_path / "a.json").read_text().startswith("{")


def test_csv(tmp_path: Path):
    path = tmp_path / "a.csv"
    write_csv(path, ("case", "dice"), [{"case": 'a "b", c', "dice": 0.5, "more": 1}, {"case": "d", "dice": None}])
    assert path.read_bytes() == b'case,dice\r\n"a ""b"", c",0.5\r\nd,\r\n'
    with pytest.raises(KeyError):
        write_csv(path, ("case", "dice"), [{"case": "e"}])
    assert path.read_bytes().startswith(b"case,dice")


def test_names_that_are_no_text(tmp_path: Path):
    """A Linux file name is bytes; one that is not UTF-8 must not lose the whole table."""
    name = os.fsdecode(b"caf\xe9.nii")
    write_csv(tmp_path / "a.csv", ("image",), [{"image": name}])
    write_json(tmp_path / "a.json", [name])
    write_text(tmp_path / "a.txt", name)
    assert (tmp_path / "a.csv").read_bytes() == b"image\r\ncaf\\udce9.nii\r\n"
    assert b"caf\\udce9.nii" in (tmp_path / "a.json").read_bytes()
    assert (tmp_path / "a.txt").read_bytes() == b"caf\\udce9.nii"


def test_a_folder_is_replaced_whole_or_stays(tmp_path: Path):
    folder = tmp_path / "a"
    folder.mkdir()
    with atomic_folder(folder) as temporary:
        (temporary / "old").touch()
    with pytest.raises(OutputError, match="not an empty folder"), atomic_folder(folder):
        pass

    def fail() -> None:
        with atomic_folder(folder, replace=True) as temporary:
            (temporary / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [path.name for path in folder.iterdir()] == ["old"]
    with atomic_folder(folder, replace=True) as temporary:
        (temporary / "new").touch()
        assert (folder / "old").exists(), "until the new one is whole"
    assert [path.name for path in folder.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_that_cannot_be_exchanged_is_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "old").touch()
    rename = Path.rename

    def refuse(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp":
            raise PermissionError(13, "not allowed")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OutputError, match="not allowed"), atomic_folder(folder, replace=True) as temporary:
        (temporary / "new").touch()
    assert [path.name for path in folder.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [folder]


def test_a_file_or_a_link_is_no_folder_to_replace(tmp_path: Path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(OutputError, match="name another one"), atomic_folder(tmp_path / name, replace=True):
            pass


def test_a_name_as_long_as_names_may_be(tmp_path: Path) -> None:
    for name in ("n" * 255, "\u5b57" * 85):
        write_text(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"
    with atomic_folder(tmp_path / ("f" * 255)) as folder:
        (folder / "file").touch()
    assert len(list(tmp_path.iterdir())) == 3
