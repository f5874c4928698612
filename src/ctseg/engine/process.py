"""This process and the CPU under it: threads, memory allocator, memory in use, signals. No torch is needed for it."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import mmap
import os
import platform
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from ctseg import slurm
from ctseg.arrays import HOST
from ctseg.errors import Stopped
from ctseg.limits import available_cpus

if TYPE_CHECKING:
    import torch

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
CPU_INFO = Path("/proc/cpuinfo")


def threads_of_process() -> int:
    """CPUs for this process: torchrun and `--gpus` share theirs out, Slurm has given each of its tasks its own."""
    started_by_srun = slurm.num_tasks(os.environ) > 1 and "TORCHELASTIC_RUN_ID" not in os.environ
    sharing = 1 if started_by_srun else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, available_cpus() // sharing)


def cpu_has_bfloat16() -> bool:
    """True where the CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX); elsewhere it is about 50x slower."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpu_flags())


@functools.cache
def cpu_flags() -> frozenset[str]:
    """What the CPU can do, by the kernel's names; empty where the kernel does not tell."""
    try:
        text = CPU_INFO.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return frozenset()
    line = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    return frozenset(line[1].split()) if line else frozenset()


def cpu_kind() -> str:
    """The same for CPUs for which the same code can be compiled."""
    flags = " ".join(sorted(cpu_flags()))
    return f"{platform.machine()} {hashlib.sha256(flags.encode()).hexdigest()[:16]}"


def tune_allocator() -> None:
    """Keeps glibc from giving large tensors back to the kernel between layers.

    Otherwise every layer's output is fresh memory and its page faults cost as much as the arithmetic in float32.
    Linux with glibc only; elsewhere nothing happens.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for option, value in ((-4, 0), (-1, 2**31 - 1), (-2, 64 * 2**20)):  # M_MMAP_MAX, M_TRIM_THRESHOLD, M_TOP_PAD
        libc.mallopt(option, value)


def give_back_memory() -> None:
    """Has glibc give free memory back to the kernel, once: after work that needed far more than what follows."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def peak_memory_bytes(device: torch.device) -> int:
    """The most that was in use until now: on a GPU by this process's tensors, else by the whole process."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_reserved(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_bytes() -> int:
    """What this process has in memory now; where the kernel does not tell, the most that it ever had."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return peak_memory_bytes(HOST)
    return pages * mmap.PAGESIZE


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """A function that says whether SIGTERM, SIGINT or SIGUSR1 has come; a second SIGINT interrupts at once.

    After Stopped the process is on its way out and deaf to SIGTERM and SIGUSR1: srun sends SIGTERM to all as soon as
    the first one has ended, and a death by it would hide the exit code that says everything is saved.
    """
    stopping = threading.Event()

    def handle(number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()

    if threading.current_thread() is not threading.main_thread():
        yield stopping.is_set
        return
    previous = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
    try:
        yield stopping.is_set
    except Stopped:
        previous |= {signal.SIGTERM: signal.SIG_IGN, signal.SIGUSR1: signal.SIG_IGN}
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
