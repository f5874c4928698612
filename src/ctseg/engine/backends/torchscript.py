"""torch: the network traced and frozen, in the runtime's precision, channels last.

Freezing folds batch normalisation into convolutions and casts weights to reduced precision once instead of for every
window.
"""

from __future__ import annotations

import io
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ctseg.engine.backends import Forward, Window, example_of, one_by_one
from ctseg.engine.cache import Bytes
from ctseg.engine.runtime import Runtime
from ctseg.networks import channels_last

LIBRARY = "torch"
PRECISIONS: tuple[str, ...] = ("float32", "bfloat16")
LAYOUT = torch.channels_last_3d


def compile_network(network: nn.Module, window: Window, runtime: Runtime) -> bytes:
    """The network as TorchScript for windows of this size."""
    channels_last(network.eval())
    buffer = io.BytesIO()
    with runtime.autocast():
        _quietly(torch.jit.save, trace(network, window, LAYOUT), buffer)
    return buffer.getvalue()


def load(content: Bytes, window: Window, runtime: Runtime) -> Forward:
    """What `compile_network` made, ready to run. TorchScript is code: `content` must be this user's own."""
    network = _quietly(torch.jit.load, io.BytesIO(content), map_location=runtime.device)

    def run(image_BCXYZ: Tensor) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = network(image_BCXYZ.contiguous(memory_format=LAYOUT))
        return logits.float()

    return one_by_one(run, window)


def import_library() -> Any:
    """torch."""
    return torch


def trace(network: nn.Module, window: Window, layout: torch.memory_format) -> torch.jit.ScriptModule:
    """The network as a frozen graph for one window of this size."""
    example = example_of(network, window).contiguous(memory_format=layout)
    with torch.inference_mode():
        traced = _quietly(torch.jit.trace, network, example, check_trace=False)
        frozen: torch.jit.ScriptModule = _quietly(torch.jit.freeze, traced)
    return frozen


def _quietly(function: Any, *arguments: Any, **options: Any) -> Any:
    """The function's result without torch.jit's notice: it is frozen, not gone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **options)
