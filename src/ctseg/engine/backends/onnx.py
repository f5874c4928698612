"""onnxruntime: the network as an ONNX model, in float32 on a CPU."""

from __future__ import annotations

import logging
import os
import warnings
from typing import TYPE_CHECKING, Any

from ctseg.engine.backends import Forward, Window, example_of, on_host, one_by_one
from ctseg.engine.cache import Bytes
from ctseg.engine.runtime import Runtime

if TYPE_CHECKING:
    from torch import Tensor, nn

LIBRARY = "onnxruntime"
PRECISIONS: tuple[str, ...] = ("float32",)
OPSET = 18
CUDA = "CUDAExecutionProvider"


def compile_network(network: nn.Module, window: Window, runtime: Runtime) -> bytes:
    """The network as ONNX."""
    import torch

    network.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # stubs lack it
    content: bytes = to_onnx(network, example_of(network, window)).SerializeToString()
    return content


def load(content: Bytes, window: Window, runtime: Runtime) -> Forward:
    """What `compile_network` made, ready to run."""
    return one_by_one(forward_of_session(open_session(bytes(content), runtime)), window)


def import_library() -> Any:
    """onnxruntime, without the usage statistics that it would report to its makers."""
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # read when it is imported
    import onnxruntime

    return onnxruntime


def to_onnx(network: nn.Module, example: Tensor) -> Any:
    """The network as an `onnx.ModelProto`, input "image", output "logits", for any number of windows."""
    import torch

    # It reports that torchvision, which no network here uses, is not installed.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's notices are for developers
        program = torch.onnx.export(
            network,
            (example,),
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # it is, with dynamo=True
    return program.model_proto


def open_session(content: bytes, runtime: Runtime) -> Any:
    """An onnxruntime session on the runtime's device.

    From bytes, not from a path: a model of a stranger cannot name further files then.
    """
    onnxruntime = import_library()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = runtime.threads
    options.log_severity_level = 3
    # Float32 means float32, not TF32's ten bits.
    on_gpu = (CUDA, {"device_id": runtime.device.index or 0, "use_tf32": "0"})
    providers = [on_gpu] if runtime.device.type == "cuda" and has_cuda() else ["CPUExecutionProvider"]
    return onnxruntime.InferenceSession(content, options, providers=providers)


def has_cuda() -> bool:
    """Whether the onnxruntime that is installed here was built for NVIDIA's GPUs."""
    return CUDA in import_library().get_available_providers()


def forward_of_session(session: Any) -> Forward:
    """The session as a function of windows."""
    name = session.get_inputs()[0].name
    return on_host(lambda image_BCXYZ: session.run(None, {name: image_BCXYZ})[0])
