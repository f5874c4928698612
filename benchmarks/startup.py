"""`ctseg --help` against `python -c "import torch"`: how long a person waits for an answer.

python benchmarks/startup.py [--repetitions 10]
"""

from __future__ import annotations

import argparse
import sys

from timing import in_turn, machine, ratios, spread


def main() -> None:
    """Prints both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=10)
    repetitions = parser.parse_args().repetitions
    commands = {
        "ctseg --help": [sys.executable, "-m", "ctseg", "--help"],
        "ctseg train spleen --set x.y=1 (refused)": [sys.executable, "-c", REFUSED],
        "python -c 'import torch'": [sys.executable, "-c", "import torch"],
    }
    results = in_turn(commands, repetitions)
    seconds = {name: [r.seconds for r in runs] for name, runs in results.items()}
    print(machine())
    for name, values in seconds.items():
        print(f"{name:42} {spread(values)} s")
    torch = seconds["python -c 'import torch'"]
    for name in list(commands)[:2]:
        print(f"{name:42} {spread(ratios(seconds[name], torch), 3)} of importing torch")


REFUSED = """
import sys
sys.argv = ["ctseg", "train", "spleen", "--set", "x.y=1"]
from ctseg.cli import main
try:
    main()
except SystemExit as end:
    assert end.code == 2
"""

if __name__ == "__main__":
    main()
