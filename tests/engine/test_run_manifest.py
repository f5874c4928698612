"""`ctseg_run.json` says how each mask was made and from which bytes, also after a stop, a kill or another run."""

import dataclasses
import hashlib
import json
import shutil
import time
from pathlib import Path

import pytest
import torch

import ctseg
from ctseg.engine import infer as engine
from ctseg.engine.infer import Outcome, infer
from ctseg.engine.model import Model
from ctseg.engine.predict import predict, predict_taken
from ctseg.engine.run_manifest import RunManifest, open_run_manifest, run_facts
from ctseg.errors import CtsegError, OutputError, Stopped
from ctseg.io.images import read_image
from ctseg.jobs import Job, Options, Shard, find_jobs
from ctseg.manifest import Manifest
from ctseg.progress import Silent
from dicom_maker import Plan, write_series

STAGES = ["read", "prepare", "network", "restore", "write", "waiting"]


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def jobs(tiny_manifest: Manifest, tmp_path: Path, output: Path) -> list[Job]:
    """Three CTs, copied so that a test may change them."""
    found = []
    for case in tiny_manifest.cases[:3]:
        image = tmp_path / "in" / case.image.name
        image.parent.mkdir(exist_ok=True)
        image.write_bytes(case.image.read_bytes())
        found.append(Job(image, output / f"{case.name}_seg.nii.gz"))
    return found


def read(output: Path, name: str = "ctseg_run.json") -> dict:
    return json.loads((output / name).read_text(encoding="utf-8"))


def test_it_says_how_and_from_what(tiny_model: Model, jobs: list[Job], output: Path) -> None:
    outcomes = infer(tiny_model, jobs, output, Silent(), options=Options(overlays=True))
    run = read(output)
    assert run["ctseg"] == ctseg.__version__
    assert run["libraries"]["torch"] == torch.__version__
    assert (run["device"], run["gpu"], run["precision"], run["backend"]) == ("cpu", None, "float32", "torch")
    assert (run["model"], run["model_sha256"], run["recipe"]) == ("best.pt", tiny_model.sha256, "spleen:small")
    assert (run["threads"], run["shard"]) == (1, "1/1")
    assert (run["options"]["overlays"], run["options"]["overwrite"], run["options"]["gaps"]) == (True, False, "error")
    assert (run["state"], run["error"], run["earlier_runs"]) == ("complete", "", [])
    assert run["started"] < run["finished"]
    for case, job, outcome in zip(run["cases"], jobs, outcomes, strict=True):
        content = job.image.read_bytes()
        assert (case["image"], case["mask"], case["status"]) == (str(job.image), job.mask.name, "done")
        assert (case["sha256"], case["num_bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))
        assert list(case["stage_seconds"]) == list(outcome.stage_seconds) == STAGES
        assert all(case["stage_seconds"][stage] > 0 for stage in STAGES[:-1])
        assert outcome.seconds == pytest.approx(sum(outcome.stage_seconds[stage] for stage in STAGES[:-1]))
        assert case["peak_memory_bytes"] > 10**8
        assert (case["error"], case["run"]) == ("", run["started"])


def test_entries_of_earlier_runs_stay_with_how_they_were_made(tiny_model: Model, jobs: list[Job], output: Path) -> None:
    infer(tiny_model, jobs[:2], output, Silent())
    first = read(output)
    infer(dataclasses.replace(tiny_model, backend="onnxruntime"), jobs, output, Silent())
    second = read(output)
    assert second["cases"][:2] == first["cases"]
    assert [case["run"] for case in second["cases"]] == [first["started"], first["started"], second["started"]]
    (earlier,) = second["earlier_runs"]
    assert earlier == {key: value for key, value in first.items() if key not in ("cases", "earlier_runs")}
    assert (earlier["backend"], second["backend"]) == ("torch", "onnxruntime")
    infer(tiny_model, jobs, output, Silent(), options=Options(overwrite=True))
    third = read(output)
    assert {case["run"] for case in third["cases"]} == {third["started"]}
    assert third["earlier_runs"] == []


def test_a_failed_ct_is_told_until_it_is_done(tiny_model: Model, jobs: list[Job], output: Path) -> None:
    good = jobs[1].image.read_bytes()
    jobs[1].image.write_bytes(good[:-300])
    outcomes = infer(tiny_model, jobs, output, Silent())
    run = read(output)
    assert run["state"] == "complete"
    failed = run["cases"][1]
    digest = hashlib.sha256(good[:-300]).hexdigest()
    assert (failed["status"], failed["error"], failed["sha256"]) == ("failed", outcomes[1].error, digest)
    assert list(failed["stage_seconds"]) == ["read", "waiting"]
    infer(tiny_model, jobs[:1], output, Silent())
    assert read(output)["cases"][1] == failed
    jobs[1].image.write_bytes(good)
    infer(tiny_model, jobs, output, Silent())
    assert [case["status"] for case in read(output)["cases"]] == ["done"] * 3


def test_entries_without_a_mask_go_and_masks_without_an_entry_get_one(
    tiny_model: Model, jobs: list[Job], output: Path
) -> None:
    infer(tiny_model, jobs, output, Silent())
    jobs[0].mask.unlink()
    infer(tiny_model, jobs[1:], output, Silent())
    assert [case["mask"] for case in read(output)["cases"]] == [job.mask.name for job in jobs[1:]]
    (output / "ctseg_run.json").unlink()
    infer(tiny_model, jobs[1:], output, Silent())
    assert [case["status"] for case in read(output)["cases"]] == ["skipped", "skipped"]


def test_a_mask_that_another_part_made_again_loses_its_entry(tiny_model: Model, jobs: list[Job], output: Path) -> None:
    infer(tiny_model, jobs, output, Silent())
    shutil.copy(jobs[1].image, jobs[0].image)
    infer(tiny_model, jobs, output, Silent(), shard=Shard(0, 3))
    (output / "ctseg_run-1-of-3.json").unlink()
    infer(tiny_model, jobs, output, Silent())
    assert [case["status"] for case in read(output)["cases"]] == ["done", "done", "skipped"]


def test_a_run_over_all_takes_over_what_parts_told(tiny_model: Model, jobs: list[Job], output: Path) -> None:
    for index in range(2):
        infer(tiny_model, jobs, output, Silent(), shard=Shard(index, 2))
    parts = [read(output, f"ctseg_run-{n}-of-2.json") for n in (1, 2)]
    jobs[2].mask.unlink()
    infer(tiny_model, jobs, output, Silent())
    whole = read(output)
    runs = {case["mask"]: case["run"] for case in whole["cases"]}
    assert runs == {
        jobs[0].mask.name: parts[0]["started"],
        jobs[1].mask.name: parts[1]["started"],
        jobs[2].mask.name: whole["started"],
    }
    assert [run["shard"] for run in whole["earlier_runs"]] == ["1/2", "2/2"]
    assert not list(output.glob("ctseg_run-*"))


def test_a_run_that_was_cut_off_leaves_those_of_parts(
    tiny_model: Model, jobs: list[Job], output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    infer(tiny_model, jobs, output, Silent(), shard=Shard(1, 2))
    with pytest.raises(Stopped):
        infer(tiny_model, jobs, output, Silent(), stop_requested=lambda: True)
    assert (output / "ctseg_run-2-of-2.json").exists()
    infer(tiny_model, jobs, output, Silent())
    assert sorted(path.name for path in output.glob("ctseg_run*")) == ["ctseg_run.json"]
    assert {case["status"] for case in read(output)["cases"]} == {"done"}


def test_a_ct_that_a_part_has_done_is_told_as_done(tiny_model: Model, jobs: list[Job], output: Path) -> None:
    good = jobs[0].image.read_bytes()
    jobs[0].image.write_bytes(b"")
    infer(tiny_model, jobs, output, Silent())
    jobs[0].image.write_bytes(good)
    infer(tiny_model, jobs, output, Silent(), shard=Shard(0, 3))
    infer(tiny_model, jobs, output, Silent())
    assert {case["status"] for case in read(output)["cases"]} == {"done"}


def test_another_models_entries_go_with_its_masks(tiny_model: Model, jobs: list[Job], output: Path) -> None:
    jobs[0].image.write_bytes(b"")
    infer(tiny_model, jobs, output, Silent())
    infer(dataclasses.replace(tiny_model, sha256="0" * 64), jobs[1:], output, Silent(), options=Options(overwrite=True))
    run = read(output)
    assert [case["mask"] for case in run["cases"]] == [job.mask.name for job in jobs[1:]]
    assert (run["model_sha256"], run["earlier_runs"]) == ("0" * 64, [])


@pytest.mark.parametrize(
    ("error", "state", "told"),
    [
        (KeyboardInterrupt(), "stopped", "KeyboardInterrupt"),
        (ZeroDivisionError("of patient Muster"), "failed", "ZeroDivisionError"),
        (OutputError("cannot write 'x'"), "failed", "cannot write 'x'"),
    ],
    ids=lambda value: str(value) or "interrupt",
)
def test_how_a_run_ended(tiny_model, jobs, output: Path, monkeypatch, error, state: str, told: str) -> None:
    states = []

    def second_fails(*arguments, **options):
        states.append(read(output)["state"])
        if len(states) == 2:
            raise error
        return predict_taken(*arguments, **options)

    monkeypatch.setattr(engine, "predict_taken", second_fails)
    with pytest.raises(type(error)):
        infer(tiny_model, jobs, output, Silent())
    run = read(output)
    assert states == ["running", "running"]
    assert (run["state"], run["error"]) == (state, told)
    assert [case["mask"] for case in run["cases"]] == [jobs[0].mask.name]


def test_a_stop_in_the_middle_of_a_ct(tiny_model: Model, jobs: list[Job], output: Path, monkeypatch) -> None:
    """After two windows of the second CT, while the first mask is still being written: that one is completed."""
    calls, wanted = [], []
    real = engine.write_mask

    def slow(*arguments):
        while not wanted:
            time.sleep(0.001)
        return real(*arguments)

    def forward(image_BCXYZ):
        calls.append(image_BCXYZ)
        if jobs[0].mask.exists() or len(calls) == windows + 2:
            wanted.append(True)
        return tiny_model.forward(image_BCXYZ)

    windows = len(_windows_of(tiny_model, jobs[0]))
    assert windows > 2
    monkeypatch.setattr(engine, "write_mask", slow)
    model = dataclasses.replace(tiny_model, forward=forward)
    with pytest.raises(Stopped, match="stopped by a signal after 1 of 3 CTs; the same command goes on"):
        infer(model, jobs, output, Silent(), stop_requested=lambda: bool(wanted))
    assert len(calls) == windows + 2
    assert [job.mask.exists() for job in jobs] == [True, False, False]
    assert (read(output)["state"], len(read(output)["cases"])) == ("stopped", 1)


def _windows_of(model: Model, job: Job) -> list[int]:
    done = []
    predict(model, read_image(job.image), lambda number, _: done.append(number))
    return done


def test_each_part_has_its_own(tiny_model: Model, jobs: list[Job], output: Path) -> None:
    for index in range(2):
        infer(tiny_model, jobs, output, Silent(), shard=Shard(index, 2))
    names = [[case["mask"] for case in read(output, f"ctseg_run-{n}-of-2.json")["cases"]] for n in (1, 2)]
    assert names == [[jobs[0].mask.name, jobs[2].mask.name], [jobs[1].mask.name]]
    assert read(output, "ctseg_run-2-of-2.json")["shard"] == "2/2"
    assert not (output / "ctseg_run.json").exists()


def test_a_dicom_series_has_one_digest_wherever_it_lies(tiny_model: Model, tmp_path: Path, monkeypatch) -> None:
    """That of `sha256sum * | cut -c1-64 | sort | sha256sum`; and no name, number or UID of the patient."""
    monkeypatch.setenv("CTSEG_PSEUDONYM_KEY", "k" * 40)
    plan = Plan(size=(24, 20, 15), spacing_mm=(10.0, 10.0, 10.0), hu=lambda points: points[..., 0] * 5)
    folder = write_series(tmp_path / "ct", plan)
    archive = Path(shutil.make_archive(str(tmp_path / "packed"), "zip", folder))
    digests = sorted(hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir())
    expected = hashlib.sha256("".join(f"{one}\n" for one in digests).encode()).hexdigest()
    uid = "1.2.826.0.1.3680043.99.1"
    for source, output in ((folder, tmp_path / "a"), (archive, tmp_path / "b")):
        options = Options(series=f"SeriesInstanceUID != {uid}")
        _run(tiny_model, source, output, options)
        (case,) = read(output)["cases"]
        assert (case["status"], case["sha256"]) == ("done", expected)
        assert case["num_bytes"] == sum(path.stat().st_size for path in folder.iterdir())
        text = (output / "ctseg_run.json").read_text()
        assert not any(secret in text for secret in ("Muster", "secret", "19500101", "ACC-99", uid))


def _run(model: Model, source: Path, output: Path, options: Options) -> list[Outcome]:
    return infer(model, find_jobs([source], output, options), output, Silent(), options=options)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"[1]", b"\xff", b'{"cases": {}, "started": 1}', b'{"cases": [1, {"mask": 2}, {"mask": "x"}]}',
        b'{"started": [], "earlier_runs": [{"started": {}}, 3], "cases": [{"mask": "x", "run": []}]}',
    ],
    ids=str,
)  # fmt: skip
def test_a_damaged_file_is_replaced(tiny_model: Model, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ctseg_run.json"
    path.write_bytes(content)
    with open_run_manifest(path, run_facts(tiny_model, Options(), Shard())) as manifest:
        manifest.add(tmp_path / "a_seg.nii", {"image": "a.nii", "status": "done"})
    assert [case["mask"] for case in read(tmp_path)["cases"]] == ["a_seg.nii"]


@pytest.mark.parametrize("mask", ["a" * 5000, "a\0b", "../" * 50], ids=len)
def test_an_entry_with_a_name_that_no_mask_has_is_dropped(tiny_model: Model, tmp_path: Path, mask: str) -> None:
    facts = run_facts(tiny_model, Options(), Shard())
    before = {**facts, "started": "then", "cases": [{"mask": mask, "run": "then", "status": "done"}]}
    (tmp_path / "ctseg_run.json").write_text(json.dumps(before))
    RunManifest(tmp_path / "ctseg_run.json", facts).write()
    assert read(tmp_path)["cases"] == []


def test_a_full_disk_at_the_end_hides_no_error(tiny_model: Model, tmp_path: Path, monkeypatch) -> None:
    facts = run_facts(tiny_model, Options(), Shard())

    def run() -> None:
        with open_run_manifest(tmp_path / "ctseg_run.json", facts):
            monkeypatch.setattr("ctseg.engine.run_manifest.write_text", _full)
            raise CtsegError("the first error")

    with pytest.raises(CtsegError, match="the first error"):
        run()


def _full(*_: object) -> None:
    raise OutputError("cannot write: disk full")
