"""The one thread that runs models on the device, and the queue before it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.requests import Request

from ctseg.server.problems import Busy, ClientGone

Result = TypeVar("Result")
Work = Callable[[Callable[[], None]], Result]
"""Takes a function that raises ClientGone once nobody waits for the result; long work calls it now and then."""

POLL_SECONDS = 0.2
"""How soon it is noticed that a client has left."""


class ModelWorker:
    """Runs work in the order it came, one piece at a time.

    Args:
        max_waiting: Pieces of work that may wait while one runs.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self._waiting = 0
        self._closing = threading.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    async def run(self, request: Request | None, work: Work[Result]) -> Result:
        """The result of `work`, run when its turn comes; without a request it is never given up.

        Raises:
            Busy: if too many wait already.
            ClientGone: if the client left before it was done; work that has not begun never begins.
        """
        if self._waiting > self._max_waiting:
            raise Busy(f"{self._waiting} requests wait for the model already; try again later")
        gone = threading.Event()

        def check() -> None:
            if gone.is_set() or self._closing.is_set():
                raise ClientGone

        def begin() -> Result:
            check()
            return work(check)

        self._waiting += 1
        future = self._thread.submit(begin)
        done = asyncio.wrap_future(future)
        try:
            while not done.done():
                await asyncio.wait({done}, timeout=POLL_SECONDS)
                if not done.done() and request is not None and await request.is_disconnected():
                    raise ClientGone
            return done.result()
        finally:
            gone.set()
            future.cancel()
            self._waiting -= 1

    def close(self) -> None:
        """Ends the work that is running as soon as it asks, and all that waits."""
        self._closing.set()
        self._thread.shutdown(wait=True, cancel_futures=True)
