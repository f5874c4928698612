"""Images in memory, bounded by their bytes: the one that was not used for the longest time goes first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeVar

Value = TypeVar("Value")


@dataclass(frozen=True)
class _Entry:
    value: Any
    num_bytes: int


class ByteCache:
    """Values by key, at most `max_bytes` of them in all; several threads may use it.

    Of threads that ask for one key at once, one makes the value and the others wait for it.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._making: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()

    @property
    def num_bytes(self) -> int:
        """What is held now."""
        with self._lock:
            return sum(entry.num_bytes for entry in self._entries.values())

    def __contains__(self, key: Hashable) -> bool:
        with self._lock:
            return key in self._entries

    def get(self, key: Hashable, make: Callable[[], Value], num_bytes: Callable[[Value], int]) -> Value:
        """The value of `key`, made if it is not held; one larger than the whole cache is not kept."""
        with self._lock:
            making = self._making.setdefault(key, threading.Lock())
        with making:
            try:
                with self._lock:
                    entry = self._entries.get(key)
                    if entry is not None:
                        self._entries.move_to_end(key)
                if entry is None:
                    value = make()
                    entry = _Entry(value, num_bytes(value))
                    self._keep(key, entry)
            finally:
                with self._lock:
                    self._making.pop(key, None)
            kept: Value = entry.value
            return kept

    def _keep(self, key: Hashable, entry: _Entry) -> None:
        with self._lock:
            if entry.num_bytes > self._max_bytes:
                return
            self._entries[key] = entry
            held = sum(entry.num_bytes for entry in self._entries.values())
            while held > self._max_bytes:
                held -= self._entries.popitem(last=False)[1].num_bytes
