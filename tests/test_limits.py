"""CPUs and memory that are ours, however a cluster or a container says so."""

import os
from pathlib import Path

import pytest

from ctseg import limits
from ctseg.limits import available_cpus, available_memory, memory_limit

GIB = 2**30


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine of twelve CPUs whose cgroups lie in the returned folder; no Slurm."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)), raising=False)
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    (tmp_path / "cgroup").mkdir()
    monkeypatch.setattr(limits, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(limits, "OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(limits, "MEMORY", tmp_path / "meminfo")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def test_nothing_limits(machine: Path) -> None:
    assert (available_cpus(), memory_limit()) == (12, None)
    write(machine / "cgroup/cpu.max", "max 100000")
    write(machine / "cgroup/memory.max", "max")
    assert (available_cpus(), memory_limit()) == (12, None)


def test_a_containers_own_cgroup(machine: Path) -> None:
    write(machine / "own", "0::/")
    write(machine / "cgroup/cpu.max", "500000 100000")
    write(machine / "cgroup/memory.max", str(3 * GIB))
    assert (available_cpus(), memory_limit()) == (5, (3 * GIB, "cgroup limit"))
    write(machine / "cgroup/cpu.max", "50000 100000")
    assert available_cpus() == 1, "half a CPU"


def test_cgroups_around_ours_limit_too(machine: Path) -> None:
    """As under Slurm: the job has a limit, the step and the task have none."""
    write(machine / "own", "0::/system.slice/job_7/step_0/task_1")
    job = machine / "cgroup/system.slice/job_7"
    write(job / "memory.max", str(8 * GIB))
    write(job / "cpu.max", "400000 100000")
    write(job / "step_0/memory.max", "max")
    write(job / "step_0/task_1/memory.max", "max")
    write(machine / "cgroup/other/memory.max", "1")
    assert (available_cpus(), memory_limit()) == (4, (8 * GIB, "cgroup limit"))


def test_version_1(machine: Path) -> None:
    """A folder for each controller, -1 and a huge number for no limit."""
    write(machine / "own", "12:memory:/slurm/uid_0/job_7\n4:cpu,cpuacct:/slurm/uid_0/job_7\n1:name=systemd:/x")
    cpu, memory = (machine / "cgroup" / name / "slurm/uid_0/job_7" for name in ("cpu,cpuacct", "memory"))
    write(cpu / "cpu.cfs_quota_us", "-1")
    write(cpu / "cpu.cfs_period_us", "100000")
    write(memory / "memory.limit_in_bytes", "9223372036854771712")
    assert (available_cpus(), memory_limit()) == (12, None)
    write(cpu / "cpu.cfs_quota_us", "300000")
    write(memory.parent / "memory.limit_in_bytes", str(5 * GIB))
    assert (available_cpus(), memory_limit()) == (3, (5 * GIB, "cgroup limit"))


def test_a_container_of_version_1_sees_its_own_folder_as_the_root(machine: Path) -> None:
    write(machine / "own", "3:memory:/docker/0123")
    write(machine / "cgroup/memory/memory.limit_in_bytes", str(2 * GIB))
    assert memory_limit() == (2 * GIB, "cgroup limit")


@pytest.mark.parametrize(
    ("variables", "cpus"),
    [
        ({"SLURM_CPUS_PER_TASK": "3"}, 3),
        ({"SLURM_CPUS_ON_NODE": "6"}, 6),
        ({"SLURM_CPUS_PER_TASK": "3", "SLURM_CPUS_ON_NODE": "6"}, 3),
        ({"SLURM_CPUS_PER_TASK": "64"}, 12),
        ({"SLURM_CPUS_ON_NODE": "8", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE":
          "4", "SLURM_NODEID": "0"}, 2),
    ],
)  # fmt: skip
def test_slurms_share_of_cpus(monkeypatch, variables: dict[str, str], cpus: int) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert available_cpus() == cpus


@pytest.mark.parametrize(
    ("variables", "gib"),
    [
        ({"SLURM_MEM_PER_NODE": "4096"}, 4),
        ({"SLURM_MEM_PER_CPU": "2048", "SLURM_CPUS_ON_NODE": "3"}, 6),
        ({"SLURM_MEM_PER_GPU": "1024", "SLURM_GPUS_ON_NODE": "2"}, 2),
        ({"SLURM_MEM_PER_NODE": "0"}, None),
        ({"SLURM_MEM_PER_CPU": "2048"}, None),
    ],
)
def test_slurms_share_of_memory(monkeypatch, variables: dict[str, str], gib: int | None) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert memory_limit() == (None if gib is None else (gib * GIB, "Slurm's share of the job on this node"))


def test_the_smallest_limit_counts(monkeypatch, machine: Path) -> None:
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "4096")
    write(machine / "cgroup/memory.max", str(3 * GIB))
    assert memory_limit() == (3 * GIB, "cgroup limit")


def test_affinity_of_this_process_counts(monkeypatch) -> None:
    monkeypatch.undo()
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    everything = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(everything)})
        assert available_cpus() == 1
    finally:
        os.sched_setaffinity(0, everything)


def test_available_memory_is_what_is_free_and_what_is_ours_already(machine: Path) -> None:
    write(machine / "meminfo", "MemTotal:  99999999 kB\nMemFree:  1 kB\nMemAvailable:    2097152 kB\nBuffers:  5 kB")
    assert available_memory(GIB) == (3 * GIB, "free memory")
    write(machine / "cgroup/memory.max", str(4 * GIB))
    assert available_memory(GIB) == (3 * GIB, "free memory")
    assert available_memory(3 * GIB) == (4 * GIB, "cgroup limit")


def test_tasks_on_a_node_share_its_memory(monkeypatch, machine: Path) -> None:
    write(machine / "meminfo", f"MemAvailable: {64 * 2**20} kB")
    for name, value in {
        "SLURM_MEM_PER_NODE": "8192",
        "SLURM_PROCID": "1",
        "SLURM_STEP_NUM_TASKS": "4",
        "SLURM_STEP_TASKS_PER_NODE": "4",
    }.items():
        monkeypatch.setenv(name, value)
    assert available_memory(GIB) == (2 * GIB, "Slurm's share of the job on this node")


def test_processes_of_one_command_share_what_is_free(monkeypatch, machine: Path) -> None:
    write(machine / "meminfo", f"MemAvailable: {8 * 2**20} kB")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_memory(GIB) == (3 * GIB, "free memory")


def test_nothing_says_how_much_memory_there_is(machine: Path) -> None:
    amount, who = available_memory(GIB)
    assert amount > 2**60
    assert who == "no limit"
