"""Long work beside the answering of requests, one piece of a kind at a time."""

from __future__ import annotations

import threading
import time
import uuid
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ctseg.server.problems import TooMany

KEPT_LINES = 200
STOP_SECONDS = 30.0
"""After a request to stop, a task is waited for so long."""


@dataclass
class Task:
    """What MONAI Label tells of a piece of work: SUBMITTED, RUNNING, DONE, ERROR or STOPPED, and its last lines."""

    request: dict[str, Any]
    id: str = field(default_factory=lambda: str(uuid.uuid4()))
    status: str = "SUBMITTED"
    start: float = field(default_factory=time.time)
    end: float | None = None
    details: deque[str] = field(default_factory=lambda: deque(["started"], maxlen=KEPT_LINES))
    result: dict[str, Any] = field(default_factory=dict)

    @property
    def is_running(self) -> bool:
        """True until it has ended."""
        return self.end is None

    def finish(self, status: str) -> None:
        """Says how it ended."""
        self.status, self.end = status, time.time()

    def told(self) -> dict[str, Any]:
        """Plain data."""
        end = {} if self.end is None else {"end_ts": _stamp(self.end)}
        about = {"id": self.id, "status": self.status, "request": self.request, "start_ts": _stamp(self.start)}
        return {**about, **end, "details": list(self.details), "result": self.result}


class Tasks:
    """The tasks of one kind, of which one runs at a time; the newest are remembered."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._tasks: deque[Task] = deque(maxlen=20)
        self._lock = threading.Lock()
        self._stop: Callable[[], None] | None = None

    @property
    def all(self) -> list[Task]:
        """Oldest first."""
        with self._lock:
            return list(self._tasks)

    @property
    def running(self) -> Task | None:
        """The one that runs."""
        return next((task for task in self.all if task.is_running), None)

    def begin(self, request: dict[str, Any], start: Callable[[Task], Callable[[], None]]) -> Task:
        """A new task, begun by `start`, which returns how to stop it. Where `start` raises, there was none.

        Raises:
            TooMany: if one is running.
        """
        with self._lock:
            if any(task.is_running for task in self._tasks):
                raise TooMany(f"{self._what} is running already; wait, or stop it first")
            task = Task(request)
            self._tasks.append(task)
            self._stop = None
        try:
            stop = start(task)  # may take long; others are told of the tasks meanwhile
        except BaseException:
            with self._lock:
                self._tasks.remove(task)
            raise
        with self._lock:
            self._stop = stop
            if task.status == "SUBMITTED":
                task.status = "RUNNING"
        if task.status == "STOPPED":  # it was, before that could be done
            stop()
        return task

    def close(self) -> None:
        """Stops the running task and waits until it has saved what it has."""
        task, until = self.stop(), time.monotonic() + STOP_SECONDS
        while task is not None and task.is_running and time.monotonic() < until:
            time.sleep(0.05)

    def stop(self) -> Task | None:
        """Asks the running task to stop; it, or None if none runs."""
        task = self.running
        if task is not None:
            task.status = "STOPPED"
            with self._lock:
                stop = self._stop
            if stop is not None:
                stop()
        return task


def _stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
