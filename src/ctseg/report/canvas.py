"""What every picture shares: matplotlib's object interface, one font, reproducible bytes.

No pyplot, no display, no state shared between calls. Colours of the pictures are from Okabe and Ito's palette, which
people with any colour vision can tell apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ctseg.files import atomic_path

FONT = "DejaVu Sans"
"""Comes with matplotlib, so pictures are alike everywhere."""
DPI = 160


def new_figure(width_inches: float, height_inches: float, colour: str) -> Any:
    """An empty picture."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width_inches, height_inches), dpi=DPI, facecolor=colour)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path) -> None:
    """Writes the PNG, whole or not at all; the same bytes for the same picture."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=DPI, metadata={"Software": None})
