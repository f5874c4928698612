"""The program `ctseg`, which is also `python -m ctseg`."""

import gc
import os
import sys

from ctseg.lean import importing

try:
    with importing():
        from ctseg.cli import program

        gc.freeze()
except KeyboardInterrupt:  # as `ctseg.cli` has it later
    print("ctseg: interrupted", file=sys.stderr, flush=True)
    os._exit(130)

if __name__ == "__main__":
    program()
