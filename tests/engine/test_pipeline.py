"""Three stages at once: as fast as the slowest, in order, within its bounds, and no error or thread is lost."""

import threading
import time
import traceback
import weakref
from collections.abc import Callable
from typing import Any

import pytest

from ctseg.engine.pipeline import one_by_one, overlapped

ITEMS = range(6)


class Scan:
    """Something large: how many live at once is counted."""

    def __init__(self, number: int) -> None:
        self.number = number


class Stages:
    """Stages that take some time, and what they have seen."""

    def __init__(self, read_seconds: float = 0.0, work_seconds: float = 0.0, write_seconds: float = 0.0) -> None:
        self.seconds = {"read": read_seconds, "work": work_seconds, "write": write_seconds}
        self.calls: dict[str, list[int]] = {"read": [], "work": [], "write": [], "finished": []}
        self.fails: dict[tuple[str, int], BaseException] = {}
        self.alive: weakref.WeakSet[Scan] = weakref.WeakSet()
        self.most_alive = 0
        self.read_ahead = 0
        self.alive_after_work = 0

    def _stage(self, name: str, number: int) -> None:
        if (name, number) in self.fails:
            raise self.fails[name, number]
        time.sleep(self.seconds[name])
        self.calls[name].append(number)

    def read(self, number: int) -> Scan:
        scan = Scan(number)
        self.alive.add(scan)
        self.most_alive = max(self.most_alive, len(self.alive))
        self.read_ahead = max(self.read_ahead, number - len(self.calls["work"]))
        self._stage("read", number)
        return scan

    def work(self, scan: Scan, check: Callable[[], None]) -> Scan:
        self._stage("work", scan.number)
        self.alive_after_work = max(self.alive_after_work, len(self.alive))
        check()
        return scan

    def write(self, scan: Scan) -> int:
        self._stage("write", scan.number)
        return scan.number

    def run(self, items: Any = ITEMS) -> None:
        overlapped(items, self.read, self.work, self.write, self.calls["finished"].append)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Any:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def test_every_item_goes_through_all_stages_in_order() -> None:
    stages = Stages()
    stages.run()
    assert all(calls == list(ITEMS) for calls in stages.calls.values())


def test_one_by_one_has_one_item_in_memory() -> None:
    stages = Stages()
    one_by_one(ITEMS, stages.read, stages.work, stages.write, stages.calls["finished"].append)
    assert all(calls == list(ITEMS) for calls in stages.calls.values())
    assert (stages.most_alive, stages.read_ahead) == (1, 0)


def test_nothing_to_do() -> None:
    Stages().run([])


@pytest.mark.parametrize("seconds", [(0.1, 0.1, 0.1), (0.15, 0.05, 0.05), (0.05, 0.15, 0.05), (0.05, 0.05, 0.15)])
def test_it_takes_about_as_long_as_the_slowest_stage(seconds: tuple[float, float, float]) -> None:
    stages = Stages(*seconds)
    started = time.perf_counter()
    stages.run()
    assert time.perf_counter() - started < 0.75 * len(ITEMS) * sum(seconds)


@pytest.mark.parametrize("slow", ["read", "work", "write"])
def test_one_is_read_ahead_and_one_written(slow: str) -> None:
    stages = Stages(**{f"{slow}_seconds": 0.03})
    stages.run(range(12))
    assert stages.most_alive <= 3
    assert stages.read_ahead <= 1
    assert stages.alive_after_work <= (3 if slow == "write" else 2)
    assert not stages.alive


@pytest.mark.parametrize("stage", ["read", "work", "write"])
def test_an_error_of_any_stage_is_raised_here_and_what_was_made_is_written(stage: str) -> None:
    stages = Stages(write_seconds=0.05)
    stages.fails[stage, 3] = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError, match="a bug") as caught:
        stages.run()
    assert stages.calls["write"] == stages.calls["finished"] == [0, 1, 2]
    assert any(frame.name == "_stage" for frame in traceback.extract_tb(caught.value.__traceback__))


def test_an_error_in_writing_ends_work_that_takes_long() -> None:
    stages = Stages()
    stages.fails["write", 0] = OSError("disk full")
    windows = []

    def work(scan: Scan, check: Callable[[], None]) -> Scan:
        for window in range(200 if scan.number == 1 else 1):
            windows.append(window)
            check()
            time.sleep(0.01)
        return scan

    with pytest.raises(OSError, match="disk full"):
        overlapped(ITEMS, stages.read, work, stages.write, stages.calls["finished"].append)
    assert len(windows) < 100
    assert stages.calls["write"] == []


def test_an_error_in_writing_is_told_rather_than_a_stop_during_it() -> None:
    """What is told after a stop is that the same command goes on, and it would not."""
    stages = Stages()
    stages.fails["write", 0] = OSError("disk full")
    stages.fails["work", 1] = InterruptedError("stop")
    with pytest.raises(OSError, match="disk full"):
        stages.run()


@pytest.mark.parametrize("stage", ["work", "finished"])
def test_an_interrupt_ends_it_and_completes_what_is_being_written(stage: str) -> None:
    stages = Stages(read_seconds=0.02, write_seconds=0.1)
    if stage == "work":
        stages.fails["work", 1] = KeyboardInterrupt()
        with pytest.raises(KeyboardInterrupt):
            stages.run()
        assert stages.calls["finished"] == [0]
    else:

        def interrupted(number: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            overlapped(ITEMS, stages.read, stages.work, stages.write, interrupted)
    assert stages.calls["write"] == [0]
