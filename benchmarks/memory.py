"""Peak memory of `ctseg infer` on large made CTs, with and without a limit, against what was planned.

    python benchmarks/memory.py --model runs/spleen-001 [--slices 400 1000 2000] [--limit none 1.5G 1G]
        [--backend torch] [--folder DIR]

Each run is a fresh process; its peak is the kernel's own account. One line for each CT and limit: the way that was
planned, planned and measured memory and seconds, and whether the mask is that of the first limit. CTs of 512 x 512
voxels of 0.75 x 0.75 x 0.5 mm are made of one of 400 slices, upside down every other time. They and the masks take
up to 2 GB in --folder, by default a temporary one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
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


def measure(model: str, backend: str, volume: Path, limit: str, output: Path) -> dict[str, Any]:
    """What `--dry-run` said, what it took, and a digest of the mask."""
    command = [sys.executable, "-m", "ctseg", "infer", str(volume), "--model", model, "--output", str(output)]
    command += ["--device", "cpu", "--backend", backend, "--quiet"]
    command += [] if limit == "none" else ["--max-memory", limit]
    said = subprocess.run([*command, "--dry-run", "--json"], capture_output=True, text=True, check=False)
    if said.returncode == 2:
        raise RuntimeError(said.stderr)
    (plan,) = json.loads(said.stdout)["cases"]
    if plan["error"]:
        return {"way": plan["error"]}
    done = run(command)
    (mask,) = output.glob("*_seg.nii.gz")
    return {
        "way": plan["way"],
        "planned_MB": plan["memory_bytes"] / 1e6,
        "peak_MB": done.peak_mb * 2**20 / 1e6,
        "planned_s": plan["seconds"],
        "process_s": done.seconds,
        "mask": hashlib.sha256(mask.read_bytes()).hexdigest(),
    }


def main() -> None:
    """Runs every CT under every limit and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--slices", type=int, nargs="+", default=[400, 1000, 2000])
    parser.add_argument("--backend", default="auto", help="as for `ctseg infer`")
    parser.add_argument("--limit", nargs="+", default=["none", "1.5G", "1G"])
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:  # a child's peak begins with its parent's memory
            cts = pool.submit(make_cts, folder, options.slices).result()
        for number, path in cts.items():
            first = None
            for limit in options.limit:
                with tempfile.TemporaryDirectory(dir=folder) as output:
                    row = measure(options.model, options.backend, path, limit, Path(output) / "masks")
                mask = row.pop("mask", None)
                first = first or mask
                cells = "  ".join(f"{k} {v:.1f}" if isinstance(v, float) else str(v) for k, v in row.items())
                print(f"512x512x{number}  limit {limit}  {cells}  same mask: {mask == first}", flush=True)


if __name__ == "__main__":
    main()
