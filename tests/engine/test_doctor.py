"""What the machine report says, and when it warns."""

import importlib.metadata
import os
import shutil
from collections import namedtuple
from pathlib import Path

import psutil
import pytest
import torch

import ctseg
from ctseg.engine import doctor
from ctseg.engine.doctor import LIBRARIES, Check, examine

Disk = namedtuple("Disk", "total used free")  # as shutil's own
Memory = namedtuple("Memory", "total")  # as psutil's own


def found(name: str) -> Check:
    (check,) = [c for c in examine() if c.name == name]
    return check


def test_everything_is_looked_at_once_and_nothing_here_is_broken() -> None:
    checks = examine()
    names = [c.name for c in checks]
    assert len(set(names)) == len(names)
    assert {"system", *LIBRARIES, "3D convolutions", "CPUs", "bfloat16 on CPU", "memory", "/dev/shm"} <= set(names)
    assert all(c.level in ("ok", "warning") for c in checks)
    assert all(bool(c.advice) == (c.level != "ok") for c in checks)


def test_versions_are_those_installed() -> None:
    assert found("torch").value == importlib.metadata.version("torch")
    assert ctseg.__version__ in found("system").value


def test_a_missing_library_is_an_error(monkeypatch) -> None:
    monkeypatch.setattr(doctor, "LIBRARIES", ("torch", "no-such-library"))
    assert found("no-such-library") == Check("no-such-library", "error", "not installed", "pip install no-such-library")


def test_what_ctseg_needs_besides_is_told_only_if_it_is_missing(monkeypatch) -> None:
    installed = importlib.metadata.version
    names = {check.name for check in examine()}
    assert not names & {"pydicom", "highdicom", "connected-components-3d"}

    def version(name: str) -> str:
        if name in ("highdicom", "openvino"):
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    told = "not installed; pip install 'ctseg[openvino]' brings it"
    assert found("openvino") == Check("openvino", "ok", told)
    assert found("highdicom") == Check("highdicom", "error", "not installed", "pip install highdicom")


@pytest.mark.parametrize(
    ("version", "level"),
    [("2.9.0", "warning"), ("2.9.1+cu128", "warning"), ("2.8.0", "ok"), ("2.10.0", "ok"), ("2.13.0+cpu", "ok")],
)
def test_the_slow_release_of_torch_is_warned_of(monkeypatch, version: str, level: str) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    check = found("3D convolutions")
    assert check.level == level
    assert version in check.value
    assert ("2.10" in check.advice) == (level == "warning")


@pytest.mark.parametrize(("gigabytes", "level"), [(0.064, "warning"), (0.49, "warning"), (0.51, "ok")])
def test_little_shared_memory_is_warned_of(monkeypatch, gigabytes: float, level: str) -> None:
    if not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm on this system")
    usage = shutil.disk_usage
    size = int(gigabytes * 1e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda p: Disk(size, 0, size) if p == "/dev/shm" else usage(p))
    check = found("/dev/shm")
    assert (check.level, "--shm-size" in check.advice) == (level, level == "warning")


@pytest.mark.parametrize(("gigabytes", "level"), [(4.9, "warning"), (5.1, "ok")])
def test_a_full_disk_is_warned_of(monkeypatch, gigabytes: float, level: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Disk(10**12, 0, int(gigabytes * 1e9)))
    assert found("disk here").level == level


def test_a_folder_that_cannot_be_written_is_warned_of(monkeypatch) -> None:
    monkeypatch.setattr(os, "access", lambda _path, mode: mode != os.W_OK)
    assert found("this folder") == Check(
        "this folder", "warning", "not writable", "runs, prepared cases and masks are written below it"
    )


@pytest.mark.parametrize(
    ("total_gb", "limit", "value", "level"),
    [
        (16.0, None, "16.0 GB", "ok"),
        (16.0, (3 * 10**9, "cgroup limit"), "3.0 GB (cgroup limit)", "warning"),
        (2.0, None, "2.0 GB", "warning"),
        (8.0, (9 * 10**9, "cgroup limit"), "8.0 GB", "ok"),
    ],
)
def test_memory_is_what_the_container_may_use(
    monkeypatch, total_gb: float, limit: tuple[int, str] | None, value: str, level: str
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(int(total_gb * 1e9)))
    monkeypatch.setattr(doctor, "memory_limit", lambda: limit)
    check = found("memory")
    assert (check.value, check.level) == (value, level)


@pytest.mark.parametrize(
    ("usable", "present", "value", "level"),
    [
        (8, 8, "8", "ok"),
        (2, 64, "2 of 64 (affinity, cgroup or Slurm limit)", "ok"),
        (1, 4, "1 of 4 (affinity, cgroup or Slurm limit)", "warning"),
    ],
)
def test_cpus_are_those_that_may_be_used(monkeypatch, usable: int, present: int, value: str, level: str) -> None:
    monkeypatch.setattr(doctor, "available_cpus", lambda: usable)
    monkeypatch.setattr(os, "cpu_count", lambda: present)
    assert (found("CPUs").value, found("CPUs").level) == (value, level)


def test_bfloat16_is_recommended_where_it_is_fast(monkeypatch) -> None:
    for present in (True, False):
        monkeypatch.setattr(doctor, "cpu_has_bfloat16", lambda present=present: present)
        assert ("--precision bfloat16" in found("bfloat16 on CPU").value) is present


def test_every_gpu_is_told_with_its_free_memory(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: ((index + 1) * 10**10, 8 * 10**10))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU-{index}")
    assert found("GPU 0").value == "GPU-0, 10.0 of 80.0 GB free"
    assert found("GPU 1").value == "GPU-1, 20.0 of 80.0 GB free"


def test_without_a_gpu_the_cpu_is_named(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert found("GPU").level == "ok"
    assert "runs on the CPU" in found("GPU").value
