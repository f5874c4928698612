"""Work on bytes, told to a `Progress` in megabytes with the pace so far."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ctseg.progress import Progress

MEGABYTE = 10**6


@contextmanager
def byte_task(progress: Progress, task: str, num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A function to call with the size of each block that is done; `num_bytes` is the size of all of them."""
    done = told = 0
    total = -(-num_bytes // MEGABYTE)
    started = time.monotonic()
    progress.start(f"{task}, MB", total)

    def count(size: int) -> None:
        nonlocal done, told
        done += size
        seconds = time.monotonic() - started
        while told < (total if done >= num_bytes else done // MEGABYTE):
            told += 1
            progress.advance(f"{done / MEGABYTE / seconds:.1f} MB/s" if seconds > 0 else "")

    try:
        yield count
    finally:
        progress.finish()
