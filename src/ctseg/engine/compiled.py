"""A checkpoint's network compiled for a backend on this CPU: once, then taken from the cache without MONAI."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

import ctseg
from ctseg.engine.backends import Backend, Forward
from ctseg.engine.cache import Entry, cache_key, can_keep, read_entry, write_entry
from ctseg.engine.runtime import Runtime, memory_errors
from ctseg.errors import DeviceError, NotEnoughMemory
from ctseg.networks import fold_for_inference
from ctseg.recipe import Recipe, recipe_from_dict

BACKENDS = {"torch": "torchscript", "onnxruntime": "onnx", "openvino": "openvino"}
"""Names and the modules of `ctseg.engine.backends` behind them."""
CHOICES = ("auto", *BACKENDS)
MEASURED = ("torch", "openvino")
"""What "auto" compares. To export to ONNX takes long, and OpenVINO was never slower than onnxruntime."""
WORTH_IT = 0.85
"""Share of torch's time that another backend may take at most to be chosen."""
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}
"""Largest difference from torch's logits, relative to the largest, of a backend that may be chosen.

In bfloat16 rounding alone makes a tenth with fresh weights; only what is plainly wrong is ruled out there.
"""
CALLS = 3
VERSION = 1
"""To be raised whenever the same network is compiled in another way."""

Source = Callable[[], tuple[Recipe, nn.Module]]
Note = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Compiled:
    """A network ready to run, and the backend that runs it."""

    recipe: Recipe
    forward: Forward
    backend: str


def compiled_network(sha256: str, source: Source, runtime: Runtime, backend: str, note: Note) -> Compiled:
    """The network of the checkpoint `sha256` on a backend, on the CPU.

    Args:
        sha256: Of the checkpoint's file: equal files have equal networks.
        source: Gives recipe and network where the cache has nothing; called once at most.
        runtime: Decides the precision and the number of threads.
        backend: One of CHOICES; "auto" is the fastest, as measured once on this machine.
        note: Told when the network has to be compiled, which takes seconds.

    Raises:
        DeviceError: if the backend is not to be had here.
        CtsegError: whatever `source` raises.
    """
    check_backend(backend, runtime)

    @functools.cache
    def folded() -> tuple[Recipe, nn.Module]:
        note("first run of this model here: its network is compiled, later runs start faster")
        recipe, network = source()
        return recipe, fold_for_inference(network)

    opened = functools.cache(lambda name: _open(sha256, folded, runtime, name))
    if backend != "auto":
        return opened(backend)
    others = [name for name in MEASURED[1:] if is_installed(name) and runtime.precision in _module(name).PRECISIONS]
    return opened(_fastest(sha256, others, opened, runtime) if others else "torch")


def check_backend(name: str, runtime: Runtime) -> None:
    """Raises DeviceError unless `name` is one of CHOICES and can run here in the runtime's precision."""
    if name not in CHOICES:
        raise DeviceError(f"backend '{name}': expected one of {', '.join(CHOICES)}")
    if name in ("auto", "torch"):
        return
    if runtime.device.type != "cpu":
        raise DeviceError(f"backend '{name}': runs on the CPU; choose --device cpu or --backend torch")
    if not is_installed(name):
        raise DeviceError(f"backend '{name}': is not installed here; run pip install 'ctseg[{name}]'")
    if runtime.precision not in _module(name).PRECISIONS:
        raise DeviceError(f"backend '{name}': has no {runtime.precision}; choose --precision float32")


def is_installed(name: str) -> bool:
    """Whether the backend's library is installed; it is not imported."""
    return importlib.util.find_spec(_module(name).LIBRARY) is not None


def _module(name: str) -> Backend:
    return cast(Backend, importlib.import_module(f"ctseg.engine.backends.{BACKENDS[name]}"))


def _facts(sha256: str, runtime: Runtime, names: list[str]) -> dict[str, Any]:
    """All that decides what is compiled, and what of it is fastest."""
    libraries = {_module(name).LIBRARY for name in names} | {"torch", "monai"}
    return {
        "version": VERSION,
        "ctseg": ctseg.__version__,
        "libraries": {name: importlib.metadata.version(name) for name in libraries},
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": [getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile")],
        "model": sha256,
        "backends": names,
        "precision": runtime.precision,
    }


def _open(sha256: str, folded: Source, runtime: Runtime, name: str) -> Compiled:
    """The network on the backend, from the cache if that has a whole one, else compiled and kept."""
    key = cache_key(_facts(sha256, runtime, [name]))
    kept = read_entry(key)
    if kept is not None:
        try:
            return _load(kept, runtime, name)
        except Exception:  # whatever libraries raise about what another version of them wrote; it is made anew
            pass
    recipe, network = folded()
    with memory_errors(f"the network of {recipe.name}", runtime.device):
        content = _module(name).compile_network(network, recipe.inference.window_size, runtime)
    entry = Entry({"recipe": recipe.to_dict(), "backend": name}, content)
    write_entry(key, entry)
    return _load(entry, runtime, name)


def _load(entry: Entry, runtime: Runtime, name: str) -> Compiled:
    recipe = recipe_from_dict(entry.about["recipe"], "recipe in the cache")
    return Compiled(recipe, _module(name).load(entry.content, recipe.inference.window_size, runtime), name)


def _fastest(sha256: str, others: list[str], opened: Callable[[str], Compiled], runtime: Runtime) -> str:
    """The fastest of torch and others, measured the first time and remembered.

    torch unless another one saves at least 15 % of its time and gives the same answer, and wherever what is measured
    could not be remembered.
    """
    names = ["torch", *others]
    key = cache_key({**_facts(sha256, runtime, names), "threads": torch.get_num_threads()})
    kept = read_entry(key)
    if kept is not None and kept.about.get("fastest") in names:
        return str(kept.about["fastest"])
    if not can_keep():
        return "torch"
    recipe = opened("torch").recipe
    shape = (1, recipe.input_channels, *recipe.inference.window_size)
    image_BCXYZ = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    wanted = opened("torch").forward(image_BCXYZ)
    tolerance = TOLERANCE[runtime.precision] * float(wanted.abs().max())
    same = [name for name in others if _largest_error(opened, name, image_BCXYZ, wanted) <= tolerance]
    seconds = measure({name: opened(name).forward for name in ["torch", *same]}, image_BCXYZ)
    best = min(seconds, key=lambda name: seconds[name])
    fastest = best if seconds[best] <= WORTH_IT * seconds["torch"] else "torch"
    write_entry(key, Entry({"fastest": fastest, "seconds": seconds}, b""))
    return fastest


def _largest_error(opened: Callable[[str], Compiled], name: str, image_BCXYZ: Tensor, wanted_BCXYZ: Tensor) -> float:
    """How far the backend's answer is from the wanted one; infinitely where it cannot be loaded or run here."""
    try:
        got_BCXYZ = opened(name).forward(image_BCXYZ)
    except (RuntimeError, ImportError, OSError, NotEnoughMemory):
        return float("inf")
    return float((got_BCXYZ - wanted_BCXYZ).abs().max())


def measure(forwards: Mapping[str, Forward], image_BCXYZ: Tensor) -> dict[str, float]:
    """Seconds that each takes for the window: the least of CALLS, taken in turn as other work may come and go."""
    seconds = dict.fromkeys(forwards, float("inf"))
    for _ in range(CALLS):
        for name, forward in forwards.items():
            started = time.perf_counter()
            forward(image_BCXYZ)
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    return seconds
