"""The only inference path: prepare -> sliding window -> restore. Every command that makes a mask ends here.

Scores of overlapping windows are averaged as logits with equal weights, as MONAI's SlidingWindowInferer does with
mode "constant". For two classes only the difference of the two logits is kept: one float32 channel on the network's
grid is all that is accumulated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ctseg.arrays import (
    Array,
    array_namespace,
    as_asked,
    cut_box,
    device_of,
    memory_order,
    release_array,
    through_torch,
    to_work_on,
    zeros,
)
from ctseg.engine.arrival import arriving
from ctseg.engine.backends import Forward
from ctseg.engine.clock import Clock
from ctseg.engine.fast import covering, windows_to_refine
from ctseg.engine.ladder import logits_within_memory, prepared_within_memory
from ctseg.engine.model import Model
from ctseg.engine.rounding import MOST_SHARE, Rounding
from ctseg.engine.runtime import memory_errors
from ctseg.engine.windows import Start, average, box_of, window_starts
from ctseg.errors import ModelError
from ctseg.preprocess import Prepared, restore, slabs_of
from ctseg.specs import Inference
from ctseg.volume import Geometry, PlaneStream, Volume, orientation_to_ras

OnWindow = Callable[[int, int], None]
"""Called after each network call with (calls done, calls in all); the latter rises where more turn out to be needed.

A window that runs again in float32 counts as one call.
"""


Ready = Callable[[int, int], None]
"""Returns once the planes from the first number to before the second are there."""


def all_there(_first: int, _stop: int) -> None:
    """Of an image that is complete."""


@dataclass(frozen=True)
class Placement:
    """Where the large arrays of a case lie: folders on whose disk they are scratch, or None for memory.

    Attributes:
        volumes: For what lies on the CT's grid: the CT and its mask.
        grids: For what lies on the network's grid: its input and the logits; on a GPU they lie there.
    """

    volumes: Path | None = None
    grids: Path | None = None


IN_MEMORY = Placement()
NO_IMAGE = np.empty((0, 0, 0), dtype=np.float32)
"""Of a CT whose image is not needed any more: that makes room."""
ALL_RAN_AGAIN = (
    "rounding would have turned too much of the mask: every window ran again; --precision float32 is faster here"
)


def predict(
    model: Model,
    volume: Volume,
    on_window: OnWindow | None = None,
    *,
    clock: Clock | None = None,
    placement: Placement = IN_MEMORY,
    fast: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> NDArray[np.uint8]:
    """The label map of a CT on its own grid: uint8 `[i, j, k]`, Fortran order.

    Args:
        model: Network and recipe.
        volume: CT in Hounsfield units, any orientation.
        on_window: Told of progress.
        clock: Told how long the stages "prepare", "network" and "restore" take.
        placement: Where arrays lie; it changes nothing else.
        fast: Leaves out windows that would hardly change the mask, see `ctseg.engine.fast`, and lets rounding turn more
            of it, see `ctseg.engine.rounding`.
        note: Told what a user should know of how it was done.

    Raises:
        ImageError: if its header claims a grid that no CT has.
        NotEnoughMemory: if it does not fit the device.
        OutputError: if the disk has no room for what is to lie there.
    """
    return predict_taken(model, lambda: volume, on_window, clock=clock, placement=placement, fast=fast, note=note)


def predict_taken(
    model: Model,
    take: Callable[[], Volume | PlaneStream],
    on_window: OnWindow | None = None,
    *,
    clock: Clock | None = None,
    placement: Placement = IN_MEMORY,
    fast: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> NDArray[np.uint8]:
    """As `predict`, of the CT that `take` gives, see `scores_taken`."""
    clock = clock or Clock()
    scores = scores_taken(model, take, on_window, clock=clock, placement=placement, fast=fast, note=note)
    with _memory_errors(scores.prepared.source, model), clock.stage("restore", model.runtime.device):
        return restore(scores.values_CXYZ, scores.prepared, placement.volumes)


@dataclass(frozen=True, eq=False)
class Scores:
    """What a network says of a CT, for `restore`: scores on its own grid, and where that lies."""

    values_CXYZ: Array
    prepared: Prepared


def scores_taken(
    model: Model,
    take: Callable[[], Volume | PlaneStream],
    on_window: OnWindow | None = None,
    *,
    clock: Clock,
    placement: Placement = IN_MEMORY,
    fast: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> Scores:
    """The scores of the CT that `take` gives: unless somebody else holds it, its memory is free once prepared.

    It may be read only now, on the CPU: windows go through the network as soon as their planes are there.
    `note` is told where a GPU has too little memory and what is done instead, see `ctseg.engine.ladder`, and where
    rounding could not be settled, see `ctseg.engine.rounding`.
    """
    volume, device = take(), model.runtime.device
    with _memory_errors(volume.geometry, model):
        with ExitStack() as arrivals:
            with clock.stage("prepare", device):
                if isinstance(volume, Volume):
                    prepared, arrival = prepared_within_memory(model, volume, placement.grids, note), None
                else:
                    coming = arriving(volume, model.recipe.preprocess, device, placement.grids)
                    prepared, arrival = arrivals.enter_context(coming)
                del volume
            with clock.stage("network", device):
                ready = all_there if arrival is None else arrival.wait
                by = orientation_to_ras(prepared.source)[2]

                def run(on: Model, image_XYZ: Array) -> Array:
                    inference, scratch = on.recipe.inference, placement.grids
                    return window_logits(
                        on, image_XYZ, inference, on_window, scratch, fast=fast, by=by, ready=ready, note=note
                    )

                image = [prepared.image_XYZ]
                prepared = replace(prepared, image_XYZ=NO_IMAGE)
                logits = logits_within_memory(model, image.pop, run, note)
                if arrival is not None:
                    arrival.wait_for_end()
            if arrival is not None:
                clock.move(arrival.seconds, "network", "read")
        with clock.stage("restore", device):
            return Scores(scores_from_logits(logits), prepared)


def _memory_errors(grid: Geometry, model: Model) -> AbstractContextManager[None]:
    return memory_errors(f"a CT of {'x'.join(map(str, grid.size))} voxels", model.runtime.device)


def scores_from_logits(logits_CXYZ: Array) -> Array:
    """Scores that `restore` takes, in place: P(foreground) - P(background) for one channel, else the softmax."""
    values_CXYZ = to_work_on(logits_CXYZ)
    xp = array_namespace(values_CXYZ)
    for box in slabs_of(values_CXYZ):
        slab = values_CXYZ[box]
        if len(slab) == 1:
            slab *= 0.5
            slab[...] = xp.tanh(slab)  # sigmoid(d) - sigmoid(-d)
        else:
            slab -= xp.max(slab, axis=0, keepdims=True)
            slab[...] = xp.exp(slab)
            slab /= xp.sum(slab, axis=0, keepdims=True)
    return logits_CXYZ


def window_logits(
    model: Model,
    image_XYZ: Array,
    inference: Inference,
    on_window: OnWindow | None = None,
    scratch: Path | None = None,
    *,
    fast: bool = False,
    by: tuple[int, int] = (0, 1),
    ready: Ready = all_there,
    note: Callable[[str], None] = lambda _: None,
) -> Array:
    """Averaged logits on the whole grid, float32 `[C, X, Y, Z]`; two classes give one channel: their difference.

    Where the image is smaller than the window, windows are padded with zeros, half before and half after it. Axes have
    the image's order in memory. On the CPU the logits lie on the disk of `scratch`, if it is given. `fast` leaves out
    windows that would hardly change the mask, and lets rounding turn more of it. Windows run in the order of their
    place along axis `by[0]`, ascending if `by[1]` is 1, and each once `ready` has returned for its range there. Where
    the model has an exact network beside a rounded one, windows whose rounding may have turned the mask run again on
    it; `note` is told if they are too many.
    """
    given, image_XYZ = image_XYZ, to_work_on(image_XYZ)
    if image_XYZ is not given:
        exact = None if model.exact is None else through_torch(model.exact)
        model = replace(model, forward=through_torch(model.forward), exact=exact)
    shape, window = _size(image_XYZ.shape), inference.window_size
    axis, sign = by
    starts = list(window_starts(_size(map(max, shape, window)), window, inference.overlap))
    starts.sort(key=lambda start: sign * start[axis])
    num_classes = model.recipe.num_classes
    channels = 1 if num_classes == 2 else num_classes
    grid = _Grid(image_XYZ, _zeros_like(image_XYZ, channels, scratch), window)
    batch = inference.batch_windows if model.runtime.device.type == "cuda" else 1
    groups = _groups_as_needed(starts, grid, batch) if fast else _groups(starts, batch)
    done: list[Start] = []
    for number, (group, calls) in enumerate(groups, start=1):
        ready(min(start[axis] for start in group), max(start[axis] for start in group) + grid.held[axis])
        for start, logits_CXYZ in zip(group, grid.logits(group, model.forward), strict=True):
            grid.add(start, logits_CXYZ)
        done += group
        if on_window is not None:
            on_window(number, calls)
    _settle_rounding(grid, done, model, on_window, note, fast=fast)
    average(grid.total_CXYZ, done, grid.held)
    if model.runtime.precision == "float16":
        _check_range(grid.total_CXYZ, model)
    return as_asked(grid.total_CXYZ, device_of(given))


def _check_range(logits_CXYZ: Array, model: Model) -> None:
    """Raises ModelError where float16, which ends at 65504, did not hold what the network computes."""
    xp = array_namespace(logits_CXYZ)
    if not bool(xp.all(xp.isfinite(logits_CXYZ))):
        raise ModelError(
            f"model '{model.path}': its answer is not a number in float16; choose --precision bfloat16 or float32"
        )


class _Grid:
    """The network's input and the sum of the logits of its windows.

    Args:
        image_XYZ: The input.
        total_CXYZ: Zeros to add to.
        window: The size of a window.

    Attributes:
        held: What a window holds of the image.
    """

    def __init__(self, image_XYZ: Array, total_CXYZ: Array, window: Start) -> None:
        self.total_CXYZ, self.window = total_CXYZ, window
        self.held = _size(map(min, image_XYZ.shape, window))
        self._image_XYZ = image_XYZ

    def logits(self, group: Sequence[Start], forward: Forward) -> Array:
        """What a network says of windows, of the voxels that they hold of the image: `[B, C, x, y, z]`."""
        windows = [cut_box(self._image_XYZ, start, self.window) for start in group]
        logits_BCXYZ = forward(array_namespace(self._image_XYZ).stack(windows)[:, None])
        if logits_BCXYZ.shape[1] > len(self.total_CXYZ):  # two classes, unless it is their difference already
            logits_BCXYZ = logits_BCXYZ[:, 1:] - logits_BCXYZ[:, :1]
        x, y, z = (slice((w - n) // 2, (w - n) // 2 + n) for n, w in zip(self.held, self.window, strict=True))
        return logits_BCXYZ[..., x, y, z]

    def clear(self) -> None:
        """Forgets what was added."""
        for box in slabs_of(self.total_CXYZ):
            self.total_CXYZ[box] = 0

    def add(self, start: Start, logits_CXYZ: Array, instead_of_CXYZ: Array | None = None) -> None:
        """Adds a window's logits, perhaps in place of others of it; what lies on a disk leaves the memory."""
        x, y, z = box_of(start, self.held)
        total_CXYZ = self.total_CXYZ[:, x, y, z]
        total_CXYZ += logits_CXYZ
        if instead_of_CXYZ is not None:
            total_CXYZ -= instead_of_CXYZ
        release_array(self._image_XYZ[x, y, z])
        release_array(total_CXYZ)


def _settle_rounding(
    grid: _Grid,
    done: Sequence[Start],
    model: Model,
    on_window: OnWindow | None,
    note: Callable[[str], None],
    *,
    fast: bool,
) -> None:
    """Puts the exact network's logits in place of the rounded one's, until rounding turns no more than it may.

    Which windows those are, and how many are too many, see `ctseg.engine.rounding`. Where they are too many, `note` is
    told, and with `fast`, which promises how much of the mask it may cost, all windows run again.
    """
    if model.exact is None or (len(done) * MOST_SHARE < 1 and not fast):
        return
    rounding = Rounding(grid.total_CXYZ, done, grid.held, fast=fast)
    number, needed = 0, rounding.needed()
    while number < needed <= rounding.most:
        start = rounding.windows[number]
        rounded_CXYZ, exact_CXYZ = (grid.logits([start], forward)[0] for forward in (model.forward, model.exact))
        rounding.learn(start, rounded_CXYZ, exact_CXYZ)
        grid.add(start, exact_CXYZ, instead_of_CXYZ=rounded_CXYZ)
        number, needed = number + 1, rounding.needed()
        if on_window is not None:
            to_run = number if needed > rounding.most else max(number, needed)
            on_window(len(done) + number, len(done) + to_run)
    if needed > rounding.most and fast:
        note(ALL_RAN_AGAIN)
        _run_all_again(grid, done, model.exact, on_window, calls_before=len(done) + number)
    elif needed > rounding.most:
        note(rounding.describe(number, tuple(model.recipe.labels.values())))


def _run_all_again(
    grid: _Grid, done: Sequence[Start], forward: Forward, on_window: OnWindow | None, calls_before: int
) -> None:
    """The sum of what another network says of the windows, in place of all that was added."""
    grid.clear()
    for number, start in enumerate(done, start=calls_before + 1):
        grid.add(start, grid.logits([start], forward)[0])
        if on_window is not None:
            on_window(number, calls_before + len(done))


def _groups(starts: Sequence[Start], batch: int, calls_before: int = 0) -> Iterator[tuple[Sequence[Start], int]]:
    """Windows of one network call each, with the number of calls in all."""
    calls = calls_before + math.ceil(len(starts) / batch)
    return ((starts[first : first + batch], calls) for first in range(0, len(starts), batch))


def _groups_as_needed(starts: Sequence[Start], grid: _Grid, batch: int) -> Iterator[tuple[Sequence[Start], int]]:
    """Like `_groups`: the fewest windows that cover all, then those that its total shows to be needed."""
    needed, done, calls = covering(starts, grid.window), list[Start](), 0
    while needed:
        yield from _groups(needed, batch, calls)
        calls += math.ceil(len(needed) / batch)
        done += needed
        ran = set(done)
        others = [start for start in starts if start not in ran]
        needed = windows_to_refine(grid.total_CXYZ, done, others, grid.held)


def _zeros_like(image_XYZ: Array, channels: int, scratch: Path | None) -> Array:
    """Zeros `[C, X, Y, Z]` with the image's order of axes in memory."""
    slowest_first = memory_order(image_XYZ)
    values = zeros((channels, *(image_XYZ.shape[axis] for axis in slowest_first)), device_of(image_XYZ), scratch)
    return array_namespace(values).permute_dims(values, (0, *(1 + slowest_first.index(n) for n in range(3))))


def _size(values: Iterable[int]) -> Start:
    x, y, z = values
    return x, y, z
