"""What is done where a GPU lacks memory: fewer windows at once, then the grids in the host's memory, then the CPU.

Each step is told. The mask is the same but for rounding; only the time differs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ctseg.arrays import HOST, Array, array_namespace, as_asked, device_of, to_device, to_numpy
from ctseg.engine.backends import Forward
from ctseg.engine.model import Model
from ctseg.engine.runtime import lacks_memory
from ctseg.preprocess import Prepared, prepare
from ctseg.volume import Volume

if TYPE_CHECKING:
    import torch

Note = Callable[[str], None]
Logits = Callable[[Model, Array], Array]
"""Of a model and the network's input."""


def prepared_within_memory(model: Model, volume: Volume, scratch: Path | None, note: Note) -> Prepared:
    """The network's input on the model's device, or on the host where that has no room for it."""
    spec, device = model.recipe.preprocess, model.runtime.device
    if device.type == "cpu":
        return prepare(volume, spec, device, scratch)
    try:
        return prepare(volume, spec, device, scratch)
    except RuntimeError as error:
        _check_lack(error)
        _tell(note, device, "the CT is prepared on the host")
    return prepare(volume, spec, HOST, scratch)


def logits_within_memory(model: Model, take_image: Callable[[], Array], logits: Logits, note: Note) -> Array:
    """What `logits` gives for the model and the input, on the first step of the ladder that has the memory.

    Nobody else may hold the input that `take_image` gives: it leaves the GPU on the way.
    """
    device, image_XYZ = model.runtime.device, take_image()
    if device.type == "cpu":
        return logits(model, image_XYZ)
    fewer = replace(model, forward=halving(model.forward, device, note))
    on_host = replace(fewer, forward=across(fewer.forward, device))
    if device_of(image_XYZ) is not HOST:
        try:
            return logits(fewer, image_XYZ)
        except RuntimeError as error:
            _check_lack(error)
            _tell(note, device, "its grids are kept in the host's memory")
        image_XYZ = to_numpy(image_XYZ)
    try:
        return logits(on_host, image_XYZ)
    except RuntimeError as error:
        _check_lack(error)
        if model.on_cpu is None:
            raise
        _tell(note, device, "one window is too much; this CT is done on the CPU")
    on_cpu = model.on_cpu()
    return logits(on_cpu, as_asked(image_XYZ, on_cpu.runtime.device))


def halving(forward: Forward, device: torch.device, note: Note) -> Forward:
    """`forward` in calls of half as many windows, again and again, once one has run out of memory."""
    most = 0

    def run(image_BCXYZ: Array) -> Array:
        nonlocal most
        windows = len(image_BCXYZ)
        while True:
            size = min(most or windows, windows)
            try:
                parts = [forward(image_BCXYZ[n : n + size]) for n in range(0, windows, size)]
                return parts[0] if len(parts) == 1 else array_namespace(image_BCXYZ).concat(parts)
            except RuntimeError as error:
                _check_lack(error)
                if size == 1:
                    raise
            most = size // 2
            _tell(note, device, f"{most} windows at once instead of {size}" if most > 1 else "windows one by one")

    return run


def across(forward: Forward, device: torch.device) -> Forward:
    """`forward` of the device for arrays of the host."""
    return lambda image_BCXYZ: to_numpy(forward(to_device(image_BCXYZ, device)))


def _check_lack(error: RuntimeError) -> None:
    """Raises an error again that does not tell of a lack of memory."""
    if not lacks_memory(error):
        raise error


def _tell(note: Note, device: torch.device, what: str) -> None:
    import torch

    torch.cuda.empty_cache()
    note(f"not enough memory on {device}: {what}")
