"""Libraries without what they would bring along and nothing here needs."""

from __future__ import annotations

import importlib
import sys


def import_nibabel_alone() -> None:
    """Imports nibabel without pydicom, which takes as long again and only reads formats that ctseg reads otherwise.

    Whoever needs pydicom later imports it as ever. Call it before there are threads: one of them could miss pydicom.
    """
    if "nibabel" in sys.modules or "pydicom" in sys.modules:
        return
    sys.modules["pydicom"] = None  # type: ignore[assignment]  # importing it fails, as if it were not installed
    try:
        importlib.import_module("nibabel")
    finally:
        del sys.modules["pydicom"]
