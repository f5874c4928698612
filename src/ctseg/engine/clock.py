"""How long the stages of one piece of work take, whoever runs them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Clock:
    """Seconds of each stage, measured inside it: time between stages, in a queue say, counts to none.

    Stages may run in several threads, one after another.
    """

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str, device: torch.device | None = None) -> Iterator[None]:
        """Adds the seconds inside to those of stage `name`; what a GPU `device` has been given counts where it was."""
        _wait_for(device)
        started = time.perf_counter()
        try:
            yield
            _wait_for(device)
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def move(self, seconds: float, source: str, target: str) -> None:
        """Counts seconds of one stage to another; the stage itself may still run."""
        self.seconds[source] = self.seconds.get(source, 0.0) - seconds
        self.seconds[target] = self.seconds.get(target, 0.0) + seconds

    def with_waiting(self) -> dict[str, float]:
        """Seconds of each stage, and under "waiting" those since the clock was made that belong to none."""
        elapsed = time.perf_counter() - self._started
        return {**self.seconds, "waiting": max(0.0, elapsed - sum(self.seconds.values()))}


def _wait_for(device: torch.device | None) -> None:
    if device is not None and device.type == "cuda":
        import torch

        torch.cuda.synchronize(device)
