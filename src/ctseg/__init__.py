"""ctseg: CT segmentation from the shell. Research use only, not for diagnosis."""

__version__ = "0.1.0"
