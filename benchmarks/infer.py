"""`ctseg` against MONAI's stock chain: one CT, one checkpoint, stage by stage, each in a fresh process.

    python benchmarks/infer.py --model runs/spleen-001 [--volume CT.nii.gz ...] [--repetitions 5]
        [--backend torch openvino ...] [--precision float32 bfloat16 ...]

The stock chain is the one of MONAI's bundles: LoadImage, EnsureChannelFirst, Orientation, Spacing,
ScaleIntensityRange, SlidingWindowInferer, softmax, Invert (linear), argmax, SaveImage. Without --volume made CTs of
512 x 512 x 120 and 512 x 512 x 400 are used. One line for each backend in each precision that it has: seconds of the
whole process with their spread, peak memory of the process, ratios to stock pair by pair, seconds of a cold run, which
finds the cache of compiled networks empty and chooses, builds and compiles, the median seconds of each stage of a warm
one, and how the mask agrees with stock's. All files are in the system's cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from timing import Run, in_turn, machine, ratios, run, spread

STAGES = ("import", "load model", "read", "prepare", "network", "back to native grid", "write")
MADE_SLICES = (120, 400)


class Clock:
    """Seconds of each stage; what is not inside a stage is not counted."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Books the time since the last lap on `stage`."""
        now = time.perf_counter()
        self.seconds[stage] += now - self._last
        self._last = now


@dataclass(frozen=True)
class Column:
    """One way of running ctseg."""

    backend: str
    precision: str

    def __str__(self) -> str:
        return f"{self.backend} {self.precision}"


def run_ctseg(checkpoint: Path, volume: Path, mask: Path, column: Column) -> dict[str, float]:
    """ctseg's path, the same functions in the same order as `ctseg infer`, with a clock between them."""
    clock = Clock()
    from ctseg.engine.model import load_model
    from ctseg.engine.predict import scores_from_logits, window_logits
    from ctseg.engine.runtime import start_runtime
    from ctseg.io.images import read_image, write_labels
    from ctseg.preprocess import prepare, restore

    clock.lap("import")
    model = load_model(checkpoint, start_runtime("cpu", column.precision), column.backend)
    clock.lap("load model")
    image = read_image(volume)
    clock.lap("read")
    prepared = prepare(image, model.recipe.preprocess, model.runtime.device)
    clock.lap("prepare")
    logits = window_logits(model, prepared.image_XYZ, model.recipe.inference)
    clock.lap("network")
    labels = restore(scores_from_logits(logits), prepared)
    clock.lap("back to native grid")
    write_labels(mask, labels, image.geometry)
    clock.lap("write")
    return clock.seconds


def run_stock(checkpoint: Path, volume: Path, mask: Path) -> dict[str, float]:
    """MONAI's chain as its bundles write it, with a clock between its stages."""
    clock = Clock()
    import monai.transforms as mt
    import torch
    from monai.data.meta_tensor import MetaTensor
    from monai.inferers.inferer import SlidingWindowInferer

    from ctseg.networks import network_for
    from ctseg.recipe import recipe_from_dict

    clock.lap("import")
    content = torch.load(checkpoint, weights_only=True)
    recipe = content["recipe"]
    spec, window = recipe["preprocess"], recipe["inference"]
    network = network_for(recipe_from_dict(recipe, "checkpoint")).eval()  # a class of MONAI's with the recipe's numbers
    network.load_state_dict(content.get("average") or content["model"])
    inferer = SlidingWindowInferer(window["window_size"], window["batch_windows"], window["overlap"])
    clock.lap("load model")
    load = mt.Compose([mt.LoadImaged("image"), mt.EnsureChannelFirstd("image")])
    low, high = spec["hu_window"]
    pre = mt.Compose(
        [
            mt.Orientationd("image", axcodes="RAS"),
            mt.Spacingd("image", pixdim=spec["spacing_mm"], mode="bilinear"),
            mt.ScaleIntensityRanged("image", low, high, 0.0, 1.0, clip=True),
            mt.EnsureTyped("image"),
        ]
    )
    post = mt.Compose(
        [
            mt.Activationsd("pred", softmax=True),
            mt.Invertd("pred", pre, orig_keys="image", nearest_interp=False, to_tensor=True),
            mt.AsDiscreted("pred", argmax=True),
        ]
    )
    save = mt.SaveImaged("pred", output_dir=str(mask.parent), output_postfix="stock", separate_folder=False)
    data: dict[str, Any] = load({"image": str(volume)})
    clock.lap("read")
    data = pre(data)
    clock.lap("prepare")
    with torch.no_grad():
        data["pred"] = MetaTensor(inferer(data["image"][None].as_tensor(), network)[0])
    clock.lap("network")
    data = post(data)
    clock.lap("back to native grid")
    save(data)
    clock.lap("write")
    return clock.seconds


def compare(checkpoint: Path, volume: Path, repetitions: int, columns: list[Column]) -> None:
    """Runs stock and all columns in turn on one volume and prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        stock = Path(folder) / "stock" / "mask.nii.gz"
        stock.parent.mkdir()
        common = [sys.executable, __file__, "--model", str(checkpoint), "--volume", str(volume)]
        commands = {"stock": [*common, "--worker", "stock", "--mask", str(stock)]}
        for column in columns:
            how = ["--backend", column.backend, "--precision", column.precision]
            mask = Path(folder) / f"{column}.nii.gz"
            commands[str(column)] = [*common, "--worker", "ctseg", "--mask", str(mask), *how]
        cold = {str(column): run([*commands[str(column)], "--cold"]).seconds for column in columns}
        results = in_turn(commands, repetitions)
        reference = next(stock.parent.iterdir())
        agreements = {str(c): _agreement(Path(folder) / f"{c}.nii.gz", reference) for c in columns}
    _print_table(volume, results, cold, agreements)


def _agreement(ours: Path, stock: Path) -> str:
    import numpy as np

    from ctseg.io.images import read_labels

    a, b = read_labels(ours).array, read_labels(stock).array
    total = int(np.count_nonzero(a)) + int(np.count_nonzero(b))
    dice = 2 * int(np.count_nonzero((a > 0) & (b > 0))) / total if total else 1.0
    return f"Dice {dice:.6f}, {int(np.count_nonzero(a != b))} of {int(np.count_nonzero(b))} voxels differ"


def _print_table(
    volume: Path, results: dict[str, list[Run]], cold: dict[str, float], agreements: dict[str, str]
) -> None:
    stock = results["stock"]
    print(f"\n{volume.name}")
    print(f"{'':20}{'whole process, s':>25}{'ratio':>7}{'cold, s':>9}{'peak memory, MB':>25}{'ratio':>7}")
    for name, runs in results.items():
        seconds, peaks = ([getattr(r, field) for r in runs] for field in ("seconds", "peak_mb"))
        faster = statistics.median(ratios([r.seconds for r in stock], seconds))
        smaller = statistics.median(ratios([r.peak_mb for r in stock], peaks))
        first = f"{cold[name]:.2f}" if name in cold else "-"
        print(f"{name:20}{spread(seconds):>25}{faster:>6.1f}x{first:>9}{spread(peaks, 0):>25}{smaller:>6.1f}x")
    print(f"{'median s of':20}" + "".join(f"{stage:>{max(len(stage) + 2, 9)}}" for stage in STAGES))
    for name, runs in results.items():
        medians = [(stage, statistics.median(r.printed[stage] for r in runs)) for stage in STAGES]
        print(f"{name:20}" + "".join(f"{value:>{max(len(stage) + 2, 9)}.2f}" for stage, value in medians))
    for name, agreement in agreements.items():
        print(f"{name:20} mask against stock's: {agreement}")
    sys.stdout.flush()


def _made_volumes(folder: Path) -> list[Path]:
    import nibabel

    from ctseg.sources.phantom import ADULT, centered_grid, make_phantom

    paths = []
    for slices in MADE_SLICES:
        grid = centered_grid((512, 512, slices), (0.75, 0.75, 300 / slices))
        image = make_phantom(0, slices, size=ADULT, grid=grid).image
        paths.append(folder / f"made_512x512x{slices}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(image.array, grid.affine_ras), paths[-1])
    return paths


def _columns(backends: list[str], precisions: list[str]) -> list[Column]:
    """Every backend that is installed in every precision that it has on this CPU."""
    from ctseg.engine.compiled import check_backend
    from ctseg.engine.runtime import start_runtime
    from ctseg.errors import DeviceError

    columns = []
    for backend, precision in itertools.product(backends, precisions):
        try:
            check_backend(backend, start_runtime("cpu", precision))
        except DeviceError as error:
            print(f"left out: {error}")
        else:
            columns.append(Column(backend, precision))
    return columns


def main() -> None:
    """Parses the command line; a worker prints its stage times as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as for `ctseg infer`; a checkpoint in the end")
    parser.add_argument("--volume", type=Path, nargs="*", default=[])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--backend", nargs="+", default=["torch", "openvino"])
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--worker", choices=("stock", "ctseg"), help=argparse.SUPPRESS)
    parser.add_argument("--mask", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cold", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker == "stock":
        print(json.dumps(run_stock(Path(options.model), options.volume[0], options.mask)))
    elif options.worker == "ctseg":
        with tempfile.TemporaryDirectory() as empty:
            if options.cold:
                os.environ["CTSEG_CACHE"] = empty
            column = Column(options.backend[0], options.precision[0])
            print(json.dumps(run_ctseg(Path(options.model), options.volume[0], options.mask, column)))
    else:
        from ctseg.workspace import resolve_model

        print(machine())
        columns = _columns(options.backend, options.precision)
        with tempfile.TemporaryDirectory() as folder:
            os.environ["CTSEG_CACHE"] = folder  # filled by the round that is not counted
            for volume in options.volume or _made_volumes(Path(folder)):
                compare(resolve_model(options.model), volume, options.repetitions, columns)


if __name__ == "__main__":
    main()
