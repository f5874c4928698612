"""Work on many at once: all of it, in bounds, and an end when one is asked for."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctseg import limits, workers
from ctseg.workers import free_threads, in_parallel, in_threads, num_workers

GB = 10**9


@pytest.mark.parametrize("count", [1, 3, 20])
def test_every_item_once(count: int):
    assert sorted(in_parallel(lambda n: n * n, range(10), count)) == [(n, n * n) for n in range(10)]
    assert list(in_parallel(lambda n: n, [], count)) == []


def test_so_many_run_at_once_and_no_more():
    """Three must meet at the barrier or nothing gets done."""
    meeting, running, most = threading.Barrier(3, timeout=20), [], []

    def work(n: int) -> None:
        running.append(n)
        most.append(len(running))
        meeting.wait()
        running.remove(n)

    assert len(list(in_parallel(work, range(9), 3))) == 9
    assert max(most) == 3


def test_results_come_as_they_are_done():
    release = threading.Event()
    done = in_parallel(lambda n: release.wait(20) if n == 0 else True, range(3), 2)
    assert {next(done)[0], next(done)[0]} == {1, 2}
    release.set()
    assert [item for item, _ in done] == [0]


def test_after_a_stop_what_runs_is_finished_and_no_more_begun():
    begun, stop = [], threading.Event()

    def work(n: int) -> int:
        begun.append(n)
        time.sleep(0.01)
        stop.set()
        return n

    finished = [item for item, _ in in_parallel(work, range(50), 2, stop.is_set)]
    assert sorted(finished) == sorted(begun)
    assert 1 <= len(finished) <= 2


def test_what_work_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        list(in_parallel(lambda n: 1 // n, [1, 0, 1], 1))


@pytest.mark.parametrize(
    ("memory_gb", "wanted", "expected"),
    [
        ([1] * 20, None, 8),  # CPUs
        ([1] * 20, 3, 3),
        ([1] * 2, 5, 2),  # cases
        ([2] * 20, 12, 5),  # half of 20 GB
        ([9] + [1] * 19, None, 2),  # the largest with another one
        ([30] * 20, None, 1),  # never none
        ([], None, 1),
        ([0] * 4, None, 4),
    ],
)
def test_bounds(monkeypatch, tmp_path: Path, memory_gb: list[int], wanted: int | None, expected: int):
    monkeypatch.setattr(workers, "available_cpus", lambda: 8)
    monkeypatch.setattr(workers, "memory_limit", lambda: None)
    monkeypatch.setattr(limits, "MEMORY", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable:   {20 * GB // 1024} kB\n")
    assert num_workers([n * GB for n in memory_gb], wanted) == expected


def test_a_limit_below_the_machines_memory_counts_and_no_knowledge_is_no_limit(monkeypatch, tmp_path: Path):
    monkeypatch.setattr(limits, "MEMORY", tmp_path / "none")
    monkeypatch.setattr(workers, "memory_limit", lambda: (4 * GB, "cgroup limit"))
    assert num_workers([GB] * 20, 16) == 2
    monkeypatch.setattr(workers, "memory_limit", lambda: None)
    assert num_workers([GB] * 20, 16) == 16


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_in_threads_does_every_item_once(threads: int):
    done: list[int] = []
    in_threads(done.append, range(20), threads)
    assert sorted(done) == list(range(20))
    in_threads(done.append, [], threads)
    assert len(done) == 20


@pytest.mark.parametrize("threads", [1, 2])
def test_in_threads_raises_what_the_work_raises_and_begins_no_more(threads: int):
    begun: list[int] = []

    def work(n: int) -> None:
        begun.append(n)
        time.sleep(0.01)
        if n == 3:
            raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        in_threads(work, range(1000), threads)
    assert len(begun) < 1000


def test_in_threads_two_run_at_once():
    meeting = threading.Barrier(2, timeout=20)
    in_threads(lambda _: meeting.wait(), range(4), 2)


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_in_threads_takes_items_only_as_they_are_needed(threads: int) -> None:
    """They may be large, and come from a file."""
    taken, most = 0, 0
    done: list[int] = []

    def items() -> Iterator[int]:
        nonlocal taken, most
        for n in range(50):
            taken, most = taken + 1, max(most, taken - len(done))
            yield n

    def work(n: int) -> int:
        time.sleep(0.002)
        done.append(n)
        return n * n

    assert in_threads(work, items(), threads) == [n * n for n in range(50)]
    assert most <= 3 * threads  # some wait, some run, and some are done but not yet counted here


def test_in_threads_what_items_raise_is_raised_here() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"):
        in_threads(lambda n: n, items(), 2)


def test_one_of_several_workers_takes_one_thread(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workers, "available_cpus", lambda: 6)
    assert [free_threads(most) for most in (1, 4, 8)] == [1, 4, 6]
    assert dict(in_parallel(lambda _: free_threads(4), range(3), 2)) == {0: 1, 1: 1, 2: 1}
    assert free_threads(4) == 4
