"""Work on many cases at once. Threads, as unpacking, resampling, hashing and writing run outside Python's lock."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

from ctseg.limits import available_cpus, free_memory, memory_limit

Item = TypeVar("Item")
Result = TypeVar("Result")

_THREAD = threading.local()
MEMORY_SHARE = 0.5
"""Cases that are worked on at once take at most this share of the free memory, by their headers."""


def in_parallel(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Item, Result]]:
    """Each item with `work` of it, as they are done; after a stop request no more begin and those begun are finished.

    What `work` raises is raised here, once the others that run are finished.
    """
    waiting = deque(items)
    running: dict[Future[Result], Item] = {}
    with ThreadPoolExecutor(workers) as pool:
        while True:
            while waiting and len(running) < workers and not stop_requested():
                item = waiting.popleft()
                running[pool.submit(_in_worker, work, item)] = item
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()


def _in_worker(work: Callable[[Item], Result], item: Item) -> Result:
    _THREAD.is_worker = True
    return work(item)


def free_threads(most: int) -> int:
    """How many threads one piece of work may have: one where `in_parallel` does several at once, else all CPUs."""
    return 1 if getattr(_THREAD, "is_worker", False) else min(available_cpus(), most)


def in_threads(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> list[Result]:
    """As `in_order`, at once."""
    return list(in_order(work, items, threads))


def in_order(work: Callable[[Item], Result], items: Iterable[Item], threads: int) -> Generator[Result, None, None]:
    """`work` of each item, in order, so many at a time; what it raises is raised here, and then no more begin.

    Items are taken in this thread, which holds one while one waits for each that is worked on: they may be read from a
    file.
    """
    if threads == 1:
        yield from map(work, items)
        return
    running: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                if len(running) == 2 * threads:
                    yield running.popleft().result()
                running.append(pool.submit(work, item))
            while running:
                yield running.popleft().result()
        finally:
            for future in running:
                future.cancel()


def num_workers(memory_bytes: Sequence[int], wanted: int | None = None) -> int:
    """How many cases to work on at once: one for each CPU or `wanted`, as far as the largest of them fit into memory.

    Args:
        memory_bytes: What each case takes.
        wanted: At most so many.
    """
    allowed = _free_memory() * MEMORY_SHARE
    together, fitting = 0, 0
    for size in sorted(memory_bytes, reverse=True):
        together += size
        if together > allowed:
            break
        fitting += 1
    return max(1, min(wanted or available_cpus(), fitting))


def _free_memory() -> float:
    """Bytes: what the machine has free, or the limit of this process where that is less; endless if unknown."""
    limit, _ = memory_limit() or (float("inf"), "")
    free = free_memory()
    return limit if free is None else min(limit, free)
