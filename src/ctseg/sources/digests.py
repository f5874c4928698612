"""Checksums of files, whichever kind their publisher has chosen."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from ctseg.errors import DownloadError
from ctseg.progress import Progress
from ctseg.sources.meter import byte_task

LENGTHS = {"md5": 32, "sha1": 40, "sha256": 64, "sha512": 128}
"""Known kinds, with their number of hexadecimal digits."""
BLOCK_BYTES = 1 << 20


def digest_problems(digests: Mapping[str, str]) -> list[str]:
    """A line for each checksum that is none."""
    problems = []
    for kind, value in digests.items():
        if kind not in LENGTHS:
            problems.append(f"digests.{kind}: unknown kind; known: {', '.join(LENGTHS)}")
        elif not re.fullmatch(f"[0-9a-f]{{{LENGTHS[kind]}}}", value):
            problems.append(
                f"digests.{kind}: expected {LENGTHS[kind]} hexadecimal digits in lower case, got {value!r:.80}"
            )
    return problems


def check_file(path: Path, expected: Mapping[str, str], progress: Progress) -> dict[str, str]:
    """The file's checksums: those of the kinds in `expected`, which they equal, and its SHA-256.

    Raises:
        DownloadError: if the file cannot be read, or a checksum differs: expected and got.
    """
    found = file_digests(path, {"sha256", *expected}, progress)
    wrong = [
        f"{kind} expected {expected[kind]}, got {found[kind]}" for kind in expected if found[kind] != expected[kind]
    ]
    if wrong:
        raise DownloadError(f"'{path}': wrong checksum: {'; '.join(wrong)}")
    return found


def file_digests(path: Path, kinds: set[str], progress: Progress) -> dict[str, str]:
    """Checksums of a file by kind, as hexadecimal digits.

    Raises:
        DownloadError: if the file cannot be read.
    """
    hashes = {kind: hashlib.new(kind, usedforsecurity=False) for kind in sorted(kinds)}
    try:
        with path.open("rb") as file, byte_task(progress, f"checking {path.name}", path.stat().st_size) as count:
            while block := file.read(BLOCK_BYTES):
                for digest in hashes.values():
                    digest.update(block)
                count(len(block))
    except OSError as error:
        raise DownloadError(f"'{path}': cannot be read: {error.strerror}") from error
    return {kind: digest.hexdigest() for kind, digest in hashes.items()}
