"""What Winograd's algorithm gains: one window of the networks whose convolutions are large, with it and without.

    python benchmarks/winograd.py [--recipe bone_lesion deepgrow_3d] [--repetitions 9]

Made weights, which take as long as trained ones. OpenVINO runs both networks of a precision in turn, in this process,
after a call that is not counted. Printed: seconds and CPU seconds of a window, the ratio of the seconds pair by pair,
the largest difference and the root of the mean square difference from float32 on torch, as shares of the largest logit
and of the logits' standard deviation.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from unittest import mock

import torch
from torch import Tensor, nn

import phases
from ctseg.engine.backends import Forward, openvino
from ctseg.engine.runtime import Runtime, start_runtime
from ctseg.networks import fold_for_inference, network_for
from ctseg.recipe import Recipe, load_recipe
from timing import machine, ratios, spread

WAYS = {"plain": False, "winograd": True}
"""Whether convolutions are rewritten, on whatever CPU."""


def make_network(recipe: Recipe) -> nn.Module:
    """The recipe's network with made weights, ready for inference."""
    torch.manual_seed(0)
    return fold_for_inference(network_for(recipe))


def compiled(recipe: Recipe, way: str, runtime: Runtime) -> Forward:
    """The recipe's network as OpenVINO runs it."""
    with mock.patch.object(openvino, "winograd_pays", return_value=WAYS[way]):
        return phases.compiled("openvino", make_network(recipe), recipe.inference.window_size, runtime)


def differences(logits: Tensor, wanted: Tensor) -> tuple[float, float]:
    """The largest, and the root of the mean square."""
    far = logits - wanted
    return float(far.abs().max() / wanted.abs().max()), float(far.square().mean().sqrt() / wanted.std())


def main() -> None:
    """Prints a line for each recipe, precision and way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", nargs="+", default=["bone_lesion", "deepgrow_3d"])
    parser.add_argument("--repetitions", type=int, default=9)
    options = parser.parse_args()
    cpu = start_runtime("cpu", "float32")
    print(machine())
    for name in options.recipe:
        recipe = load_recipe(name)
        shape = (1, recipe.input_channels, *recipe.inference.window_size)
        image = torch.rand(shape, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            wanted = make_network(recipe)(image)
        print(f"\n{name}, window {' x '.join(map(str, shape[2:]))}")
        print(f"{'':20}{'seconds':>24}{'CPU seconds':>24}{'ratio':>7}  difference, rms")
        for precision in phases.PRECISIONS:
            forwards = {way: compiled(recipe, way, replace(cpu, precision=precision)) for way in WAYS}
            far = {way: differences(forward(image), wanted) for way, forward in forwards.items()}
            rounds = range(options.repetitions)
            taken = [{way: phases.timed(forward, image) for way, forward in forwards.items()} for _ in rounds]
            for way in WAYS:
                wall, own = ([one[way][n] for one in taken] for n in (0, 1))
                faster = statistics.median(ratios([one["plain"][0] for one in taken], wall))
                largest, rms = far[way]
                told = f"{spread(wall, 3):>24}{spread(own, 3):>24}{faster:>6.2f}x  {largest:.1e}, {rms:.1e}"
                print(f"{precision:10}{way:10}{told}", flush=True)


if __name__ == "__main__":
    main()
