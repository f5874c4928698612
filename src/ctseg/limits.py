"""How much of this machine is ours: CPUs and memory that affinity, cgroups (v1 and v2) and Slurm allow."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from ctseg.slurm import number, tasks_on_node

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")
"""Lines such as "0::/slurm/job_7/step_0" (version 2) and "4:cpu,cpuacct:/slurm/job_7" (version 1)."""

MEMORY = Path("/proc/meminfo")


def available_cpus() -> int:
    """CPUs this process may use: affinity, cgroup quota and Slurm's share of this task, whichever is smallest."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *_quotas(), *_slurm_cpus(os.environ)]))


def memory_limit() -> tuple[int, str] | None:
    """Bytes that this process and what shares its limit may use, and who says so; None without a limit."""
    limits = [(value, "cgroup limit") for value in _cgroup_memory()]
    granted = _slurm_memory(os.environ)
    if granted:
        limits.append((granted, "Slurm's share of the job on this node"))
    return min(limits, default=None)


def available_memory(own_bytes: int) -> tuple[int, str]:
    """Bytes that this process may have in memory, and who says so.

    The smallest of: its part of what is free here, added to the `own_bytes` that it has already; and its part of
    `memory_limit`. The processes of one command on one node have equal parts.
    """
    sharing = tasks_on_node(os.environ)
    free, limit = free_memory(), memory_limit()
    shares = [] if free is None else [(own_bytes + free // sharing, "free memory")]
    if limit is not None:
        shares.append((limit[0] // sharing, limit[1]))
    return min(shares, default=(2**63 - 1, "no limit"))


def free_memory() -> int | None:
    """Bytes that this machine has free for whoever asks; None if unknown."""
    match = re.search(r"^MemAvailable:\s+(\d+) kB$", _text(MEMORY), re.MULTILINE)
    return int(match[1]) * 1024 if match else None


def _quotas() -> Iterator[int]:
    for folder in _cgroup_folders("cpu"):
        allowed, _, period = _text(folder / "cpu.max").partition(" ")
        if not allowed:
            allowed, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if allowed.isdigit() and period.isdigit():  # neither "max" nor -1, which mean no limit
            yield int(allowed) // int(period)


def _cgroup_memory() -> Iterator[int]:
    for folder in _cgroup_folders("memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _text(folder / name)
            if text.isdigit() and int(text) < 2**60:  # version 1 writes a number near 2**63 for no limit
                yield int(text)


def _cgroup_folders(controller: str) -> Iterator[Path]:
    """The cgroup of this process and those around it, each of which may set a limit."""
    for line in _text(OWN_CGROUPS).splitlines() or ["0::/"]:
        _, _, rest = line.partition(":")
        controllers, _, own = rest.partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        for root in (CGROUPS, *((CGROUPS / name for name in (controllers, controller)) if controllers else ())):
            path = root / own.lstrip("/")
            folders = [path, *(parent for parent in path.parents if parent.is_relative_to(root))]
            yield from (folder for folder in folders if folder.is_dir())


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return ""


def _slurm_cpus(environ: Mapping[str, str]) -> Iterator[int]:
    per_task, on_node = (number(environ, f"SLURM_CPUS_{what}") for what in ("PER_TASK", "ON_NODE"))
    if per_task:
        yield per_task
    elif on_node:
        yield on_node // tasks_on_node(environ)


def _slurm_memory(environ: Mapping[str, str]) -> int | None:
    """What the job was granted on this node, in bytes; Slurm counts in MiB, 0 is all there is."""
    for amount, units in (
        ("SLURM_MEM_PER_NODE", 1),
        ("SLURM_MEM_PER_CPU", number(environ, "SLURM_CPUS_ON_NODE")),
        ("SLURM_MEM_PER_GPU", number(environ, "SLURM_GPUS_ON_NODE")),
    ):
        granted = number(environ, amount)
        if granted and units:
            return granted * units * 2**20
    return None
