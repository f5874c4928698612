"""What Slurm's variables say: which of several processes this is, where the first one listens, which part is ours.

Light and pure: `join` is all that changes anything, and only the mapping it is given.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping, MutableMapping

from ctseg.errors import CtsegError

FIRST_PORT, NUM_PORTS = 12000, 18000
"""Ports of process groups: below those that Linux gives to outgoing connections, from 32768."""


def number(environ: Mapping[str, str], name: str) -> int | None:
    """The whole number in a variable, None if it is not there or is something else."""
    text = environ.get(name, "")
    return int(text) if text.isdecimal() else None


def num_tasks(environ: Mapping[str, str]) -> int:
    """How many tasks one `srun` has started this process among; 1 outside of srun, as in the batch script itself."""
    if "SLURM_PROCID" not in environ:
        return 1
    return number(environ, "SLURM_STEP_NUM_TASKS") or 1


def num_processes(environ: Mapping[str, str]) -> int:
    """How many times this command was started together: by torchrun, by `--gpus`, or by srun."""
    return (number(environ, "WORLD_SIZE") or 1) if "RANK" in environ else num_tasks(environ)


def process_index(environ: Mapping[str, str]) -> int:
    """Which of `num_processes` this one is, from 0."""
    name = "RANK" if "RANK" in environ else "SLURM_PROCID"
    return (number(environ, name) or 0) if num_processes(environ) > 1 else 0


def tasks_on_node(environ: Mapping[str, str]) -> int:
    """How many processes of this command run on this node, by srun, torchrun or `--gpus`, this one included."""
    if "RANK" in environ and "LOCAL_WORLD_SIZE" in environ:
        return number(environ, "LOCAL_WORLD_SIZE") or 1
    if num_tasks(environ) == 1:
        return 1
    counts = expand_counts(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
    node = number(environ, "SLURM_NODEID") or 0
    return counts[node] if node < len(counts) else 1


def join(environ: MutableMapping[str, str]) -> bool:
    """Sets what torch's process groups read (RANK, WORLD_SIZE, MASTER_ADDR, ...) for a task of srun.

    Returns:
        Whether srun started several tasks and nothing had told them apart yet, as torchrun does.

    Raises:
        CtsegError: if Slurm's variables do not say where the first task is.
    """
    tasks = num_tasks(environ)
    if tasks == 1 or "RANK" in environ:
        return False
    port = FIRST_PORT + (31 * (number(environ, "SLURM_JOB_ID") or 0) + (number(environ, "SLURM_STEP_ID") or 0)) % (
        NUM_PORTS
    )
    environ.setdefault("MASTER_ADDR", _first_address(environ))
    environ.setdefault("MASTER_PORT", str(port))
    environ["RANK"], environ["WORLD_SIZE"] = environ["SLURM_PROCID"], str(tasks)
    environ["LOCAL_RANK"] = environ.get("SLURM_LOCALID", "0")
    environ["LOCAL_WORLD_SIZE"] = str(tasks_on_node(environ))
    return True


def _first_address(environ: Mapping[str, str]) -> str:
    """The first node of the step; by the address of the node that launched it where its name means nothing here."""
    if "MASTER_ADDR" in environ:
        return environ["MASTER_ADDR"]
    host = first_host(environ.get("SLURM_STEP_NODELIST", ""))
    fallback = environ.get("SLURM_LAUNCH_NODE_IPADDR")
    if host and (fallback is None or _resolves(host)):
        return host
    if fallback is None:
        raise CtsegError("srun started several tasks, but SLURM_STEP_NODELIST is missing; set MASTER_ADDR")
    return fallback


def _resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def first_host(nodelist: str) -> str:
    """The first of Slurm's compressed list of hosts: "n[01-02,5],m3" -> "n01", "r[1-2]n[7,9]" -> "r1n7"."""
    first = re.split(r",(?![^\[]*\])", nodelist)[0]
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first)


def expand_counts(text: str) -> list[int]:
    """Slurm's compressed list of counts: "2(x2),1" -> [2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match:
            counts += [int(match[1])] * int(match[2] or 1)
    return counts


def array_part(environ: Mapping[str, str]) -> tuple[int, int] | None:
    """Which task of its job array this is and of how many, from 0; None outside of one.

    Raises:
        CtsegError: if the array has gaps, as the parts of the tasks that are not there would be left out.
    """
    names = ("TASK_ID", "TASK_MIN", "TASK_MAX", "TASK_COUNT")
    values = [number(environ, f"SLURM_ARRAY_{name}") for name in names]
    task, first, last, count = values
    if task is None or first is None or last is None or count is None:
        return None
    step = number(environ, "SLURM_ARRAY_TASK_STEP") or 1
    if count != (last - first) // step + 1:
        raise CtsegError(
            f"--shard auto: the job array has gaps ({count} tasks from {first} to {last}), so some parts would be "
            f"nobody's; give --shard I/N"
        )
    return (task - first) // step, count
