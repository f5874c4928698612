"""What computing a UNet's finest level in phases gains: one window of the spleen network with and without it.

    python benchmarks/phases.py [--window 160 160 160] [--repetitions 9]

Made weights, which take as long as trained ones. Every backend and precision runs the plain and the rearranged network
in turn, in this process, after a call that is not counted. Printed: seconds and CPU seconds of a window, the ratio of
the CPU seconds pair by pair (which other work on the machine disturbs least), and the largest difference from plain
float32 on torch as a share of the largest logit.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ctseg.engine.backends import Forward, Window
from ctseg.engine.backends import openvino as openvino_backend
from ctseg.engine.backends import torchscript as torch_backend
from ctseg.engine.runtime import Runtime, start_runtime
from ctseg.networks import fold_for_inference, network_for
from ctseg.phases import finest_level_in_phases
from ctseg.recipe import load_recipe
from timing import machine, ratios, spread

BACKENDS = {"torch": torch_backend, "openvino": openvino_backend}
PRECISIONS = ("float32", "bfloat16")


def make_network() -> nn.Module:
    """The spleen network, ready for inference, with batch statistics that are not a fresh network's."""
    torch.manual_seed(0)
    network = network_for(load_recipe("spleen")).train()
    with torch.no_grad():
        network(torch.rand(2, 1, 64, 64, 64))
    return fold_for_inference(network)


def compiled(backend: str, network: nn.Module, window: Window, runtime: Runtime) -> Forward:
    """The network as the backend runs it."""
    module = BACKENDS[backend]
    forward: Forward = module.load(module.compile_network(network, window, runtime), window, runtime)
    return forward


def margin(logits: Tensor) -> Tensor:
    """The second class's logit minus the first one's, whichever way they came."""
    return logits if logits.shape[1] == 1 else logits[:, 1:] - logits[:, :1]


def timed(forward: Callable[[Tensor], Tensor], image: Tensor) -> tuple[float, float]:
    """Seconds and CPU seconds of a call."""
    started, started_cpu = time.perf_counter(), time.process_time()
    forward(image)
    return time.perf_counter() - started, time.process_time() - started_cpu


def main() -> None:
    """Prints a line for each backend and precision, plain and in phases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, nargs=3, default=[160, 160, 160])
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    x, y, z = options.window
    image = torch.rand((1, 1, x, y, z), generator=torch.Generator().manual_seed(1))
    cpu = start_runtime("cpu", "float32")
    wanted = margin(compiled("torch", make_network(), (x, y, z), cpu)(image))
    print(f"{machine()}\n\nwindow {x} x {y} x {z}")
    print(f"{'':20}{'':8}{'seconds':>24}{'CPU seconds':>24}{'ratio':>7}  difference")
    for backend in BACKENDS:
        for precision in PRECISIONS:
            runtime = replace(cpu, precision=precision)
            ways = {
                "plain": compiled(backend, make_network(), (x, y, z), runtime),
                "phases": compiled(backend, finest_level_in_phases(make_network()), (x, y, z), runtime),
            }
            far = {way: float((margin(f(image)) - wanted).abs().max() / wanted.abs().max()) for way, f in ways.items()}
            taken = [{way: timed(forward, image) for way, forward in ways.items()} for _ in range(options.repetitions)]
            for way in ways:
                wall, own = ([one[way][n] for one in taken] for n in (0, 1))
                faster = statistics.median(ratios([one["plain"][1] for one in taken], own))
                name = f"{backend} {precision}"
                print(f"{name:20}{way:8}{spread(wall, 3):>24}{spread(own, 3):>24}{faster:>6.2f}x  {far[way]:.1e}")


if __name__ == "__main__":
    main()
