"""Simulated clicks: ctseg against the transforms of monai.apps.deepgrow, on the same labels and masks, in one process.

One round of a training's simulation for one batch: the errors of a mask are found, a click is drawn in the larger one
of each image, and the maps of all clicks so far are made. MONAI's transforms work on one image at a time, with NumPy
and SciPy on the host; with --device cuda they get their arrays there for free.

    python benchmarks/clicks.py
    python benchmarks/clicks.py --size 128 --batch 4 --repetitions 9 --device cuda
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ctseg.clicks import Click, network_input, next_click
from ctseg.engine.process import tune_allocator
from timing import machine, ratios, spread

SIGMA = 2
MADE = {"rough": (0.30, 6.0), "medium": (0.20, 3.0), "close": (0.15, 1.0)}
"""Masks: radius of the organ as a share of the patch, and by how many voxels the mask lies beside it."""


def make_masks(size: int, batch: int, kind: str) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Labels and masks `[B, X, Y, Z]`: ellipsoids, the masks moved and a little smaller, each image another one."""
    share, shift = MADE[kind]
    rng = np.random.default_rng(0)
    grid = np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"))
    labels: list[NDArray[np.bool_]] = []
    masks: list[NDArray[np.bool_]] = []
    for _ in range(batch):
        centre, radii = rng.uniform(0.4, 0.6, 3) * size, rng.uniform(0.8, 1.25, 3) * share * size
        for kept, moved, scale in ((labels, 0.0, 1.0), (masks, shift, 0.95)):
            apart = (grid - (centre + moved)[:, None, None, None]) / (scale * radii)[:, None, None, None]
            kept.append((apart**2).sum(0) < 1)
    return np.stack(labels), np.stack(masks)


def monai_round(
    image: NDArray[np.float32], labels: NDArray[np.float32], masks: NDArray[np.float32], guidance: list[str]
) -> Any:
    """The batch after one round with MONAI's transforms, image by image as its Interaction does it."""
    from monai.apps.deepgrow.transforms import AddGuidanceSignald, AddRandomGuidanced, FindDiscrepancyRegionsd

    steps = (FindDiscrepancyRegionsd(), AddRandomGuidanced(), AddGuidanceSignald(sigma=SIGMA))
    done = []
    for n in range(len(image)):
        data: dict[str, Any] = {"image": image[n], "label": labels[n], "pred": masks[n]}
        data |= {"guidance": guidance[n], "probability": 1.0}
        for step in steps:
            data = step(data)
        done.append(torch.from_numpy(data["image"]))
    return torch.stack(done)


def our_round(image: Tensor, labels: Tensor, masks: Tensor, clicks: list[list[Click]], seed: int) -> Tensor:
    """The same with ctseg."""
    after = []
    for n, own in enumerate(clicks):
        click = next_click(labels[n], masks[n], np.random.default_rng([seed, n]))
        after.append(own if click is None else [*own, click])
    result = network_input(image, after, SIGMA)
    if result.is_cuda:
        torch.cuda.synchronize()
    return result


def milliseconds(work: Callable[[], Any]) -> tuple[float, float]:
    """How long it takes: by the clock, and of this process's CPU time, which neighbours on the machine disturb less."""
    started = time.perf_counter(), time.process_time()
    work()
    return 1e3 * (time.perf_counter() - started[0]), 1e3 * (time.process_time() - started[1])


def compare(options: argparse.Namespace, kind: str) -> None:
    """Runs both in turn and prints a line."""
    labels, masks = make_masks(options.size, options.batch, kind)
    image = np.random.default_rng(1).random((options.batch, 1, *labels.shape[1:]), dtype=np.float32)
    points = [[tuple(int(v) for v in np.argwhere(label)[k * 997]) for k in range(options.clicks)] for label in labels]
    clicks = [[Click((x, y, z)) for x, y, z in own] for own in points]
    guidance = [str([[[0, *p] for p in own], [[-1] * 4 for _ in own]]) for own in points]
    device = torch.device(options.device)
    image_there, labels_there, masks_there = (torch.from_numpy(a).to(device) for a in (image, labels, masks))
    label_floats, mask_floats = (a[:, None].astype(np.float32) for a in (labels, masks))
    stock, ours = [], []
    for repetition in range(options.repetitions + 1):
        theirs = partial(monai_round, image, label_floats, mask_floats, guidance)
        own = partial(our_round, image_there, labels_there, masks_there, clicks, repetition)
        pair = milliseconds(theirs), milliseconds(own)
        if repetition:  # the first one warms up
            stock.append(pair[0])
            ours.append(pair[1])
    wrong = int((labels != masks).sum()) // options.batch
    print(f"{kind}: {wrong:,} wrong voxels in each")
    for name, column in (("by the clock", 0), ("CPU time", 1)):
        a, b = [row[column] for row in stock], [row[column] for row in ours]
        faster = ratios(a, b)
        print(
            f"  {name:14}{spread(a, 0):>26}{spread(b, 1):>24}{statistics.median(faster):>8.0f}x"
            f"  ({min(faster):.0f}x to {max(faster):.0f}x)"
        )


def main() -> None:
    """Parses the command line and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128, help="of the patch along each axis")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--clicks", type=int, default=5, help="made before this round")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    tune_allocator()
    if options.threads:
        torch.set_num_threads(options.threads)
    print(f"{machine()}, {torch.get_num_threads()} threads, {options.device}")
    print(f"one round, {options.batch} patches of {options.size}^3, {options.clicks} clicks each before; milliseconds")
    print(f"{'':16}{'monai.apps.deepgrow':>26}{'ctseg':>24}{'faster':>9}")
    for kind in MADE:
        compare(options, kind)


if __name__ == "__main__":
    main()
