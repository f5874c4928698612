"""How well a mask agrees with its label."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def dice(mask: NDArray[np.uint8], label: NDArray[np.uint8], value: int = 1) -> float | None:
    """Dice coefficient of the voxels that equal `value`: 2 |A and B| / (|A| + |B|), in 0..1.

    None where the label has no such voxel: the coefficient says nothing then (MONAI's `ignore_empty` rule).

    Raises:
        ValueError: if the shapes differ.

    Reference: Dice 1945, doi:10.2307/1932409.
    """
    if mask.shape != label.shape:
        raise ValueError(f"mask and label must have one shape, got {mask.shape} and {label.shape}")
    in_mask, in_label = mask == value, label == value
    label_voxels = int(np.count_nonzero(in_label))
    if label_voxels == 0:
        return None
    overlap = int(np.count_nonzero(in_mask & in_label))
    return 2.0 * overlap / (int(np.count_nonzero(in_mask)) + label_voxels)


def mean_or_none(values: list[float]) -> float | None:
    """The arithmetic mean, or None of nothing."""
    return float(np.mean(values)) if values else None


def sd_or_none(values: list[float]) -> float | None:
    """The sample standard deviation (n - 1), or None of fewer than two."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
