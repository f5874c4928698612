"""Where the organs of a label map are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def index_organs(label_XYZ: NDArray[np.uint8]) -> tuple[NDArray[np.int32], list[list[int]]]:
    """The flat indices (C order) of all labelled voxels, organ by organ and slice by slice, and where each begins.

    A section is an organ in one slice: its label value, z, where its indices start and stop, the lowest and highest x,
    the lowest and highest y.
    """
    flat = np.flatnonzero(label_XYZ)
    value = label_XYZ.reshape(-1)[flat].astype(np.int64)
    order = np.lexsort((flat, flat % label_XYZ.shape[2], value))
    flat, value = flat[order], value[order]
    x, y, z = np.unravel_index(flat, label_XYZ.shape)
    starts = np.flatnonzero((np.diff(value, prepend=0) != 0) | (np.diff(z, prepend=-1) != 0))
    if len(starts) == 0:
        return flat.astype(np.int32), []
    stops = [*starts[1:], len(flat)]
    bounds = [f.reduceat(part, starts) for part in (x, y) for f in (np.minimum, np.maximum)]
    table = np.column_stack([value[starts], z[starts], starts, stops, *bounds])
    return flat.astype(np.int32), [[int(n) for n in row] for row in table]
