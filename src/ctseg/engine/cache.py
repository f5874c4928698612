"""What was compiled once and is wanted again, in a folder of this user alone: `$CTSEG_CACHE`, else `~/.cache/ctseg`.

An entry is one file, named by its key: the SHA-256 of everything that what it holds depends on. Its first line is the
SHA-256 of the rest, its second one plain data, and then come the bytes. Some of these bytes are code (TorchScript), so
a file is read only if this user owns it and nobody else may write to it or to the folder; one that is damaged is no
entry. The cache is a convenience: where it cannot be used, nothing is found and nothing is kept, without an error.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from ctseg.errors import OutputError
from ctseg.files import atomic_path

FOLDER_VARIABLE = "CTSEG_CACHE"
SUFFIX = ".cached"
MAX_BYTES = 2 * 2**30
"""Of all entries together; beyond it those go that were not used for longest."""
LEFTOVER_SECONDS = 3600
"""A temporary file of this age was left by a process that was killed."""


Bytes: TypeAlias = "bytes | memoryview[int]"
"""Of an entry that was read it is a part of the file's bytes."""


@dataclass(frozen=True)
class Entry:
    """What was kept: plain data about it, and its bytes."""

    about: dict[str, Any]
    content: Bytes


def cache_key(facts: Mapping[str, Any]) -> str:
    """The name of the entry that depends on `facts`, plain data."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def read_entry(key: str) -> Entry | None:
    """The entry `key`, or None if there is none that can be trusted. It counts as used now."""
    folder = cache_folder()
    if folder is None:
        return None
    path = folder / f"{key}{SUFFIX}"
    try:
        data = _read_own_file(path)
        end_of_digest = data.index(b"\n")
        end_of_about = data.index(b"\n", end_of_digest + 1)
        parts = memoryview(data)  # of tens of megabytes, which are not copied
        if hashlib.sha256(parts[end_of_digest + 1 :]).hexdigest().encode() != parts[:end_of_digest]:
            return None
        about = json.loads(data[end_of_digest + 1 : end_of_about])
        entry = Entry(about, parts[end_of_about + 1 :])
    except (OSError, ValueError):
        return None
    with contextlib.suppress(OSError):
        os.utime(path)
    return entry


def has_entry(key: str) -> bool:
    """Whether there is such an entry; only `read_entry` finds out whether it can be trusted."""
    folder = cache_folder()
    return folder is not None and (folder / f"{key}{SUFFIX}").is_file()


def write_entry(key: str, entry: Entry) -> None:
    """Keeps the entry if it can be kept, and removes what the cache has no more room for."""
    folder = cache_folder(create=True)
    rest = json.dumps(entry.about).encode() + b"\n" + entry.content
    if folder is None or len(rest) > MAX_BYTES // 2:
        return
    with contextlib.suppress(OutputError), atomic_path(folder / f"{key}{SUFFIX}") as temporary:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(hashlib.sha256(rest).hexdigest().encode() + b"\n")
            file.write(rest)
    _trim(folder)


def can_keep() -> bool:
    """Whether an entry could be kept, unless the disk is full."""
    folder = cache_folder(create=True)
    return folder is not None and os.access(folder, os.W_OK)


def cache_folder(*, create: bool = False) -> Path | None:
    """The folder of the cache, or None if it is not there or is not this user's alone."""
    try:
        folder = _configured_folder()
        if create:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        trusted = stat.S_ISDIR(folder.stat().st_mode) and _is_own(folder.stat()) and _is_own_link(folder)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        return None
    return folder if trusted else None


def _configured_folder() -> Path:
    given = os.environ.get(FOLDER_VARIABLE)
    if given:
        return Path(given)
    caches = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (caches if caches.is_absolute() else Path.home() / ".cache") / "ctseg"


def _is_own(status: os.stat_result) -> bool:
    """Whether this user owns it and nobody else may write to it."""
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _is_own_link(path: Path) -> bool:
    """True unless `path` is a link that another user has laid."""
    return not path.is_symlink() or path.lstat().st_uid == os.geteuid()


def _read_own_file(path: Path) -> bytes:
    """The file's bytes; raises OSError if it is a link, another user's, not a plain file, or larger than any entry."""
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        if not (stat.S_ISREG(status.st_mode) and _is_own(status) and status.st_size <= MAX_BYTES):
            raise PermissionError(1, "not a file that this user has written here")
        return file.read()


def _trim(folder: Path) -> None:
    """Removes the entries that were not used for longest until the rest have room, and old temporary files."""
    with contextlib.suppress(OSError):
        for leftover in folder.glob(f".*{SUFFIX}.*.tmp"):
            if leftover.lstat().st_mtime < time.time() - LEFTOVER_SECONDS:
                leftover.unlink(missing_ok=True)
        total = 0
        entries = [(path, path.lstat()) for path in folder.glob(f"*{SUFFIX}")]
        for path, status in sorted(entries, key=lambda pair: -pair[1].st_mtime_ns):
            total += status.st_size
            if total > MAX_BYTES:
                path.unlink(missing_ok=True)
