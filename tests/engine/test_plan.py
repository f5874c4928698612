"""Plans: the first way that fits is taken, what does not fit is refused before it is read, and estimates hold."""

import hashlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

from ctseg.engine import plan as planning
from ctseg.engine.infer import infer
from ctseg.engine.model import Model
from ctseg.engine.plan import (
    ALL,
    PLAIN,
    SPARE_BYTES,
    TOO_LARGE,
    UNREADABLE,
    VOLUMES,
    NetworkCost,
    Plan,
    RunPlan,
    duration,
    measure_network,
    network_cost,
    plan_case,
    plan_run,
)
from ctseg.engine.predict import IN_MEMORY, Placement, predict
from ctseg.engine.runtime import Runtime
from ctseg.errors import ImageError, NotEnoughMemory
from ctseg.io import Extent
from ctseg.io.images import read_image, read_labels, write_image
from ctseg.jobs import PLAIN as PLAIN_OPTIONS
from ctseg.jobs import Job
from ctseg.manifest import Manifest
from ctseg.progress import Silent
from ctseg.recipe import Recipe
from ctseg.volume import Geometry

BASE = 300 * 10**6
COST = NetworkCost(seconds=0.5, window_bytes=0, base_bytes=BASE)
CT = Extent(Geometry((400, 300, 200), np.diag([-4.0, -4.0, 4.0, 1.0])), held_bytes=48_000_000)
"""At the tiny recipe's 8 mm a grid of 200 x 150 x 100, by its first and last centres."""
VOXELS = 24_000_000
GRID = 4 * 200 * 150 * 100
SCRATCH = Path("somewhere")


def plan(model: Model, max_bytes: float, extent: Extent = CT, **more: Any) -> Plan:
    return plan_case(model, extent, COST, int(max_bytes), SCRATCH, **more)


def test_all_in_memory_where_it_fits(tiny_model: Model) -> None:
    """The most is held while the CT is prepared: it and the network's input; with pictures, while it is restored."""
    most = BASE + SPARE_BYTES + 48_000_000 + GRID
    made = plan(tiny_model, most + 2 * GRID)
    kept = plan(tiny_model, 1e12, keep=True)
    assert kept.memory_bytes == pytest.approx(BASE + SPARE_BYTES + 48_000_000 + 2 * GRID + VOXELS, rel=1e-3)
    assert (made.way, made.placement, made.disk_bytes, made.error) == (PLAIN, IN_MEMORY, 0, "")
    assert made.memory_bytes == pytest.approx(most, rel=1e-3)


def test_windows_and_seconds(tiny_model: Model) -> None:
    """Windows of 16 at an overlap of 0.25: a step of 12."""
    made = plan(tiny_model, 1e12)
    windows = math.prod(math.ceil((n - 16) / 12) + 1 for n in (200, 150, 100))
    assert made.windows == windows
    assert made.seconds == pytest.approx(
        windows * 0.5 + planning.SECONDS_PER_CASE + VOXELS * planning.SECONDS_PER_VOXEL
    )


@pytest.mark.parametrize(("length", "windows", "again"), [(290, 3, 0.0), (340, 4, 0.1), (880, 9, 0.1)])
def test_windows_that_run_again_take_seconds(tiny_model: Model, length: int, windows: int, again: float) -> None:
    """A tenth of them, unless there are fewer than four."""
    size = (length, 100, 100)
    cost, extent = replace(COST, again_seconds=2.0), Extent(Geometry(size, np.eye(4)), math.prod(size) * 2)
    longer = plan_case(tiny_model, extent, cost, 10**12, SCRATCH)
    shorter = plan_case(tiny_model, extent, COST, 10**12, SCRATCH)
    assert longer.windows == shorter.windows == windows
    assert longer.seconds - shorter.seconds == pytest.approx(windows * again * 2.0)


@pytest.mark.parametrize(("length", "windows"), [(290, 3), (880, 9)])
def test_with_fast_the_seconds_are_the_most_that_rounding_may_cost(
    tiny_model: Model, length: int, windows: int
) -> None:
    """One window runs again, in both precisions, before all do in float32."""
    size = (length, 100, 100)
    cost, extent = replace(COST, seconds=0.5, again_seconds=2.0), Extent(Geometry(size, np.eye(4)), math.prod(size) * 2)
    longer = plan_case(tiny_model, extent, cost, 10**12, SCRATCH, fast=True)
    unet = plan_case(tiny_model, extent, replace(cost, again_seconds=0.0), 10**12, SCRATCH, fast=True)
    assert longer.windows == unet.windows == windows
    assert longer.seconds - unet.seconds == pytest.approx(2.0 + windows * 1.5)


def test_each_way_is_taken_where_the_one_before_does_not_fit(tiny_model: Model) -> None:
    in_memory = plan(tiny_model, 1e12).memory_bytes
    volumes = plan(tiny_model, in_memory - 1)
    assert (volumes.way, volumes.placement) == (VOLUMES, Placement(volumes=SCRATCH))
    assert volumes.memory_bytes == pytest.approx(BASE + SPARE_BYTES + 2 * GRID, rel=1e-3)
    assert volumes.disk_bytes == 48_000_000 + VOXELS
    everything = plan(tiny_model, volumes.memory_bytes - 1)
    assert (everything.way, everything.placement) == (ALL, Placement(SCRATCH, SCRATCH))
    assert everything.memory_bytes < BASE + SPARE_BYTES + GRID
    assert everything.disk_bytes == pytest.approx(48_000_000 + VOXELS + 2 * GRID, rel=1e-3)
    none = plan(tiny_model, everything.memory_bytes - 1)
    assert (none.way, none.memory_bytes) == (TOO_LARGE, everything.memory_bytes)
    assert none.error == (
        f"needs {none.memory_bytes / 1e9:.2f} GB of memory, allowed are {(none.memory_bytes - 1) / 1e9:.2f} GB; "
        f"allow more with --max-memory or crop it"
    )


def test_several_classes_have_several_channels_of_logits(tiny_model: Model) -> None:
    recipe = replace(tiny_model.recipe, labels={"1": "a", "2": "b"})
    three = plan(replace(tiny_model, recipe=recipe), 1e12)
    assert three.memory_bytes == pytest.approx(BASE + SPARE_BYTES + 6 * GRID + VOXELS, rel=1e-3)


def test_what_cannot_move_and_what_writing_takes_counts(tiny_model: Model) -> None:
    tilted = replace(CT, reading_bytes=48_000_000, movable=False)
    assert plan(tiny_model, 1, tilted).memory_bytes == BASE + SPARE_BYTES + 2 * 48_000_000
    assert plan(tiny_model, 1, writing_bytes=10**9).memory_bytes == BASE + SPARE_BYTES + 10**9


STREAMS = replace(CT, streams=True)


def test_a_ct_that_is_prepared_while_it_is_read_takes_no_memory(tiny_model: Model) -> None:
    """Nor does its mask: what remains is the network's input and its logits, or these and a copy of them."""
    made = plan(tiny_model, 1e12, STREAMS, streamed=True)
    assert made.streamed
    assert made.memory_bytes == pytest.approx(BASE + SPARE_BYTES + 2 * GRID, rel=1e-3)
    assert made.beside_bytes == 2 * GRID
    assert made.disk_bytes == 0
    tight = plan(tiny_model, made.memory_bytes - 1, STREAMS, streamed=True)
    assert (tight.way, tight.streamed) == (ALL, True)
    assert tight.disk_bytes == pytest.approx(2 * GRID, rel=1e-3)


@pytest.mark.parametrize(
    ("extent", "more"),
    [
        (CT, {"streamed": True}),
        (STREAMS, {"streamed": False}),
        (STREAMS, {"streamed": True, "keep": True}),
    ],
    ids=["it_cannot", "not_wanted", "its_voxels_are_needed_later"],
)
def test_a_ct_is_not_streamed_where(tiny_model: Model, extent: Extent, more: dict[str, bool]) -> None:
    made = plan(tiny_model, 1e12, extent, **more)
    assert not made.streamed
    assert made.memory_bytes >= BASE + SPARE_BYTES + 48_000_000 + GRID


def test_a_gpu_may_need_the_ct_twice(tiny_model: Model) -> None:
    runtime = replace(tiny_model.runtime, device=torch.device("cuda"))
    assert not plan(replace(tiny_model, runtime=runtime), 1e12, STREAMS, streamed=True).streamed


def jobs_that_look_like(extent: Extent, jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs, each of which is planned with this extent, and a network of known cost."""
    monkeypatch.setattr(planning, "case_extent", lambda *_: extent)
    monkeypatch.setattr(planning, "measure_network", lambda _: COST)
    return jobs


def test_of_several_the_first_is_streamed_and_one_by_one_all_are(
    tiny_model: Model, tiny_manifest: Manifest, tmp_path: Path, monkeypatch
) -> None:
    """While the network runs, the next CT is read; before the first there is nothing to run."""
    jobs = jobs_that_look_like(STREAMS, jobs_of(tiny_manifest, tmp_path), monkeypatch)
    first, whole = plan(tiny_model, 1e12, STREAMS, streamed=True), plan(tiny_model, 1e12, STREAMS)
    together = plan_run(tiny_model, jobs, PLAIN_OPTIONS, tmp_path, Silent(), max_bytes=10**12)
    assert [case.streamed for case in together.cases] == [True, False, False]
    assert [case.memory_bytes for case in together.cases] == [
        first.memory_bytes + 48_000_000,
        whole.memory_bytes + 2 * GRID + 48_000_000,
        whole.memory_bytes + 48_000_000,
    ]
    alone = plan_run(tiny_model, jobs, PLAIN_OPTIONS, tmp_path, Silent(), max_bytes=first.memory_bytes)
    assert not alone.overlap
    assert [(case.streamed, case.memory_bytes) for case in alone.cases] == [(True, first.memory_bytes)] * 3


def test_what_is_measured_is_remembered(tiny_model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    model = replace(tiny_model, sha256="measured")
    cost = network_cost(model)
    assert 0 < cost.seconds < 5
    assert cost.base_bytes > cost.window_bytes >= 0
    monkeypatch.setattr(planning, "measure_network", lambda _: pytest.fail("it is known"))
    assert network_cost(model).seconds == cost.seconds


def test_the_exact_network_is_measured_too(tiny_model: Model) -> None:
    """And remembered apart: without it the same network takes less."""
    windows: list[int] = []

    def exact(image_BCXYZ: torch.Tensor) -> torch.Tensor:
        windows.append(len(image_BCXYZ))
        return tiny_model.forward(image_BCXYZ)

    alone = replace(tiny_model, sha256="measured with another")
    both = replace(alone, exact=exact)
    assert network_cost(alone).again_seconds == 0
    cost = network_cost(both)
    assert windows == [1] * planning.MEASURED_CALLS
    assert cost.again_seconds > cost.seconds > 0
    assert network_cost(both).again_seconds == cost.again_seconds
    assert len(windows) == planning.MEASURED_CALLS
    assert network_cost(alone).again_seconds == 0


def test_what_was_unpacked_ahead_is_no_part_of_what_a_network_takes(tiny_model: Model, monkeypatch) -> None:
    base = network_cost(replace(tiny_model, sha256="ahead")).base_bytes
    monkeypatch.setattr(planning, "stop_unpacking", lambda: 32 * 2**20)
    assert network_cost(replace(tiny_model, sha256="ahead")).base_bytes < base - 16 * 2**20


def jobs_of(manifest: Manifest, output: Path) -> list[Job]:
    return [Job(case.image, output / f"{case.name}_seg.nii.gz") for case in manifest.cases[:3]]


def test_a_run_tells_apart_what_cannot_be_read_and_what_does_not_fit(
    tiny_model: Model, tiny_manifest: Manifest, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"no image")
    jobs = [*jobs_of(tiny_manifest, tmp_path / "out"), Job(bad, tmp_path / "out" / "bad_seg.nii.gz")]
    good = plan_run(tiny_model, jobs, PLAIN_OPTIONS, tmp_path / "out", Silent(), max_bytes=10**11)
    assert [case.way for case in good.cases] == [PLAIN] * 3 + [UNREADABLE]
    assert good.cases[3].error.startswith(f"cannot read '{bad}': ")
    assert good.summary().startswith("4 CTs, about ")
    assert good.summary().endswith(" of 100.00 GB (--max-memory); 1 cannot be done")
    tight = plan_run(tiny_model, jobs, PLAIN_OPTIONS, tmp_path / "out", Silent(), max_bytes=1000)
    assert [case.way for case in tight.cases] == [TOO_LARGE] * 3 + [UNREADABLE]
    assert tight.cases[0].error.startswith(f"'{jobs[0].image}': needs ")
    assert tight.summary() == "4 CTs; 4 cannot be done"
    assert not (tmp_path / "out").exists()


def test_neighbours_count_where_they_overlap_and_wait_where_they_do_not_fit(
    tiny_model: Model, tiny_manifest: Manifest, tmp_path: Path, monkeypatch
) -> None:
    jobs = jobs_that_look_like(CT, jobs_of(tiny_manifest, tmp_path), monkeypatch)
    alone = plan(tiny_model, 1e12).memory_bytes
    together = plan_run(tiny_model, jobs, PLAIN_OPTIONS, tmp_path, Silent(), max_bytes=10**12)
    beside = 48_000_000
    assert together.overlap
    assert [case.memory_bytes for case in together.cases] == [alone + beside, alone + 2 * beside, alone + beside]
    waiting = plan_run(tiny_model, jobs, PLAIN_OPTIONS, tmp_path, Silent(), max_bytes=alone + 2 * beside - 1)
    assert not waiting.overlap
    assert [(case.way, case.memory_bytes) for case in waiting.cases] == [(PLAIN, alone)] * 3


def test_without_a_limit_the_machines_counts(tiny_model: Model, tiny_manifest: Manifest, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(planning, "available_memory", lambda own: (own + 10**9, "cgroup limit"))
    run = plan_run(tiny_model, jobs_of(tiny_manifest, tmp_path), PLAIN_OPTIONS, tmp_path, Silent())
    assert run.limited_by == "cgroup limit"
    assert [case.way for case in run.cases] == [PLAIN] * 3


def test_nothing_to_do_measures_nothing(tiny_model: Model, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(planning, "network_cost", lambda _: pytest.fail("nothing to do"))
    assert plan_run(tiny_model, [], PLAIN_OPTIONS, tmp_path, Silent()) == RunPlan((), 0, "")


def test_what_cannot_be_planned_is_not_read(
    tiny_model: Model, tiny_manifest: Manifest, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("ctseg.engine.infer.read_case", lambda *_: pytest.fail("it could be of any size"))
    (job, *_) = jobs_of(tiny_manifest, tmp_path)
    plans = {job.mask: Plan(image=job.image, way=UNREADABLE, error="its grid is too large")}
    (outcome,) = infer(tiny_model, [job], tmp_path, Silent(), plans=plans)
    assert (outcome.status, outcome.error) == ("failed", f"'{job.image}': its grid is too large")


@pytest.mark.parametrize("overlap", [True, False])
def test_masks_of_streamed_cts_are_those_of_whole_ones(
    tiny_model: Model, tiny_manifest: Manifest, tmp_path: Path, monkeypatch, overlap: bool
) -> None:
    monkeypatch.setattr("ctseg.engine.infer.read_case", lambda *_: pytest.fail("it is to be streamed"))
    jobs = jobs_of(tiny_manifest, tmp_path)
    plans = {job.mask: Plan(image=job.image, way=PLAIN, streamed=True) for job in jobs}
    outcomes = infer(tiny_model, jobs, tmp_path, Silent(), plans=plans, overlap=overlap)
    for job, outcome in zip(jobs, outcomes, strict=True):
        expected = predict(tiny_model, read_image(job.image))
        assert 0 < expected.mean() < 1
        np.testing.assert_array_equal(read_labels(job.mask).array, expected)
        assert outcome.volumes_ml == {"spleen": pytest.approx(int(expected.sum()) * 0.125)}
        assert list(outcome.stage_seconds) == ["read", "prepare", "network", "restore", "write", "waiting"]
        assert min(outcome.stage_seconds.values()) >= 0
    record = json.loads((tmp_path / "ctseg_run.json").read_text())["cases"]
    digests = [hashlib.sha256(job.image.read_bytes()).hexdigest() for job in jobs]
    assert [case["sha256"] for case in record] == digests


def wrong_checksum(path: Path, good: Path) -> None:
    data = good.read_bytes()
    path.write_bytes(data[:-8] + bytes(4) + data[-4:])


def some_infinite(path: Path, good: Path) -> None:
    volume = read_image(good)
    array = volume.array.astype(np.float32)
    array[3, 3, 3:5] = np.inf
    write_image(path, replace(volume, array=array))


def enormous(path: Path, good: Path) -> None:
    """Finite in the file, but infinite, or nearly so, in float32."""
    volume = read_image(good)
    array = volume.array.astype(np.float64)
    array[3, 3, 3:5] = -1.797e308
    write_image(path, replace(volume, array=array))


def far_too_large(path: Path, good: Path) -> None:
    volume = read_image(good)
    array = volume.array.astype(np.int32)
    array[-1, -1, -1] = 2**31 - 1
    write_image(path, replace(volume, array=array))


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (enormous, "expected Hounsfield units of at most 1e+06, got voxels from -1.797e+308 to "),
        (far_too_large, "expected Hounsfield units of at most 1e+06, got voxels from -"),
        (wrong_checksum, "the compressed data are damaged (CRC check failed"),
        (some_infinite, "every voxel must be a number, got 2 NaN or infinite"),
    ],
)
def test_a_damaged_ct_fails_alone_streamed_or_not(
    tiny_model: Model,
    tiny_manifest: Manifest,
    tmp_path: Path,
    streamed: bool,
    break_it: Callable[[Path, Path], None],
    reason: str,
) -> None:
    """A checksum is the last thing to be read, when all else of it is prepared."""
    jobs = jobs_of(tiny_manifest, tmp_path / "out")
    bad = tmp_path / "bad.nii.gz"
    break_it(bad, jobs[1].image)
    jobs[1] = replace(jobs[1], image=bad)
    plans = {job.mask: Plan(image=job.image, way=PLAIN, streamed=streamed) for job in jobs}
    outcomes = infer(tiny_model, jobs, tmp_path / "out", Silent(), plans=plans)
    assert [outcome.status for outcome in outcomes] == ["done", "failed", "done"]
    assert outcomes[1].error.startswith(f"cannot read '{bad}': {reason}")
    assert not jobs[1].mask.exists()


@pytest.mark.parametrize("streamed", [True, False])
def test_a_ct_whose_bytes_cannot_be_told_gets_no_mask(
    tiny_model: Model, tiny_manifest: Manifest, tmp_path: Path, monkeypatch, streamed: bool
) -> None:
    def digest(_: Job) -> None:
        raise ImageError("cannot read it: the disk has gone")

    monkeypatch.setattr("ctseg.engine.infer.digest_input", digest)
    (job, *_) = jobs_of(tiny_manifest, tmp_path)
    plans = {job.mask: Plan(image=job.image, way=PLAIN, streamed=streamed)}
    (outcome,) = infer(tiny_model, [job], tmp_path, Silent(), plans=plans)
    assert (outcome.status, outcome.error) == ("failed", f"'{job.image}': cannot read it: the disk has gone")
    assert not job.mask.exists()


def test_the_bytes_of_a_ct_that_fails_are_told(tiny_model: Model, tiny_manifest: Manifest, tmp_path: Path, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise NotEnoughMemory("not enough memory for one window")

    monkeypatch.setattr("ctseg.engine.infer.scores_taken", fail)
    (job, *_) = jobs_of(tiny_manifest, tmp_path)
    plans = {job.mask: Plan(image=job.image, way=PLAIN, streamed=True)}
    (outcome,) = infer(tiny_model, [job], tmp_path, Silent(), plans=plans)
    assert outcome.status == "failed"
    (case,) = json.loads((tmp_path / "ctseg_run.json").read_text())["cases"]
    assert case["sha256"] == hashlib.sha256(job.image.read_bytes()).hexdigest()


@pytest.mark.parametrize("placement", ["volumes", "all"])
def test_masks_of_a_run_on_disk_are_those_of_one_in_memory(
    tiny_model: Model, tiny_manifest: Manifest, tmp_path: Path, placement: str
) -> None:
    jobs = jobs_of(tiny_manifest, tmp_path)
    way = Placement(tmp_path, tmp_path if placement == "all" else None)
    plans = {job.mask: Plan(image=job.image, way="on disk", placement=way) for job in jobs}
    plans[jobs[1].mask] = Plan(image=jobs[1].image, way=TOO_LARGE, error="needs more")
    outcomes = infer(tiny_model, jobs, tmp_path, Silent(), plans=plans)
    assert [outcome.status for outcome in outcomes] == ["done", "failed", "done"]
    assert outcomes[1].error == f"'{jobs[1].image}': needs more"
    for job in (jobs[0], jobs[2]):
        np.testing.assert_array_equal(read_labels(job.mask).array, predict(tiny_model, read_image(job.image)))
    names = {"ctseg_model.json", "ctseg_run.json", "failures.csv", jobs[0].mask.name, jobs[2].mask.name}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_durations_for_people() -> None:
    assert [duration(s) for s in (0.4, 89, 90, 5000, 9000)] == ["0 s", "89 s", "2 min", "83 min", "2.5 h"]


MEASURE = """
import re, sys
from pathlib import Path
from typing import Any
from ctseg.cli import main
try:
    main()
finally:
    status = Path("/proc/self/status").read_text()  # getrusage would count what the test itself has in memory
    print(int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1]) * 1024, file=sys.stderr)
"""


def run_ctseg(folder: Path, *arguments: object) -> tuple[str, str, int]:
    """What `ctseg` prints on stdout and stderr, and its peak memory."""
    command = [sys.executable, "-c", MEASURE, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, env=os.environ)
    return done.stdout, done.stderr, int(done.stderr.splitlines()[-1])


def write_large_ct(path: Path, slices: int, dtype: str) -> None:
    """Noise of 512 x 512 voxels a slice; shifted, so that integers of four bytes do not stream."""
    header = nibabel.Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape((512, 512, slices))
    header.set_sform(np.eye(4), code=1)
    header["vox_offset"], header["magic"], header["scl_slope"], header["scl_inter"] = 352, b"n+1", 1, -1024
    with path.open("wb") as file:
        file.write(bytes(header.binaryblock) + bytes(4))
        rng = np.random.default_rng(0)
        for _ in range(slices):
            file.write(rng.integers(800, 1300, (512, 512), dtype=dtype).tobytes())


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "streams"), [("int16", True), ("int32", False)])
def test_the_memory_that_was_promised_is_kept(
    made_checkpoint, tiny_recipe: Recipe, tmp_path: Path, dtype: str, streams: bool
) -> None:
    """CTs beside each other, one after another and, where they are not read plane by plane, through the disk."""
    (tmp_path / "ct").mkdir()
    for number, slices in enumerate((200, 300)):
        write_large_ct(tmp_path / "ct" / f"{number}.nii", slices, dtype)
    common = ("--model", made_checkpoint(tiny_recipe, tmp_path / "model.pt"), "--device", "cpu")
    dry_run = (*common, "--output", "none", "--dry-run")
    run_ctseg(tmp_path, "infer", "ct", *dry_run)  # the first run compiles, and holds more

    def needed(cts: str) -> int:
        cases = json.loads(run_ctseg(tmp_path, "infer", cts, *dry_run, "--json")[0])["cases"]
        assert cases[0]["streamed"] == streams
        return max(case["memory_bytes"] for case in cases)

    spread = 16 * 10**6  # of what the interpreter and its libraries take from run to run
    together, alone = (needed(cts) + spread for cts in ("ct", "ct/1.nii"))
    limits = {"together": together, "alone": alone}
    if not streams:
        limits["on_disk"] = alone - 200 * 10**6  # of 315 MB of the CT and 79 of its mask
    said = {}
    for name, limit in limits.items():
        told = () if name == "together" else ("--max-memory", limit)
        _, said[name], peak = run_ctseg(tmp_path, "infer", "ct", *common, "--output", name, *told)
        assert peak <= limit
        for mask in ("0_seg.nii", "1_seg.nii"):
            assert (tmp_path / name / mask).read_bytes() == (tmp_path / "together" / mask).read_bytes()
        assert {path.name for path in (tmp_path / name).glob("*_seg.nii")} == {"0_seg.nii", "1_seg.nii"}
    assert alone < together - 100 * 10**6
    on_disk = "1.nii: CT and mask on disk, as memory is limited"
    assert [on_disk in text for text in said.values()] == [False, False, True][: len(said)]


def test_measuring_leaves_the_model_as_it_was(tiny_model: Model, tiny_manifest: Manifest) -> None:
    volume = read_image(tiny_manifest.cases[0].image)
    before = predict(tiny_model, volume)
    measure_network(tiny_model)
    np.testing.assert_array_equal(predict(tiny_model, volume), before)


def test_a_network_that_a_gpu_has_no_memory_for_is_measured_on_the_cpu(tiny_model: Model, monkeypatch) -> None:
    """As its CTs will be done there: see `ctseg.engine.ladder`."""

    def seconds_of(model: Model) -> float:
        if model.runtime.device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 3.0

    monkeypatch.setattr(planning, "_seconds_of_window", seconds_of)
    full = replace(tiny_model, runtime=Runtime(torch.device("cuda", 0)), on_cpu=lambda: tiny_model)
    assert measure_network(full).seconds == 3.0
    with pytest.raises(NotEnoughMemory, match="one window: not enough memory on cuda:0"):
        measure_network(replace(full, on_cpu=None))
