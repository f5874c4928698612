"""The same command once per GPU, each process doing its part of the cases alone; their answers put together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import zip_longest
from typing import IO, Any

from ctseg.engine.process import stop_on_signal
from ctseg.errors import CasesFailed, CtsegError, Stopped

POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Answers:
    """What the processes have printed.

    Attributes:
        rows: Of all, in the order in which a single process would have printed them.
        failed: Whether cases failed; each process has told which.
    """

    rows: list[dict[str, Any]]
    failed: bool


def run_parts(number: int, arguments: list[str]) -> Answers:
    """Runs `python -m ctseg ARGUMENTS` in `number` processes that share the cases out by their rank.

    Each must print one JSON list, of every `number`-th case. The first one shows its progress. A stop signal is handed
    on. A process that fails leaves the others alone.

    Raises:
        Stopped: if a signal stopped them.
        CtsegError: if one failed; it has told its own error.
    """
    with ExitStack() as stack:
        stop_requested = stack.enter_context(stop_on_signal())
        outputs = [stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8")) for _ in range(number)]
        processes = [_start(rank, number, arguments, output) for rank, output in enumerate(outputs)]
        for process in processes:
            stack.callback(_end, process)
        told = False
        while any(process.poll() is None for process in processes):
            if stop_requested() and not told:
                told = True
                for process in processes:
                    process.terminate()  # not by SIGINT, which a terminal has sent them too: the second one kills
            time.sleep(POLL_SECONDS)
        if told:
            raise Stopped("all processes have ended after a signal; the same command goes on")
        parts = [_rows(output) for output in outputs]
    codes = [process.returncode for process in processes]
    whole: list[list[dict[str, Any]]] = []
    for index, (rows, code) in enumerate(zip(parts, codes, strict=True)):
        if rows is None or code not in (0, CasesFailed.exit_code):
            raise CtsegError(f"process {index + 1} of {number} failed with exit code {code}; its error is above")
        whole.append(rows)
    return Answers([row for dealt in zip_longest(*whole) for row in dealt if row is not None], any(codes))


def _start(rank: int, number: int, arguments: list[str], output: IO[str]) -> subprocess.Popen[str]:
    counts = {"WORLD_SIZE": str(number), "LOCAL_WORLD_SIZE": str(number)}
    environ = {**os.environ, **counts, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    name, *rest = arguments
    quiet = ["--quiet"] if rank else []
    return subprocess.Popen([sys.executable, "-m", "ctseg", name, *quiet, *rest], env=environ, stdout=output, text=True)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.kill()
    process.wait()


def _rows(output: IO[str]) -> list[dict[str, Any]] | None:
    output.seek(0)
    try:
        rows = json.load(output)
    except ValueError:  # a bug ended it: its traceback is on stderr
        return None
    return rows if isinstance(rows, list) else None
