"""How long work tells how far it is, without knowing who watches.

The engine is handed a `Progress` and never prints. A person at a terminal sees a live bar, a batch log gets plain dated
lines, a script gets nothing; all of it on stderr. Tasks nest: `start` inside a running task begins a part of it.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import Console
    from typing_extensions import Self


class Progress(Protocol):
    """What the engine may tell about its work."""

    def start(self, task: str, total: int) -> None:
        """A task of `total` units begins, inside the running one if there is one."""

    def advance(self, detail: str = "") -> None:
        """One unit of the innermost task is done; `detail` says more, e.g. "loss 0.412"."""

    def finish(self) -> None:
        """The innermost task ends, complete or not."""

    def note(self, text: str) -> None:
        """One line worth keeping, e.g. a validation result."""


@dataclass
class _Task:
    name: str
    total: int
    started_seconds: float
    done: int = 0
    detail: str = ""

    def advance(self, detail: str) -> None:
        self.done += 1
        self.detail = printable(detail)

    def eta(self, now_seconds: float) -> str:
        """Time left as 0:01:20 at the mean pace so far; empty before the first unit and after the last."""
        if not 0 < self.done < self.total:
            return ""
        return _duration((now_seconds - self.started_seconds) / self.done * (self.total - self.done))

    def line(self, now_seconds: float) -> str:
        """E.g. "training 12/40 (30%) ETA 0:01:20 loss 0.412"."""
        percent = 100 * self.done // self.total if self.total else 100
        eta = self.eta(now_seconds)
        return _join(f"{self.name} {self.done}/{self.total} ({percent}%)", eta and f"ETA {eta}", self.detail)

    def last_line(self, now_seconds: float) -> str:
        """E.g. "training 40/40 took 0:04:10 loss 0.101"."""
        took = _duration(now_seconds - self.started_seconds)
        return _join(f"{self.name} {self.done}/{self.total} took {took}", self.detail)


class Silent:
    """Tells nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def start(self, task: str, total: int) -> None:
        """Does nothing."""

    def advance(self, detail: str = "") -> None:
        """Does nothing."""

    def finish(self) -> None:
        """Does nothing."""

    def note(self, text: str) -> None:
        """Does nothing."""


class PlainProgress:
    """Plain dated lines for a batch log: "2026-11-21 15:04:05 training 12/40 (30%) ETA 0:01:20 loss 0.412".

    Writes the first and the last line of an outermost task, every note, and between them at most one line per interval.

    Args:
        stream: Where lines go.
        interval_seconds: Shortest time between two lines about a running task.
        clock: Seconds that only grow.
        now: The date and time in front of each line.
    """

    def __init__(
        self,
        stream: TextIO,
        interval_seconds: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], datetime] = datetime.now,
    ) -> None:
        self._stream = stream
        self._interval_seconds = interval_seconds
        self._clock = clock
        self._now = now
        self._tasks: list[_Task] = []
        self._last_seconds = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._tasks.clear()

    def start(self, task: str, total: int) -> None:
        """Begins a task; an outermost one writes its first line."""
        self._tasks.append(_Task(printable(task), total, self._clock()))
        if len(self._tasks) == 1:
            self._report()

    def advance(self, detail: str = "") -> None:
        """Counts one unit and writes a line if the interval has passed; the last line is left to `finish`."""
        task = self._tasks[-1]
        task.advance(detail)
        ends_outermost = len(self._tasks) == 1 and task.done >= task.total
        if not ends_outermost and self._clock() - self._last_seconds >= self._interval_seconds:
            self._report()

    def finish(self) -> None:
        """Ends the innermost task; an outermost one writes its last line."""
        task = self._tasks.pop()
        if not self._tasks:
            self.note(task.last_line(self._clock()))

    def note(self, text: str) -> None:
        """Writes one dated line now."""
        print(f"{self._now():%Y-%m-%d %H:%M:%S} {printable(text)}", file=self._stream, flush=True)

    def _report(self) -> None:
        self._last_seconds = self._clock()
        self.note("; ".join(task.line(self._last_seconds) for task in self._tasks))


class RichProgress:
    """A live bar per running task, drawn by rich; a finished outermost task leaves one line behind."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars
        from rich.table import Column

        def fixed(width: int) -> Column:
            return Column(min_width=width, no_wrap=True)

        rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # on a narrow terminal only this is cut
        columns: list[Any] = [
            TextColumn("{task.description}", markup=False, table_column=fixed(0)),
            BarColumn(bar_width=12, table_column=fixed(12)),
            MofNCompleteColumn(table_column=fixed(5)),
            TimeElapsedColumn(table_column=fixed(7)),
            TextColumn("{task.fields[eta]}", table_column=fixed(0)),
            TextColumn("{task.fields[detail]}", markup=False, table_column=rest),
        ]
        # Results printed to stdout stay there; whatever else reaches stderr is shown above the bars.
        self._bars = Bars(*columns, console=console, transient=True, redirect_stdout=False, expand=True)
        self._clock = clock
        self._tasks: list[tuple[_Task, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._tasks.clear()
        self._bars.stop()

    def start(self, task: str, total: int) -> None:
        """Begins a task and shows its bar below those already running."""
        begun = _Task(printable(task), total, self._clock())
        self._tasks.append((begun, self._bars.add_task(begun.name, total=total, eta="", detail="")))
        self._bars.start()

    def advance(self, detail: str = "") -> None:
        """Moves the innermost bar by one unit."""
        task, bar = self._tasks[-1]
        task.advance(detail)
        eta = task.eta(self._clock())
        self._bars.update(bar, completed=task.done, eta=eta and f"ETA {eta}", detail=task.detail)

    def finish(self) -> None:
        """Removes the innermost bar; after the outermost one the terminal is as before, with one line more."""
        task, bar = self._tasks.pop()
        self._bars.remove_task(bar)
        if not self._tasks:
            self._bars.stop()
            self.note(task.last_line(self._clock()))

    def note(self, text: str) -> None:
        """Prints one line above the bars."""
        self._bars.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)


def make_progress(quiet: bool) -> Silent | PlainProgress | RichProgress:
    """The progress that suits stderr: none when quiet, a live bar on a terminal, dated lines elsewhere."""
    if quiet:
        return Silent()
    if not sys.stderr.isatty():
        return PlainProgress(sys.stderr)
    from rich.console import Console

    return RichProgress(Console(stderr=True))


def printable(text: str) -> str:
    """`text` with "?" for each control character, so that a file's name cannot steer a terminal or forge a line."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _join(*parts: str) -> str:
    return " ".join(part for part in parts if part)
