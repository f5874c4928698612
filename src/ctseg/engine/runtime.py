"""The machine under a run: device, precision, processes, threads, memory allocator. Nothing else knows of them."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from torch import Tensor, distributed

from ctseg import slurm
from ctseg.errors import DeviceError, NotEnoughMemory, PeerLost, Stopped
from ctseg.limits import available_cpus

LACK_OF_MEMORY = "out of memory|not enough memory|(can't|cannot|failed to) allocate"
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
COLLECTIVE_TIMEOUT = timedelta(days=1)
"""How long a process waits for the others: one may prepare a large data set alone. Elastic ends those that lost one."""
MEETING_TIMEOUT = timedelta(minutes=10)
"""How long the processes wait for each other at the start, when none has anything long to do."""
PEER_GRACE_SECONDS = 2.0
"""A process that lost another one ends this much later: what started them then sees the one that failed first."""


@dataclass(frozen=True)
class Runtime:
    """Where and how tensors are computed, and this process's place among its peers."""

    device: torch.device
    amp_dtype: torch.dtype | None
    """Type of mixed precision, None for plain float32."""
    rank: int = 0
    world_size: int = 1

    @property
    def precision(self) -> str:
        """One of PRECISIONS, as it turned out: float32, bfloat16 or float16."""
        return "float32" if self.amp_dtype is None else str(self.amp_dtype).removeprefix("torch.")

    @property
    def is_main(self) -> bool:
        """True in the one process that writes and prints."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the network runs."""
        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def any_process(self, flag: bool) -> bool:
        """True in every process as soon as it is true in one."""
        if self.world_size == 1:
            return flag
        value = torch.tensor(float(flag))  # on the host, so that no GPU is waited for
        distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
        return bool(value.item())

    def add_up(self, sums: Tensor) -> Tensor:
        """The sum over processes of `sums`; its gradient is that of this process's own part."""
        if self.world_size == 1:
            return sums
        total = sums.detach().clone()
        distributed.all_reduce(total)
        return sums + (total - sums.detach())

    def gather(self, value: Any) -> list[Any]:
        """Every process's `value`, in order of rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites every process's `tensors` with those of the main one."""
        if self.world_size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, src=0)

    def wait_for_all(self) -> None:
        """Returns once every process is here."""
        if self.world_size > 1:
            distributed.barrier()

    def describe(self) -> str:
        """One line for logs."""
        name = (
            torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else f"{torch.get_num_threads()} threads"
        )
        processes = f", process {self.rank + 1} of {self.world_size}" if self.world_size > 1 else ""
        return f"{self.device} ({name}), {self.precision}{processes}"


def start_runtime(
    device: str = "auto", precision: str = "auto", *, amp: bool = False, alone: bool = False, fast: bool = False
) -> Runtime:
    """The runtime for this process: threads and allocator set, process group joined if launched as one of several.

    Launched by torchrun, by `--gpus` or as one of several tasks of one srun.

    Args:
        device: "auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N".
        precision: One of PRECISIONS. "auto" is float16 on CUDA when `amp`, bfloat16 on a CPU that has it when `fast`,
            float32 otherwise.
        amp: Whether the recipe wants mixed precision on CUDA.
        alone: Work that processes share without ever talking to each other: no process group is joined.
        fast: Whether less precision is welcome on a CPU.

    Raises:
        DeviceError: if the device or precision is not to be had here.
        PeerLost: if the other processes are not to be found.
    """
    slurm.join(os.environ)
    tune_allocator()
    torch.set_num_threads(threads_of_process())
    chosen = _choose_device(device)
    rank, world_size = (0, 1) if alone else (int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))
    if world_size > 1 and not distributed.is_initialized():
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        _join_group("cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo", rank, world_size)
    if precision == "auto" and fast and chosen.type == "cpu" and cpu_has_bfloat16():
        precision = "bfloat16"
    amp_dtype = _choose_precision(precision, chosen, amp)
    torch.backends.cudnn.allow_tf32 = amp_dtype is not None  # float32 means float32, not TF32's ten bits
    return Runtime(chosen, amp_dtype, rank, world_size)


@contextmanager
def memory_errors(subject: str, device: torch.device) -> Iterator[None]:
    """Turns a lack of memory inside, however torch or NumPy tell it, into NotEnoughMemory about `subject`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(LACK_OF_MEMORY, str(error), re.IGNORECASE):
            raise
        advice = "a machine with more" if device.type == "cpu" else "--device cpu or a GPU with more"
        raise NotEnoughMemory(f"{subject}: not enough memory on {device}; try {advice}") from error


@contextmanager
def running(
    device: str = "auto", precision: str = "auto", *, amp: bool = False, alone: bool = False, fast: bool = False
) -> Iterator[Runtime]:
    """`start_runtime`, and the process group left again at the end; the end of another process is PeerLost.

    After an error the others may still be waiting in NCCL, and leaving the group would wait for them: the command line
    tells the error and ends the process instead, see `cli`.
    """
    try:
        yield start_runtime(device, precision, amp=amp, alone=alone, fast=fast)
        _leave_group()
    except Stopped:
        _leave_group()
        raise
    except RuntimeError as error:
        if not _tells_of_lost_peer(error):
            raise
        time.sleep(PEER_GRACE_SECONDS)
        raise PeerLost("another process of this run has ended; its error is above or in its own log") from error


def _leave_group() -> None:
    if distributed.is_initialized():
        gc.collect()  # a network wrapped for several processes is a cycle that keeps the group's threads alive
        distributed.destroy_process_group()


def _join_group(backend: str, rank: int, world_size: int) -> None:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun's agents have met already
        distributed.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
        return
    host, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdecimal():
        raise PeerLost(f"{world_size} processes, but MASTER_ADDR and MASTER_PORT do not say where the first one is")
    try:
        store = distributed.TCPStore(host, int(port), world_size, rank == 0, MEETING_TIMEOUT)  # type: ignore[attr-defined]  # documented
    except distributed.DistError as error:
        raise PeerLost(
            f"process {rank + 1} of {world_size} did not meet the others at {host}:{port}; see their logs, or set "
            f"MASTER_ADDR and MASTER_PORT to where the first process can listen"
        ) from error
    store.set_timeout(COLLECTIVE_TIMEOUT)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)


def _tells_of_lost_peer(error: RuntimeError) -> bool:
    """Whether it is about the connection to another process; gloo raises RuntimeErrors that name its own files."""
    return isinstance(error, distributed.DistError) or "gloo" in str(error)


def _choose_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"device '{name}': expected auto, cpu, cuda or cuda:N") from error
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise DeviceError(f"device '{name}': ctseg runs on cpu and cuda")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    only = count == 1 and slurm.num_tasks(os.environ) > 1  # Slurm may show each task its own GPU and no other
    index = device.index if device.index is not None else 0 if only else int(os.environ.get("LOCAL_RANK", 0))
    if index >= count:
        raise DeviceError(f"device 'cuda:{index}': {count} CUDA GPU(s) here; use --device cpu or a free GPU's number")
    return torch.device("cuda", index)


def _choose_precision(name: str, device: torch.device, amp: bool) -> torch.dtype | None:
    if name not in PRECISIONS:
        raise DeviceError(f"precision '{name}': expected one of {', '.join(PRECISIONS)}")
    if name == "auto":
        return torch.float16 if amp and device.type == "cuda" else None
    if name == "float16" and device.type == "cpu":
        raise DeviceError("precision 'float16': not on a CPU; use bfloat16 or float32")
    if name == "bfloat16" and device.type == "cpu" and not cpu_has_bfloat16():
        raise DeviceError(
            "precision 'bfloat16': this CPU lacks bfloat16 arithmetic, it would be far slower; use float32"
        )
    return None if name == "float32" else getattr(torch, name)


def cpu_has_bfloat16() -> bool:
    """True where the CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX); elsewhere it is about 50x slower."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, check, lambda: False)() for check in checks)


def threads_of_process() -> int:
    """CPUs for this process: torchrun and `--gpus` share theirs out, Slurm has given each of its tasks its own."""
    started_by_srun = slurm.num_tasks(os.environ) > 1 and "TORCHELASTIC_RUN_ID" not in os.environ
    sharing = 1 if started_by_srun else int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, available_cpus() // sharing)


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
