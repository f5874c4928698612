"""What runs a network on windows: torch, onnxruntime or OpenVINO.

Each backend is a module with two functions: `compile_network` turns a network into bytes, and `load` turns these
bytes into a function of windows, without MONAI. Its libraries are imported inside its functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from ctseg.engine.runtime import Runtime

Forward = Callable[[Tensor], Tensor]
"""image_BCXYZ float32 -> logits_BCXYZ float32, without gradients."""
Window = tuple[int, int, int]


class Backend(Protocol):
    """What the modules of this package have in common."""

    LIBRARY: str
    """The installed package whose version decides what is compiled."""
    PRECISIONS: tuple[str, ...]
    """Those it has on a CPU."""

    def compile_network(self, network: nn.Module, window: Window, runtime: Runtime) -> bytes:
        """The network for windows of this size in the runtime's precision; changes the network's memory format."""

    def load(self, content: bytes, window: Window, runtime: Runtime) -> Forward:
        """What `compile_network` made, ready to run."""


def one_by_one(run: Forward, window: Window) -> Forward:
    """`run`, which takes one window, for any number of them."""

    def forward(image_BCXYZ: Tensor) -> Tensor:
        assert image_BCXYZ.shape[2:] == window, f"compiled for windows of {window}, got {image_BCXYZ.shape}"
        if len(image_BCXYZ) == 1:
            return run(image_BCXYZ)
        return torch.cat([run(image_CXYZ.unsqueeze(0)) for image_CXYZ in image_BCXYZ])

    return forward


def example_of(network: nn.Module, window: Window) -> Tensor:
    """An empty window with as many channels as the network's first convolution takes."""
    first = next(parameter for parameter in network.parameters() if parameter.ndim >= 4)
    return torch.zeros((1, first.shape[1], *window))
