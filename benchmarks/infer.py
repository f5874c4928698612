"""`ctseg` against MONAI's stock chain: one CT, one checkpoint, stage by stage, each in a fresh process.

    python benchmarks/infer.py --model runs/spleen-001 [--volume CT.nii.gz ...] [--repetitions 5]

The stock chain is the one of MONAI's bundles: LoadImage, EnsureChannelFirst, Orientation, Spacing,
ScaleIntensityRange, SlidingWindowInferer, softmax, Invert (linear), argmax, SaveImage. Without --volume made CTs of
512 x 512 x 120 and 512 x 512 x 400 are used. Printed: median seconds of each stage with their spread, peak memory of
the process, ratios pair by pair, and the Dice between the two masks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from timing import Run, in_turn, machine, ratios, spread

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


def run_ctseg(checkpoint: Path, volume: Path, mask: Path, precision: str) -> dict[str, float]:
    """ctseg's path, the same functions in the same order as `ctseg infer`, with a clock between them."""
    clock = Clock()
    from ctseg.engine.model import load_model
    from ctseg.engine.predict import scores_from_logits, window_logits
    from ctseg.engine.runtime import start_runtime
    from ctseg.io.images import read_image, write_labels
    from ctseg.preprocess import prepare, restore

    clock.lap("import")
    model = load_model(checkpoint, start_runtime("cpu", precision))
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
    from monai.networks.nets.unet import UNet

    clock.lap("import")
    content = torch.load(checkpoint, weights_only=True)
    recipe = content["recipe"]
    spec, window = recipe["preprocess"], recipe["inference"]
    net = {k: recipe["network"][k] for k in ("channels", "strides", "num_res_units", "norm")}
    network = UNet(spatial_dims=3, in_channels=1, out_channels=len(recipe["labels"]) + 1, **net).eval()
    network.load_state_dict(content["model"])
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


def compare(checkpoint: Path, volume: Path, repetitions: int, precision: str) -> None:
    """Runs both in turn on one volume and prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        ours, stock = Path(folder) / "ctseg.nii.gz", Path(folder) / "stock" / "mask.nii.gz"
        stock.parent.mkdir()
        common = [sys.executable, __file__, "--model", str(checkpoint), "--volume", str(volume)]
        commands = {
            "stock": [*common, "--worker", "stock", "--mask", str(stock)],
            "ctseg": [*common, "--worker", "ctseg", "--mask", str(ours), "--precision", precision],
        }
        results = in_turn(commands, repetitions)
        agreement = _agreement(ours, next(stock.parent.iterdir()))
    _print_table(volume, results, agreement)


def _agreement(ours: Path, stock: Path) -> str:
    import numpy as np

    from ctseg.io.images import read_labels

    a, b = read_labels(ours).array, read_labels(stock).array
    total = int(np.count_nonzero(a)) + int(np.count_nonzero(b))
    dice = 2 * int(np.count_nonzero((a > 0) & (b > 0))) / total if total else 1.0
    return f"masks: {int(np.count_nonzero(b))} voxels, Dice {dice:.6f}, {int(np.count_nonzero(a != b))} voxels differ"


def _print_table(volume: Path, results: dict[str, list[Run]], agreement: str) -> None:
    stock, ours = results["stock"], results["ctseg"]
    print(f"\n{volume.name}")
    print(f"{'':22}{'stock':>26}{'ctseg':>26}   ratio")
    rows = [(stage, [r.printed[stage] for r in stock], [r.printed[stage] for r in ours]) for stage in STAGES]
    rows.append(("whole process, s", [r.seconds for r in stock], [r.seconds for r in ours]))
    rows.append(("peak memory, MB", [r.peak_mb for r in stock], [r.peak_mb for r in ours]))
    for name, a, b in rows:
        digits = 0 if "MB" in name else 2
        print(f"{name:22}{spread(a, digits):>26}{spread(b, digits):>26}   {statistics.median(ratios(a, b)):.1f}x")
    print(agreement)


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


def main() -> None:
    """Parses the command line; a worker prints its stage times as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="as for `ctseg infer`; a checkpoint in the end")
    parser.add_argument("--volume", type=Path, nargs="*", default=[])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--worker", choices=("stock", "ctseg"), help=argparse.SUPPRESS)
    parser.add_argument("--mask", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker == "stock":
        print(json.dumps(run_stock(Path(options.model), options.volume[0], options.mask)))
    elif options.worker == "ctseg":
        print(json.dumps(run_ctseg(Path(options.model), options.volume[0], options.mask, options.precision)))
    else:
        from ctseg.workspace import resolve_model

        print(machine())
        with tempfile.TemporaryDirectory() as folder:
            for volume in options.volume or _made_volumes(Path(folder)):
                compare(resolve_model(options.model), volume, options.repetitions, options.precision)


if __name__ == "__main__":
    main()
