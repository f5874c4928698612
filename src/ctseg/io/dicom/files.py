"""Files that may be DICOM: in folders, in zip archives, or named one by one. Nothing is ever unpacked to disk."""

from __future__ import annotations

import os
import struct
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ctseg.errors import ImageError
from ctseg.privacy import without_uids

MAX_FILES = 200_000
"""More files than this in what the user named are refused: it is not the folder of a study."""
MAX_UNPACKED_BYTES = 2**36
"""An archive that promises more is refused; 64 GiB are some 130,000 slices."""
MAX_DEFLATE_RATIO = 1032
"""Deflate packs at most this many bytes into one; an archive that promises more lies about its sizes."""

_LOCAL_HEADER = struct.Struct("<4s22xHH")
_STORED_OR_DEFLATED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


@dataclass(frozen=True)
class Source:
    """Where the bytes of one file are.

    Attributes:
        path: The file, or the zip archive that holds it.
        packed: Its entry in the archive, None for a file of its own.
    """

    path: Path
    packed: zipfile.ZipInfo | None = None

    @property
    def member(self) -> str | None:
        """Its name in the archive, None for a file of its own."""
        return None if self.packed is None else self.packed.filename

    @property
    def shown(self) -> str:
        """Its name in messages, without UIDs."""
        return without_uids(str(self.path) if self.packed is None else f"{self.path}:{self.packed.filename}")

    @property
    def num_bytes(self) -> int:
        """Its size, unpacked."""
        return self.path.stat().st_size if self.packed is None else self.packed.file_size

    def open(self) -> IO[bytes] | zipfile.ZipExtFile:
        """Its bytes from the beginning, unpacked as they are read; close it after use. Several threads may do so."""
        file = self.path.open("rb")
        if self.packed is None:
            return file
        file.seek(self.packed.header_offset)
        local = file.read(_LOCAL_HEADER.size)
        if len(local) < _LOCAL_HEADER.size or local[:4] != b"PK\x03\x04":
            file.close()
            raise ImageError("the archive is damaged; copy it again from its source")
        _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(local)
        file.seek(name_bytes + extra_bytes, os.SEEK_CUR)
        return zipfile.ZipExtFile(file, "r", self.packed, None, True)


def list_sources(paths: Iterable[Path]) -> tuple[list[Source], list[tuple[str, str]]]:
    """Every regular file in files, folders (nested) and zip archives, and (name, reason) of those left out.

    Links that lead out of a named folder are left out, as are encrypted members of archives. A file that is named
    twice is listed once.

    Raises:
        ImageError: if a path is missing or cannot be read, an archive is not safe, or there are too many files.
    """
    sources: dict[tuple[Path, str | None], Source] = {}
    left_out: list[tuple[str, str]] = []
    for path in paths:
        for file in _files(path, left_out):
            try:
                found = list(_members(file, left_out)) if _is_zip(file) else [Source(file)]
            except OSError as error:
                left_out.append((without_uids(str(file)), f"{error.strerror}; ask for access to it"))
                continue
            sources.update({(file.resolve(), source.member): source for source in found})
            if len(sources) > MAX_FILES:
                raise ImageError(f"cannot read '{path}': more than {MAX_FILES} files; name the folder of a study")
    return list(sources.values()), left_out


def _files(path: Path, left_out: list[tuple[str, str]]) -> Iterator[Path]:
    if path.is_dir():
        yield from _files_below(path, left_out)
    elif path.is_file():
        yield path
    else:
        reason = "it must be a file or folder, got a device or pipe" if path.exists() else "no such file or folder"
        raise ImageError(f"cannot read '{path}': {reason}; check the path")


def _files_below(folder: Path, left_out: list[tuple[str, str]]) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        left_out.append((without_uids(str(error.filename)), f"{error.strerror}; ask for access to it"))

    top = folder.resolve()
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders.sort()
        linked = [name for name in folders if Path(parent, name).is_symlink()]
        for path in (Path(parent, name) for name in sorted([*names, *linked])):
            if path.is_symlink() and not (path.is_file() and path.resolve().is_relative_to(top)):
                left_out.append((without_uids(str(path)), "a link to a folder or out of this one; name its target"))
            elif path.is_file():
                yield path


def _is_zip(path: Path) -> bool:
    """True for a file that begins as an archive: what merely ends as one could be anything."""
    with path.open("rb") as file:
        return file.read(4) in (b"PK\x03\x04", b"PK\x05\x06")


def _members(path: Path, left_out: list[tuple[str, str]]) -> Iterator[Source]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
    except Exception as error:  # zipfile raises anything on hostile bytes
        raise ImageError(f"cannot read '{path}': not a sound zip archive ({error}); copy it again") from error
    _check_archive(path, members)
    for member in members:
        if member.flag_bits & 1:
            left_out.append((Source(path, member).shown, "encrypted; unpack it with its password"))
        elif member.compress_type not in _STORED_OR_DEFLATED:
            left_out.append((Source(path, member).shown, "packed by an unknown method; pack it by deflate"))
        else:
            yield Source(path, member)


def _check_archive(path: Path, members: list[zipfile.ZipInfo]) -> None:
    """Passes if an archive can hold what it promises: members that overlap or unpack without end are refused."""
    if len(members) > MAX_FILES:
        raise ImageError(f"cannot read '{path}': {len(members)} members, at most {MAX_FILES}; split the archive")
    promised = sum(member.file_size for member in members)
    if promised > MAX_UNPACKED_BYTES:
        raise ImageError(
            f"cannot read '{path}': it would unpack to {promised:.3g} bytes, at most {MAX_UNPACKED_BYTES}; split it"
        )
    packed = sum(member.compress_size for member in members)
    if packed > path.stat().st_size or any(m.file_size > MAX_DEFLATE_RATIO * m.compress_size for m in members):
        raise ImageError(f"cannot read '{path}': its members are larger than it can hold; it is not a sound archive")
