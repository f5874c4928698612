"""What `ctseg infer --fast` gains and what it costs: exact, fast in float32, and fast, on given CTs.

    python benchmarks/fast.py --model runs/spleen-001 --volume CT.nii.gz [CT.nii.gz ...] [--repetitions 5]

The three ways run in turn, each in a fresh process on the CPU, after one round that is not counted and fills the cache
of compiled networks. "fast, float32" leaves windows out and nothing else; "fast" also has reduced precision where the
CPU has it. Printed for each CT: seconds of the whole process with their spread, ratios to exact pair by pair, seconds
and share of the network, windows, and Dice of the mask against the exact one; in the end mean and lowest Dice.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from infer import Clock
from timing import Run, in_turn, machine, ratios, run, spread

WAYS = {"exact": ("float32", False), "fast, float32": ("float32", True), "fast": ("auto", True)}
"""Precision, and whether it is fast."""


def segment(checkpoint: Path, volume: Path, mask: Path, way: str) -> dict[str, Any]:
    """The same functions in the same order as `ctseg infer`: seconds of the network, windows, precision."""
    clock = Clock()
    from ctseg.engine.model import fast_in_bfloat16, load_model
    from ctseg.engine.predict import scores_from_logits, window_logits
    from ctseg.engine.runtime import start_runtime
    from ctseg.io.images import read_image, write_labels
    from ctseg.preprocess import prepare, restore

    precision, fast = WAYS[way]
    runtime = start_runtime("cpu", precision, fast=fast and fast_in_bfloat16(checkpoint))
    model = load_model(checkpoint, runtime)
    image = read_image(volume)
    prepared = prepare(image, model.recipe.preprocess, runtime.device)
    calls: list[int] = []
    clock.lap("prepare")
    logits = window_logits(
        model, prepared.image_XYZ, model.recipe.inference, lambda done, _: calls.append(done), fast=fast
    )
    clock.lap("network")
    write_labels(mask, restore(scores_from_logits(logits), prepared), image.geometry)
    return {"network": clock.seconds["network"], "windows": len(calls), "precision": runtime.precision}


def compare(checkpoint: Path, volume: Path, repetitions: int) -> dict[str, float | None]:
    """Runs the ways in turn on one volume, prints the table and gives back each way's Dice against exact."""
    with tempfile.TemporaryDirectory() as folder:
        masks = {way: Path(folder) / f"{way}.nii.gz" for way in WAYS}
        common = [sys.executable, __file__, "--model", str(checkpoint), "--volume", str(volume)]
        commands = {way: [*common, "--worker", way, "--mask", str(mask)] for way, mask in masks.items()}
        results = in_turn(commands, repetitions) if repetitions else {way: [run(c)] for way, c in commands.items()}
        agreement = {way: _dice(mask, masks["exact"]) for way, mask in masks.items()}
    _print_table(volume, results, agreement)
    return agreement


def _dice(mask: Path, exact: Path) -> float | None:
    """Mean over structures; None where exact has found nothing."""
    from ctseg.io.images import read_labels
    from ctseg.metrics import dice, mean_or_none

    ours, reference = read_labels(mask).array, read_labels(exact).array
    values = [dice(ours, reference, value) for value in range(1, int(max(reference.max(), ours.max())) + 1)]
    return mean_or_none([value for value in values if value is not None])


def _print_table(volume: Path, results: dict[str, list[Run]], agreement: dict[str, float | None]) -> None:
    exact = results["exact"]
    print(f"\n{volume.name}")
    print(f"{'':24}{'whole process, s':>25}{'ratio':>7}{'network, s':>25}{'ratio':>7}{'share':>7}{'windows':>10}  Dice")
    for way, runs in results.items():
        whole, network = [r.seconds for r in runs], [r.printed["network"] for r in runs]
        faster = statistics.median(ratios([r.seconds for r in exact], whole))
        network_faster = statistics.median(ratios([r.printed["network"] for r in exact], network))
        share = statistics.median(ratios(network, whole))
        windows = f"{runs[0].printed['windows']}/{exact[0].printed['windows']}"
        value = agreement[way]
        told = "nothing found" if value is None else f"{value:.5f}"
        print(
            f"{way + ' (' + runs[0].printed['precision'] + ')':24}{spread(whole):>25}{faster:>6.1f}x"
            f"{spread(network):>25}{network_faster:>6.1f}x{share:>7.0%}{windows:>10}  {told}"
        )
    sys.stdout.flush()


def main() -> None:
    """Parses the command line; a worker prints its figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="as for `ctseg infer`; a checkpoint in the end")
    parser.add_argument("--volume", type=Path, nargs="+", required=True)
    parser.add_argument("--repetitions", type=int, default=5, help="0: one run each, for windows and Dice alone")
    parser.add_argument("--worker", choices=tuple(WAYS), help=argparse.SUPPRESS)
    parser.add_argument("--mask", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(segment(Path(options.model), options.volume[0], options.mask, options.worker)))
        return
    from ctseg.workspace import resolve_model

    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CTSEG_CACHE"] = folder
        found = [compare(resolve_model(options.model), volume, options.repetitions) for volume in options.volume]
    for way in list(WAYS)[1:]:
        values = [value for one in found if (value := one[way]) is not None]
        if values:
            print(f"{way}: Dice against exact, mean {statistics.mean(values):.5f}, lowest {min(values):.5f}")


if __name__ == "__main__":
    main()
