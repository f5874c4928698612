"""What each CT will take before it is read, and where its arrays lie so that the process stays within its memory.

What the network needs is measured on a window of zeros: seconds and memory depend on the CPU, the backend and the
precision. All else follows from the headers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType

import ctseg
from ctseg.ahead import stop_unpacking
from ctseg.arrays import as_asked, zeros
from ctseg.engine.cache import Entry, cache_key, read_entry, write_entry
from ctseg.engine.cases import case_extent
from ctseg.engine.clock import Clock
from ctseg.engine.compiled import VERSION, library_version
from ctseg.engine.model import Model
from ctseg.engine.predict import IN_MEMORY, Placement, window_logits
from ctseg.engine.process import cpu_kind, give_back_memory, resident_bytes
from ctseg.engine.rounding import MOST_SHARE
from ctseg.engine.runtime import memory_errors
from ctseg.engine.windows import num_windows
from ctseg.errors import ImageError, NotEnoughMemory
from ctseg.io import Extent
from ctseg.jobs import Job, Options
from ctseg.limits import available_memory
from ctseg.preprocess import network_geometry
from ctseg.progress import Progress
from ctseg.recipe import Recipe
from ctseg.volume import orientation_to_ras

PLAIN, VOLUMES, ALL = "in memory", "CT and mask on disk", "all on disk"
TOO_LARGE, UNREADABLE = "does not fit", "cannot be read"
"""Ways of a case. Masks are the same voxel for voxel; on disk takes longer."""
SPARE_BYTES = 48 * 2**20
"""What slabs and readers take beside all that is counted."""
SPARE_SHARE = 0.2
"""Of what a window takes: the heap's gaps differ from run to run, and so what it grows by."""
SECONDS_PER_CASE, SECONDS_PER_VOXEL, STREAMED_SECONDS_PER_VOXEL = 0.08, 6e-9, 3.5e-9
"""Of reading, preparing, restoring and writing on two CPU cores; of a streamed CT, what the network waits for."""
MEASURED_CALLS = 3
"""torch settles the memory of a network only in its third call."""
AGAIN_SHARE = 0.1
"""Of windows in reduced precision that run again in float32, see `ctseg.engine.rounding`; as seen on real CTs."""
OVERLAY_BYTES_PER_VOXEL = 2
"""Drawing looks at the whole CT and mask at once, and at a map of what to show."""


@dataclass(frozen=True)
class NetworkCost:
    """What a network takes here.

    Attributes:
        seconds: For a window.
        window_bytes: How much the process grows by its first windows.
        base_bytes: What the process has in memory then, without any CT.
        again_seconds: For a window that runs again in float32, see `ctseg.engine.rounding`; 0 where none may.
    """

    seconds: float
    window_bytes: int
    base_bytes: int
    again_seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one CT is to be done, and what it takes.

    Attributes:
        image: The CT.
        way: PLAIN, VOLUMES, ALL, TOO_LARGE or UNREADABLE.
        error: Why it cannot be done, if so.
        size: Of the CT, in voxels.
        windows: Calls of the network; with `--fast` at most, as only the run itself shows which it leaves out, and
            without those that rounding has run again.
        seconds: In all.
        memory_bytes: The most that the process has in memory.
        beside_bytes: Of memory while another CT goes through the network: it is read before, or its mask written after.
        disk_bytes: Of scratch files.
        placement: Where the arrays lie.
        streamed: Whether the CT is prepared while it is read, and its mask written while it is restored: neither is
            ever in memory as a whole.
    """

    image: Path
    way: str
    error: str = ""
    size: tuple[int, int, int] = (0, 0, 0)
    windows: int = 0
    seconds: float = 0.0
    memory_bytes: int = 0
    beside_bytes: int = 0
    disk_bytes: int = 0
    placement: Placement = IN_MEMORY
    streamed: bool = False

    def describe(self) -> str:
        """Its memory and disk, for logs."""
        return f"up to {gigabytes(self.memory_bytes)} of memory, {gigabytes(self.disk_bytes)} of disk"


def gigabytes(number: int) -> str:
    """Bytes for people."""
    return f"{number / 1e9:.2f} GB"


def duration(seconds: float) -> str:
    """Seconds for people: "40 s", "3 min", "2.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


NO_PLANS: Mapping[Path, Plan] = MappingProxyType({})


def measure_network(model: Model) -> NetworkCost:
    """What the network takes on a window, tried out now and remembered for `network_cost`.

    On the CPU, where a GPU has no memory for one window.

    Raises:
        NotEnoughMemory: if not even one window fits the device.
    """
    give_back_memory()
    before = _bytes_of_process()
    again_seconds = 0.0
    try:
        with memory_errors("one window", model.runtime.device):
            seconds = _seconds_of_window(model)
            if model.exact is not None:
                again_seconds = seconds + _seconds_of_window(replace(model, forward=model.exact))
    except NotEnoughMemory:
        if model.on_cpu is None:
            raise
        return measure_network(model.on_cpu())
    after = _bytes_of_process()
    about = {"seconds": seconds, "again_seconds": again_seconds, "window_bytes": after - before}
    write_entry(_key(model), Entry(about, b""))
    return NetworkCost(seconds, after - before, after, again_seconds)


def _bytes_of_process() -> int:
    """What it has in memory, but for what was unpacked ahead: that goes before the first window runs."""
    num_bytes_ahead = stop_unpacking()
    return resident_bytes() - num_bytes_ahead


def _seconds_of_window(model: Model) -> float:
    device = model.runtime.device
    image_XYZ = as_asked(zeros(model.recipe.inference.window_size, device), device)
    seconds = math.inf
    for _ in range(MEASURED_CALLS):
        clock = Clock()
        with clock.stage("network", device):
            window_logits(replace(model, exact=None), image_XYZ, model.recipe.inference)
        seconds = min(seconds, clock.seconds["network"])
    return seconds


def network_cost(model: Model) -> NetworkCost:
    """What was measured for this network on this machine the last time; measured now if it never was.

    Raises:
        NotEnoughMemory: as `measure_network`.
    """
    kept = read_entry(_key(model))
    try:
        about = kept.about  # type: ignore[union-attr]
        seconds, again_seconds = float(about["seconds"]), float(about["again_seconds"])
        window_bytes = int(about["window_bytes"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return measure_network(model)
    give_back_memory()
    return NetworkCost(seconds, window_bytes, _bytes_of_process() + window_bytes, again_seconds)


def _seconds_again(windows: int, cost: NetworkCost, *, fast: bool) -> float:
    """Of windows that run again in float32: with `fast` the most, when one shows that all have to."""
    if fast and cost.again_seconds:
        return cost.again_seconds + windows * (cost.again_seconds - cost.seconds)
    return windows * AGAIN_SHARE * cost.again_seconds if windows * MOST_SHARE >= 1 else 0.0


def _key(model: Model) -> str:
    facts = {
        "what": "cost of a window",
        "ctseg": ctseg.__version__,
        "compiled": VERSION,
        "library": library_version(model.backend),
        "model": model.sha256,
        "backend": model.backend,
        "exact": model.exact is not None,
        "runtime": model.runtime.describe(),
        "cpu": cpu_kind(),
    }
    return cache_key(facts)


@dataclass(frozen=True)
class RunPlan:
    """How the CTs of a run are to be done.

    Attributes:
        cases: One for each, in order; those that cannot be done have an `error`.
        max_bytes: Of memory that the process may have.
        limited_by: Who says so.
        overlap: Whether the next CT may be read, and the last mask written, while the network runs.
        fast: Whether windows may be left out, so that the seconds are the most.
    """

    cases: tuple[Plan, ...]
    max_bytes: int
    limited_by: str
    overlap: bool = True
    fast: bool = False

    def summary(self) -> str:
        """One line: "20 CTs, about 2 min, up to 1.20 GB of 24.00 GB (cgroup limit)"."""
        able = [plan for plan in self.cases if not plan.error]
        text = "1 CT" if len(self.cases) == 1 else f"{len(self.cases)} CTs"
        if able:
            most = gigabytes(max(plan.memory_bytes for plan in able))
            text += f", {'at most' if self.fast else 'about'} {duration(sum(plan.seconds for plan in able))}"
            text += f", up to {most} of {gigabytes(self.max_bytes)} ({self.limited_by})"
        return text + (f"; {len(self.cases) - len(able)} cannot be done" if len(able) < len(self.cases) else "")


def plan_run(
    model: Model,
    jobs: Sequence[Job],
    options: Options,
    scratch: Path,
    progress: Progress,
    *,
    max_bytes: int | None = None,
    measure: bool = False,
) -> RunPlan:
    """How each job is to be done; only headers are read.

    Args:
        model: Whose recipe says the grid and the windows.
        jobs: The CTs.
        options: How they are read and what is written.
        scratch: Folder for arrays on disk.
        progress: Told how far it is.
        max_bytes: Of memory that the process may have; None: what this machine, its cgroup or Slurm allows.
        measure: Whether the network is tried out even where its cost is known.

    Raises:
        NotEnoughMemory: if not even one window of the network fits the device.
    """
    if not jobs:
        return RunPlan((), max_bytes or 0, "")
    cost = measure_network(model) if measure or max_bytes is not None else network_cost(model)
    allowed, limited_by = (max_bytes, "--max-memory") if max_bytes else available_memory(resident_bytes())
    alone: list[Plan] = []
    ahead: list[Plan] = []
    plan_one = partial(plan_case, keep=options.needs_voxels, fast=options.fast)
    progress.start("reading headers", len(jobs))
    for job in jobs:
        try:
            extent = case_extent(job, options)
            writing_bytes = _writing_bytes(job, extent, options.overlays)
            plan_it = partial(plan_one, model, extent, cost, allowed, scratch, writing_bytes=writing_bytes)
            streamed, whole = plan_it(streamed=True), plan_it()
        except ImageError as error:
            streamed = whole = Plan(image=job.image, way=UNREADABLE, error=str(error))
        alone.append(_named(streamed, job))
        ahead.append(_named(whole, job) if ahead else alone[0])  # nothing goes through the network before the first
        progress.advance()
    progress.finish()
    together = _overlapped(ahead)
    overlap = all(
        plan.way == by_itself.way and (plan.error or plan.memory_bytes <= allowed)
        for plan, by_itself in zip(together, alone, strict=True)
    )  # rather one after another than through the disk
    return RunPlan(tuple(together if overlap else alone), allowed, limited_by, overlap, options.fast)


def _named(plan: Plan, job: Job) -> Plan:
    told = f"'{job.image}': {plan.error}" if plan.error and str(job.image) not in plan.error else plan.error
    return replace(plan, image=job.image, error=told)


def _overlapped(plans: Sequence[Plan]) -> list[Plan]:
    """The plans with what the neighbours of each take meanwhile: the one before is written, the next one read."""
    beside = [(0, 0), *((0, 0) if plan.error else (plan.beside_bytes, plan.disk_bytes) for plan in plans), (0, 0)]
    return [
        replace(
            plan,
            memory_bytes=plan.memory_bytes + before[0] + after[0],
            disk_bytes=plan.disk_bytes + before[1] + after[1],
        )
        for plan, before, after in zip(plans, beside[:-2], beside[2:], strict=True)
    ]


def plan_case(
    model: Model,
    extent: Extent,
    cost: NetworkCost,
    max_bytes: int,
    scratch: Path,
    *,
    writing_bytes: int = 0,
    keep: bool = False,
    streamed: bool = False,
    fast: bool = False,
) -> Plan:
    """The first way that stays within `max_bytes`: in memory, the CT and its mask on disk, or the grids as well.

    Args:
        model: As for `plan_run`.
        extent: Of the CT.
        cost: Of the model's network.
        max_bytes: Of memory that the process may have.
        scratch: Folder for arrays on disk.
        writing_bytes: Of memory while the mask is written, wherever the arrays lie.
        keep: Whether the CT is needed until its mask is written, and not only until it is prepared.
        streamed: Whether it is to be prepared while it is read, if it can be.
        fast: Whether windows may be left out: the seconds are the most, then.

    Raises:
        ImageError: if the network's grid would have too many voxels.
    """
    voxels = math.prod(extent.geometry.size)
    grid = network_geometry(extent.geometry, model.recipe.preprocess).size
    windows = num_windows(grid, model.recipe.inference)
    streamed = streamed and extent.streams and not keep and model.runtime.device.type == "cpu"
    per_voxel = STREAMED_SECONDS_PER_VOXEL if streamed else SECONDS_PER_VOXEL
    network_seconds = windows * cost.seconds + _seconds_again(windows, cost, fast=fast)
    seconds = network_seconds + SECONDS_PER_CASE + voxels * per_voxel
    always_bytes = cost.base_bytes + int(cost.window_bytes * SPARE_SHARE) + SPARE_BYTES
    for way, placement in _ways(scratch, streamed=streamed):
        stage_bytes, volume_bytes, disk_bytes = _bytes(model, extent, grid, placement, keep=keep, streamed=streamed)
        plan = Plan(
            image=Path(),
            way=way,
            size=extent.geometry.size,
            windows=windows,
            seconds=seconds,
            memory_bytes=always_bytes + max(stage_bytes, writing_bytes),
            beside_bytes=max(volume_bytes, writing_bytes),
            disk_bytes=disk_bytes,
            placement=placement,
            streamed=streamed,
        )
        if plan.memory_bytes <= max_bytes:
            return plan
    return replace(
        plan,
        way=TOO_LARGE,
        error=f"needs {gigabytes(plan.memory_bytes)} of memory, allowed are {gigabytes(max_bytes)}; "
        f"allow more with --max-memory or crop it",
    )


def _ways(scratch: Path, *, streamed: bool) -> Iterator[tuple[str, Placement]]:
    yield PLAIN, IN_MEMORY
    if not streamed:
        yield VOLUMES, Placement(volumes=scratch)
    yield ALL, Placement(volumes=scratch, grids=scratch)


def _bytes(
    model: Model, extent: Extent, grid: tuple[int, int, int], placement: Placement, *, keep: bool, streamed: bool
) -> tuple[int, int, int]:
    """Of memory, at the stage that needs most; of memory while the CT is read or its mask written; and of disk."""
    voxels = 0 if streamed else math.prod(extent.geometry.size)
    if streamed:
        extent = replace(extent, held_bytes=0, reading_bytes=0)
    image_bytes, logits_bytes = _grid_bytes(model, grid)
    on_disk = placement.volumes is not None
    held = 0 if on_disk and extent.movable else extent.held_bytes
    reading = 0 if on_disk and extent.movable else extent.reading_bytes
    mask = 0 if on_disk else voxels
    disk = (extent.held_bytes - held) + (voxels - mask)
    if placement.grids is not None:
        disk += image_bytes + logits_bytes
        share = _window_share(model.recipe, extent, grid)
        image_bytes, logits_bytes = int(image_bytes * share), int(logits_bytes * share)
    kept = held if keep else 0
    in_order = logits_bytes if placement.grids is None else 0  # a copy of the part that holds labels, at most all
    stages = (
        held + max(reading, image_bytes),
        kept + image_bytes + logits_bytes,
        kept + logits_bytes + in_order + mask,
    )
    written = logits_bytes + in_order if streamed else kept + mask
    return max(stages), max(held + reading, written), disk


def _grid_bytes(model: Model, grid: tuple[int, int, int]) -> tuple[int, int]:
    """Of the network's input and of its logits, as float32 on the CPU."""
    if model.runtime.device.type != "cpu":
        return 0, 0
    channels = 1 if model.recipe.num_classes == 2 else model.recipe.num_classes
    return 4 * math.prod(grid), 4 * math.prod(grid) * channels


def _window_share(recipe: Recipe, extent: Extent, grid: tuple[int, int, int]) -> float:
    """The part of a grid on disk that one window may touch: all planes that it crosses along the slowest axis."""
    axis = orientation_to_ras(extent.geometry)[2][0]
    return min(1.0, recipe.inference.window_size[axis] / grid[axis])


def _writing_bytes(job: Job, extent: Extent, overlays: bool) -> int:
    """Of memory while a mask is written: pictures look at the whole CT and its mask, DICOM takes the mask twice."""
    voxels = math.prod(extent.geometry.size)
    picture = extent.held_bytes + (1 + OVERLAY_BYTES_PER_VOXEL) * voxels if overlays else 0
    return max(picture, extent.held_bytes + 3 * voxels if job.mask.name.endswith(".dcm") else 0)
