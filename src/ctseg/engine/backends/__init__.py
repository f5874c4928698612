"""What runs a network on windows: torch, onnxruntime or OpenVINO.

Each backend is a module: `compile_network` turns a network into bytes, and `load` turns these bytes into a function of
windows, without MONAI. Its libraries are imported inside its functions; only torch's own backend needs torch to run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ctseg.arrays import Array, array_namespace, as_asked, device_of, to_numpy
from ctseg.engine.cache import Bytes
from ctseg.engine.runtime import Runtime

if TYPE_CHECKING:
    from torch import Tensor, nn

Forward: TypeAlias = Callable[[Array], Array]
"""image_BCXYZ float32 -> logits_BCXYZ float32 on the same device and of the same library, without gradients.

One channel for each class, or, of two classes, one: the second one's logit minus the first one's.
"""
Window = tuple[int, int, int]


class Backend(Protocol):
    """What the modules of this package have in common."""

    LIBRARY: str
    """The installed package whose version decides what is compiled."""
    PRECISIONS: tuple[str, ...]
    """Those it has on a CPU."""

    def compile_network(self, network: nn.Module, window: Window, runtime: Runtime) -> bytes:
        """The network for windows of this size in the runtime's precision; changes the network's memory format."""

    def import_library(self) -> Any:
        """The library itself, imported now if it was not."""

    def load(self, content: Bytes, window: Window, runtime: Runtime) -> Forward:
        """What `compile_network` made, ready to run."""


def one_by_one(run: Forward, window: Window) -> Forward:
    """`run`, which takes one window, for any number of them."""

    def forward(image_BCXYZ: Array) -> Array:
        assert tuple(image_BCXYZ.shape[2:]) == window, f"compiled for windows of {window}, got {image_BCXYZ.shape}"
        if len(image_BCXYZ) == 1:
            return run(image_BCXYZ)
        return array_namespace(image_BCXYZ).concat([run(image_BCXYZ[n : n + 1]) for n in range(len(image_BCXYZ))])

    return forward


def on_host(run: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Forward:
    """`run`, which takes NumPy's arrays, for tensors too."""

    def forward(image_BCXYZ: Array) -> Array:
        device = device_of(image_BCXYZ)
        logits = as_asked(run(np.ascontiguousarray(to_numpy(image_BCXYZ))), device)
        return logits.to(device) if device.type != "cpu" else logits

    return forward


def example_of(network: nn.Module, window: Window) -> Tensor:
    """An empty window with as many channels as the network's first convolution takes."""
    import torch

    first = next(parameter for parameter in network.parameters() if parameter.ndim >= 4)
    return torch.zeros((1, first.shape[1], *window))
