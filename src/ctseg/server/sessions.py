"""Sessions: what a client comes back for by an id that nobody can guess, until nobody has for some time."""

from __future__ import annotations

import secrets
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ctseg.server.problems import NotHere, SessionGone, TooMany

Content = TypeVar("Content")
REMEMBERED = 10_000
"""Ids of expired sessions that are remembered, to tell them from those that never were."""


@dataclass
class Entry(Generic[Content]):
    """One session and its times, in seconds since 1970."""

    content: Content
    seconds: float
    created: float = field(default_factory=time.time)
    used: float = field(default_factory=time.time)


class Sessions(Generic[Content]):
    """Sessions by id.

    Args:
        seconds: A session that was not used for so long is removed.
        max_sessions: How many there may be at once.
        on_remove: Told of what is removed, to clean up after it.
    """

    def __init__(
        self, seconds: float, max_sessions: int, on_remove: Callable[[Content], None] = lambda _: None
    ) -> None:
        self._seconds = seconds
        self._max_sessions = max_sessions
        self._on_remove = on_remove
        self._entries: dict[str, Entry[Content]] = {}
        self._expired: deque[str] = deque(maxlen=REMEMBERED)
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._entries)

    def check_room(self) -> None:
        """Passes if one more session may be added.

        Raises:
            TooMany: if there are as many as may be.
        """
        self.expire()
        if len(self._entries) >= self._max_sessions:
            raise TooMany(f"{self._max_sessions} sessions are open already; close one, or wait until one expires")

    def add(self, content: Content, seconds: float | None = None) -> str:
        """The id of a new session; `seconds` may shorten its life, not lengthen it.

        Raises:
            TooMany: see `check_room`; nothing is kept of `content`.
        """
        try:
            self.check_room()
        except TooMany:
            self._on_remove(content)
            raise
        session_id = secrets.token_urlsafe(16)
        with self._lock:
            self._entries[session_id] = Entry(content, min(seconds or self._seconds, self._seconds))
        return session_id

    def get(self, session_id: str, *, touch: bool = True) -> Entry[Content]:
        """The session, which from now on lives its time again if `touch`.

        Raises:
            SessionGone: if it has expired.
            NotHere: if it never was, or was removed.
        """
        self.expire()
        with self._lock:
            entry = self._entries.get(session_id)
            if entry is not None:
                entry.used = time.time() if touch else entry.used
                return entry
            if session_id in self._expired:
                raise SessionGone("session: it has expired; open a new one")
        raise NotHere("session: there is none of this id; open one")

    def remove(self, session_id: str) -> Entry[Content]:
        """Takes a session away; what it was."""
        entry = self.get(session_id)
        with self._lock:
            self._entries.pop(session_id, None)
        self._on_remove(entry.content)
        return entry

    def expire(self) -> None:
        """Removes every session whose time is over."""
        now = time.time()
        with self._lock:
            over = [key for key, entry in self._entries.items() if now > entry.used + entry.seconds]
            entries = [self._entries.pop(key) for key in over]
            self._expired.extend(over)
        for entry in entries:
            self._on_remove(entry.content)

    def clear(self) -> None:
        """Removes all."""
        with self._lock:
            entries = list(self._entries.values())
            self._entries.clear()
        for entry in entries:
            self._on_remove(entry.content)
