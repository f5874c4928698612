"""Libraries faster than they would come by themselves, and without what nothing here needs."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_kept: list[object] = []


@contextmanager
def importing() -> Iterator[None]:
    """For imports: Python looks for no garbage meanwhile.

    Modules are thousands of objects that stay; it would look through them again and again. In a process that has frozen
    what it began with, as the program `ctseg` does, it never does later either.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        if gc.get_freeze_count():
            gc.freeze()
        gc.enable()


def keep_to_the_end(thing: object) -> None:
    """Has the program `ctseg` not take `thing` apart before it ends: to free a network takes a tenth of a second.

    In a process that is not the program, and may go on with something else, nothing is kept.
    """
    if gc.get_freeze_count():
        _kept.append(thing)


def import_nibabel_alone() -> None:
    """Imports nibabel without pydicom, which takes as long again and only reads formats that ctseg reads otherwise.

    Whoever needs pydicom later imports it as ever. Call it while no other thread may want pydicom.
    """
    if "nibabel" in sys.modules or "pydicom" in sys.modules:
        return
    sys.modules["pydicom"] = None  # type: ignore[assignment]  # importing it fails, as if it were not installed
    try:
        importlib.import_module("nibabel")
    finally:
        sys.modules.pop("pydicom", None)
