"""Three stages of work on many items at once: the next is read and the last is written while one is worked on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Read = TypeVar("Read")
Made = TypeVar("Made")
Result = TypeVar("Result")
Check = Callable[[], None]
"""Raises what the writing stage has raised; for work that takes long."""


def one_by_one(
    items: Iterable[Item],
    read: Callable[[Item], Read],
    work: Callable[[Read, Check], Made],
    write: Callable[[Made], Result],
    finished: Callable[[Result], None],
) -> None:
    """As `overlapped`, with only one item in memory at a time."""
    for item in items:
        finished(write(work(read(item), lambda: None)))


def overlapped(
    items: Iterable[Item],
    read: Callable[[Item], Read],
    work: Callable[[Read, Check], Made],
    write: Callable[[Made], Result],
    finished: Callable[[Result], None],
) -> None:
    """Calls `finished(write(work(read(item))))` for each item, in order.

    `read` and `write` each run in a thread of their own, `work` and `finished` in this one. At most one item is read
    ahead and one is being written, so that besides the present item two more are in memory.

    Whatever a stage raises is raised here, after what was read has been dropped and what was worked on completely has
    been written and `finished`. No thread is left behind.
    """
    coming = iter(items)
    writing: Future[Result] | None = None

    def collect() -> None:
        nonlocal writing
        if writing is not None:
            written, writing = writing, None
            finished(written.result())

    def check() -> None:
        if writing is not None and writing.done() and writing.exception() is not None:
            collect()

    with ThreadPoolExecutor(1, "ctseg-read") as reader, ThreadPoolExecutor(1, "ctseg-write") as writer:

        def read_next() -> Future[Read] | None:
            return next((reader.submit(read, item) for item in coming), None)

        try:
            ahead = read_next()
            while ahead is not None:
                present = ahead.result()
                ahead = read_next()
                made = work(present, check)
                collect()
                writing = writer.submit(write, made)
                del present, made  # what is written is given back while the next is worked on
        finally:
            collect()
