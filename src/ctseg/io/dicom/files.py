"""Files that may be DICOM: in folders, in zip archives, or named one by one. Nothing is ever unpacked to disk."""

from __future__ import annotations

import io
import os
import struct
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ctseg.errors import ImageError
from ctseg.files import is_zip
from ctseg.privacy import without_uids
from ctseg.progress import printable

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
        root: What the user named: the file itself, or a folder or archive that holds it; None for the file itself.
        number: Its place in the list of all files of the search, from 1.
    """

    path: Path
    packed: zipfile.ZipInfo | None = None
    root: Path | None = None
    number: int = 0

    @property
    def member(self) -> str | None:
        """Its name in the archive, None for a file of its own."""
        return None if self.packed is None else self.packed.filename

    @property
    def shown(self) -> str:
        """Its name in messages: what the user named, and a number; names inside it may tell who the patient is."""
        named = str(self.root or self.path)
        shown = printable(without_uids(named))
        alone = self.packed is None and named == str(self.path) == shown
        return shown if alone or not self.number else f"{shown}: file #{self.number}"

    @property
    def full(self) -> str:
        """Its whole name, for those who keep identifiers."""
        return printable(str(self.path) if self.packed is None else f"{self.path}:{self.packed.filename}")

    def named(self, *, keep_identifiers: bool) -> str:
        """`full` for those who keep identifiers, `shown` for the others."""
        return self.full if keep_identifiers else self.shown

    @property
    def num_bytes(self) -> int:
        """Its size, unpacked."""
        return self.path.stat().st_size if self.packed is None else self.packed.file_size

    def open(self) -> io.BufferedReader | zipfile.ZipExtFile:
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


def list_sources(paths: Iterable[Path]) -> tuple[list[Source], list[tuple[Source, str]]]:
    """Every regular file in files, folders (nested) and zip archives, and (source, reason) of those left out.

    Links that lead out of a named folder are left out, as are encrypted members of archives, and archives below a
    folder that are not safe. A file that is named twice is listed once.

    Raises:
        ImageError: if a path is missing or cannot be read, it is an archive that is not safe, or there are too many
            files.
    """
    sources: dict[tuple[Path, str | None], Source] = {}
    left_out: list[tuple[Source, str]] = []
    number = 0
    for root in paths:
        for found, fault in _files(root):
            for member, reason in [(None, fault)] if fault else _parts(found, root):
                number += 1
                source = Source(found, member, root, number)
                if reason is None:
                    sources.setdefault((found.resolve(), source.member), source)
                else:
                    left_out.append((source, reason))
                if len(sources) + len(left_out) > MAX_FILES:
                    raise ImageError(f"cannot read '{root}': more than {MAX_FILES} files; name the folder of a study")
    return list(sources.values()), left_out


def _files(root: Path) -> Iterator[tuple[Path, str | None]]:
    """The files of what the user named, each with the reason to leave it out, or None."""
    if root.is_dir():
        yield from _files_below(root)
    elif root.is_file():
        yield root, None
    else:
        reason = "it must be a file or folder, got a device or pipe" if root.exists() else "no such file or folder"
        raise ImageError(f"cannot read '{root}': {reason}; check the path")


def _files_below(folder: Path) -> Iterator[tuple[Path, str | None]]:
    refused: list[OSError] = []
    top = folder.resolve()
    for parent, folders, names in os.walk(folder, onerror=refused.append):
        folders.sort()
        linked = [name for name in folders if Path(parent, name).is_symlink()]
        for path in (Path(parent, name) for name in sorted([*names, *linked])):
            if path.is_symlink() and not (path.is_file() and path.resolve().is_relative_to(top)):
                yield path, "a link to a folder or out of this one; name its target"
            elif path.is_file():
                yield path, None
    for error in refused:
        yield Path(error.filename), f"{error.strerror}; ask for access to it"


def _parts(path: Path, root: Path) -> Iterator[tuple[zipfile.ZipInfo | None, str | None]]:
    """The members of an archive, or None for a file that is none; each with the reason to leave it out, or None."""
    try:
        if is_zip(path):
            yield from ((member, _member_fault(member)) for member in _members(path))
        else:
            yield None, None
    except OSError as error:
        yield None, f"{error.strerror}; ask for access to it"
    except ImageError as error:
        if path == root:
            raise ImageError(f"cannot read '{path}': {error}") from error
        yield None, str(error)


def _members(path: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if not member.is_dir()]
    except Exception as error:  # zipfile raises anything on hostile bytes
        raise ImageError(f"not a sound zip archive ({printable(str(error))[:200]}); copy it again") from error
    _check_archive(members, path.stat().st_size)
    return members


def _member_fault(member: zipfile.ZipInfo) -> str | None:
    if member.flag_bits & 1:
        return "encrypted; unpack it with its password"
    if member.compress_type not in _STORED_OR_DEFLATED:
        return "packed by an unknown method; pack it by deflate"
    return None


def _check_archive(members: list[zipfile.ZipInfo], num_bytes: int) -> None:
    """Passes if an archive can hold what it promises: members that overlap or unpack without end are refused."""
    if len(members) > MAX_FILES:
        raise ImageError(f"{len(members)} members, at most {MAX_FILES}; split the archive")
    promised = sum(member.file_size for member in members)
    if promised > MAX_UNPACKED_BYTES:
        raise ImageError(f"it would unpack to {promised:.3g} bytes, at most {MAX_UNPACKED_BYTES}; split it")
    packed = sum(member.compress_size for member in members)
    if packed > num_bytes or any(m.file_size > MAX_DEFLATE_RATIO * m.compress_size for m in members):
        raise ImageError("its members are larger than it can hold; it is not a sound archive")
    if len({member.filename for member in members}) < len(members):
        raise ImageError("several members have one name, of which programs read one or another; pack it anew")
