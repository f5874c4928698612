"""pydicom without its warnings, which are settings of the whole process."""

from __future__ import annotations

import threading
import warnings
from contextlib import AbstractContextManager, ExitStack

import pydicom


class _Silence:
    """No warnings of pydicom from the first thread that enters to the last that leaves: its settings are global."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads_inside = 0
        self._before = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._threads_inside += 1
            if self._threads_inside == 1:
                settings = pydicom.config.settings
                self._before.callback(setattr, settings, "reading_validation_mode", settings.reading_validation_mode)
                settings.reading_validation_mode = pydicom.config.IGNORE
                self._before.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._threads_inside -= 1
            if self._threads_inside == 0:
                self._before.close()


_SILENCE = _Silence()


def pydicom_silent() -> AbstractContextManager[None]:
    """No warnings of pydicom inside: what a header says is judged by ctseg's own rules. For several threads too."""
    return _SILENCE
