"""The files that a data set or a model is published as: fetched, or taken from where a user has put them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import ctseg
from ctseg.errors import DownloadError, ModelError, list_problems
from ctseg.files import output_errors
from ctseg.progress import Progress
from ctseg.sources.answers import shown
from ctseg.sources.digests import check_file, digest_problems
from ctseg.sources.fetch import Fetched, Remote, fetch, locked

SOURCE_FILE = "ctseg_source.json"
"""In a folder that was downloaded: where it came from, under which licence, and the checksums."""
UNPACKED = "unpacked"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True, kw_only=True)
class Archive:
    """One published file."""

    file: str
    urls: tuple[str, ...] = ()
    """Empty where only a login gives the file."""
    digests: dict[str, str] = field(default_factory=dict)
    into: str = ""
    """The folder for its files inside the data set."""

    def check(self) -> Iterator[str]:
        """Problems beyond those of single values, as "key: text"."""
        yield from digest_problems(self.digests)
        for key, value in (("file", self.file), *((("into", self.into),) if self.into else ())):
            if not NAME.fullmatch(value):
                yield f"{key}: expected a plain name, got {value!r:.80}"
        for url in self.urls:
            if not re.match(r"https?://[^/\s]+/\S+$", url):
                yield f"urls: expected http or https addresses, got {url!r:.80}"


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to get for one download, and for whom."""

    name: str
    archives: tuple[Archive, ...]
    max_bytes: int
    steps: tuple[str, ...] = ()
    """How a person gets them where no address does."""


def check_obtainable(order: Order, given: Path | None) -> None:
    """Raises DownloadError, with what a person can do, if it is clear beforehand that an archive cannot be had."""
    if given is not None:
        _find_given(order, given)
    elif not all(archive.urls for archive in order.archives):
        steps = [f"{number}. {step}" for number, step in enumerate(order.steps, start=1)]
        raise DownloadError("\n  ".join([f"'{order.name}' cannot be fetched without a login:", *steps]))


def obtain(order: Order, given: Path | None, folder: Path, progress: Progress) -> list[Fetched]:
    """The order's archives, whole and verified: below `folder`, or those that a user has in `given`.

    Raises:
        DownloadError: if one cannot be had, or is another file than published.
    """
    if given is not None:
        return [_taken(archive, path, order.max_bytes, progress) for archive, path in _find_given(order, given)]
    return [fetch(_remote(order, archive), folder, progress) for archive in order.archives]


def _remote(order: Order, archive: Archive) -> Remote:
    what = archive.file if len(order.archives) == 1 else "FOLDER"
    files = " and ".join(shown(each.urls[0]) for each in order.archives)
    by_hand = f"fetch {files} on another machine, then `ctseg download {order.name} --from {what}` here"
    return Remote(
        name=archive.file, urls=archive.urls, max_bytes=order.max_bytes, digests=archive.digests, by_hand=by_hand
    )


def _find_given(order: Order, given: Path) -> list[tuple[Archive, Path]]:
    if given.is_file():
        if len(order.archives) > 1:
            files = ", ".join(_described(archive) for archive in order.archives)
            raise DownloadError(f"--from {given}: '{order.name}' is {files}; name the folder that holds them")
        return [(order.archives[0], given)]
    if not given.is_dir():
        raise DownloadError(f"--from {given}: no such file or folder")
    found = [(archive, given / archive.file) for archive in order.archives]
    missing = [f"no {_described(archive)} in it" for archive, path in found if not path.is_file()]
    if missing:
        raise DownloadError(list_problems(f"--from {given}", missing))
    return found


def _described(archive: Archive) -> str:
    return f"{archive.file} ({shown(archive.urls[0])})" if archive.urls else archive.file


def _taken(archive: Archive, path: Path, max_bytes: int, progress: Progress) -> Fetched:
    if path.stat().st_size > max_bytes:
        raise DownloadError(f"'{path}': larger than {max_bytes / 1e9:.1f} GB; it is another file than {archive.file}")
    try:
        found = check_file(path, archive.digests, progress)
    except DownloadError as error:
        raise DownloadError(f"{error}; it is another file or damaged, fetch it again") from error
    return Fetched(path, None, path.stat().st_size, found, bool(archive.digests))


def record(name: str, licence: str, source: str, fetched: list[Fetched]) -> dict[str, Any]:
    """What `SOURCE_FILE` says, as plain data."""
    archives = [
        {"file": f.path.name, "url": f.url, "num_bytes": f.num_bytes, "digests": f.digests, "verified": f.verified}
        for f in fetched
    ]
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    about = {"name": name, "licence": licence, "source": source, "date": date, "ctseg": ctseg.__version__}
    return {**about, "archives": archives}


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `SOURCE_FILE` in a folder says, None if ctseg did not make the folder."""
    try:
        about = json.loads((folder / SOURCE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return about if isinstance(about, dict) and isinstance(about.get("archives"), list) else None


@contextmanager
def workplace(target: Path) -> Iterator[Path | None]:
    """A folder beside `target` for what it is made from, to itself; None if `target` is there already.

    Archives in it outlive a stop of any kind; once `target` is there, nothing of it is left.

    Raises:
        DownloadError: if another process is making `target`.
        OutputError: if the place cannot be written to.
    """
    work = target.with_name(f".{target.name}.download")
    if target.exists() and not work.exists():
        yield None
        return
    with locked(target):
        try:
            yield None if target.exists() else work
        finally:
            with output_errors(work):
                if target.exists():
                    _remove(work)
                elif work.is_dir() and not any(work.iterdir()):
                    work.rmdir()


@contextmanager
def becoming(target: Path, work: Path) -> Iterator[Path]:
    """An empty folder in `work` that becomes `target` on success and is removed on failure.

    Raises:
        OutputError: if it cannot be made.
    """
    folder = work / UNPACKED
    with output_errors(target):
        _remove(folder)
        folder.mkdir(parents=True)
        try:
            yield folder
            folder.rename(target)
        except BaseException:
            _remove(folder)
            raise


@contextmanager
def proved(fetched: list[Fetched], work: Path) -> Iterator[None]:
    """Removes what came without a checksum if it turns out not to be the file, e.g. the page of a login.

    Raises:
        DownloadError, ModelError: those of the block, saying so.
    """
    try:
        yield
    except (DownloadError, ModelError) as error:
        doubtful = [archive.path for archive in fetched if archive.path.parent == work and not archive.verified]
        with output_errors(work):
            for path in doubtful:
                path.unlink(missing_ok=True)
        if not doubtful:
            raise
        raise type(error)(f"{error}; it was removed, run again to fetch it, or use --from") from error


def keep_archives(fetched: list[Fetched], work: Path) -> None:
    """Moves the archives that were fetched to `work` out of it, to lie beside it."""
    with output_errors(work):
        for archive in fetched:
            if archive.path.parent == work:
                archive.path.replace(work.parent / archive.path.name)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
