"""Every backend gives the eager network's answer, for every kind of network and in every precision it has."""

import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ctseg.engine.backends import Backend, onnx, openvino, torchscript
from ctseg.engine.model import forward_of, load_model, load_network
from ctseg.engine.predict import predict
from ctseg.engine.runtime import Runtime
from ctseg.networks import fold_for_inference, network_for
from ctseg.recipe import Recipe, load_recipe
from ctseg.sources.phantom import centered_grid, make_phantom
from marks import needs_openvino

BACKENDS = [
    pytest.param(torchscript, id="torch"),
    pytest.param(onnx, id="onnxruntime"),
    pytest.param(openvino, id="openvino", marks=needs_openvino),
]
NETWORKS = {
    "unet": ("spleen:small", [], (16, 32, 24)),
    "unet_instance_norm": ("spleen:small", ["network.norm=instance"], (16, 32, 24)),
    "unet_three_classes": ("spleen:small", ["labels.2=liver"], (16, 16, 16)),
    "ahnet": ("lung:small", [], (64, 32, 32)),
    "ahnet_transpose": ("lung:small", ["network.upsample_mode=transpose"], (32, 32, 32)),
    "segresnet": ("bone_lesion:small", ["network.dropout_prob=0.1"], (16, 24, 32)),
}


@pytest.fixture(scope="module")
def made_network() -> Callable[[str], tuple[Recipe, nn.Module]]:
    """A function that makes a network whose batch statistics are not a fresh network's."""

    def make(name: str) -> tuple[Recipe, nn.Module]:
        recipe = load_recipe(*NETWORKS[name][:2])
        torch.manual_seed(2)
        network = network_for(recipe).train()
        with torch.no_grad():
            network(torch.rand(2, 1, *NETWORKS[name][2]))
        return recipe, network.eval()

    return make


def dice(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    return 2 * np.count_nonzero(a & b) / (np.count_nonzero(a) + np.count_nonzero(b))


def windows(size: tuple[int, int, int], number: int = 1) -> Tensor:
    return torch.rand((number, 1, *size), generator=torch.Generator().manual_seed(1))


def pairs() -> Iterator[object]:
    """Every network on every backend; to export to ONNX takes so long that most of these pairs are slow tests."""
    for backend, name in itertools.product(BACKENDS, NETWORKS):
        slow = backend.id == "onnxruntime" and name not in ("unet", "segresnet")
        marks = [*backend.marks, *([pytest.mark.slow] if slow else [])]
        yield pytest.param(*backend.values, name, id=f"{backend.id}-{name}", marks=marks)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_the_order_of_memory_changes_nothing(
    backend: Backend,
    order: tuple[int, int, int],
    made_network: Callable[[str], tuple[Recipe, nn.Module]],
    cpu: Runtime,
) -> None:
    """A window is a part of a CT, whose axes may lie in memory in any order."""
    size, (_, network) = NETWORKS["unet"][2], made_network("unet")
    image = windows(size)
    with torch.inference_mode():
        wanted = network(image)
    larger = torch.zeros([size[axis] + 3 for axis in order]).permute(*(order.index(axis) for axis in range(3)))
    window = larger[1:-2, 2:-1, 3:]
    window.copy_(image[0, 0])
    forward = backend.load(backend.compile_network(network, size, cpu), size, cpu)
    torch.testing.assert_close(forward(window[None, None]), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("backend", "name"), list(pairs()))
def test_float32_is_the_eager_networks_answer(
    backend: Backend, name: str, made_network: Callable[[str], tuple[Recipe, nn.Module]], cpu: Runtime
) -> None:
    _, network = made_network(name)
    size = NETWORKS[name][2]
    image = windows(size, 2)
    with torch.inference_mode():
        wanted = network(image)
    forward = backend.load(backend.compile_network(fold_for_inference(network), size, cpu), size, cpu)
    got = forward(image)
    assert got.dtype == torch.float32
    assert got.shape == wanted.shape
    assert not got.requires_grad
    assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert torch.equal(forward(image[1:]), got[1:])
    assert torch.equal(forward(image), got)  # later calls do not write into what earlier ones gave


@pytest.mark.parametrize("name", ["unet", "ahnet", "segresnet"])
@pytest.mark.parametrize("backend", [BACKENDS[0], BACKENDS[2]])
def test_bfloat16_is_close_to_float32_and_not_the_same(
    backend: Backend, name: str, made_network: Callable[[str], tuple[Recipe, nn.Module]]
) -> None:
    _, network = made_network(name)
    size = NETWORKS[name][2]
    with torch.inference_mode():
        wanted = network(windows(size))
    runtime = Runtime(torch.device("cpu"), "bfloat16")
    forward = backend.load(backend.compile_network(fold_for_inference(network), size, runtime), size, runtime)
    got = forward(windows(size))
    assert got.dtype == torch.float32
    difference = (got - wanted).abs().max() / wanted.abs().max()
    assert 1e-5 < difference < 0.2


@pytest.mark.parametrize("backend", [BACKENDS[0], BACKENDS[2]])
def test_windows_of_another_size_are_a_bug(
    backend: Backend, made_network: Callable[[str], tuple[Recipe, nn.Module]], cpu: Runtime
) -> None:
    _, network = made_network("unet")
    forward = backend.load(backend.compile_network(network, (16, 16, 16), cpu), (16, 16, 16), cpu)
    with pytest.raises(AssertionError, match="compiled for windows of"):
        forward(windows((16, 16, 24)))


@pytest.mark.parametrize("backend", ["torch", pytest.param("openvino", marks=needs_openvino)])
def test_masks_of_a_trained_network_agree(tiny_checkpoint: Path, cpu: Runtime, backend: str) -> None:
    """Organs of 5 000 to 10 000 voxels; reduced precision moves the border of larger ones by less."""
    reduced = Runtime(torch.device("cpu"), "bfloat16")
    eager = load_model(tiny_checkpoint, cpu)
    eager = replace(eager, forward=forward_of(load_network(tiny_checkpoint)[1], cpu))
    exact, close = load_model(tiny_checkpoint, cpu, backend), load_model(tiny_checkpoint, reduced, backend)
    for index in (0, 4):
        grid = centered_grid((160, 134, 100), (1.5, 1.5, 1.5), "LPS")
        image = make_phantom(7, index, grid=grid).image
        wanted = predict(eager, image)
        assert np.count_nonzero(wanted) > 5000
        assert dice(predict(exact, image), wanted) > 0.9999
        assert 0.997 < dice(predict(close, image), wanted) < 1


@needs_openvino
def test_openvino_is_imported_without_its_telemetry(tmp_path: Path) -> None:
    """It would write an identifier to the home and report the import to its makers."""
    program = """
import sys
from ctseg.engine.backends.openvino import import_library
import_library().Core()
assert not [name for name, module in sys.modules.items() if name.startswith("openvino_telemetry") and module]
"""
    subprocess.run([sys.executable, "-c", program], check=True, env={"HOME": str(tmp_path)}, timeout=60)
    assert list(tmp_path.iterdir()) == []


def test_onnxruntime_is_imported_without_its_telemetry(tmp_path: Path) -> None:
    """It would write an identifier to the home and report what it runs to its makers."""
    program = """
import sys
from pathlib import Path
from onnx import TensorProto, helper
from ctseg.engine.backends.onnx import open_session
from ctseg.engine.runtime import start_on_host
ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", ports[:1], ports[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
open_session(model.SerializeToString(), start_on_host())
"""
    environ = {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", program], check=True, env=environ, timeout=60)
    assert list(tmp_path.iterdir()) == []


@needs_openvino
def test_openvinos_converter_is_imported_by_whoever_calls_it(tmp_path: Path) -> None:
    program = """
import sys
from ctseg.engine.backends.openvino import import_library
import_library()
assert "openvino.tools.ovc" not in sys.modules
import openvino
try:
    openvino.convert_model("gone.onnx")
except Exception as error:
    print(error)
assert "openvino.tools.ovc" in sys.modules
"""
    environment = {"HOME": str(tmp_path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=True, env=environment, timeout=60, capture_output=True, text=True)
    assert "gone.onnx" in done.stdout


ALL_SIGNALS_AT_ONCE = """
import ctypes, gc, os, signal, sys, threading
import torch
from torch import nn
from ctseg.engine.backends import openvino
from ctseg.engine.process import STOP_SIGNALS
from ctseg.engine.runtime import Runtime

class Stack(ctypes.Structure):
    _fields_ = [("start", ctypes.c_void_p), ("flags", ctypes.c_int), ("num_bytes", ctypes.c_size_t)]

def signal_stack():
    stack = Stack()
    assert ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack)) == 0
    return stack.start, stack.num_bytes

def load(precision):
    runtime = Runtime(torch.device("cpu"), precision)
    return openvino.load(openvino.compile_network(network, window, runtime), window, runtime)

def stop():
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    for number in STOP_SIGNALS:
        os.kill(os.getpid(), number)
    image = torch.rand(1, 32, *window)
    for forward in models:
        forward(image)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

def forget_first():
    del models[0]
    gc.collect()

seen = []
for number in STOP_SIGNALS:
    signal.signal(number, lambda number, _: seen.append(number))
before = signal_stack()
window = (16, 16, 16)
network = nn.Sequential(*[nn.Conv3d(32, 32, 3, padding=1) for _ in range(3)])
models = [load(precision) for precision in ("float32", "bfloat16", "bfloat16")]
stop()
forget_first()
stop()
other = threading.Thread(target=forget_first)
other.start()
other.join()
stop()
forget_first()
stop()
assert sorted(seen) == sorted([*STOP_SIGNALS] * 4), seen
assert signal_stack() == before
"""


@needs_openvino
@pytest.mark.skipif(sys.platform != "linux", reason="the alternate signal stack is read as Linux lays it out")
@pytest.mark.parametrize("options", [(), ("-X", "faulthandler")])
def test_openvino_leaves_signals_to_python_while_models_come_and_go(options: tuple[str, ...]) -> None:
    """In a process of its own, which a signal would end."""
    command = [sys.executable, *options, "-c", ALL_SIGNALS_AT_ONCE]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
