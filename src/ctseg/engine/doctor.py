"""What this machine can do for ctseg, and what is wrong with it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

import ctseg
from ctseg.engine.process import cpu_has_bfloat16
from ctseg.limits import available_cpus, memory_limit

LIBRARIES = ("torch", "monai", "SimpleITK", "nibabel", "isal", "numpy", "onnxruntime", "tensorboard")
"""Their versions are told; of others that ctseg needs only that they are missing."""
OPTIONAL = {"openvino": "openvino", "fastapi": "serve", "mlflow-skinny": "mlflow"}
"""Libraries of extras, and the extra that brings each."""
MIN_MEMORY_GB = 4.0
MIN_DISK_GB = 5.0
MIN_SHARED_MEMORY_GB = 0.5
"""torch's processes exchange tensors there; containers often have 64 MB."""


@dataclass(frozen=True)
class Check:
    """One finding: `level` is "ok", "warning" (works, but) or "error" (ctseg cannot work here)."""

    name: str
    level: str
    value: str
    advice: str = ""


def examine() -> list[Check]:
    """All findings, most basic first."""
    return [
        _system(),
        *_libraries(),
        _torch_release(),
        _cpu(),
        _bfloat16(),
        _memory(),
        *_gpus(),
        _disk(),
        _shared_memory(),
    ]


def _system() -> Check:
    return Check(
        "system", "ok", f"ctseg {ctseg.__version__}, Python {platform.python_version()}, {platform.platform()}"
    )


def _libraries() -> list[Check]:
    checks = []
    for name in (*LIBRARIES, *(name for name in _required() if name not in LIBRARIES)):
        versions = [v for v in map(_version, (name, f"{name}-gpu")) if v]  # onnxruntime has a build for GPUs
        if versions and name in LIBRARIES:
            checks.append(Check(name, "ok", versions[0]))
        elif not versions:
            checks.append(Check(name, "error", "not installed", f"pip install {name}"))
    for name, extra in OPTIONAL.items():
        checks.append(Check(name, "ok", _version(name) or f"not installed; pip install 'ctseg[{extra}]' brings it"))
    return checks


def _required() -> list[str]:
    """What ctseg cannot do without on any system, by the name that pip knows."""
    requirements = importlib.metadata.requires("ctseg") or []
    names = (re.match(r"[\w.-]+", text) for text in requirements if ";" not in text)  # else an extra, or an old Python
    return [found[0] for found in names if found]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_release() -> Check:
    version = torch.__version__
    if version.startswith("2.9."):
        return Check(
            "3D convolutions", "warning", f"torch {version}", "torch 2.9 is up to 4x slower here; use 2.10 or later"
        )
    return Check("3D convolutions", "ok", f"torch {version}")


def _cpu() -> Check:
    usable, present = available_cpus(), os.cpu_count() or 1
    limited = f" of {present} (affinity, cgroup or Slurm limit)" if usable < present else ""
    level = "warning" if usable < 2 else "ok"
    return Check("CPUs", level, f"{usable}{limited}", "ask for at least 2" if usable < 2 else "")


def _bfloat16() -> Check:
    if cpu_has_bfloat16():
        return Check("bfloat16 on CPU", "ok", "in hardware: --precision bfloat16 is faster here")
    return Check("bfloat16 on CPU", "ok", "not in hardware: float32 is used")


def _memory() -> Check:
    total = psutil.virtual_memory().total
    usable, source = min((total, ""), memory_limit() or (total, ""))
    named = f" ({source})" if source else ""
    low = usable / 1e9 < MIN_MEMORY_GB
    advice = f"a 512x512 CT may need {MIN_MEMORY_GB:g} GB" if low else ""
    return Check("memory", "warning" if low else "ok", f"{usable / 1e9:.1f} GB{named}", advice)


def _gpus() -> list[Check]:
    if not torch.cuda.is_available():
        reason = "torch is a CPU build" if torch.version.cuda is None else "no usable CUDA device"
        return [Check("GPU", "ok", f"none ({reason}): runs on the CPU")]
    checks = []
    for index in range(torch.cuda.device_count()):
        try:
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
        except RuntimeError as error:  # full, used by one process alone, or of another driver
            reason = str(error).splitlines()[0][:100]
            checks.append(Check(f"GPU {index}", "warning", f"cannot be used: {reason}", "choose another --device"))
        else:
            checks.append(Check(f"GPU {index}", "ok", f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free"))
    return checks


def _disk() -> Check:
    free_gb = shutil.disk_usage(".").free / 1e9
    writable = os.access(".", os.W_OK)
    if not writable:
        return Check("this folder", "warning", "not writable", "runs, prepared cases and masks are written below it")
    low = free_gb < MIN_DISK_GB
    advice = "prepared cases and checkpoints need room" if low else ""
    return Check("disk here", "warning" if low else "ok", f"{free_gb:.0f} GB free", advice)


def _shared_memory() -> Check:
    if not Path("/dev/shm").is_dir():
        return Check("/dev/shm", "ok", "not on this system")
    size_gb = shutil.disk_usage("/dev/shm").total / 1e9
    low = size_gb < MIN_SHARED_MEMORY_GB
    advice = "several processes may fail: start the container with --shm-size 1g" if low else ""
    return Check("/dev/shm", "warning" if low else "ok", f"{size_gb:.1f} GB", advice)
