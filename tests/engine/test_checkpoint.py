"""Checkpoints are plain data, written whole, and nothing else is read."""

import hashlib
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import ctseg
from ctseg.engine.checkpoint import file_sha256, read_checkpoint, save_checkpoint
from ctseg.errors import ModelError, OutputError

CONTENT = {"model": {"w": torch.arange(6.0).reshape(2, 3)}, "epoch": 3, "history": [{"loss": 0.5, "mean_dice": None}]}


class Trap:
    """Creates a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def refusal(path: Path) -> str:
    """The one line with which `path` is refused."""
    with pytest.raises(ModelError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"checkpoint '{path}': ")
    assert "\n" not in message
    return message


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "last.pt", CONTENT)
    return tmp_path / "last.pt"


def test_what_is_written_is_read(saved: Path) -> None:
    content = read_checkpoint(saved)
    assert torch.equal(content["model"]["w"], CONTENT["model"]["w"])
    assert (content["epoch"], content["history"]) == (3, CONTENT["history"])
    assert content["ctseg"] == ctseg.__version__


def test_torch_reads_it_without_ctseg_and_without_code(saved: Path) -> None:
    content = torch.load(saved, weights_only=True)
    assert torch.equal(content["model"]["w"], CONTENT["model"]["w"])


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "bare pickle"])
def test_code_is_refused_and_not_run(tmp_path: Path, legacy: bool) -> None:
    sprung, path = tmp_path / "sprung", tmp_path / "evil.pt"
    content = {"format": "ctseg-checkpoint", "version": 1, "model": Trap(sprung)}
    if legacy:
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path)
    assert "more than plain data" in refusal(path)
    assert not sprung.exists()
    torch.load(path, weights_only=False) if not legacy else pickle.loads(path.read_bytes())
    assert sprung.exists()  # the trap works


@pytest.mark.parametrize(
    "data", [b"", b"epoch,loss\n1,0.5\n" * 9, b"PK\x03\x04", b"\x80\x02.", bytes(300), b'{"format": 1}']
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(data)
    refusal(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "none.pt")
    refusal(tmp_path)


def test_every_cut_is_refused(saved: Path) -> None:
    data = saved.read_bytes()
    for length in random.Random(0).sample(range(len(data)), 60):
        saved.write_bytes(data[:length])
        refusal(saved)


def test_no_damage_ends_in_another_error(saved: Path) -> None:
    """Random bytes changed in either kind of file: it may still be read, but never fails in another way."""
    rng = random.Random(1)
    for original in (saved.read_bytes(), pickle.dumps({"format": "ctseg-checkpoint", "s": "x" * 9}, protocol=2)):
        refused = 0
        for _ in range(300):
            data = bytearray(original)
            for _ in range(3):
                data[rng.randrange(len(data))] = rng.randrange(256)
            saved.write_bytes(data)
            try:
                read_checkpoint(saved)
            except ModelError:
                refused += 1
        assert refused > 100


@pytest.mark.parametrize("content", [{"model": {}}, {"format": "other", "version": 1}, [1, 2], torch.zeros(3)])
def test_foreign_content_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "x.pt")
    assert "not written by ctseg" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize(("version", "told"), [(2, "2"), (torch.zeros(2), "Tensor")])
def test_another_version_is_refused(saved: Path, version: Any, told: str) -> None:
    content = torch.load(saved, weights_only=True)
    torch.save({**content, "version": version}, saved)
    assert f"format version {told}, this ctseg reads 1" in refusal(saved)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_crash_while_writing_leaves_the_old_file(saved: Path, monkeypatch, error: BaseException) -> None:
    """The new file is written but not yet on disk, and nothing else is left of it."""
    before, seen = saved.read_bytes(), []

    def crash(_descriptor: int) -> None:
        seen.extend(path for path in saved.parent.iterdir() if path != saved)
        raise error

    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt):
        save_checkpoint(saved, {"epoch": 4})
    assert len(seen) == 1  # it was about to be
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_sha256_is_that_of_the_whole_file(tmp_path: Path) -> None:
    data = random.Random(0).randbytes((1 << 20) + 17)
    (tmp_path / "x").write_bytes(data)
    assert file_sha256(tmp_path / "x") == hashlib.sha256(data).hexdigest()
    with pytest.raises(ModelError, match="No such file"):
        file_sha256(tmp_path / "none")
