"""The program `ctseg`, which is also `python -m ctseg`."""

import gc

from ctseg.lean import importing

with importing():
    from ctseg.cli import program

    gc.freeze()

if __name__ == "__main__":
    program()
