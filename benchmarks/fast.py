"""How many windows `--fast` spares on CTs, and what that changes of the mask; not for time, see infer.py for that.

    python benchmarks/fast.py --model runs/spleen-001 --volume CT.nii.gz ... [--window 96 96 96] [--overlap 0.5]
        [--backend openvino] [--precision float32]

Prints for each CT the windows that run without and with `--fast`, the voxels of the exact mask, and Dice of the fast
one against it, both in the same precision, so that only the windows make a difference.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from pathlib import Path
from statistics import mean

import numpy as np
from numpy.typing import NDArray

from ctseg.arrays import Array
from ctseg.engine.model import Model, load_model
from ctseg.engine.predict import predict
from ctseg.engine.runtime import start_runtime
from ctseg.io.images import read_image
from ctseg.metrics import dice
from ctseg.volume import Volume
from infer import make_checkpoint
from timing import machine


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(fresh=None)
    parser.add_argument("--model", required=True)
    parser.add_argument("--volume", nargs="+", type=Path, required=True)
    parser.add_argument("--window", type=int, nargs=3)
    parser.add_argument("--overlap", type=float)
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--precision", default="float32")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_checkpoint(options, Path(folder))
        model = load_model(checkpoint, start_runtime("cpu", options.precision), options.backend)
    print(f"{machine()}\n{'':32}{'windows':>9}{'fast':>6}{'voxels':>9}{'Dice':>10}")
    scores = []
    for path in options.volume:
        volume = read_image(path)
        exact, windows = run(model, volume, fast=False)
        fast, fewer = run(model, volume, fast=True)
        score = dice(fast, exact)
        scores += [] if score is None else [score]
        told = "- (empty)" if score is None else f"{score:.6f}"
        print(f"{path.name:32}{windows:>9}{fewer:>6}{np.count_nonzero(exact):>9}{told:>10}", flush=True)
    print(f"{'mean':56}{mean(scores):>10.6f}")


def run(model: Model, volume: Volume, *, fast: bool) -> tuple[NDArray[np.uint8], int]:
    """The mask, and how many windows it took."""
    windows = 0

    def counted(image_BCXYZ: Array) -> Array:
        nonlocal windows
        windows += len(image_BCXYZ)
        return model.forward(image_BCXYZ)

    return predict(dataclasses.replace(model, forward=counted), volume, fast=fast), windows


if __name__ == "__main__":
    main()
