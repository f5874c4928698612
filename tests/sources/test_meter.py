"""Bytes told as megabytes: all of them, none twice."""

import pytest

from ctseg.progress import Silent
from ctseg.sources.meter import byte_task


class Listener(Silent):
    """What was told."""

    def __init__(self) -> None:
        self.total, self.done, self.ended, self.details = 0, 0, False, [""]

    def start(self, task: str, total: int) -> None:
        self.total = total

    def advance(self, detail: str = "") -> None:
        self.done += 1
        self.details.append(detail)

    def finish(self) -> None:
        self.ended = True


@pytest.mark.parametrize("block", [1, 999_999, 1_000_000, 3_700_000])
@pytest.mark.parametrize("size", [0, 1, 1_000_000, 3_700_001])
def test_every_megabyte_is_told_once(size: int, block: int):
    if size // block > 100_000:
        block = 1000
    listener = Listener()
    with byte_task(listener, "x", size) as count:
        done = 0
        while done < size:
            count(min(block, size - done))
            done += min(block, size - done)
            assert listener.done <= listener.total
    assert listener.done == listener.total == -(-size // 10**6)
    assert listener.ended
    assert size == 0 or listener.details[-1].endswith("MB/s")


def test_it_ends_also_when_the_work_breaks_off():
    listener = Listener()
    with pytest.raises(ZeroDivisionError), byte_task(listener, "x", 10) as count:
        count(1 // 0)
    assert listener.ended
