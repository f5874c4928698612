"""How others run the same network on the same CT: workers of `infer.py`, each a process of its own.

    python benchmarks/stock.py chain|tiling --model best.pt --volume CT.nii.gz --mask MASK.nii.gz [--device cuda]

"chain" is MONAI's chain as its bundles write it: LoadImage, EnsureChannelFirst, Orientation, Spacing,
ScaleIntensityRange, SlidingWindowInferer, softmax, Invert (linear), argmax, SaveImage. "tiling" is the way of nnU-Net,
without its mirroring: cubic resampling, windows weighted by a Gaussian, the logits of every class resampled to the CT's
grid, argmax. Each prints the seconds of its stages as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

STAGES = ("start", "read", "prepare", "network", "restore", "write")


class Stages:
    """Seconds of each stage of this process."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Books the time since the last lap on `stage`."""
        now = time.perf_counter()
        self.seconds[stage] += now - self._last
        self._last = now


def load(checkpoint: Path, device: str) -> tuple[dict[str, Any], Any]:
    """The recipe as plain data, and the network on the device: a class of MONAI's with the recipe's numbers."""
    import torch

    from ctseg.networks import network_for
    from ctseg.recipe import recipe_from_dict

    content = torch.load(checkpoint, weights_only=True)
    network = network_for(recipe_from_dict(content["recipe"], "checkpoint")).eval()
    network.load_state_dict(content.get("average") or content["model"])
    return content["recipe"], network.to(device)


def run_chain(checkpoint: Path, volume: Path, mask: Path, device: str) -> dict[str, float]:
    """MONAI's chain; the mask is written beside `mask` under a name of MONAI's."""
    stages = Stages()
    import monai.transforms as mt
    import torch
    from monai.data.meta_tensor import MetaTensor
    from monai.inferers.inferer import SlidingWindowInferer

    recipe, network = load(checkpoint, device)
    spec, window = recipe["preprocess"], recipe["inference"]
    low, high = spec["hu_window"]
    inferer = SlidingWindowInferer(window["window_size"], window["batch_windows"], window["overlap"])
    read = mt.Compose([mt.LoadImaged("image"), mt.EnsureChannelFirstd("image")])
    pre = mt.Compose(
        [
            mt.Orientationd("image", axcodes="RAS"),
            mt.Spacingd("image", pixdim=spec["spacing_mm"], mode="bilinear"),
            mt.ScaleIntensityRanged("image", low, high, 0.0, 1.0, clip=True),
            mt.EnsureTyped("image", device=device),
        ]
    )
    post = mt.Compose(
        [
            mt.Activationsd("pred", softmax=True),
            mt.Invertd("pred", pre, orig_keys="image", nearest_interp=False, to_tensor=True),
            mt.AsDiscreted("pred", argmax=True),
        ]
    )
    save = mt.SaveImaged("pred", output_dir=str(mask.parent), output_postfix="seg", separate_folder=False)
    stages.lap("start")
    data: dict[str, Any] = read({"image": str(volume)})
    stages.lap("read")
    data = pre(data)
    stages.lap("prepare")
    with torch.no_grad():
        data["pred"] = MetaTensor(inferer(data["image"][None].as_tensor(), network)[0])
    stages.lap("network")
    data = post(data)
    stages.lap("restore")
    save(data)
    stages.lap("write")
    return stages.seconds


def run_tiling(checkpoint: Path, volume: Path, mask: Path, device: str) -> dict[str, float]:
    """nnU-Net's way with this network, spacing, intensities and windows."""
    stages = Stages()
    import numpy as np
    import SimpleITK
    import torch
    from monai.inferers.inferer import SlidingWindowInferer
    from scipy import ndimage

    recipe, network = load(checkpoint, device)
    spec, window = recipe["preprocess"], recipe["inference"]
    low, high = spec["hu_window"]
    inferer = SlidingWindowInferer(window["window_size"], 1, window["overlap"], mode="gaussian")
    stages.lap("start")
    image = SimpleITK.DICOMOrient(SimpleITK.ReadImage(str(volume)), "RAS")
    array = SimpleITK.GetArrayFromImage(image).transpose().astype(np.float32)
    stages.lap("read")
    zoom = [have / want for have, want in zip(image.GetSpacing(), spec["spacing_mm"], strict=True)]
    prepared = (np.clip(ndimage.zoom(array, zoom, order=3, mode="nearest"), low, high) - low) / (high - low)
    stages.lap("prepare")
    with torch.no_grad():
        logits = inferer(torch.from_numpy(prepared)[None, None].to(device), network)[0].cpu().numpy()
    stages.lap("network")
    back = [n / m for n, m in zip(array.shape, logits.shape[1:], strict=True)]
    labels = np.argmax([ndimage.zoom(channel, back, order=1, mode="nearest") for channel in logits], axis=0)
    stages.lap("restore")
    result = SimpleITK.GetImageFromArray(labels.astype(np.uint8).transpose())
    result.CopyInformation(image)
    SimpleITK.WriteImage(SimpleITK.DICOMOrient(result, "LPS"), str(mask), useCompression=True)
    stages.lap("write")
    return stages.seconds


def main() -> None:
    """Runs one way and prints its stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=("chain", "tiling"))
    for name in ("--model", "--volume", "--mask"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    run = run_chain if options.way == "chain" else run_tiling
    print(json.dumps(run(options.model, options.volume, options.mask, options.device)))


if __name__ == "__main__":
    main()
