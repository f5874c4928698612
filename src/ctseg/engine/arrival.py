"""A CT on its way from its file to the network: what is prepared can be segmented while the rest is still read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ctseg.preprocess import Prepared, preparation
from ctseg.specs import Preprocess
from ctseg.volume import PlaneStream, orientation_to_ras

if TYPE_CHECKING:
    import torch


class _CancelledError(Exception):
    """Nobody waits for the rest."""


class Arrival:
    """Which planes of a network's input are there, along the axis that the CT is read along.

    Attributes:
        seconds: Spent on waiting so far.
    """

    def __init__(self, num_planes: int) -> None:
        self.seconds = 0.0
        self._there = np.zeros(num_planes, dtype=bool)
        self._changed = threading.Condition()
        self._has_ended = self._is_cancelled = False
        self._error: BaseException | None = None

    def wait(self, first: int, stop: int) -> None:
        """Returns once planes `first` to `stop` - 1 are there; raises what ended preparing before."""
        self._wait_until(lambda: bool(self._there[first:stop].all()))

    def wait_for_end(self) -> None:
        """Returns once the whole file was read and found sound; raises what ended preparing before."""
        self._wait_until(lambda: self._has_ended)

    def add(self, start: int, stop: int) -> None:
        """Says that planes are there; raises if nobody wants more."""
        with self._changed:
            if self._is_cancelled:
                raise _CancelledError
            self._there[start:stop] = True
            self._changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """Says that preparing has ended, and why if it is not complete."""
        with self._changed:
            self._has_ended, self._error = True, error
            self._changed.notify_all()

    def cancel(self) -> None:
        """Says that nobody wants more."""
        with self._changed:
            self._is_cancelled = True

    def forget(self) -> None:
        """Lets go of what ended preparing: its traceback holds whoever waited, and the arrays of that."""
        self._error = None

    def _wait_until(self, is_there: Callable[[], bool]) -> None:
        started = time.perf_counter()
        with self._changed:
            self._changed.wait_for(lambda: self._has_ended or is_there())
        self.seconds += time.perf_counter() - started
        if self._error is not None:
            raise self._error


@contextmanager
def arriving(
    stream: PlaneStream, spec: Preprocess, device: torch.device, scratch: Path | None
) -> Iterator[tuple[Prepared, Arrival]]:
    """As `prepare` on the CPU, but at once: the image fills as its planes are read, by a thread that ends with this.

    Planes arrive along the axis of `orientation_to_ras(source)[2]`, in the direction of its sign.
    """
    prepared, fill = preparation(stream, spec, device, scratch)
    arrival = Arrival(prepared.geometry.size[orientation_to_ras(prepared.source)[2][0]])

    def run() -> None:
        try:
            fill(arrival.add)
        except BaseException as error:
            arrival.end(error)
        else:
            arrival.end()

    thread = threading.Thread(target=run, name="ctseg-prepare")
    thread.start()
    try:
        yield prepared, arrival
    finally:
        arrival.cancel()
        thread.join()
        arrival.forget()
