"""Many CTs: finished masks are kept, a bad file leaves the others alone, and models and half masks never mix."""

import csv
import dataclasses
import json
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ctseg.engine import infer as engine
from ctseg.engine.infer import infer, show_windows
from ctseg.engine.model import Model, load_model
from ctseg.engine.predict import predict, predict_taken
from ctseg.engine.runtime import Runtime
from ctseg.errors import CtsegError, OutputError
from ctseg.io.images import read_image, read_labels
from ctseg.jobs import Job, Options
from ctseg.manifest import Manifest
from ctseg.preprocess import prepare
from ctseg.progress import Silent


@pytest.fixture
def jobs(tiny_manifest: Manifest, tmp_path: Path) -> list[Job]:
    """Three CTs, copied so that a test may change them."""
    found = []
    for case in tiny_manifest.cases[:3]:
        image = tmp_path / "in" / case.image.name
        image.parent.mkdir(exist_ok=True)
        image.write_bytes(case.image.read_bytes())
        found.append(Job(image, tmp_path / "out" / f"{case.name}_seg.nii.gz"))
    return found


def statuses(outcomes: list[engine.Outcome]) -> list[str]:
    return [outcome.status for outcome in outcomes]


def states(jobs: list[Job]) -> list[tuple[int, int]]:
    """What changes when a file is written anew."""
    return [(s.st_ino, s.st_mtime_ns) for s in (job.mask.stat() for job in jobs)]


def test_masks_are_those_of_predict_on_each_grid(tiny_model: Model, jobs: list[Job], tmp_path: Path) -> None:
    outcomes = infer(tiny_model, jobs, tmp_path / "out", Silent())
    assert statuses(outcomes) == ["done"] * 3
    for job, outcome in zip(jobs, outcomes, strict=True):
        volume, written = read_image(job.image), read_labels(job.mask)
        expected = predict(tiny_model, volume)
        assert 0 < expected.mean() < 1
        np.testing.assert_array_equal(written.array, expected)
        np.testing.assert_allclose(written.geometry.affine, volume.geometry.affine, atol=1e-4)
        assert outcome.volumes_ml == {"spleen": pytest.approx(int(expected.sum()) * 0.125)}  # voxels of 5 mm


def test_a_second_run_skips_what_is_done(tiny_model: Model, jobs: list[Job], tmp_path: Path) -> None:
    infer(tiny_model, jobs[:2], tmp_path / "out", Silent())
    before = states(jobs[:2])
    assert statuses(infer(tiny_model, jobs, tmp_path / "out", Silent())) == ["skipped", "skipped", "done"]
    assert states(jobs[:2]) == before


def test_what_is_done_is_not_read(tiny_model: Model, jobs: list[Job], tmp_path: Path, monkeypatch) -> None:
    infer(tiny_model, jobs, tmp_path / "out", Silent())
    monkeypatch.delattr(engine, "read_case")
    assert statuses(infer(tiny_model, jobs, tmp_path / "out", Silent())) == ["skipped"] * 3


def test_the_next_is_read_and_the_last_written_while_the_network_runs(
    tiny_model: Model, jobs: list[Job], tmp_path: Path, monkeypatch
) -> None:
    """The network waits for the next CT to be read, and writing for the network: in turn, none would end."""
    real_read, real_write = engine.read_case, engine.write_mask
    read, predicted = ([threading.Event() for _ in jobs] for _ in range(2))

    def read_case(job, *rest):
        case = real_read(job, *rest)
        read[jobs.index(job)].set()
        return case

    def predict_later(*arguments, **options):
        number = sum(event.is_set() for event in predicted)
        assert read[min(number + 1, 2)].wait(timeout=30)
        predicted[number].set()
        return predict_taken(*arguments, **options)

    def write_mask(job, *rest):
        assert predicted[min(jobs.index(job) + 1, 2)].wait(timeout=30)
        return real_write(job, *rest)

    monkeypatch.setattr(engine, "read_case", read_case)
    monkeypatch.setattr(engine, "predict_taken", predict_later)
    monkeypatch.setattr(engine, "write_mask", write_mask)
    before = threading.active_count()
    assert statuses(infer(tiny_model, jobs, tmp_path / "out", Silent())) == ["done"] * 3
    assert threading.active_count() == before


def test_a_ct_newer_than_its_mask_is_done_again(tiny_model: Model, jobs: list[Job], tmp_path: Path) -> None:
    infer(tiny_model, jobs, tmp_path / "out", Silent())
    later = jobs[1].mask.stat().st_mtime_ns + 10**9
    os.utime(jobs[1].image, ns=(later, later))
    assert statuses(infer(tiny_model, jobs, tmp_path / "out", Silent())) == ["skipped", "done", "skipped"]


def test_overwrite_does_all_again(tiny_model: Model, jobs: list[Job], tmp_path: Path) -> None:
    infer(tiny_model, jobs, tmp_path / "out", Silent())
    before = states(jobs)
    assert (
        statuses(infer(tiny_model, jobs, tmp_path / "out", Silent(), options=Options(overwrite=True))) == ["done"] * 3
    )
    assert all(now != then for now, then in zip(states(jobs), before, strict=True))


def test_a_bad_file_is_listed_and_forgotten_once_mended(tiny_model: Model, jobs: list[Job], tmp_path: Path) -> None:
    good = jobs[1].image.read_bytes()
    jobs[1].image.write_bytes(good[:-300])
    outcomes = infer(tiny_model, jobs, tmp_path / "out", Silent())
    assert statuses(outcomes) == ["done", "failed", "done"]
    assert not jobs[1].mask.exists()
    (row,) = csv.DictReader((tmp_path / "out" / "failures.csv").read_text().splitlines())
    assert row == {"image": str(jobs[1].image), "error": outcomes[1].error}
    assert str(jobs[1].image) in outcomes[1].error
    jobs[1].image.write_bytes(good)
    assert statuses(infer(tiny_model, jobs, tmp_path / "out", Silent())) == ["skipped", "done", "skipped"]
    assert not (tmp_path / "out" / "failures.csv").exists()


CPU_ERROR = "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CPU_ERROR)], ids=repr
)
def test_too_little_memory_for_one_ct_leaves_the_others(tiny_model, jobs, tmp_path: Path, monkeypatch, error) -> None:
    calls = []

    def sometimes(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise error
        return prepare(*arguments)

    monkeypatch.setattr("ctseg.engine.ladder.prepare", sometimes)
    outcomes = infer(tiny_model, jobs, tmp_path / "out", Silent())
    assert statuses(outcomes) == ["done", "failed", "done"]
    assert "not enough memory on cpu" in outcomes[1].error


def test_an_output_that_cannot_be_written_ends_the_run(tiny_model, jobs, tmp_path: Path, monkeypatch) -> None:
    infer(tiny_model, jobs[:1], tmp_path / "out", Silent())
    jobs[1].mask.mkdir()  # stands in the way
    with pytest.raises(OutputError, match="cannot write"):
        infer(tiny_model, jobs, tmp_path / "out", Silent(), options=Options(overwrite=True))
    assert jobs[0].mask.is_file()
    assert not jobs[2].mask.exists()


def test_the_folder_says_whose_masks_it_holds(tiny_model: Model, jobs: list[Job], tmp_path: Path) -> None:
    infer(tiny_model, jobs[:1], tmp_path / "out", Silent())
    record = json.loads((tmp_path / "out" / "ctseg_model.json").read_text())
    assert record == {"recipe": "spleen:small", "model": "best.pt", "sha256": tiny_model.sha256, "fast": False}


@pytest.mark.parametrize("fast", [False, True])
def test_fast_and_exact_masks_never_mix(tiny_model: Model, jobs: list[Job], tmp_path: Path, fast: bool) -> None:
    one_way, other_way = Options(fast=fast), Options(fast=not fast)
    infer(tiny_model, jobs[:2], tmp_path / "out", Silent(), options=one_way)
    before = states(jobs[:2])
    with pytest.raises(CtsegError, match=rf"holds masks made with other options \(fast {fast}\); choose another"):
        infer(tiny_model, jobs, tmp_path / "out", Silent(), options=other_way)
    assert states(jobs[:2]) == before
    assert statuses(infer(tiny_model, jobs, tmp_path / "out", Silent(), options=one_way)) == ["skipped"] * 2 + ["done"]
    again = infer(tiny_model, jobs, tmp_path / "out", Silent(), options=dataclasses.replace(other_way, overwrite=True))
    assert statuses(again) == ["done"] * 3
    assert statuses(infer(tiny_model, jobs, tmp_path / "out", Silent(), options=other_way)) == ["skipped"] * 3


def test_masks_of_a_folder_that_does_not_say_are_exact(tiny_model: Model, jobs: list[Job], tmp_path: Path) -> None:
    infer(tiny_model, jobs, tmp_path / "out", Silent())
    record = tmp_path / "out" / "ctseg_model.json"
    record.write_text(json.dumps({k: v for k, v in json.loads(record.read_text()).items() if k != "fast"}))
    with pytest.raises(CtsegError, match="fast False"):
        infer(tiny_model, jobs, tmp_path / "out", Silent(), options=Options(fast=True))
    assert statuses(infer(tiny_model, jobs, tmp_path / "out", Silent())) == ["skipped"] * 3


def test_fast_reaches_predict(tiny_model: Model, jobs: list[Job], tmp_path: Path) -> None:
    infer(tiny_model, jobs[:1], tmp_path / "out", Silent(), options=Options(fast=True))
    expected = predict(tiny_model, read_image(jobs[0].image), fast=True)
    np.testing.assert_array_equal(read_labels(jobs[0].mask).array, expected)


class Told(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def start(self, task: str, total: int) -> None:
        self.lines.append(f"{task} {total}")

    def advance(self, detail: str = "") -> None:
        self.lines.append("+")

    def finish(self) -> None:
        self.lines.append("end")


def test_windows_that_turn_out_to_be_needed_are_a_task_of_their_own() -> None:
    told = Told()
    with show_windows(told, "ct.nii") as on_window:
        for done, total in ((1, 2), (2, 2), (3, 5), (4, 5), (5, 5)):
            on_window(done, total)
    assert told.lines == ["ct.nii 2", "+", "+", "end", "ct.nii 3", "+", "+", "+", "end"]


@pytest.fixture
def other_model(tiny_model: Model) -> Model:
    """A model that answers with empty masks."""
    return dataclasses.replace(
        tiny_model, sha256="0" * 64, forward=lambda x: torch.stack([x[:, 0] * 0, x[:, 0] * 0 - 1], dim=1)
    )


def test_another_model_is_refused_and_touches_nothing(tiny_model, other_model, jobs, tmp_path: Path) -> None:
    infer(tiny_model, jobs, tmp_path / "out", Silent())
    before = states(jobs)
    with pytest.raises(CtsegError, match=r"holds masks of another model \(spleen:small, best.pt\); .*--overwrite"):
        infer(other_model, jobs, tmp_path / "out", Silent())
    assert states(jobs) == before


@pytest.mark.parametrize("newer", [False, True])
def test_the_mask_of_another_ct_of_that_name_is_not_taken_for_its_own(
    tiny_model: Model, jobs: list[Job], tmp_path: Path, newer: bool
) -> None:
    """As in a loop over patients whose CTs are all called ct.nii.gz."""
    first, second = jobs[0].image, tmp_path / "other" / jobs[0].image.name
    infer(tiny_model, jobs[:1], tmp_path / "out", Silent())
    before = states(jobs[:1])
    second.parent.mkdir()
    second.write_bytes(jobs[1].image.read_bytes())
    if not newer:
        os.utime(second, (1, 1))
    other = [Job(second, jobs[0].mask)]
    with pytest.raises(CtsegError, match=r"is the mask of another CT of that name than .*other/"):
        infer(tiny_model, other, tmp_path / "out", Silent())
    assert states(jobs[:1]) == before
    second.write_bytes(first.read_bytes())  # the same CT, somewhere else
    os.utime(second, (1, 1))
    assert statuses(infer(tiny_model, other, tmp_path / "out", Silent())) == ["skipped"]
    second.write_bytes(jobs[1].image.read_bytes())
    replaced = infer(tiny_model, other, tmp_path / "out", Silent(), options=Options(overwrite=True))
    assert statuses(replaced) == ["done"]


def test_a_ct_that_was_replaced_by_an_older_file_is_done_again(
    tiny_model: Model, jobs: list[Job], tmp_path: Path
) -> None:
    infer(tiny_model, jobs, tmp_path / "out", Silent())
    jobs[1].image.write_bytes(jobs[2].image.read_bytes())
    os.utime(jobs[1].image, (1, 1))
    assert statuses(infer(tiny_model, jobs, tmp_path / "out", Silent())) == ["skipped", "done", "skipped"]
    assert read_labels(jobs[1].mask).geometry.size == read_image(jobs[2].image).geometry.size


def test_two_masks_never_share_a_picture(tiny_model: Model, jobs: list[Job], tmp_path: Path) -> None:
    twins = [jobs[0], Job(jobs[1].image, jobs[0].mask.with_name(jobs[0].mask.name.replace(".nii.gz", ".nii")))]
    with pytest.raises(CtsegError, match=r"would be the picture of 2 masks; give these CTs other names"):
        infer(tiny_model, twins, tmp_path / "out", Silent(), options=Options(overlays=True))
    assert statuses(infer(tiny_model, twins, tmp_path / "out", Silent())) == ["done"] * 2


def test_another_model_may_replace_all_masks(tiny_model, other_model, jobs, tmp_path: Path) -> None:
    infer(tiny_model, jobs, tmp_path / "out", Silent())
    assert (
        statuses(infer(other_model, jobs, tmp_path / "out", Silent(), options=Options(overwrite=True))) == ["done"] * 3
    )
    assert not any(read_labels(job.mask).array.any() for job in jobs)
    assert statuses(infer(other_model, jobs, tmp_path / "out", Silent())) == ["skipped"] * 3


def test_another_model_may_not_replace_some_masks(tiny_model, other_model, jobs, tmp_path: Path) -> None:
    """The others would stay and pass for the new model's."""
    infer(tiny_model, jobs, tmp_path / "out", Silent())
    before = states(jobs)
    with pytest.raises(CtsegError, match=r"holds masks of another model \(.*\), and 2 would stay"):
        infer(other_model, jobs[:1], tmp_path / "out", Silent(), options=Options(overwrite=True))
    assert states(jobs) == before


def test_replacing_that_is_cut_off_leaves_no_mask_of_the_old_model(
    tiny_model, other_model, jobs, tmp_path: Path, monkeypatch
) -> None:
    """After the first of three CTs; going on with the new model finishes the rest, the old one is refused."""
    infer(tiny_model, jobs, tmp_path / "out", Silent())
    calls = []

    def cut_off(*args, **options):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return predict_taken(*args, **options)

    monkeypatch.setattr(engine, "predict_taken", cut_off)
    with pytest.raises(KeyboardInterrupt):
        infer(other_model, jobs, tmp_path / "out", Silent(), options=Options(overwrite=True))
    monkeypatch.undo()
    assert [job.mask.exists() for job in jobs] == [True, False, False]
    with pytest.raises(CtsegError, match="another model"):
        infer(tiny_model, jobs, tmp_path / "out", Silent())
    assert statuses(infer(other_model, jobs, tmp_path / "out", Silent())) == ["skipped", "done", "done"]
    assert not any(read_labels(job.mask).array.any() for job in jobs)


def _infer_and_hang(checkpoint: Path, jobs: list[Job], output: Path) -> None:
    """Hangs when the second mask is written but not yet renamed."""
    from ctseg import files

    masks, replace = [], Path.replace

    def slow(path: Path, target: Path) -> Path:
        if target.name.endswith("_seg.nii.gz"):
            masks.append(target)
            if len(masks) == 2:
                (output / "hanging").touch()
                time.sleep(60)
        return replace(path, target)

    files.Path.replace = slow
    model = load_model(checkpoint, Runtime(torch.device("cpu")))
    infer(model, jobs, output, Silent())


def test_killed_in_the_middle_there_is_no_half_mask(
    tiny_model: Model, tiny_checkpoint: Path, jobs: list[Job], tmp_path: Path
) -> None:
    output = tmp_path / "out"
    process = multiprocessing.get_context("spawn").Process(target=_infer_and_hang, args=(tiny_checkpoint, jobs, output))
    process.start()
    deadline = time.monotonic() + 120
    while not (output / "hanging").exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert [job.mask.exists() for job in jobs] == [True, False, False]
    assert statuses(infer(tiny_model, jobs, output, Silent())) == ["skipped", "done", "done"]
    np.testing.assert_array_equal(read_labels(jobs[0].mask).array, predict(tiny_model, read_image(jobs[0].image)))


def test_masks_of_unknown_origin_are_not_taken_for_ours(tiny_model: Model, jobs: list[Job], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    jobs[0].mask.write_bytes(b"drawn by hand")
    with pytest.raises(CtsegError, match="holds masks of another model"):
        infer(tiny_model, jobs, tmp_path / "out", Silent())
    assert jobs[0].mask.read_bytes() == b"drawn by hand"


def test_failures_of_other_files_stay_listed(tiny_model: Model, jobs: list[Job], tmp_path: Path) -> None:
    jobs[0].image.write_bytes(b"")
    infer(tiny_model, jobs[:1], tmp_path / "out", Silent())
    infer(tiny_model, jobs[1:], tmp_path / "out", Silent())
    with (tmp_path / "out" / "failures.csv").open(newline="") as file:
        assert [row["image"] for row in csv.DictReader(file)] == [str(jobs[0].image)]
