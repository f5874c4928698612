"""What the benchmarks share: fresh processes, peak memory, medians with their spread."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Run:
    """One finished process."""

    seconds: float
    peak_mb: float
    printed: Any
    """The JSON that it printed: all of stdout, or the object on its last line; else None."""


def run(command: Sequence[str], environ: Mapping[str, str] | None = None) -> Run:
    """Runs a command in a fresh process; its peak memory is the kernel's own account of that process.

    The account begins with what this process has in memory: call it from a small one. `environ` is set besides this
    process's own environment.

    Raises:
        RuntimeError: if it fails, with the end of what it wrote to stderr.
    """
    started, environment = time.perf_counter(), {**os.environ, **(environ or {})}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        assert process.stdout is not None
        stdout = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        errors.seek(0)
        stderr = errors.read()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed with {process.returncode}: {stderr[-500:]}")
    return Run(seconds, usage.ru_maxrss / 1024, _json(stdout))


def _json(stdout: str) -> Any:
    for text in (stdout, *stdout.strip().splitlines()[-1:]):
        try:
            return json.loads(text)
        except ValueError:
            continue
    return None


def in_turn(commands: dict[str, list[str]], repetitions: int) -> dict[str, list[Run]]:
    """A B A B ...: every command `repetitions` times, after one uncounted round that warms the file cache."""
    results: dict[str, list[Run]] = {name: [] for name in commands}
    for repetition in range(repetitions + 1):
        for name, command in commands.items():
            result = run(command)
            if repetition > 0:
                results[name].append(result)
    return results


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Median (smallest to largest)."""
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Pair by pair, so that a drift of the machine's speed cancels."""
    return [a / b for a, b in zip(over, under, strict=True)]


def machine() -> str:
    """One line about where this runs."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123  # a benchmark's one-liner
            cpu = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} CPUs ({cpu}), Python {sys.version.split()[0]}"
