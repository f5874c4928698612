"""A folder of CTs by one `ctseg infer`: the whole process against the sum of each stage over all CTs.

    python benchmarks/cohort.py --model runs/spleen-001 --volume CT.nii.gz ... [--number 20] [--repetitions 3]
        [--backend openvino] [--precision float32]

The CTs are copied, in turn, until there are as many as --number. Stages that ran beside each other make the process
shorter than their sum; at best it takes as long as its slowest stage. Each run is a fresh process, after one that is
not counted. Medians, smallest and largest in brackets.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from stock import STAGES
from timing import in_turn, machine, spread

STAGES_OF_A_CT = STAGES[1:]


def main() -> None:
    """Runs the cohort and prints its stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--volume", type=Path, nargs="+", required=True)
    parser.add_argument("--number", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--backend", default="auto", help="as for `ctseg infer`")
    parser.add_argument("--precision", default="auto", help="as for `ctseg infer`")
    parser.add_argument("--device", default="auto", help="as for `ctseg infer`")
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as temporary:
        cts = Path(temporary) / "cts"
        cts.mkdir()
        for number in range(options.number):
            volume = options.volume[number % len(options.volume)]
            shutil.copyfile(volume, cts / f"{number:03}_{volume.name}")
        command = [sys.executable, "-m", "ctseg", "infer", str(cts), "--model", options.model, "--output"]
        command += [str(Path(temporary) / "masks"), "--json", "--quiet", "--overwrite"]
        command += ["--backend", options.backend, "--precision", options.precision, "--device", options.device]
        runs = in_turn({"cohort": command}, options.repetitions)["cohort"]
    outcomes: list[list[dict[str, Any]]] = [run.printed for run in runs]
    sums = {
        stage: [sum(one["stage_seconds"].get(stage, 0.0) for one in rows) for rows in outcomes]
        for stage in STAGES_OF_A_CT
    }
    slowest = max(STAGES_OF_A_CT, key=lambda stage: statistics.median(sums[stage]))
    print(f"{options.number} CTs of {len(options.volume)} kinds")
    for stage in STAGES_OF_A_CT:
        print(f"{stage:20}{spread(sums[stage]):>25} s in all")
    print(
        f"{'whole process':20}{spread([run.seconds for run in runs]):>25} s, of one CT: "
        f"{statistics.median(run.seconds for run in runs) / options.number:.2f} s"
    )
    together = [sum(values) for values in zip(*sums.values(), strict=True)]
    print(f"of the sum of the stages: {spread([r.seconds / s for r, s in zip(runs, together, strict=True)])}")
    print(f"of the slowest, {slowest}: {spread([r.seconds / s for r, s in zip(runs, sums[slowest], strict=True)])}")
    print(f"peak memory, MB: {spread([run.peak_mb for run in runs], 0)}")


if __name__ == "__main__":
    main()
