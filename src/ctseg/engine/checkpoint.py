"""Checkpoints: plain data, written whole or not at all, read without pickle.

In a run folder `last.pt` holds all that training needs to go on, `previous.pt` the same an epoch or a stop earlier,
`best.pt` the weights with the highest validation score, and `start.pt` those that a fine-tuning begins with. All carry
their recipe. `torch.load(weights_only=True)` reads them: tensors, numbers, strings, lists and dictionaries, no code.
torch itself does not notice a changed byte among the weights; here the file's own checksums are compared first.
"""

from __future__ import annotations

import io
import mmap
import os
import pickle
import shutil
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ctseg
from ctseg.errors import ModelError
from ctseg.files import atomic_path, digest_of

if TYPE_CHECKING:
    pass

FORMAT = "ctseg-checkpoint"
VERSION = 1
BEST, LAST, PREVIOUS = "best.pt", "last.pt", "previous.pt"


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Writes `content` (plain data and tensors) under the format's name and version, atomically."""
    import torch

    buffer = io.BytesIO()  # torch's own file writer hides a full disk behind a RuntimeError
    torch.save({"format": FORMAT, "version": VERSION, "ctseg": ctseg.__version__, **content}, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getbuffer())


def keep_previous(run: Path) -> None:
    """Lets the last checkpoint stand as the previous one too, so that a new last one can replace it."""
    if not (run / LAST).exists():
        return
    with atomic_path(run / PREVIOUS) as linked:
        try:
            os.link(run / LAST, linked)
        except OSError:  # a file system without hard links
            shutil.copyfile(run / LAST, linked)


def read_newest(run: Path) -> tuple[dict[str, Any] | None, str]:
    """What the run goes on from, None if it has not come to its first checkpoint, and a warning or "".

    A damaged last checkpoint is replaced by the previous one: training repeats what lies between.

    Raises:
        ModelError: if there are checkpoints but none can be read.
    """
    warning = ""
    for name in (LAST, PREVIOUS):
        if not (run / name).exists():
            continue
        try:
            return read_checkpoint(run / name), warning
        except ModelError as error:
            warning = f"{error}; going on from the one before it" if name == LAST else f"{warning}; {error}"
    if warning:
        raise ModelError(f"no checkpoint of run '{run}' can be read: {warning}")
    return None, ""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote.

    Raises:
        ModelError: if the file is missing, damaged, holds anything but plain data, or is not from ctseg.
    """
    content = load_plain(path, "checkpoint")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ModelError(f"checkpoint '{path}': not written by ctseg; expected format '{FORMAT}'")
    check_version(content.get("version"), "checkpoint", path)
    return content


def check_version(version: Any, kind: str, path: Path) -> None:
    """Raises ModelError unless this ctseg reads the version of the format that a file names."""
    if not isinstance(version, int) or version != VERSION:  # a tensor has no single answer to !=
        found = version if isinstance(version, int) else type(version).__name__
        raise ModelError(f"{kind} '{path}': format version {found}, this ctseg reads {VERSION}")


def load_plain(path: Path, kind: str) -> Any:
    """The plain data in a file of PyTorch's, whoever wrote it; `kind` says in messages what it should be.

    Raises:
        ModelError: if the file is missing, damaged, compressed, or holds anything but plain data.
    """
    import torch

    try:
        _check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about foreign pickles, which are refused anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ModelError(f"{kind} '{path}': no such file") from error
    except pickle.UnpicklingError as error:
        raise ModelError(f"{kind} '{path}': holds more than plain data (or is damaged); refused") from error
    except Exception as error:  # damaged bytes make the unpickler fail in any way: IndexError, struct.error, ...
        raise ModelError(f"{kind} '{path}': damaged or no {kind} ({_first_line(error)})") from error


def _check_archive(path: Path) -> None:
    """Raises ValueError if a part is not what was written, or would unpack to more than the file holds."""
    if not zipfile.is_zipfile(path):  # torch reads its own older files, and finds out about others
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            _check_pickle(content)
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise ValueError("its parts are compressed, as torch never does")
        if sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise ValueError("its parts claim more than the file holds")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                _check_pickle(archive.read(entry))
        part = archive.testzip()
    if part is not None:
        raise ValueError(f"the checksum of {part[:80]!r} is wrong; copy the file again")


def _check_pickle(content: bytes | mmap.mmap) -> None:
    """Raises ValueError for what torch would let a few bytes take any amount of memory by."""
    for module in (b"builtins", b"__builtin__"):
        if content.find(module + b"\nbytearray\n") >= 0:
            raise ValueError("it holds a bytearray, as ctseg never writes")


def file_sha256(path: Path) -> str:
    """The file's SHA-256 as hexadecimal digits.

    Raises:
        ModelError: if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return digest_of(file).sha256
    except OSError as error:
        raise ModelError(f"model '{path}': cannot be read: {error.strerror}") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
