"""Starts the same command once per GPU through torch elastic; each copy then joins the others' process group."""

from __future__ import annotations

import logging
import os
import signal
import sys
import uuid

import torch

from ctseg.errors import CtsegError, DeviceError, PeerLost, Stopped

STOPPED = "all processes have ended after a signal; go on with --resume, or start again if there is no run yet"


def is_launched() -> bool:
    """True in a process that torchrun, Slurm's torchrun or `launch` started as one of several."""
    return all(name in os.environ for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))


def check_gpus(number: int, device: str) -> None:
    """Raises DeviceError unless `number` GPUs are here or the run is on the CPU."""
    if device == "cpu":
        return
    if number > 1 and device.startswith("cuda:"):
        raise DeviceError(f"--gpus {number} with --device {device}: one GPU for {number} processes; use --device cuda")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if number > count:
        raise DeviceError(f"--gpus {number}: {count} CUDA GPU(s) here; use fewer, or --device cpu")


def launch(number: int, arguments: list[str]) -> None:
    """Runs `python -m ctseg ARGUMENTS` in `number` processes on this machine; returns when all are done.

    Raises:
        Stopped: if a signal stopped them at a point they can resume from.
        CtsegError: if one failed; it has told its own error, and the others were ended.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=number,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # SIGKILL follows SIGTERM: time to save, not 30 s
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
    # Elastic hands SIGTERM on to its processes but does not know Slurm's SIGUSR1.
    signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        elastic_launch(config, sys.executable)("-m", "ctseg", *arguments)
    except SignalException as error:
        raise Stopped(STOPPED) from error
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode == Stopped.exit_code:
            raise Stopped(STOPPED) from error
        process = f"process {rank + 1} of {number}"
        if failure.exitcode < 0:
            name = signal.Signals(-failure.exitcode).name
            raise PeerLost(f"{process} was ended by {name} (for too much memory?); go on with --resume") from error
        kind = CtsegError if failure.exitcode == CtsegError.exit_code else PeerLost
        raise kind(f"{process} failed with exit code {failure.exitcode}; its error is above") from error
