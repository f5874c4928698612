"""A checkpoint's network compiled for a backend on this CPU: once, then taken from the cache.

Then neither MONAI is imported nor, for another backend than torch, torch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import ctseg
from ctseg.arrays import Array
from ctseg.engine.backends import Backend, Forward
from ctseg.engine.cache import Entry, cache_key, can_keep, has_entry, read_entry, write_entry
from ctseg.engine.process import cpu_has_bfloat16, cpu_kind
from ctseg.engine.runtime import Runtime, memory_errors
from ctseg.errors import DeviceError, NotEnoughMemory
from ctseg.recipe import Recipe, recipe_from_dict

if TYPE_CHECKING:
    from torch import nn

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
VERSION = 5
"""To be raised whenever the same network is compiled in another way."""

Source = Callable[[], "tuple[Recipe, nn.Module]"]
Note = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class Compiled:
    """A network ready to run, and the backend that runs it."""

    recipe: Recipe
    forward: Forward
    backend: str
    exact: Forward | None = None
    """The same in float32, where `forward` is not and it was asked for."""


def compiled_network(
    sha256: str, source: Source, runtime: Runtime, backend: str, note: Note, *, exact: bool = False
) -> Compiled:
    """The network of the checkpoint `sha256` on a backend, on the CPU.

    Args:
        sha256: Of the checkpoint's file: equal files have equal networks.
        source: Gives recipe and network where the cache has nothing; called once at most.
        runtime: Decides the precision and the number of threads.
        backend: One of CHOICES; "auto" is the fastest, as measured once on this machine.
        note: Told when the network has to be compiled, which takes seconds.
        exact: Whether a network without clicks is to be had in float32 too, where the runtime's precision is another.
            From the cache it is loaded only when it is used.

    Raises:
        DeviceError: if the backend is not to be had here.
        CtsegError: whatever `source` raises.
    """
    check_backend(backend, runtime)

    def fold() -> tuple[Recipe, nn.Module]:
        from ctseg.networks import fold_for_inference
        from ctseg.phases import finest_level_in_phases

        recipe, network = source()
        note("first run of this model here: its network is compiled, later runs start faster")
        return recipe, finest_level_in_phases(fold_for_inference(network))

    folded = functools.cache(fold)
    opened = functools.cache(lambda name: _open(sha256, folded, runtime, name))
    if backend == "auto":
        others = _others(runtime)
        backend = _fastest(sha256, others, opened, runtime) if others else "torch"
    found = opened(backend)
    if not exact or runtime.precision == "float32" or found.recipe.clicks is not None:
        return found
    in_float32 = replace(runtime, precision="float32")
    if not _is_kept(sha256, in_float32, backend):
        compiled = _open(sha256, folded, in_float32, backend)
        if not can_keep():  # else it is loaded again once it is used, as in later runs, whose memory is measured now
            return replace(found, exact=compiled.forward)
    return replace(found, exact=_once_used(lambda: _open(sha256, fold, in_float32, backend).forward))


def ready_without_torch(sha256: str, runtime: Runtime, backend: str, *, exact: bool = False) -> bool:
    """Whether the checkpoint's network is in the cache for this backend, and it is not torch that would run it.

    With `exact`, whether it is there in float32 as well.

    False, too, where the backend is not to be had here: `compiled_network` says why.
    """
    if backend == "auto":
        others = _others(runtime)
        backend = _remembered(_choice_key(sha256, others, runtime), others) or "torch"
    if backend == "torch" or backend not in BACKENDS or not is_installed(backend):
        return False
    precisions = {runtime.precision, "float32"} if exact else {runtime.precision}
    return all(_is_kept(sha256, replace(runtime, precision=precision), backend) for precision in precisions)


def _is_kept(sha256: str, runtime: Runtime, backend: str) -> bool:
    return has_entry(cache_key(_facts(sha256, runtime, [backend])))


def recipe_of(sha256: str, source: Callable[[], Recipe]) -> Recipe:
    """The recipe of the checkpoint `sha256`: from the cache, else what `source` gives, which is kept."""
    key = cache_key({"what": "recipe", "version": VERSION, "ctseg": ctseg.__version__, "model": sha256})
    kept = read_entry(key)
    if kept is not None:
        return recipe_from_dict(kept.about.get("recipe"), "recipe in the cache")
    recipe = source()
    write_entry(key, Entry({"recipe": recipe.to_dict()}, b""))
    return recipe


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


def library_version(backend: str) -> str:
    """Of the backend's library; it is not imported."""
    return importlib.metadata.version(_module(backend).LIBRARY)


def _module(name: str) -> Backend:
    return cast(Backend, importlib.import_module(f"ctseg.engine.backends.{BACKENDS[name]}"))


def _facts(sha256: str, runtime: Runtime, names: list[str]) -> dict[str, Any]:
    """All that decides what is compiled, and what of it is fastest."""
    libraries = {_module(name).LIBRARY for name in names} | {"torch", "monai"}
    return {
        "version": VERSION,
        "ctseg": ctseg.__version__,
        "libraries": {name: importlib.metadata.version(name) for name in libraries},
        "cpu": cpu_kind(),
        "bfloat16": cpu_has_bfloat16(),
        "model": sha256,
        "backends": names,
        "precision": runtime.precision,
    }


def _open(sha256: str, folded: Source, runtime: Runtime, name: str) -> Compiled:
    """The network on the backend, from the cache if that has it, else compiled and kept.

    One in the cache is loaded while the caller goes on, and its first window waits for that; if it turns out to be
    damaged, it is compiled anew. Its library is imported before: imports of two threads at once take turns, and each
    takes longer than both one after the other.
    """
    key = cache_key(_facts(sha256, runtime, [name]))
    recipe = recipe_of(sha256, lambda: folded()[0])
    module, window = _module(name), recipe.inference.window_size

    def make() -> Forward:
        with memory_errors(f"the network of {recipe.name}", runtime.device):
            content = module.compile_network(folded()[1], window, runtime)
        write_entry(key, Entry({"backend": name}, content))
        return module.load(content, window, runtime)

    def load() -> Forward:
        kept = read_entry(key)
        if kept is not None:
            try:
                return module.load(kept.content, window, runtime)
            except Exception:  # whatever libraries raise about what another version of them wrote
                pass
        return make()

    if not has_entry(key):
        return Compiled(recipe, make(), name)
    module.import_library()
    return Compiled(recipe, _once_loaded(load), name)


def _once_loaded(load: Callable[[], Forward]) -> Forward:
    """What `load` gives; it runs in another thread from now on."""
    thread = ThreadPoolExecutor(1, "ctseg-load")
    loading = thread.submit(load)
    thread.shutdown(wait=False)
    return lambda image_BCXYZ: loading.result()(image_BCXYZ)


def _once_used(load: Callable[[], Forward]) -> Forward:
    """What `load` gives; it runs at the first call."""
    loaded = functools.cache(load)
    return lambda image_BCXYZ: loaded()(image_BCXYZ)


def _fastest(sha256: str, others: list[str], opened: Callable[[str], Compiled], runtime: Runtime) -> str:
    """The fastest of torch and others, measured the first time and remembered.

    torch unless another one saves at least 15 % of its time and gives the same answer, and wherever what is measured
    could not be remembered.
    """
    key = _choice_key(sha256, others, runtime)
    remembered = _remembered(key, others)
    if remembered is not None or not can_keep():
        return remembered or "torch"
    import torch

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


def _others(runtime: Runtime) -> list[str]:
    """The backends that torch is compared with."""
    return [name for name in MEASURED[1:] if is_installed(name) and runtime.precision in _module(name).PRECISIONS]


def _choice_key(sha256: str, others: list[str], runtime: Runtime) -> str:
    return cache_key({**_facts(sha256, runtime, ["torch", *others]), "threads": runtime.threads})


def _remembered(key: str, others: list[str]) -> str | None:
    kept = read_entry(key)
    return str(kept.about["fastest"]) if kept is not None and kept.about.get("fastest") in ["torch", *others] else None


def _largest_error(opened: Callable[[str], Compiled], name: str, image_BCXYZ: Array, wanted_BCXYZ: Array) -> float:
    """How far the backend's answer is from the wanted one; infinitely where it cannot be loaded or run here."""
    try:
        got_BCXYZ = opened(name).forward(image_BCXYZ)
    except (RuntimeError, ImportError, OSError, NotEnoughMemory):
        return float("inf")
    return float((got_BCXYZ - wanted_BCXYZ).abs().max())


def measure(forwards: Mapping[str, Forward], image_BCXYZ: Array) -> dict[str, float]:
    """Seconds that each takes for the window: the least of CALLS, taken in turn as other work may come and go."""
    seconds = dict.fromkeys(forwards, float("inf"))
    for _ in range(CALLS):
        for name, forward in forwards.items():
            started = time.perf_counter()
            forward(image_BCXYZ)
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    return seconds
