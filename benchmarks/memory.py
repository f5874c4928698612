"""Memory and seconds of `ctseg infer` on large CTs, with and without a limit, against what `--dry-run` says.

    python benchmarks/memory.py --model runs/spleen-001 [--slices 400 1000 2000] [--volume CT.nii.gz ...]
        [--limit none 1.5G 1G] [--backend torch] [--precision float32] [--repetitions 1] [--folder DIR]

Each run is a fresh process; its peak is the kernel's own account, its seconds are those of the stages from reading to
writing, without start-up. One line for each CT and limit: the way that was planned, planned and measured memory and
seconds (medians of the repetitions) and by how much the plan is above what came, and whether the mask is that of the
first limit. Made CTs of 512 x 512 voxels of 0.75 x 0.75 x 0.5 mm are made of one of 400 slices, upside down every
other time. They and the masks take up to 2 GB in --folder, by default a temporary one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from timing import machine, run

BLOCK_SLICES = 400


def make_cts(folder: Path, slices: list[int]) -> dict[int, Path]:
    """A CT of each number of slices, made once."""
    import numpy as np

    from ctseg.io.images import write_image
    from ctseg.sources.phantom import ADULT, centered_grid, make_phantom
    from ctseg.volume import Volume

    paths = {number: folder / f"made_512x512x{number}.nii.gz" for number in slices}
    missing = {number: path for number, path in paths.items() if not path.exists()}
    if not missing:
        return paths
    spacing_mm = (0.75, 0.75, 0.5)
    grid = centered_grid((512, 512, BLOCK_SLICES), spacing_mm)
    block = make_phantom(0, 0, size=ADULT, grid=grid).image.array
    for number, path in missing.items():
        array = np.empty((number, 512, 512), block.dtype).T
        for index, start in enumerate(range(0, number, BLOCK_SLICES)):
            part = block if index % 2 == 0 else block[:, :, ::-1]
            array[:, :, start : start + BLOCK_SLICES] = part[:, :, : number - start]
        write_image(path, Volume(array, centered_grid((512, 512, number), spacing_mm)))
    return paths


def measure(command: list[str], output: Path, repetitions: int) -> dict[str, Any]:
    """What `--dry-run` said, what it took, and a digest of the mask."""
    said = subprocess.run([*command, "--dry-run", "--json"], capture_output=True, text=True, check=False)
    if said.returncode == 2:
        raise RuntimeError(said.stderr)
    (plan,) = json.loads(said.stdout)["cases"]
    if plan["error"]:
        return {"way": plan["error"]}
    planned_mb, planned_s = plan["memory_bytes"] / 1e6, plan["seconds"]
    runs = [run([*command, "--json", "--overwrite"]) for _ in range(repetitions)]
    peak_mb = statistics.median(done.peak_mb for done in runs) * 2**20 / 1e6
    seconds = statistics.median(done.printed[0]["seconds"] for done in runs)
    (mask,) = output.glob("*_seg.nii*")
    return {
        "way": plan["way"],
        "memory, MB": f"{planned_mb:.0f} planned, {peak_mb:.0f} ({planned_mb / peak_mb - 1:+.0%})",
        "seconds": f"{planned_s:.1f} planned, {seconds:.1f} ({planned_s / seconds - 1:+.0%})",
        "mask": hashlib.sha256(mask.read_bytes()).hexdigest(),
    }


def main() -> None:
    """Runs every CT under every limit and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--slices", type=int, nargs="*", default=[400, 1000, 2000])
    parser.add_argument("--volume", type=Path, nargs="+", default=[])
    parser.add_argument("--backend", default="auto", help="as for `ctseg infer`")
    parser.add_argument("--precision", default="auto", help="as for `ctseg infer`")
    parser.add_argument("--limit", nargs="+", default=["none", "1.5G", "1G"])
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # a child's peak begins with its parent's memory
            made = pool.submit(make_cts, folder, options.slices).result()
        for path in [*made.values(), *options.volume]:
            first = None
            for limit in options.limit:
                with tempfile.TemporaryDirectory(dir=folder) as temporary_output:
                    output = Path(temporary_output) / "masks"
                    command = [sys.executable, "-m", "ctseg", "infer", str(path), "--model", options.model]
                    command += ["--output", str(output), "--device", "cpu", "--backend", options.backend, "--quiet"]
                    command += ["--precision", options.precision]
                    command += [] if limit == "none" else ["--max-memory", limit]
                    row = measure(command, output, options.repetitions)
                mask = row.pop("mask", None)
                first = first or mask
                cells = "  ".join(f"{name} {value}" for name, value in row.items())
                print(f"{path.name}  limit {limit}  {cells}  same mask: {mask == first}", flush=True)


if __name__ == "__main__":
    main()
