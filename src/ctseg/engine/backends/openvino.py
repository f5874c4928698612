"""OpenVINO: the network as compiled for this CPU, all cores at one window, in float32 or bfloat16."""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ctseg.engine.backends import Forward, Window, example_of, on_host, one_by_one
from ctseg.engine.cache import Bytes
from ctseg.engine.process import cpu_flags
from ctseg.engine.runtime import Runtime

if TYPE_CHECKING:
    from torch import nn

LIBRARY = "openvino"
PRECISIONS: tuple[str, ...] = ("float32", "bfloat16")
HINTS = {"float32": "f32", "bfloat16": "bf16"}
CONVERTER = "openvino.tools.ovc"
"""What turns models' files into OpenVINO's; the package imports it if it can."""
_IMPORTING, _LOADING = threading.Lock(), threading.Lock()


def compile_network(network: nn.Module, window: Window, runtime: Runtime) -> bytes:
    """The network as OpenVINO keeps it, for windows of this size."""
    core = _core()
    import torch
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    from ctseg.engine.backends.torchscript import trace
    from ctseg.engine.backends.winograd import use_winograd
    from ctseg.norms import with_channelwise_group_norms

    network = with_channelwise_group_norms(network)
    network.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # stubs lack it
    frontend = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(trace(network, window, torch.contiguous_format))  # must outlive the conversion
    model = frontend.convert(frontend.load(decoder))
    model.reshape(list(example_of(network, window).shape))
    if winograd_pays(runtime):
        use_winograd(model)
    compiled = core.compile_model(model, "CPU", _settings(runtime))
    content: bytes = compiled.export_model().getvalue()
    return content


def load(content: Bytes, window: Window, runtime: Runtime) -> Forward:
    """What `compile_network` made, ready to run."""
    tensor = import_library().Tensor(np.frombuffer(content, np.uint8))  # copied once; bytes are copied twice
    compiled = _core().import_model(tensor, "CPU", _settings(runtime))
    request = compiled.create_infer_request()

    def run(image_BCXYZ: NDArray[np.float32]) -> NDArray[np.float32]:
        (logits,) = request.infer({0: image_BCXYZ}, share_inputs=True).values()
        return np.asarray(logits)

    return one_by_one(on_host(run), window)


def winograd_pays(runtime: Runtime) -> bool:
    """Whether halving the products is worth the sums: not known of other CPUs, and AMX's products are cheap."""
    return "avx2" in cpu_flags() and not (runtime.precision == "bfloat16" and "amx_bf16" in cpu_flags())


def _settings(runtime: Runtime) -> dict[str, Any]:
    """One window at a time on this process's share of the CPUs; not pinned, as its neighbours' would be to the same."""
    return {
        "INFERENCE_PRECISION_HINT": HINTS[runtime.precision],
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": runtime.threads,
        "ENABLE_CPU_PINNING": False,
    }


def _core() -> Any:
    with _LOADING:  # threads that load networks at once share one
        return _loaded_core()


@functools.cache
def _loaded_core() -> Any:
    """OpenVINO with its CPU plugin, loaded in a thread of its own that then ends.

    The plugin gives the thread that loads it an alternate signal stack, and Python has its signal handlers run on such
    stacks. The plugin's has room for one handler once bfloat16 has run on AMX, and several signals at once overflow it;
    and it is unmapped with the plugin, while a thread may still point at it. Either way the next signal ends the
    process with SIGSEGV.
    """

    def make() -> Any:
        core = import_library().Core()
        core.get_versions("CPU")  # loads the plugin, which otherwise waits for the first network
        return core

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def import_library() -> Any:
    """The package without its telemetry, which would report every import to its makers; it can do without.

    And without its converter of models' files, which takes as long to import as all the rest and is not needed here.
    """
    with _IMPORTING:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # None: importing it fails
        if "openvino" not in sys.modules:
            sys.modules[CONVERTER] = None  # type: ignore[assignment]
            try:
                import openvino
            finally:
                del sys.modules[CONVERTER]
            openvino.convert_model = _convert_model  # for whoever else in this process uses it
        import openvino

        return openvino


def _convert_model(*arguments: Any, **options: Any) -> Any:
    return importlib.import_module(CONVERTER).convert_model(*arguments, **options)
