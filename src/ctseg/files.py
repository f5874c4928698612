"""Files that are whole or absent: written under a temporary name, synced, then renamed."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path
from typing import IO, Any

from ctseg.errors import OutputError

BLOCK_BYTES = 1 << 20
ZIP_MARKS = (b"PK\x03\x04", b"PK\x05\x06")
"""How a zip archive begins: with its first member, or with its end if it has none."""


@dataclass(frozen=True)
class Digest:
    """Which bytes something is made of: their SHA-256 as hexadecimal digits, and how many they are."""

    sha256: str
    num_bytes: int


def digest_of(file: IO[bytes] | BufferedIOBase) -> Digest:
    """The digest of what is left of an open file."""
    sha256, num_bytes = hashlib.sha256(), 0
    while block := file.read(BLOCK_BYTES):
        sha256.update(block)
        num_bytes += len(block)
    return Digest(sha256.hexdigest(), num_bytes)


def is_zip(path: Path) -> bool:
    """True for a file that begins as an archive: what merely ends as one could be anything."""
    with path.open("rb") as file:
        return file.read(4) in ZIP_MARKS


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turns any OSError inside into an OutputError that names `path` and what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"cannot write '{path}': {reason}; free space or choose another output folder") from error


def make_folder(path: Path) -> Path:
    """`path`, created with its parents if missing.

    Raises:
        OutputError: if it cannot be created or written to.
    """
    with output_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "no permission to write here")
    return path


@contextmanager
def folder_if_used(path: Path) -> Iterator[Path]:
    """`path`, created as by `make_folder`; what was created goes again if an error leaves it empty.

    Raises:
        OutputError: if it cannot be created or written to.
    """
    created = [folder for folder in (path, *path.parents) if not folder.exists()]
    make_folder(path)
    try:
        yield path
    except BaseException:
        with suppress(OSError):  # not empty
            for folder in created:
                folder.rmdir()
        raise


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; on success it is synced and renamed to `path`, on failure it is removed.

    Raises:
        OutputError: if anything inside raises an OSError, e.g. when the disk is full.
    """
    # Two nodes may have the same process numbers and write the same file.
    temporary = _temporary(path)
    with output_errors(path):
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """A name beside `path` that nobody has, not longer than names may be."""
    return path.with_name(f".{path.name[:40]}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def sync_contents(folder: Path) -> None:
    """Waits until all that a folder holds is on the disk."""
    for path in folder.rglob("*"):
        _sync(path)


def _sync(path: Path) -> None:
    """Waits until a file's bytes, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes `text` as UTF-8, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: Path, data: Any) -> None:
    """Writes `data` as indented JSON. NaN is a bug: callers pass None."""
    write_text(path, json.dumps(data, indent=1, allow_nan=False) + "\n")


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows under a header; None becomes an empty cell, missing columns are an error."""
    with (
        atomic_path(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file,  # names need not be text
    ):
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows({c: row[c] for c in columns} for row in rows)


def is_there(path: Path) -> bool:
    """True for a file and for a folder that holds something: an empty folder is as good as none."""
    with output_errors(path):
        return os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir()))


@contextmanager
def atomic_folder(folder: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder beside `folder`; on success it is renamed to it, on failure it is removed with all it holds.

    With `replace`, a folder that is there is set aside only once the new one is whole, and removed last.

    Raises:
        OutputError: if `folder` holds something already and is not to be replaced, is no folder or a link, or anything
            inside raises an OSError.
    """
    if folder.is_symlink() or (is_there(folder) and not (replace and folder.is_dir())):
        raise OutputError(f"cannot write '{folder}': it is there already and not an empty folder; name another one")
    temporary = _temporary(folder)
    with output_errors(folder):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            sync_contents(temporary)
            if is_there(folder):
                _exchange(folder, temporary)
            else:
                temporary.replace(folder)
            _sync(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _exchange(folder: Path, new: Path) -> None:
    """Puts the folder `new` in the place of `folder`, which goes; if that fails, `folder` is where it was."""
    aside = new.with_suffix(".old")
    folder.rename(aside)
    try:
        new.rename(folder)
    except BaseException:
        aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)
