"""From a file and clicks to a mask's file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ctseg.clicks import Click
from ctseg.engine.model import Model
from ctseg.engine.session import Coordinates, clicks_of, keep_clicked_component, segment_clicks, voxel_of
from ctseg.files import make_folder
from ctseg.io.images import read_image, write_labels


@dataclass(frozen=True)
class Annotation:
    """The mask that was written: of which clicks, in voxels of the image, and how large the structure is."""

    image: Path
    mask: Path
    clicks: tuple[Click, ...]
    volume_ml: float


def annotate(
    model: Model,
    image: Path,
    clicks: Sequence[tuple[tuple[float, float, float], bool]],
    output: Path,
    *,
    coordinates: Coordinates = "voxel",
    largest_component: bool = False,
) -> Annotation:
    """Writes the mask of what is clicked on to `output`, uint8 0 and 1 on the image's own grid.

    Args:
        model: One for clicks.
        image: A CT.
        clicks: Place, in `coordinates`, and whether the structure is there.
        output: A file of any format that masks have.
        coordinates: See Coordinates.
        largest_component: Keep only the largest part that holds a positive click.

    Raises:
        ClickError: if a click lies outside the image.
        ImageError: if the image cannot be read.
        ModelError: if the model is not one for clicks.
        OutputError: if the mask cannot be written.
    """
    clicks_of(model)
    volume = read_image(image)
    placed = tuple(Click(voxel_of(point, volume.geometry, coordinates), positive) for point, positive in clicks)
    mask = segment_clicks(model, volume, placed)
    if largest_component:
        mask = keep_clicked_component(mask, placed)
    make_folder(output.parent)
    write_labels(output, mask, volume.geometry)
    return Annotation(image, output, placed, int(np.count_nonzero(mask)) * volume.geometry.voxel_volume_ml)
