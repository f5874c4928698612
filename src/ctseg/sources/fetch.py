"""One file over HTTP: whole and verified under its name, or not there.

What has arrived stands in `NAME.part`, where it came from in `NAME.part.json`; after a stop of any kind the next call
goes on from there. A file is continued only where that is safe: the server confirms that it still is the same one
(`If-Range`), or a known checksum will tell. Proxies and certificates are those of the environment, as in `requests`.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ctseg
from ctseg.errors import DownloadError, OutputError
from ctseg.files import make_folder, output_errors, write_json
from ctseg.progress import Progress
from ctseg.sources.answers import (
    MAX_REDIRECTS,
    AddressFails,
    TryAgain,
    Unreachable,
    check_answer,
    connection_problem,
    range_total,
    shown,
    total_bytes,
    validator_of,
)
from ctseg.sources.digests import check_file
from ctseg.sources.meter import byte_task

if TYPE_CHECKING:
    import requests

TIMEOUT_SECONDS = (15, 60)
"""To connect, and between two pieces of an answer."""
BLOCK_BYTES = 1 << 17
MAX_TRIES = 6
"""So many in a row may fail without bringing the file further."""
GAIN_BYTES = 1 << 20
MAX_PAUSE_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A file that can be fetched."""

    name: str
    urls: tuple[str, ...]
    """The same file at several addresses; those after the first are tried when it fails."""
    max_bytes: int
    digests: Mapping[str, str] = field(default_factory=dict)
    """By kind; empty where nobody knows one."""
    by_hand: str = ""
    """What to do where it cannot be fetched; ends messages."""


@dataclass(frozen=True)
class Fetched:
    """A whole file with its checksums."""

    path: Path
    url: str | None
    """None if it was there already."""
    num_bytes: int
    digests: dict[str, str]
    verified: bool
    """False if no checksum was known beforehand."""


class _WrongFile(TryAgain):
    """A whole file with a wrong checksum: another address is better, and twice is enough."""

    weight = MAX_TRIES // 2


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """Lets one process at a time make `target`; the kernel forgets a process that was killed.

    Raises:
        DownloadError: if another one is at it, or the file system has no locks.
    """
    make_folder(target.parent)
    path = target.with_name(f".{target.name}.lock")
    with output_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    try:
        if not _lock(descriptor, path):
            raise DownloadError(f"'{target}': another ctseg is making it; wait for that one to end")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        path.unlink(missing_ok=True)
        raise DownloadError(
            f"'{path.parent}': this file system has no locks ({error.strerror}); work in a folder on another one, "
            f"or name one with --data"
        ) from error
    return os.fstat(descriptor).st_nlink > 0  # else the one before has just removed it


def fetch(remote: Remote, folder: Path, progress: Progress) -> Fetched:
    """The file `folder/NAME`, complete and verified, fetched unless it is there.

    Raises:
        DownloadError: if no address gives it, naming the reason of each, or what is there is another file.
        OutputError: if the disk is full or cannot be written to.
    """
    target = folder / remote.name
    if target.exists():
        return _kept(remote, target, progress)
    part = folder / f"{remote.name}.part"
    if part.is_symlink():
        raise DownloadError(f"'{part}': is a link; delete it and run again")
    url, found = _fetch_part(remote, part, progress)
    with output_errors(target):
        part.replace(target)
        _state_file(part).unlink(missing_ok=True)
    return Fetched(target, shown(url), target.stat().st_size, found, bool(remote.digests))


def _kept(remote: Remote, target: Path, progress: Progress) -> Fetched:
    try:
        found = check_file(target, remote.digests, progress)
    except DownloadError as error:
        raise DownloadError(f"{error}; delete it and run again") from error
    return Fetched(target, None, target.stat().st_size, found, bool(remote.digests))


def _fetch_part(remote: Remote, part: Path, progress: Progress) -> tuple[str, dict[str, str]]:
    """Completes `part`; the address that did, and the checksums, which are right."""
    import requests

    problems: dict[str, str] = {}
    addresses = list(dict.fromkeys(remote.urls))
    tries, began, furthest = dict.fromkeys(addresses, 0), _size(part), _size(part)
    with requests.Session() as session:
        session.max_redirects = MAX_REDIRECTS
        session.headers["User-Agent"] = f"ctseg/{ctseg.__version__}"
        while addresses:
            url = addresses[0]
            try:
                _transfer(session, remote, url, part, progress)
                return url, _checked(remote, part, progress)
            except AddressFails as error:
                problems[url] = str(error)
                addresses.remove(url)
            except TryAgain as error:
                if _size(part) >= furthest + GAIN_BYTES:
                    tries[url], furthest = 0, _size(part)
                tries[url] += error.weight
                problems[url] = str(error) + (f" (tried {tries[url]} times)" if tries[url] > 1 else "")
                if tries[url] >= MAX_TRIES or (isinstance(error, Unreachable) and furthest == began):
                    addresses.remove(url)
                    continue
                if error.weight > 1:
                    addresses.append(addresses.pop(0))
                pause = _pause_seconds(tries[url], error.pause_seconds)
                progress.note(f"{remote.name}: {error}; trying again in {pause:.0f} s")
                time.sleep(pause)
    where: dict[str, list[str]] = {}
    for url, reason in problems.items():
        where.setdefault(reason, []).append(shown(url))
    reasons = "; ".join(f"{', '.join(urls)}: {reason}" for reason, urls in where.items())
    raise DownloadError(f"{remote.name}: cannot be fetched: {reasons}; {remote.by_hand}".rstrip("; "))


def _checked(remote: Remote, part: Path, progress: Progress) -> dict[str, str]:
    """The checksums of a whole file; one with a wrong checksum is removed."""
    try:
        return check_file(part, remote.digests, progress)
    except DownloadError as error:
        part.unlink(missing_ok=True)
        _state_file(part).unlink(missing_ok=True)
        raise _WrongFile(str(error).partition(": ")[2]) from error


def _pause_seconds(tries: int, wanted: float | None) -> float:
    """Twice as long after each try, with a part left to chance so that many clients do not come back together."""
    if wanted is not None:
        return min(wanted, MAX_PAUSE_SECONDS)
    return min(2.0**tries, MAX_PAUSE_SECONDS) * random.uniform(0.5, 1.0)


def _transfer(session: requests.Session, remote: Remote, url: str, part: Path, progress: Progress) -> None:
    """Brings `part` to its end from one address, from where it is if that is safe."""
    state = _read_state(part)
    validator = state.get("validator") if state.get("url") == shown(url) else None
    offset = _size(part) if validator or remote.digests else 0
    headers = {"Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if validator:
            headers["If-Range"] = validator
    try:
        response = session.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS)
    except Exception as error:  # requests lets other errors through where an answer leads to a malformed address
        raise connection_problem(error) from error
    with response:
        if response.status_code == 416 and offset and range_total(response) == offset:
            return
        check_answer(response, url, bool(remote.digests))
        make_folder(part.parent)
        offset = _first_byte(response, part, offset, validator)
        total = total_bytes(response, offset)
        _check_size(remote, total, response, offset, part)
        with output_errors(part):
            if offset == 0:
                part.write_bytes(b"")  # first: what is there must never stand under a new file's validator
            write_json(_state_file(part), {"url": shown(url), "validator": validator_of(response)})
        _receive(response, part, offset, total, remote, progress)


def _first_byte(response: requests.Response, part: Path, offset: int, validator: str | None) -> int:
    """Where in the file the answer begins; what is there of a file that has changed is dropped."""
    if response.status_code == 200:
        return 0
    begins = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
    now = validator_of(response)
    changed = validator is not None and now is not None and now != validator
    if response.status_code == 416 or changed or begins is None or int(begins[1]) != offset:
        with output_errors(part):
            part.write_bytes(b"")
        raise TryAgain("the file has changed on the server" if changed else "the server sends another part than asked")
    return offset


def _check_size(remote: Remote, total: int | None, response: requests.Response, offset: int, part: Path) -> None:
    if total is not None and total > remote.max_bytes:
        raise AddressFails(f"the server has {total / 1e9:.1f} GB, at most {remote.max_bytes / 1e9:.1f} are expected")
    chunked = "chunked" in response.headers.get("Transfer-Encoding", "").lower()
    if total is None and not chunked and not remote.digests:
        raise AddressFails("the server does not say how large it is, and there is no checksum to know it whole")
    needed = 0 if total is None else total - offset
    free = shutil.disk_usage(part.parent).free
    if needed > free:
        raise OutputError(f"cannot write '{part}': needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} are free; free space")


def _receive(
    response: requests.Response, part: Path, offset: int, total: int | None, remote: Remote, progress: Progress
) -> None:
    bound = remote.max_bytes if total is None else total
    size = offset
    began = f" from {offset / 1e6:.0f}" if offset else ""
    with (
        output_errors(part),
        part.open("ab") as file,
        byte_task(progress, f"fetching {remote.name}{began}", bound - offset) as count,
    ):
        for block in _blocks(response):
            size += len(block)
            if size > bound:
                part.write_bytes(b"")
                raise AddressFails(f"the server sends more than {bound} bytes")
            file.write(block)
            file.flush()  # what a killed process had received is there
            count(len(block))
        os.fsync(file.fileno())
    if total is not None and size != total:
        raise TryAgain(f"the connection ended after {size} of {total} bytes")


def _blocks(response: requests.Response) -> Iterator[bytes]:
    import requests

    try:
        yield from response.iter_content(BLOCK_BYTES)
    except requests.RequestException as error:
        raise TryAgain(f"the connection broke ({type(error).__name__})") from error


def _state_file(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_state(part: Path) -> dict[str, Any]:
    try:
        state = json.loads(_state_file(part).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    known = isinstance(state, dict) and all(isinstance(value, str | None) for value in state.values())
    return state if known else {}


def _size(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0
