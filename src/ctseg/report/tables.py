"""Tables as plain aligned text: readable on a terminal, in a batch log and in an e-mail."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ctseg.progress import printable

GAP = "  "


def render_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The table as lines of text, without a newline at the end.

    Columns of numbers, rounded to text or not, are aligned right, all others left. Floats have 4 decimals; None is "-".

    Raises:
        ValueError: if a row has more or fewer cells than there are columns.
    """
    cells = [list(columns), *([_text(value) for value in row] for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*cells, strict=True)]
    numeric = [_is_numeric([row[n] for row in rows]) for n in range(len(columns))]
    lines = [_line(line, widths, numeric) for line in cells]
    lines.insert(1, GAP.join("-" * width for width in widths))
    return "\n".join(lines)


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else printable(str(value))


def _is_numeric(values: Sequence[object]) -> bool:
    known = [value for value in values if value is not None]
    return bool(known) and all(_is_number(value) for value in known)


def _is_number(value: object) -> bool:
    if isinstance(value, str):
        return re.fullmatch(r"-?\d+(\.\d+)?", value) is not None  # rounded by the caller
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _line(cells: Sequence[str], widths: Sequence[int], numeric: Sequence[bool]) -> str:
    padded = (
        cell.rjust(width) if right else cell.ljust(width)
        for cell, width, right in zip(cells, widths, numeric, strict=True)
    )
    return GAP.join(padded).rstrip()
