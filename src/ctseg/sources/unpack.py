"""Archives of strangers: every member is judged by its header before the first byte is written.

tar (plain, gzip, bzip2, xz) and zip. Only plain files and folders are made, inside the target; permissions, owners and
dates of the archive are not carried over. What macOS adds (`._name`, `__MACOSX`) is left out.
"""

from __future__ import annotations

import os
import shutil
import stat
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ctseg.errors import CtsegError, DownloadError, OutputError, list_problems
from ctseg.files import output_errors
from ctseg.progress import Progress, printable
from ctseg.sources.meter import byte_task

BLOCK_BYTES = 1 << 20
MAX_MEMBERS = 100_000
MAX_RATIO = 100
"""Unpacked size to the archive's own. Images shrink to a half, masks to a fiftieth."""
SMALL_BYTES = 64 * 2**20
"""Up to here any ratio is harmless."""
MAX_NAME = 1000
ZIP_HEADER_BYTES = 30
MAX_DIRECTORY_BYTES = 16 * 2**20
"""Of a zip; a member takes some 100 of them and thousands of memory."""
MAX_TEXT_BYTES = 1 << 16
MAX_TEXTS_BYTES = 64 * 2**20
"""Of all headers of a tar that hold text."""
TEXT_TYPES = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
JUNK = {"__MACOSX", ".DS_Store"}


@dataclass(frozen=True)
class Member:
    """A file in an archive."""

    path: PurePosixPath
    num_bytes: int
    open: Callable[[], IO[bytes]]


@contextmanager
def opened(path: Path, max_bytes: int) -> Iterator[tuple[Member, ...]]:
    """The files in an archive, all of them harmless; junk of macOS and folders are left out.

    Args:
        path: The archive.
        max_bytes: It may unpack to so much.

    Raises:
        DownloadError: if it is damaged, or naming every member that must not be unpacked.
    """
    try:
        packed_bytes = path.stat().st_size
        archive = _open(path)
    except CtsegError as error:
        raise DownloadError(f"archive '{path}': {error}") from error
    except Exception as error:  # the parsers raise anything over damaged bytes
        raise DownloadError(f"archive '{path}': damaged, or neither tar nor zip ({_reason(error)})") from error
    with archive:
        limit = min(max_bytes, max(SMALL_BYTES, MAX_RATIO * packed_bytes))
        try:
            zipped = isinstance(archive, zipfile.ZipFile)
            found = _zip_members(archive, limit) if zipped else _tar_members(archive, limit)
        except CtsegError as error:
            raise DownloadError(f"archive '{path}': {error}") from error
        except Exception as error:
            raise DownloadError(f"archive '{path}': damaged ({_reason(error)})") from error
        yield found


def unpack(members: list[tuple[Member, PurePosixPath]], folder: Path, progress: Progress, task: str) -> int:
    """Writes each member to its path below `folder`, which must be new; returns how many bytes.

    Raises:
        DownloadError: if a member is damaged or is not of the size its header says.
        OutputError: if the disk is full or cannot be written to.
    """
    total = sum(member.num_bytes for member, _ in members)
    free = shutil.disk_usage(folder).free
    if total > free:
        raise OutputError(f"cannot write '{folder}': needs {total / 1e9:.1f} GB, {free / 1e9:.1f} are free; free space")
    with byte_task(progress, task, total) as count:
        for member, inside in members:
            target = folder / inside
            with output_errors(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("xb") as file:
                    for block in _blocks(member):
                        file.write(block)
                        count(len(block))
                    file.flush()
                    os.fsync(file.fileno())
    return total


def _blocks(member: Member) -> Iterator[bytes]:
    size = 0
    try:
        with member.open() as source:
            while block := source.read(BLOCK_BYTES):
                size += len(block)
                if size > member.num_bytes:
                    break
                yield block
    except Exception as error:
        raise DownloadError(f"'{_shown(member.path)}' in the archive is damaged ({_reason(error)})") from error
    if size != member.num_bytes:
        raise DownloadError(f"'{_shown(member.path)}' in the archive is not of the size that its header says")


def _open(path: Path) -> Any:
    """The archive, closed by the caller. A tar if it can be one: a zip may stand at the end of any file."""
    try:
        return _Tar.open(path)
    except tarfile.ReadError:
        if not zipfile.is_zipfile(path):
            raise
    with path.open("rb") as file:
        directory_bytes = zipfile._EndRecData(file)[5]  # type: ignore[attr-defined]  # ZipFile reads so many, unasked
    if directory_bytes > MAX_DIRECTORY_BYTES:
        raise DownloadError(f"more than {MAX_DIRECTORY_BYTES >> 20} MiB of names; refused")
    return zipfile.ZipFile(path)


class _Header(tarfile.TarInfo):
    """A header of a tar. Those that hold text, or the map of a sparse file, are read into memory at once."""

    def _proc_member(self, archive: _Tar) -> tarfile.TarInfo:
        if self.type == tarfile.GNUTYPE_SPARSE:
            self._refuse_sparse()
        if self.type in TEXT_TYPES:
            archive.text_bytes += self.size
            if self.size > MAX_TEXT_BYTES or archive.text_bytes > MAX_TEXTS_BYTES:
                raise DownloadError("a header of it is too long, or all of them are; refused")
        _check_size(self)
        archive.pax_headers = {}  # those for all members: each would hold a copy
        member: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]  # not in the stubs
        _check_size(member)
        member.pax_headers = {}
        return member

    def _refuse_sparse(self, *_: object) -> None:
        raise DownloadError("must not be unpacked: a sparse file is in it")

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


class _Tar(tarfile.TarFile):
    """A tar that counts the text in its headers."""

    tarinfo = _Header
    text_bytes = 0


def _check_size(member: tarfile.TarInfo) -> None:
    """Refuses a negative size, which leads back: to an archive without end, or to reading all that follows."""
    if member.size < 0:
        raise DownloadError(f"must not be unpacked: '{_shown(PurePosixPath(member.name))}': of negative size")


def _tar_members(archive: tarfile.TarFile, limit: int) -> tuple[Member, ...]:
    judge = _Judge(limit)
    for info in archive:  # one header after the other: a bomb is noticed before its data is passed over
        kind = "" if info.isreg() else "a folder" if info.isdir() else _tar_kind(info)
        judge.take(info.name, info.size, kind, partial(_tar_file, archive, info))
    return judge.members()


def _tar_kind(info: tarfile.TarInfo) -> str:
    return "a link" if info.issym() or info.islnk() else "a device"


def _tar_file(archive: tarfile.TarFile, info: tarfile.TarInfo) -> IO[bytes]:
    file = archive.extractfile(info)
    assert file is not None, "only regular files come here"
    return file


def _zip_members(archive: zipfile.ZipFile, limit: int) -> tuple[Member, ...]:
    judge = _Judge(limit)
    end = 0
    for info in sorted(archive.infolist(), key=lambda info: info.header_offset):
        mode = stat.S_IFMT(info.external_attr >> 16)
        kind = "a folder" if info.is_dir() else ""
        if mode not in (0, stat.S_IFREG, stat.S_IFDIR):
            kind = "a link" if mode == stat.S_IFLNK else "a device"
        elif info.flag_bits & 1:
            kind = "encrypted"
        elif info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            kind = "packed in an uncommon way"
        elif info.header_offset < end:
            kind = "a part of another member"
        end = info.header_offset + ZIP_HEADER_BYTES + len(info.filename) + info.compress_size
        judge.take(info.orig_filename, info.file_size, kind, partial(archive.open, info))
    return judge.members()


class _Judge:
    """Collects the members of one archive and what is wrong with them."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._members: list[Member] = []
        self._problems: list[str] = []
        self._seen: dict[str, bool] = {}
        self._count = self._bytes = 0

    def take(self, name: str, num_bytes: int, kind: str, open_it: Callable[[], IO[bytes]]) -> None:
        """Judges a member; `kind` is "" for a plain file."""
        self._count += 1
        self._bytes += num_bytes
        if self._count > MAX_MEMBERS:
            raise DownloadError(f"more than {MAX_MEMBERS} members; refused")
        if self._bytes > self._limit:
            raise DownloadError(f"unpacks to more than {self._limit / 1e9:.1f} GB; refused")
        path = PurePosixPath(name)
        problem = _name_problem(name)
        if not problem and kind not in ("", "a folder"):
            problem = kind
        if not problem and kind == "" and not _is_junk(path):
            problem = self._clash(path)
            self._members.append(Member(path, num_bytes, open_it))
        if problem:
            self._problems.append(f"'{_shown(path)}': {problem}")

    def members(self) -> tuple[Member, ...]:
        """The files, or a DownloadError with all problems."""
        if self._problems:
            more = len(self._problems) - 10
            shown = [*self._problems[:10], *([f"... and {more} more"] if more > 0 else [])]
            raise DownloadError(list_problems("must not be unpacked", shown))
        return tuple(self._members)

    def _clash(self, path: PurePosixPath) -> str:
        """What stands at the same place on some file system: names that differ by case only, a file as a folder."""
        keys = [unicodedata.normalize("NFC", str(p)).casefold() for p in (path, *path.parents) if str(p) != "."]
        clash = keys[0] in self._seen or any(self._seen.get(key) for key in keys[1:])
        self._seen[keys[0]] = True
        for key in keys[1:]:
            self._seen.setdefault(key, False)
        return "the same place as another member" if clash else ""


def _name_problem(name: str) -> str:
    path = PurePosixPath(name)
    if not name or len(name) > MAX_NAME or any(len(os.fsencode(part)) > 255 for part in path.parts):
        return "no usable name"
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in "".join(path.parts[:1]):
        return "leads out of the folder"
    if "\0" in name or not name.isprintable():
        return "control characters in its name"
    return ""


def _is_junk(path: PurePosixPath) -> bool:
    return any(part in JUNK or part.startswith("._") for part in path.parts)


def _shown(path: PurePosixPath) -> str:
    return printable(str(path))[:120]


def _reason(error: Exception) -> str:
    return printable((str(error).splitlines() or [type(error).__name__])[0])[:120]
