"""The machine under a run: device, precision, processes. Nothing else knows of them.

torch takes more than a second to import, so it is imported only where something is done with it: what runs on the host
alone (`start_on_host`) does without.
"""

from __future__ import annotations

import gc
import os
import re
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctseg import slurm
from ctseg.arrays import HOST
from ctseg.engine.process import cpu_has_bfloat16, threads_of_process, tune_allocator
from ctseg.errors import DeviceError, NotEnoughMemory, PeerLost, Stopped

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LACK_OF_MEMORY = re.compile(
    "out of memory|not enough memory|(can't|cannot|failed to) allocate|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED|"
    "unable to find an engine to execute|unable to find a valid cuDNN algorithm",
    re.IGNORECASE,
)
"""How torch and NumPy tell it. cuDNN says that no engine is left when all have run out of memory."""
GPU_DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg", "/dev/kfd", "/proc/driver/nvidia/version")
"""Of NVIDIA's driver, of Windows below a Linux, and of AMD's, whose builds of torch speak of CUDA too."""
PRECISIONS = ("auto", "float32", "bfloat16", "float16")
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
    """HOST where torch is not needed."""
    precision: str = "float32"
    """One of PRECISIONS, as it turned out: float32, or the type of mixed precision, bfloat16 or float16."""
    rank: int = 0
    world_size: int = 1

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """torch's type of mixed precision, None for plain float32."""
        if self.precision == "float32":
            return None
        import torch

        dtype: torch.dtype = getattr(torch, self.precision)
        return dtype

    @property
    def gpu(self) -> str | None:
        """The name of the GPU, None for a CPU."""
        if self.device.type != "cuda":
            return None
        import torch

        return torch.cuda.get_device_name(self.device)

    @property
    def threads(self) -> int:
        """CPU threads of one operation."""
        if self.device is HOST:
            return threads_of_process()
        import torch

        return torch.get_num_threads()

    @property
    def is_main(self) -> bool:
        """True in the one process that writes and prints."""
        return self.rank == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the network runs."""
        import torch

        return torch.autocast(self.device.type, self.amp_dtype, enabled=self.amp_dtype is not None)

    def any_process(self, flag: bool) -> bool:
        """True in every process as soon as it is true in one."""
        if self.world_size == 1:
            return flag
        import torch
        from torch import distributed

        value = torch.tensor(float(flag))  # on the host, so that no GPU is waited for
        distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
        return bool(value.item())

    def add_up(self, sums: Tensor) -> Tensor:
        """The sum over processes of `sums`; its gradient is that of this process's own part."""
        if self.world_size == 1:
            return sums
        from torch import distributed

        total = sums.detach().clone()
        distributed.all_reduce(total)
        return sums + (total - sums.detach())

    def gather(self, value: Any) -> list[Any]:
        """Every process's `value`, in order of rank."""
        if self.world_size == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.world_size
        distributed.all_gather_object(values, value)
        return values

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Overwrites every process's `tensors` with those of the main one."""
        if self.world_size > 1:
            from torch import distributed

            for tensor in tensors:
                distributed.broadcast(tensor, src=0)

    def wait_for_all(self) -> None:
        """Returns once every process is here."""
        if self.world_size > 1:
            from torch import distributed

            distributed.barrier()

    def describe(self) -> str:
        """One line for logs."""
        name = self.gpu or f"{self.threads} threads"
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
    import torch
    from torch import distributed

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
    precision = _choose_precision(precision, chosen, amp)
    torch.backends.cudnn.allow_tf32 = precision != "float32"  # float32 means float32, not TF32's ten bits
    return Runtime(chosen, precision, rank, world_size)


def start_on_host(precision: str = "auto", *, fast: bool = False) -> Runtime:
    """The runtime of a process that computes on the CPU, alone, and does not import torch.

    Args:
        precision: As for `start_runtime`.
        fast: As for `start_runtime`.

    Raises:
        DeviceError: if the precision is not to be had here.
    """
    slurm.join(os.environ)
    if precision == "auto" and fast and cpu_has_bfloat16():
        precision = "bfloat16"
    return Runtime(HOST, _choose_precision(precision, HOST, amp=False))


def may_have_gpu() -> bool:
    """Whether torch might find a CUDA device here: whether a driver shows one, which is known at once."""
    return any(Path(path).exists() for path in GPU_DEVICES)


def lacks_memory(error: MemoryError | RuntimeError) -> bool:
    """Whether an error tells of a lack of memory."""
    return isinstance(error, MemoryError) or LACK_OF_MEMORY.search(str(error)) is not None


@contextmanager
def memory_errors(subject: str, device: torch.device) -> Iterator[None]:
    """Turns a lack of memory inside, however torch or NumPy tell it, into NotEnoughMemory about `subject`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
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
        leave_group()
    except Stopped as stopped:
        traceback.clear_frames(stopped.__traceback__)  # they hold the network, see `leave_group`
        leave_group()
        raise
    except RuntimeError as error:
        if not _tells_of_lost_peer(error):
            raise
        time.sleep(PEER_GRACE_SECONDS)
        raise PeerLost("another process of this run has ended; its error is above or in its own log") from error


def leave_group() -> None:
    """Leaves the process group, if there is one.

    A network wrapped for several processes must be gone by then: it keeps the group's threads, and a process that ends
    with them is aborted.
    """
    from torch import distributed

    if distributed.is_initialized():
        gc.collect()  # such a network is a cycle
        distributed.destroy_process_group()


def _join_group(backend: str, rank: int, world_size: int) -> None:
    from torch import distributed

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
    from torch import distributed

    return isinstance(error, distributed.DistError) or "gloo" in str(error)


def _choose_device(name: str) -> torch.device:
    import torch

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
    together = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if device.index is not None and together > 1:
        raise DeviceError(f"device '{name}': one GPU for {together} processes; use --device cuda")
    only = count == 1 and slurm.num_tasks(os.environ) > 1  # Slurm may show each task its own GPU and no other
    index = device.index if device.index is not None else 0 if only else int(os.environ.get("LOCAL_RANK", 0))
    if index >= count:
        raise DeviceError(f"device 'cuda:{index}': {count} CUDA GPU(s) here; use --device cpu or a free GPU's number")
    return torch.device("cuda", index)


def _choose_precision(name: str, device: torch.device, amp: bool) -> str:
    if name not in PRECISIONS:
        raise DeviceError(f"precision '{name}': expected one of {', '.join(PRECISIONS)}")
    if name == "auto":
        return "float16" if amp and device.type == "cuda" else "float32"
    if name == "float16" and device.type == "cpu":
        raise DeviceError("precision 'float16': not on a CPU; use bfloat16 or float32")
    if name == "bfloat16" and device.type == "cpu" and not cpu_has_bfloat16():
        raise DeviceError(
            "precision 'bfloat16': this CPU lacks bfloat16 arithmetic, it would be far slower; use float32"
        )
    return name
