"""`python -m ctseg` is the same program as `ctseg`."""

from ctseg.cli import program

program()
