"""Masks for many CTs: the model loaded once, finished files kept, a bad file reported and the rest done."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ctseg.engine.cases import ReadCase, digest_input, open_case, read_case, write_mask
from ctseg.engine.clock import Clock
from ctseg.engine.folder import claim, drop_old_failures, record_failure
from ctseg.engine.model import Model
from ctseg.engine.pipeline import Check, one_by_one, overlapped
from ctseg.engine.plan import NO_PLANS, TOO_LARGE, Plan
from ctseg.engine.predict import IN_MEMORY, OnWindow, Placement, Scores, predict_taken, scores_taken
from ctseg.engine.process import peak_memory_bytes
from ctseg.engine.run_manifest import RunManifest, open_run_manifest, place_of, run_facts
from ctseg.engine.runtime import memory_errors
from ctseg.errors import CtsegError, ImageError, NotEnoughMemory, Stopped
from ctseg.files import Digest, make_folder
from ctseg.io.images import write_labels
from ctseg.jobs import PLAIN, Job, Options, Shard
from ctseg.manifest import image_stem
from ctseg.preprocess import restored_planes
from ctseg.progress import Progress
from ctseg.scratch import count_values
from ctseg.volume import LabelStream, PlaneStream, Volume

if TYPE_CHECKING:
    import torch

WHOLE = Shard()


@dataclass(frozen=True)
class Outcome:
    """What became of one CT: "done", "skipped" (its mask was there) or "failed".

    Attributes:
        seconds: Of work on it, without waiting.
        notes: What a user should know of how the network ran; what was repaired or odd about a DICOM series, or missing
            in its header.
        stage_seconds: Of "read", "prepare", "network", "restore", "write", as far as it came, and "waiting" between
            them while other CTs were worked on.
    """

    image: Path
    mask: Path
    status: str
    volumes_ml: dict[str, float]
    seconds: float
    error: str = ""
    notes: tuple[str, ...] = ()
    stage_seconds: dict[str, float] = field(default_factory=dict)


@dataclass(eq=False)
class _Work:
    """A CT on its way through the stages: what each has added. An `error` ends it."""

    job: Job
    plan: Plan | None
    skipped: bool
    clock: Clock = field(default_factory=Clock)
    case: ReadCase | None = None
    hashing: Future[Digest] | None = None
    digest: Digest | None = None
    mask: NDArray[np.uint8] | None = None
    scores: Scores | None = None
    error: str = ""
    told: list[str] = field(default_factory=list)
    """What a user should know of how the network ran."""

    def take_volume(self, *, keep: bool) -> Volume | PlaneStream:
        """The CT; from now on only its grid is held here, unless its voxels are to be kept."""
        assert self.case is not None
        volume = self.case.stream or self.case.volume
        if not keep:
            self.case = self.case.without_voxels
        return volume

    @property
    def placement(self) -> Placement:
        """Where its arrays lie."""
        return self.plan.placement if self.plan else IN_MEMORY


def infer(
    model: Model,
    jobs: list[Job],
    output: Path,
    progress: Progress,
    *,
    options: Options = PLAIN,
    shard: Shard = WHOLE,
    plans: Mapping[Path, Plan] = NO_PLANS,
    overlap: bool = True,
    stop_requested: Callable[[], bool] = lambda: False,
) -> list[Outcome]:
    """Writes the mask of every job of `shard` that is not done yet; one outcome for each, in order.

    A mask is done when it is there and not older than its CT. The next CT is read and the last mask written while the
    network runs, if `overlap` is on. Failed ones are listed in `failures.csv`, all in `ctseg_run.json`. A shard never
    replaces another model's masks: what it took for old ones could be another shard's new ones. `plans` says by mask
    where the arrays of a CT lie, see `ctseg.engine.plan`; without one they lie in memory.

    Raises:
        OutputError: if masks cannot be written; finished ones stay.
        CtsegError: if `output` holds masks of another model or made with other options, unless `options.overwrite` is
            on and `jobs` replace them all.
        Stopped: after a stop request, which is looked for after every window; finished masks stay.
    """
    make_folder(output)
    mine = shard.take(jobs)
    claim(output, model, mine, options.record(jobs), options.overwrite and shard.count == 1)
    outcomes: list[Outcome] = []

    def segment(work: _Work, check: Check) -> _Work:
        def stop() -> None:
            check()
            if stop_requested():
                raise Stopped

        return _segment(work, model, options, progress, stop, keep=options.needs_voxels)

    def finished(outcome: Outcome) -> None:
        outcomes.append(outcome)
        for note in outcome.notes:
            progress.note(f"{outcome.image.name}: {note}")
        progress.advance(f"{outcome.image.name}: {outcome.error or outcome.status}")

    if options.overlays:
        _check_pictures(jobs)
    facts = run_facts(model, options, shard)
    progress.start(f"segmenting with {model.recipe.name}", len(mine))
    with (
        open_run_manifest(output / shard.run_manifest, facts) as manifest,
        ThreadPoolExecutor(1, "ctseg-digest") as hasher,
    ):
        run = overlapped if overlap else one_by_one

        others = [] if options.overwrite else [job for job in mine if manifest.is_of_another_ct(job)]
        if others:
            raise CtsegError(
                f"'{others[0].mask}' is the mask of another CT of that name than '{others[0].image}'; choose another "
                f"--output, or --overwrite to replace it"
            )

        def read(job: Job) -> _Work:
            is_done = job.is_done and not options.overwrite and not manifest.is_outdated(job)
            work = _Work(job, plans.get(job.mask), skipped=is_done)
            return work if work.skipped else _read(work, options, model.runtime.device, hasher)

        def write(work: _Work) -> Outcome:
            outcome = _write(work, model, options)
            record_failure(output / shard.failures, str(outcome.image), outcome.error)
            _record(manifest, outcome, work, model.runtime.device)
            return outcome

        try:
            run(mine, read, segment, write, finished)
        except Stopped as error:
            done = f"{len(outcomes)} of {len(mine)} CTs"
            raise Stopped(f"stopped by a signal after {done}; the same command goes on") from error
    progress.finish()
    drop_old_failures(output, shard, {str(outcome.image) for outcome in outcomes})
    return outcomes


@contextmanager
def show_windows(progress: Progress, name: str, stop: Callable[[], None] = lambda: None) -> Iterator[OnWindow]:
    """Progress through one CT, as a task below the running one; the task ends with the context, whatever happens.

    When more windows turn out to be needed, a new task is begun for them. `stop` is called after every window and may
    raise.
    """
    known = 0

    def on_window(done: int, total: int) -> None:
        nonlocal known
        if total > known or done == 1:  # or they begin anew, on another device
            if known:
                progress.finish()
            progress.start(name, total - done + 1)
            known = total
        progress.advance()
        stop()

    try:
        yield on_window
    finally:
        if known:
            progress.finish()


def _read(work: _Work, options: Options, device: torch.device, hasher: Executor) -> _Work:
    with _case_errors(work, device), work.clock.stage("read"):
        if work.plan and work.plan.error:
            raise (NotEnoughMemory if work.plan.way == TOO_LARGE else ImageError)(work.plan.error)
        work.hashing = hasher.submit(digest_input, work.job)
        if work.plan and work.plan.streamed:
            work.case = open_case(work.job)
        else:
            work.case = read_case(work.job, options, work.placement.volumes)
    return work


def _segment(
    work: _Work, model: Model, options: Options, progress: Progress, stop: Callable[[], None], *, keep: bool
) -> _Work:
    stop()
    if work.case is None or work.error:
        return work
    name = work.job.image.name
    if work.plan and work.placement != IN_MEMORY:
        progress.note(f"{name}: {work.plan.way}, as memory is limited: {work.plan.describe()}")
    stream = work.case.stream
    with (
        closing(stream) if stream is not None else nullcontext(),
        _case_errors(work, model.runtime.device),
        show_windows(progress, name, stop) as on_window,
    ):
        run = partial(
            predict_taken if stream is None else scores_taken,
            model,
            partial(work.take_volume, keep=keep),
            on_window,
            clock=work.clock,
            placement=work.placement,
            fast=options.fast,
            note=work.told.append,
        )
        result = run()
        work.mask, work.scores = (None, result) if isinstance(result, Scores) else (result, None)
    return work


def _write(work: _Work, model: Model, options: Options) -> Outcome:
    job, case = work.job, work.case
    if work.skipped:
        return Outcome(job.image, job.mask, "skipped", {}, 0.0)
    volumes: dict[str, float] = {}
    notes: tuple[str, ...] = ()  # of reading and writing
    with _case_errors(work, model.runtime.device):
        work.digest = None if work.hashing is None else work.hashing.result()
    if case is not None and not work.error:
        with _case_errors(work, model.runtime.device), work.clock.stage("write"):
            if work.mask is not None:
                notes = case.notes + write_mask(job, case, work.mask, model, options)
                if options.overlays:
                    _draw(job, case, work.mask, model)
                volumes = _volumes_ml(case, count_values(work.mask, model.recipe.num_classes), model)
            if work.scores is not None:
                volumes = _volumes_ml(case, _write_restored(work, work.scores), model)
    seconds, status = work.clock.with_waiting(), "failed" if work.error else "done"
    work_seconds = sum(work.clock.seconds.values())
    if work.error:
        notes, volumes = (), {}
    return Outcome(job.image, job.mask, status, volumes, work_seconds, work.error, (*work.told, *notes), seconds)


@contextmanager
def _case_errors(work: _Work, device: torch.device) -> Iterator[None]:
    """Keeps what is wrong with one CT, or too little memory for it, as the error of `work`: the others go on."""
    image = str(work.job.image)
    try:
        with memory_errors(f"'{image}'", device):
            yield
    except (ImageError, NotEnoughMemory) as error:
        work.error = work.error or (str(error) if image in str(error) else f"'{image}': {error}")


def _check_pictures(jobs: Sequence[Job]) -> None:
    """Raises CtsegError if two masks would have one picture."""
    named = Counter(_picture(job) for job in jobs)
    shared = [path for path, count in named.items() if count > 1]
    if shared:
        raise CtsegError(
            f"--overlays: '{shared[0]}' would be the picture of {named[shared[0]]} masks; give these CTs other names"
        )


def _picture(job: Job) -> Path:
    return job.mask.with_name(f"{image_stem(job.mask)}.png")


def _draw(job: Job, case: ReadCase, mask: NDArray[np.uint8], model: Model) -> None:
    from ctseg.report.overlay import draw_overlay  # not at the top: few runs draw

    stem = image_stem(job.mask)
    title = job.image.name if job.series is None else stem  # a folder may be called as the patient is
    hu_window = model.recipe.preprocess.hu_window
    draw_overlay(_picture(job), case.volume, mask, None, hu_window, title)


def _write_restored(work: _Work, scores: Scores) -> NDArray[np.int64]:
    """Writes a mask while it is restored, never in memory as a whole; how many voxels have each value."""
    counts, seconds = np.zeros(256, dtype=np.int64), 0.0

    def pieces() -> Generator[NDArray[np.uint8], None, None]:
        nonlocal seconds
        started = time.perf_counter()
        with closing(restored_planes(scores.values_CXYZ, scores.prepared)) as planes:
            for piece in planes:
                seconds += time.perf_counter() - started
                yield piece
                counts[:] += count_values(piece, len(counts))
                started = time.perf_counter()

    geometry = scores.prepared.source
    make_folder(work.job.mask.parent)
    with closing(pieces()) as made:
        write_labels(work.job.mask, LabelStream(geometry, made), geometry)
    work.clock.move(seconds, "write", "restore")
    return counts


def _volumes_ml(case: ReadCase, counts: NDArray[np.int64], model: Model) -> dict[str, float]:
    voxel_ml = case.volume.geometry.voxel_volume_ml
    return {name: float(counts[int(value)]) * voxel_ml for value, name in model.recipe.labels.items()}


def _record(manifest: RunManifest, outcome: Outcome, work: _Work, device: torch.device) -> None:
    digest = work.digest
    if outcome.status == "skipped":
        manifest.add_skipped(outcome.mask, outcome.image)
        return
    case = {
        "image": str(outcome.image),
        "place": place_of(work.job),
        "status": outcome.status,
        "sha256": digest and digest.sha256,
        "num_bytes": digest and digest.num_bytes,
        "stage_seconds": {stage: round(seconds, 4) for stage, seconds in outcome.stage_seconds.items()},
        "peak_memory_bytes": peak_memory_bytes(device),
        "error": outcome.error,
    }
    manifest.add(outcome.mask, case)
