"""Annotation: a CT, clicks, and after each of them a mask on the CT's own grid.

A mask depends on the CT and on the clicks alone, not on the masks before: `segment_clicks` is all there is, and a
`Session` saves preparing the CT again. It holds that on the host as float16, 2 bytes for each voxel of the network's
grid, and one mask, a byte for each voxel of the CT: 90 MB for 512 x 512 x 150 voxels of 0.8 x 0.8 x 3 mm at a spacing
of 1 x 1 x 3 mm. Sessions share nothing but their model.

The network sees one window around all clicks (see `regions`); outside of it the mask is empty. A 2D network sees one
window for each slice that has a positive click.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ctseg.clicks import Click, Point, network_input
from ctseg.engine.model import Model
from ctseg.engine.predict import scores_from_logits
from ctseg.engine.runtime import memory_errors
from ctseg.errors import ClickError, ModelError
from ctseg.preprocess import Prepared, prepare, restore
from ctseg.regions import Region, point_in_window, region_around, window_geometry
from ctseg.sampling import cut_region
from ctseg.specs import ClicksSpec
from ctseg.volume import Geometry, Volume

Coordinates = Literal["voxel", "lps", "ras"]
"""Of a click: indices along the image's own array axes, or millimetres in the patient towards L, P, S or R, A, S."""


class Session:
    """One CT being annotated; several threads may use it.

    `click`, `undo` and `reset` return the new mask: uint8 `[i, j, k]` on the CT's grid, Fortran order. It is a new
    array each time.
    """

    def __init__(self, model: Model, volume: Volume) -> None:
        self.model = model
        self.geometry = volume.geometry
        self._prepared = prepare_for_clicks(model, volume)
        self._lock = threading.Lock()
        self._clicks: tuple[Click, ...] = ()
        self._mask = _empty(volume.geometry)

    @property
    def clicks(self) -> tuple[Click, ...]:
        """All clicks in the order they came, in voxels of the CT."""
        return self._clicks

    @property
    def mask(self) -> NDArray[np.uint8]:
        """The mask of all clicks; empty without any."""
        return self._mask

    def click(
        self, point: Sequence[float], positive: bool = True, *, coordinates: Coordinates = "voxel"
    ) -> NDArray[np.uint8]:
        """The mask with one click more.

        Args:
            point: Where, in `coordinates`.
            positive: Whether the structure is there.
            coordinates: See Coordinates.

        Raises:
            ClickError: if it lies outside the CT.
        """
        click = Click(voxel_of(point, self.geometry, coordinates), positive)
        with self._lock:
            return self._change((*self._clicks, click))

    def undo(self) -> NDArray[np.uint8]:
        """The mask without the last click; without clicks nothing changes."""
        with self._lock:
            return self._change(self._clicks[:-1])

    def reset(self) -> NDArray[np.uint8]:
        """The empty mask: all clicks are gone."""
        with self._lock:
            return self._change(())

    def _change(self, clicks: tuple[Click, ...]) -> NDArray[np.uint8]:
        self._mask = segment_prepared(self.model, self._prepared, clicks)
        self._clicks = clicks
        return self._mask


def segment_clicks(model: Model, volume: Volume, clicks: Sequence[Click]) -> NDArray[np.uint8]:
    """The mask of these clicks, given in voxels of the CT: uint8 `[i, j, k]` on its grid, Fortran order.

    Raises:
        ClickError: if a click lies outside the CT.
        ImageError: if its header claims a grid that no CT has.
        ModelError: if the model is not one for clicks.
        NotEnoughMemory: if it does not fit the device.
    """
    return segment_prepared(model, prepare_for_clicks(model, volume), clicks)


def prepare_for_clicks(model: Model, volume: Volume) -> Prepared:
    """What `segment_prepared` takes: the CT on the network's grid, as float16 on the host.

    Raises:
        ImageError: if its header claims a grid that no CT has.
        ModelError: if the model is not one for clicks.
        NotEnoughMemory: if it does not fit the device.
    """
    clicks_of(model)
    size = "x".join(map(str, volume.geometry.size))
    with memory_errors(f"a CT of {size} voxels", model.runtime.device):
        prepared = prepare(volume, model.recipe.preprocess, model.runtime.device)
        return dataclasses.replace(prepared, image_XYZ=prepared.image_XYZ.half().cpu())


def segment_prepared(model: Model, prepared: Prepared, clicks: Sequence[Click]) -> NDArray[np.uint8]:
    """As `segment_clicks`, of a CT that `prepare_for_clicks` has prepared for this model."""
    mask = _empty(prepared.source)
    points = [voxel_of(click.point, prepared.source, "voxel") for click in clicks]
    on_grid = [Click(_on_grid(p, prepared), c.positive) for p, c in zip(points, clicks, strict=True)]
    for seen in _windows(on_grid, is_2d=model.recipe.is_2d):
        with memory_errors("a window with clicks", model.runtime.device):
            np.maximum(mask, _segment_window(model, prepared, seen), out=mask)
    return mask


def clicks_of(model: Model) -> ClicksSpec:
    """How the model's network is told of clicks.

    Raises:
        ModelError: if it is not.
    """
    if model.recipe.clicks is None:
        raise ModelError(
            f"model '{model.path}': recipe {model.recipe.name} segments without clicks; use `ctseg infer`, or name a "
            f"model of a recipe such as deepgrow_3d"
        )
    return model.recipe.clicks


def voxel_of(point: Sequence[float], geometry: Geometry, coordinates: Coordinates = "voxel") -> Point:
    """The voxel of the grid that a point lies in.

    Raises:
        ClickError: if it lies in none.
    """
    place = np.asarray(point, dtype=np.float64)
    if place.shape != (3,) or not np.isfinite(place).all():
        raise ClickError(f"click {_shown(point)}: expected three numbers")
    if coordinates != "voxel":
        affine = geometry.affine if coordinates == "lps" else geometry.affine_ras
        place = np.linalg.solve(affine, [*place, 1.0])[:3]
    voxel = np.floor(np.round(place, 6) + 0.5)
    if (voxel < 0).any() or (voxel >= geometry.size).any():
        at = "" if coordinates == "voxel" else f" ({coordinates} mm, voxel {_shown(np.round(place, 1).tolist())})"
        size = " x ".join(map(str, geometry.size))
        raise ClickError(f"click {_shown(point)}{at}: outside the image, which has {size} voxels counted from 0")
    i, j, k = (int(n) for n in voxel)
    return i, j, k


def keep_clicked_component(mask: NDArray[np.uint8], clicks: Sequence[Click]) -> NDArray[np.uint8]:
    """The largest 26-connected part of a mask that holds a positive click; the largest of all where none does."""
    import cc3d

    parts = cc3d.connected_components(mask, connectivity=26)
    sizes = np.bincount(parts.ravel(order="K"))
    sizes[0] = 0
    clicked = [n for n in {int(parts[c.point]) for c in clicks if c.positive} if n]
    if sizes.any():
        kept = max(clicked, key=lambda n: (sizes[n], -n)) if clicked else int(sizes.argmax())
        mask = np.asfortranarray((parts == kept).astype(np.uint8))
    return mask


def _empty(geometry: Geometry) -> NDArray[np.uint8]:
    return np.zeros(geometry.size, dtype=np.uint8, order="F")


def _shown(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


def _on_grid(voxel: Point, prepared: Prepared) -> Point:
    """The voxel of the network's grid nearest to a voxel of the CT."""
    place = np.linalg.solve(prepared.geometry.affine, prepared.source.affine @ [*voxel, 1.0])[:3]
    x, y, z = (int(n) for n in np.clip(np.floor(np.round(place, 6) + 0.5), 0, np.array(prepared.geometry.size) - 1))
    return x, y, z


def _windows(clicks: list[Click], *, is_2d: bool) -> list[list[Click]]:
    """The clicks of each window: all, or those of each slice; none where nothing is positive."""
    groups = (
        [[c for c in clicks if c.point[2] == z] for z in sorted({c.point[2] for c in clicks})] if is_2d else [clicks]
    )
    return [group for group in groups if any(click.positive for click in group)]


def _segment_window(model: Model, prepared: Prepared, clicks: list[Click]) -> NDArray[np.uint8]:
    """The mask of one window, on the CT's grid."""
    spec, window, grid = clicks_of(model), model.recipe.inference.window_size, prepared.geometry
    low_x, low_y, low_z = (min(c.point[axis] for c in clicks) for axis in range(3))
    high_x, high_y, high_z = (max(c.point[axis] for c in clicks) for axis in range(3))
    region = region_around((low_x, low_y, low_z), (high_x, high_y, high_z), grid.size, window, spec.margin_voxels)
    image = cut_region(prepared.image_XYZ, region, window).to(model.runtime.device).float()
    seen = [Click(point_in_window(c.point, region, window), c.positive) for c in clicks]
    logits_BCXYZ = model.forward(network_input(image[None, None], [seen], spec.sigma_voxels))
    scores_XYZ = _framed(scores_from_logits(logits_BCXYZ[0].clone())[0], region, grid.size)
    return restore(
        scores_XYZ[None], dataclasses.replace(prepared, geometry=window_geometry(grid, region, window, pad=1))
    )


def _framed(scores_XYZ: Tensor, region: Region, shape: Point) -> Tensor:
    """The scores of a window with a voxel of background around; where the window ends with the CT, of the same."""
    framed = functional.pad(scores_XYZ, (1,) * 6, value=-1.0)
    for axis in range(3):
        if region.start[axis] <= 0:
            framed.select(axis, 0).copy_(framed.select(axis, 1))
        if region.start[axis] + region.size[axis] >= shape[axis]:
            framed.select(axis, -1).copy_(framed.select(axis, -2))
    return framed
