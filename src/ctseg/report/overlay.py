"""What a mask looks like in its CT: three planes on black."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ctseg.report.canvas import FONT, new_figure, save_figure
from ctseg.volume import Geometry, Volume, to_ras

PREDICTION_COLOUR = "#E69F00"
LABEL_COLOUR = "#56B4E9"
OVERLAY_INCHES = (10.0, 9.0)
"""Room for the planes together: width, height."""
OVERLAY_MIN_WIDTH_INCHES = 6.0
GUTTER_INCHES = 0.32
"""Black border around each plane; holds its direction letters."""
MARGIN_MM = 5.0
"""Kept around what is not black."""
HEADER_INCHES = 0.78
FOOTER_INCHES = 0.42


@dataclass(frozen=True)
class _Plane:
    """One way to cut a RAS volume. All three show the right or the front of the patient on the left, as is usual."""

    name: str
    across: int
    """RAS axis that the plane cuts; the other two run along the picture's columns and rows."""
    letters: str
    """Directions at the left, right, top and bottom edge."""

    def cut(self, array_RAS: NDArray[Any], index: int) -> NDArray[Any]:
        """The slice as rows from bottom to top, columns from left to right."""
        picture: NDArray[Any] = np.moveaxis(array_RAS, self.across, 0)[index, ::-1].T
        return picture

    def size_mm(self, geometry: Geometry) -> tuple[float, float]:
        """Width and height."""
        columns, rows = (axis for axis in range(3) if axis != self.across)
        extent = [n * mm for n, mm in zip(geometry.size, geometry.spacing_mm, strict=True)]
        return extent[columns], extent[rows]


AXIAL, CORONAL, SAGITTAL = _Plane("Axial", 2, "RLAP"), _Plane("Coronal", 1, "RLHF"), _Plane("Sagittal", 0, "APHF")


def draw_overlay(
    path: Path,
    image: Volume,
    mask: NDArray[np.uint8],
    label: NDArray[np.uint8] | None,
    hu_window: tuple[float, float],
    title: str,
) -> None:
    """Writes a PNG of three planes through the mask: radiological view, one scale in mm for all, on black.

    The planes go through the centre of mass of the label, or of the mask where there is no label, or else through the
    middle of the volume. A volume of a single slice is shown in that plane alone.

    Args:
        path: The PNG.
        image: The CT, in any axis order.
        mask: The prediction on the image's grid; everything above 0 is drawn alike.
        label: The expert's label on the same grid, or None.
        hu_window: HU shown as black and as white.
        title: Stands above the planes.

    Raises:
        OutputError: if the file cannot be written.
    """
    volumes = [image] + [Volume(shape, image.geometry) for shape in (mask, label) if shape is not None]
    geometry, (ct, prediction, *labels) = _crop([to_ras(volume) for volume in volumes], hu_window[0])
    expert = labels[0] if labels else None
    centre = _centre(prediction, expert)
    boxes, (width, height), inches_per_mm = _lay_out(geometry)
    figure = new_figure(width, height, "black")
    for plane, box in boxes.items():
        left, bottom, plane_width, plane_height = box
        axes = figure.add_axes((left / width, bottom / height, plane_width / width, plane_height / height))
        index = centre[plane.across]
        _draw_plane(axes, plane.cut(ct, index), hu_window)
        _draw_shape(axes, plane.cut(prediction, index), PREDICTION_COLOUR, fill=True)
        if expert is not None:
            _draw_shape(axes, plane.cut(expert, index), LABEL_COLOUR, fill=False)
        _draw_letters(figure, plane, box)
    _draw_header(figure, title, {"prediction": prediction, "label": expert})
    _draw_footer(figure, geometry, hu_window, inches_per_mm)
    save_figure(figure, path)


def _crop(volumes_RAS: list[Volume], black_hu: float) -> tuple[Geometry, list[NDArray[Any]]]:
    """The grid and arrays without borders that hold no shape and no CT above `black_hu`."""
    ct, *shapes = (volume.array for volume in volumes_RAS)
    shown = ct > black_hu
    for shape in shapes:
        shown |= shape > 0
    geometry = volumes_RAS[0].geometry
    kept = []
    for axis, spacing_mm in enumerate(geometry.spacing_mm):
        indices = np.flatnonzero(shown.any(axis=tuple({0, 1, 2} - {axis})))
        margin = math.ceil(MARGIN_MM / spacing_mm)
        kept.append(slice(max(0, indices[0] - margin), indices[-1] + 1 + margin) if indices.size else slice(None))
    arrays = [volume.array[tuple(kept)] for volume in volumes_RAS]
    affine = geometry.affine.copy()
    affine[:3, 3] = (geometry.affine @ [*(s.start or 0 for s in kept), 1])[:3]
    x, y, z = arrays[0].shape
    return Geometry((x, y, z), affine), arrays


def _centre(prediction_RAS: NDArray[Any], label_RAS: NDArray[Any] | None) -> tuple[int, ...]:
    """The voxel the planes go through. Where such a plane would miss the shape, the plane that shows most of it."""
    for shape in (label_RAS, prediction_RAS):
        if shape is None or not shape.any():
            continue
        voxels_along = [np.count_nonzero(shape, axis=tuple({0, 1, 2} - {axis})) for axis in range(3)]
        means = [int(n @ np.arange(n.size) / n.sum() + 0.5) for n in voxels_along]
        return tuple(mean if n[mean] else int(n.argmax()) for n, mean in zip(voxels_along, means, strict=True))
    return tuple(n // 2 for n in prediction_RAS.shape)


Box = tuple[float, float, float, float]


def _lay_out(geometry: Geometry) -> tuple[dict[_Plane, Box], tuple[float, float], float]:
    """Each plane's place (left, bottom, width, height), the figure's size, both in inches, and inches per mm.

    Of the arrangements "side by side" and "axial left, the others stacked", the one with the larger scale.
    """
    flat = [plane for plane in (AXIAL, CORONAL, SAGITTAL) if geometry.size[plane.across] == 1]
    arrangements = [[flat[:1]]] if flat else [[[AXIAL], [CORONAL], [SAGITTAL]], [[AXIAL], [CORONAL, SAGITTAL]]]
    inches_per_mm, columns = max(((_scale(columns, geometry), columns) for columns in arrangements), key=lambda c: c[0])
    sizes = {plane: [mm * inches_per_mm for mm in plane.size_mm(geometry)] for column in columns for plane in column}
    widths = [max(sizes[plane][0] for plane in column) + 2 * GUTTER_INCHES for column in columns]
    heights = [sum(sizes[plane][1] + 2 * GUTTER_INCHES for plane in column) for column in columns]
    width = max(sum(widths), OVERLAY_MIN_WIDTH_INCHES)
    left = (width - sum(widths)) / 2
    boxes: dict[_Plane, Box] = {}
    for column, column_width in zip(columns, widths, strict=True):
        top = FOOTER_INCHES + max(heights)
        for plane in column:
            w, h = sizes[plane]
            boxes[plane] = (left + (column_width - w) / 2, top - GUTTER_INCHES - h, w, h)
            top -= h + 2 * GUTTER_INCHES
        left += column_width
    return boxes, (width, HEADER_INCHES + max(heights) + FOOTER_INCHES), inches_per_mm


def _scale(columns: list[list[_Plane]], geometry: Geometry) -> float:
    """The largest inches per mm at which the columns of planes fit."""
    width_mm = sum(max(plane.size_mm(geometry)[0] for plane in column) for column in columns)
    height_mm = max(sum(plane.size_mm(geometry)[1] for plane in column) for column in columns)
    gutters = (2 * GUTTER_INCHES * len(columns), 2 * GUTTER_INCHES * max(len(column) for column in columns))
    return min((OVERLAY_INCHES[0] - gutters[0]) / width_mm, (OVERLAY_INCHES[1] - gutters[1]) / height_mm)


def _draw_plane(axes: Any, cut: NDArray[Any], hu_window: tuple[float, float]) -> None:
    low, high = hu_window
    axes.imshow(cut, cmap="gray", vmin=low, vmax=high, origin="lower", interpolation="bicubic", aspect="auto")
    axes.set_axis_off()


def _draw_shape(axes: Any, cut: NDArray[Any], colour: str, fill: bool) -> None:
    """Outlines the voxels above 0; the border of zeros closes outlines at the edge of the picture."""
    inside = np.pad((cut > 0).astype(np.float32), 1)
    if not inside.any():
        return
    rows, columns = (np.arange(-1, n - 1) for n in inside.shape)
    limits = axes.axis()
    if fill:
        axes.contourf(columns, rows, inside, levels=[0.5, 1.5], colors=[colour], alpha=0.35)
    axes.contour(columns, rows, inside, levels=[0.5], colors=[colour], linewidths=1.4)
    axes.axis(limits)


def _draw_letters(figure: Any, plane: _Plane, box: Box) -> None:
    """Direction letters in the middle of each edge, the plane's name above its corner."""
    width, height = figure.get_size_inches()
    left, bottom, w, h = box
    gap = GUTTER_INCHES / 2
    places = [(left - gap, bottom + h / 2), (left + w + gap, bottom + h / 2)]
    places += [(left + w / 2, bottom + h + gap), (left + w / 2, bottom - gap)]
    for letter, (x, y) in zip(plane.letters, places, strict=True):
        style = {"size": 11, "weight": "bold", "color": "#D8D8D8"}
        figure.text(x / width, y / height, letter, family=FONT, ha="center", va="center_baseline", **style)
    name = {"size": 10, "color": "#9A9A9A", "ha": "left", "va": "center_baseline"}
    figure.text(left / width, (bottom + h + gap) / height, plane.name, family=FONT, **name)


def _draw_header(figure: Any, title: str, shapes: Mapping[str, NDArray[Any] | None]) -> None:
    """The title, and below it a legend that says so where a shape is empty."""
    from matplotlib.patches import Patch

    width, height = figure.get_size_inches()
    left, y = GUTTER_INCHES / width, 1 - 0.3 / height
    style = {"family": FONT, "size": 15, "weight": "bold", "color": "white", "va": "center_baseline"}
    figure.text(left, y, title, parse_math=False, **style)
    fills = {"prediction": PREDICTION_COLOUR + "59", "label": "none"}
    edges = {"prediction": PREDICTION_COLOUR, "label": LABEL_COLOUR}
    handles = [
        Patch(facecolor=fills[name], edgecolor=edges[name], label=name if shape.any() else f"{name} (empty)")
        for name, shape in shapes.items()
        if shape is not None
    ]
    figure.legend(
        handles=handles, loc="center left", bbox_to_anchor=(left, 1 - 0.62 / height), ncols=2, frameon=False,
        prop={"family": FONT, "size": 11}, labelcolor="white", borderpad=0, borderaxespad=0,
        handlelength=1.3, handleheight=0.9, handletextpad=0.6, columnspacing=2.0,
    )  # fmt: skip


def _draw_footer(figure: Any, geometry: Geometry, hu_window: tuple[float, float], inches_per_mm: float) -> None:
    """How the CT is shown on the left, a scale bar for all planes on the right."""
    from matplotlib.lines import Line2D

    width, height = figure.get_size_inches()
    y, right = FOOTER_INCHES / 2 / height, 1 - GUTTER_INCHES / width
    spacing = " × ".join(f"{mm:.2f}" for mm in geometry.spacing_mm)
    text = f"{hu_window[0]:g} to {hu_window[1]:g} HU   ·   voxel {spacing} mm".replace("-", "\N{MINUS SIGN}")
    style = {"family": FONT, "size": 10, "color": "#9A9A9A", "va": "center_baseline"}
    figure.text(GUTTER_INCHES / width, y, text, **style)
    bar_mm = _round_length(1.6 / inches_per_mm)
    start = right - bar_mm * inches_per_mm / width
    figure.add_artist(Line2D([start, right], [y, y], color="#D8D8D8", linewidth=2, marker="|", markersize=9))
    figure.text(start - 0.12 / width, y, f"{bar_mm:g} mm", ha="right", **(style | {"color": "#D8D8D8"}))


def _round_length(longest_mm: float) -> float:
    """The largest of 1, 2, 5, 10, 20, 50, ... that is at most `longest_mm`."""
    power = 10.0 ** math.floor(math.log10(longest_mm))
    return max(step * power for step in (1, 2, 5) if step * power <= longest_mm)
