"""`ctseg doctor`: what this machine can do, and what is wrong with it."""

from __future__ import annotations

import dataclasses

from ctseg.commands.common import JsonFlag, emit
from ctseg.errors import CtsegError
from ctseg.report.tables import render_table


def doctor(as_json: JsonFlag = False) -> None:
    """Check Python, libraries, CPU, memory, GPUs and disk; exit 2 if ctseg cannot work here."""
    try:
        from ctseg.engine.doctor import examine
    except ImportError as error:
        raise CtsegError(f"a library is missing or broken: {error}; install ctseg again") from error
    checks = examine()
    rows = [(c.level, c.name, c.value, c.advice) for c in checks]
    emit([dataclasses.asdict(c) for c in checks], render_table(("", "check", "found", "advice"), rows), as_json)
    broken = [c.name for c in checks if c.level == "error"]
    if broken:
        raise CtsegError(f"ctseg cannot work here: {', '.join(broken)}")
