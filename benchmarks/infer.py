"""`ctseg infer` against others on the same weights and CT: whole processes, stage by stage, and the masks.

    python benchmarks/infer.py --model runs/spleen-001 | --fresh lung [--volume CT.nii.gz ...]
        [--way bundle chain tiling torch:float32 openvino:float32 openvino:bfloat16 openvino:fast]
        [--window 96 96 96] [--overlap 0.5] [--repetitions 5] [--device cuda]

"bundle" is `python -m monai.bundle run` of the checkpoint exported as a MONAI bundle, the way of MONAI's Model Zoo;
"chain" and "tiling" are in `stock.py`. BACKEND:PRECISION and BACKEND:fast are the command `ctseg infer` as anyone types
it, start-up included. All run in turn, each in a fresh process, after a round that is not counted; before that, each
way of ctseg runs once with an empty cache of compiled networks ("cold"). Files are in the system's cache.

Without --volume made CTs of 512 x 512 x 120 and 512 x 512 x 400 are used; `made:1000` makes one of 1000 slices.
--window and --overlap replace the recipe's. --fresh takes a recipe with made weights,
where nothing was trained: its masks mean nothing, but they must be the same. Ratios are against the first way.
All ways run on --device; with "cpu", the default, none sees a GPU. Peak memory is that of the process on the host.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from stock import STAGES
from timing import Run, in_turn, machine, ratios, run, spread

WAYS = (
    "bundle",
    "chain",
    "torch:float32",
    "openvino:float32",
    "torch:bfloat16",
    "openvino:bfloat16",
    "openvino:fast",
)
OTHERS = ("bundle", "chain", "tiling")
MADE = ("made:120", "made:400")


@dataclass(frozen=True)
class Subject:
    """What is segmented by what, and where the masks go."""

    checkpoint: Path
    bundle: Path
    volume: Path
    folder: Path
    device: str

    def masks(self, way: str) -> Path:
        """The folder of a way's mask."""
        return self.folder / way.replace(":", "-")

    def mask(self, way: str) -> Path:
        """A way's mask, whatever it is called."""
        return next(self.masks(way).glob("*_seg.nii*"))

    def command(self, way: str) -> list[str]:
        """What runs it."""
        output = self.masks(way)
        output.mkdir(exist_ok=True)
        if way == "bundle":
            cts = self.folder / "cts"
            cts.mkdir(exist_ok=True)
            if not (cts / self.volume.name).exists():
                (cts / self.volume.name).symlink_to(self.volume.resolve())
            config = ["--config_file", str(self.bundle / "configs" / "inference.json"), "--bundle_root"]
            places = [str(self.bundle), "--dataset_dir", str(cts), "--output_dir", str(output)]
            return [sys.executable, "-m", "monai.bundle", "run", *config, *places]
        if way in OTHERS:
            stock = str(Path(__file__).with_name("stock.py"))
            files = ["--volume", str(self.volume), "--mask", str(output / "ct_seg.nii.gz")]
            return [sys.executable, stock, way, "--model", str(self.checkpoint), "--device", self.device, *files]
        backend, precision = way.split(":")
        how = ["--fast"] if precision == "fast" else ["--precision", precision]
        common = ["--device", self.device, "--backend", backend, "--json", "--quiet", "--overwrite"]
        files = [str(self.volume), "--model", str(self.checkpoint), "--output", str(output)]
        return [sys.executable, "-m", "ctseg", "infer", *files, *common, *how]


def compare(subject: Subject, ways: list[str], repetitions: int, elsewhere: Executor) -> dict[str, float]:
    """Runs all ways in turn on one volume, prints the tables and gives back each one's Dice against the first."""
    cold = {}
    for way in ways:
        if way not in OTHERS:
            with tempfile.TemporaryDirectory() as empty:
                cold[way] = run(subject.command(way), {"CTSEG_CACHE": empty}).seconds
    results = in_turn({way: subject.command(way) for way in ways}, repetitions)
    _print_processes(subject.volume, results, cold)
    _print_stages(results)
    found = {}
    for way in ways[1:]:
        found[way], told = elsewhere.submit(agreement, subject.mask(way), subject.mask(ways[0])).result()
        print(f"{way:20}mask: {told}", flush=True)
    return found


def _print_processes(volume: Path, results: dict[str, list[Run]], cold: dict[str, float]) -> None:
    first = next(iter(results.values()))
    print(f"\n{volume.name}")
    print(f"{'':20}{'whole process, s':>25}{'ratio':>7}{'cold, s':>9}{'peak memory, MB':>25}{'ratio':>7}")
    for way, runs in results.items():
        seconds, peaks = ([getattr(r, field) for r in runs] for field in ("seconds", "peak_mb"))
        faster = statistics.median(ratios([r.seconds for r in first], seconds))
        smaller = statistics.median(ratios([r.peak_mb for r in first], peaks))
        told = f"{cold[way]:.1f}" if way in cold else "-"
        print(f"{way:20}{spread(seconds):>25}{faster:>6.1f}x{told:>9}{spread(peaks, 0):>25}{smaller:>6.1f}x")
    sys.stdout.flush()


def _print_stages(results: dict[str, list[Run]]) -> None:
    print(f"{'median s of':20}" + "".join(f"{stage:>9}" for stage in STAGES) + f"{'share outside the network':>28}")
    for way, runs in results.items():
        found = [seconds for r in runs if (seconds := _stages(r))]
        if not found:
            continue
        medians = {stage: statistics.median(seconds[stage] for seconds in found) for stage in STAGES}
        outside = statistics.median(1 - s["network"] / r.seconds for s, r in zip(found, runs, strict=True))
        print(f"{way:20}" + "".join(f"{medians[stage]:>9.2f}" for stage in STAGES) + f"{outside:>28.0%}")


def _stages(done: Run) -> dict[str, float] | None:
    """Seconds of each stage; those of the process that belong to none are its start and its end."""
    printed: Any = done.printed
    if isinstance(printed, list):  # of `ctseg infer --json`
        printed = {**dict.fromkeys(STAGES, 0.0), **printed[0]["stage_seconds"]}
    if not isinstance(printed, dict):
        return None
    return {**printed, "start": done.seconds - sum(printed[stage] for stage in STAGES[1:])}


def agreement(ours: Path, wanted: Path) -> tuple[float, str]:
    """Dice of two masks, and a line about it."""
    import numpy as np

    from ctseg.io.images import read_labels

    a, b = read_labels(ours).array, read_labels(wanted).array
    total = int(np.count_nonzero(a)) + int(np.count_nonzero(b))
    dice = 2 * int(np.count_nonzero((a == b) & (b > 0))) / total if total else 1.0
    return dice, f"Dice {dice:.6f}, {int(np.count_nonzero(a != b))} of {int(np.count_nonzero(b))} voxels differ"


def make_volume(name: str, folder: Path) -> Path:
    """A file, or the made CT that `made:SLICES` names."""
    if not name.startswith("made:"):
        return Path(name)
    import nibabel

    from ctseg.sources.phantom import ADULT, centered_grid, make_phantom

    slices = int(name.removeprefix("made:"))
    grid = centered_grid((512, 512, slices), (0.75, 0.75, 300 / slices))
    image = make_phantom(0, slices, size=ADULT, grid=grid).image
    path = folder / f"made_512x512x{slices}.nii.gz"
    nibabel.save(nibabel.Nifti1Image(image.array, grid.affine_ras), path)
    return path


def make_checkpoint(options: argparse.Namespace, folder: Path) -> Path:
    """The checkpoint of --model, or made weights for --fresh, with the windows of --window."""
    import torch

    from ctseg.engine.checkpoint import save_checkpoint
    from ctseg.networks import network_for
    from ctseg.recipe import load_recipe
    from ctseg.workspace import resolve_model

    path = folder / "best.pt"
    if options.fresh:
        recipe = load_recipe(options.fresh)
        torch.manual_seed(0)
        network = network_for(recipe).train()
        with torch.no_grad():  # batch statistics that are not a fresh network's
            network(torch.rand(2, 1, *(min(n, 64) for n in recipe.inference.window_size)))
        save_checkpoint(path, {"recipe": recipe.to_dict(), "model": network.state_dict()})
    else:
        shutil.copyfile(resolve_model(options.model), path)
    asked = {"window_size": options.window, "overlap": options.overlap}
    content = torch.load(path, weights_only=True)
    content["recipe"]["inference"] |= {key: value for key, value in asked.items() if value is not None}
    torch.save(content, path)
    return path


def make_bundle(checkpoint: Path, folder: Path) -> None:
    """Exports the checkpoint as a MONAI bundle."""
    from ctseg.engine.export import export_bundle
    from ctseg.engine.runtime import start_runtime

    export_bundle(checkpoint, folder, start_runtime("cpu"))


def describe_gpu() -> str:
    """One line about the GPU that a run takes."""
    import torch

    return f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, CUDA {torch.version.cuda}"


def main() -> None:
    """Parses the command line and prints a table for every volume."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    weights = parser.add_mutually_exclusive_group(required=True)
    weights.add_argument("--model", help="as for `ctseg infer`; a checkpoint in the end")
    weights.add_argument("--fresh", metavar="RECIPE")
    parser.add_argument("--volume", nargs="+", default=list(MADE))
    parser.add_argument("--window", type=int, nargs=3)
    parser.add_argument("--overlap", type=float)
    parser.add_argument("--way", nargs="+", default=list(WAYS))
    parser.add_argument("--repetitions", type=int, default=5, help="0: a single round")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the bundle takes a GPU where it sees one
    print(machine())
    found: dict[str, list[float]] = {}
    # What takes memory is done elsewhere, as the peak of a child begins with that of its parent.
    with tempfile.TemporaryDirectory() as temporary, ProcessPoolExecutor(1, get_context("spawn")) as elsewhere:
        if options.device == "cuda":
            print(elsewhere.submit(describe_gpu).result())
        folder = Path(temporary)
        os.environ["CTSEG_CACHE"] = str(folder / "cache")
        checkpoint = elsewhere.submit(make_checkpoint, options, folder).result()
        bundle = folder / "bundle"
        if "bundle" in options.way:
            elsewhere.submit(make_bundle, checkpoint, bundle).result()
        for number, name in enumerate(options.volume):
            place = folder / str(number)
            place.mkdir()
            volume = elsewhere.submit(make_volume, name, place).result()
            subject = Subject(checkpoint, bundle, volume, place, options.device)
            for way, dice in compare(subject, options.way, options.repetitions, elsewhere).items():
                found.setdefault(way, []).append(dice)
    print("\nDice against the first way's masks, mean and lowest:")
    for way, values in found.items():
        print(f"{way:20}{statistics.mean(values):.6f} {min(values):.6f}")


if __name__ == "__main__":
    main()
