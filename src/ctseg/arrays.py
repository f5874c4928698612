"""Arrays of either library: NumPy's on the CPU, torch's on a GPU. The same code works on both.

It calls the functions of the array API standard, which NumPy has itself and torch through array-api-compat.
torch is imported only where a tensor is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from array_api_compat import device, is_torch_array
from numpy.typing import NDArray

from ctseg.scratch import new_array, release

if TYPE_CHECKING:
    import torch

Array: TypeAlias = Any
"""A NumPy array or a torch tensor."""


@dataclass(frozen=True)
class _Host:
    type: str = "cpu"
    index: None = None

    def __str__(self) -> str:
        return self.type


HOST = cast("torch.device", _Host())
"""Stands for `torch.device("cpu")` where torch need not be imported: arrays that are made for it are NumPy's."""


def array_namespace(values: Array) -> Any:
    """The functions of the array API standard for an array; NumPy has them itself, and compat takes long to load."""
    if isinstance(values, np.ndarray):
        return np
    from array_api_compat import array_namespace

    return array_namespace(values)


def device_of(values: Array) -> torch.device:
    """Where an array lies; HOST for NumPy's."""
    device: torch.device = values.device if is_torch_array(values) else HOST
    return device


def zeros(shape: tuple[int, ...], device: torch.device, scratch: Path | None = None) -> Array:
    """Float32 zeros to work on; on the CPU they are NumPy's, perhaps on the disk of a folder: see `ctseg.scratch`."""
    if device.type == "cpu":
        return new_array(shape, np.float32, scratch)
    import torch

    return torch.zeros(shape, device=device)


def to_work_on(values: Array) -> Array:
    """A tensor on the CPU as the NumPy array that shares its memory; anything else as it is."""
    return values.numpy() if is_torch_array(values) and values.device.type == "cpu" else values


def as_asked(values: Array, device: torch.device) -> Array:
    """A NumPy array as the tensor that shares its memory, unless HOST is asked for; anything else as it is."""
    if device is HOST or is_torch_array(values):
        return values
    import torch

    return torch.from_numpy(values)


def through_torch(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """A function of tensors as one of NumPy arrays; memory is shared."""
    import torch

    return lambda values: function(torch.from_numpy(values)).numpy()


def to_device(values: NDArray[Any], device: torch.device) -> Array:
    """A NumPy array where work on it is to be done: as it is for the CPU, else a copy on the GPU."""
    if device.type == "cpu":
        return values
    import torch

    if values.dtype in (np.uint16, np.uint32, np.uint64) or not values.dtype.isnative:  # torch has none of these
        values = values.astype(np.int32 if values.dtype == np.uint16 else np.float32)
    values = np.ascontiguousarray(values)
    return torch.from_numpy(values if values.flags.writeable else values.copy()).to(device)


def to_numpy(values: Array) -> NDArray[Any]:
    """The array on the CPU, as NumPy's."""
    result: NDArray[Any] = values.cpu().numpy() if is_torch_array(values) else np.asarray(values)
    return result


def strides_of(values: Array) -> tuple[int, ...]:
    """How far apart neighbours along each axis lie in memory, in one unit or another."""
    return tuple(values.stride() if is_torch_array(values) else values.strides)


def memory_order(values: Array) -> list[int]:
    """The array's axes, slowest in memory first."""
    strides = strides_of(values)
    return sorted(range(len(strides)), key=lambda axis: -abs(strides[axis]))


def release_array(values: Array) -> None:
    """`ctseg.scratch.release` for arrays of either library."""
    host = to_work_on(values)
    if not is_torch_array(host):
        release(host)


def cut_box(values_XYZ: Array, start: tuple[int, int, int], size: tuple[int, int, int]) -> Array:
    """The box of `size` at `start`, padded with zeros (half before, half after) where the array is smaller."""
    box = values_XYZ[tuple(slice(s, s + n) for s, n in zip(start, size, strict=True))]
    if tuple(box.shape) == tuple(size):
        return box
    padded = array_namespace(box).zeros(size, dtype=box.dtype, device=device(box))
    before = [(n - have) // 2 for n, have in zip(size, box.shape, strict=True)]
    padded[tuple(slice(b, b + have) for b, have in zip(before, box.shape, strict=True))] = box
    return padded
