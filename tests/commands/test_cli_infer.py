"""`ctseg infer` on good, bad and hostile input: one line for each bad file, the others done, nothing half-written."""

import csv
import dataclasses
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from nibabel.nifti1 import Nifti1Header

from ctseg.ahead import UnpackedAhead
from ctseg.commands.common import parse_bytes
from ctseg.io.images import read_geometry, read_labels
from dicom_maker import Plan, write_series

SIZE = (16, 14, 12)
AFFINE = np.diag([-5.0, -5.0, 5.0, 1.0])

BAD = {
    "truncated.nii.gz": "truncated: the compressed data end early; copy it again",
    "text.nii": "not NIfTI: it must begin with a header of 348 or 540 bytes",
    "empty.nii.gz": "the file is empty",
    "flat.nii.gz": "a volume has three axes, got a 2D image of 16 x 14; stack its slices first",
    "series.nii.gz": "one volume per file, got 2 (16 x 14 x 12 x 2); split it into 3D files",
    "nan.nii.gz": "every voxel must be a number, got 3 NaN or infinite",
    "constant.nii.gz": "every voxel is -1000: not a CT",
    "spacing.nii": "spacing must be positive, got ",
    "sheared.nii": "axes must be at right angles, got a shear of 0.196",
    "conflict.nii": "sform/qform conflict: they must agree within half a voxel, got 40 mm (8 voxels) at a corner",
    "huge.nii": "its header promises 2.7e+13",
    "picture.png": "its suffix is unknown; convert it",
    "pipe.nii": "it must be a file, got a device or pipe",
}


def ct(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-200, 300, SIZE, dtype=np.int16)


def header(array: np.ndarray, sform: np.ndarray = AFFINE, qform: np.ndarray | None = None, **fields: Any) -> bytes:
    """An uncompressed NIfTI file whose header says what it is told."""
    head = Nifti1Header()
    head.set_data_shape(array.shape)
    head.set_data_dtype(array.dtype)
    head.set_sform(sform, code=1)
    if qform is not None:
        head.set_qform(qform, code=1)
    head.set_xyzt_units("mm")
    head["vox_offset"], head["magic"] = 352, b"n+1"
    for name, value in fields.items():
        head[name] = value
    return bytes(head.binaryblock) + bytes(4) + array.tobytes(order="F")


def write_bad(folder: Path) -> None:
    array = ct()
    nan = array.astype(np.float32)
    nan[2, 3, 4:7] = [np.nan, np.inf, -np.inf]
    sheared, shifted, flat = AFFINE.copy(), AFFINE.copy(), AFFINE.copy()
    sheared[:3, 2] += [1.0, 0, 0]
    shifted[0, 3] += 40
    flat[2, 2] = 0
    contents = {
        "truncated.nii.gz": gzip.compress(header(array))[:-500],
        "text.nii": b"dear reader, this is no image\n" * 50,
        "empty.nii.gz": b"",
        "flat.nii.gz": gzip.compress(header(array[:, :, 0])),
        "series.nii.gz": gzip.compress(header(np.stack([array, array], axis=3))),
        "nan.nii.gz": gzip.compress(header(nan)),
        "constant.nii.gz": gzip.compress(header(np.full_like(array, -1000))),
        "spacing.nii": header(array, flat),
        "sheared.nii": header(array, sheared),
        "conflict.nii": header(array, qform=shifted),
        "huge.nii": header(array, dim=[3, 30000, 30000, 30000, 1, 1, 1, 1]),
        "picture.png": b"\x89PNG",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    os.mkfifo(folder / "pipe.nii")


def write_good(folder: Path) -> list[Path]:
    """One CT in each of the four formats, of different voxels."""
    folder.mkdir(exist_ok=True)
    paths = [folder / name for name in ("one.nii.gz", "two.nii", "three.nrrd", "four.mha")]
    for seed, path in enumerate(paths):
        if ".nii" in path.name:
            nibabel.save(nibabel.Nifti1Image(ct(seed), AFFINE), path)
        else:
            image = SimpleITK.GetImageFromArray(ct(seed).T)
            image.SetSpacing((5.0, 5.0, 5.0))
            SimpleITK.WriteImage(image, str(path))
    return paths


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, run_cli: Callable[..., Any], tiny_model: Path) -> tuple[Path, Any]:
    """A folder in which one call met every kind of bad file between good ones, and what it answered."""
    folder = tmp_path_factory.mktemp("mixed")
    good = write_good(folder)
    write_bad(folder)
    files = [*good[:2], *(folder / name for name in BAD), *good[2:]]
    return folder, run_cli(folder, "infer", *(f.name for f in files), "--output", "masks", "--model", tiny_model)


def test_the_good_files_are_done(mixed: tuple[Path, Any]):
    folder, _ = mixed
    assert files_below(folder / "masks") == [
        "ctseg_model.json", "ctseg_run.json", "failures.csv", "four_seg.mha", "one_seg.nii.gz", "three_seg.nrrd",
        "two_seg.nii",
    ]  # fmt: skip
    for image in ("one.nii.gz", "two.nii", "three.nrrd", "four.mha"):
        stem, suffix = image.split(".", 1)
        mask = read_labels(folder / "masks" / f"{stem}_seg.{suffix}")
        assert mask.geometry.agrees_with(read_geometry(folder / image))
        assert mask.array.max() <= 1


@pytest.mark.parametrize(("name", "rule"), BAD.items(), ids=list(BAD))
def test_a_bad_file_is_one_line_that_names_it_and_the_rule(mixed: tuple[Path, Any], name: str, rule: str):
    folder, result = mixed
    (line,) = [line for line in result.message.splitlines() if name in line]
    assert line.startswith(f"  cannot read '{name}': ")
    assert rule in line
    rows = list(csv.DictReader((folder / "masks" / "failures.csv").read_text().splitlines()))
    assert [row["error"] for row in rows if row["image"] == name] == [line.strip()]


def test_exit_code_and_summary(mixed: tuple[Path, Any]):
    _, result = mixed
    assert result.code == 1
    first, *lines = result.message.splitlines()
    assert first == f"{len(BAD)} of {len(BAD) + 4} files failed, listed in masks/failures.csv:"
    assert len(lines) == len(BAD)
    assert result.out.endswith(f"\n\n4 done, {len(BAD)} failed\n")


def test_record_of_the_model(mixed: tuple[Path, Any], tiny_model: Path):
    import hashlib

    record = json.loads((mixed[0] / "masks" / "ctseg_model.json").read_text())
    sha256 = hashlib.sha256(tiny_model.read_bytes()).hexdigest()
    assert record == {"recipe": "spleen:small", "model": "best.pt", "sha256": sha256, "fast": False}


@pytest.fixture
def cts(tmp_path: Path) -> Path:
    """A folder of good CT."""
    write_good(tmp_path / "cts")
    return tmp_path / "cts"


def test_json_gives_the_volume_of_the_mask(cli: Callable[..., Any], cts: Path, tiny_model: Path, tmp_path: Path):
    result = cli("infer", "cts", "--output", "masks", "--model", tiny_model, "--json", "--quiet")
    assert (result.code, result.err) == (0, "")
    outcomes = json.loads(result.out)
    assert [o["image"] for o in outcomes] == ["cts/four.mha", "cts/one.nii.gz", "cts/three.nrrd", "cts/two.nii"]
    for outcome in outcomes:
        voxels = np.count_nonzero(read_labels(tmp_path / outcome["mask"]).array)
        assert outcome["volumes_ml"] == pytest.approx({"spleen": voxels * 0.125})
        assert (outcome["status"], outcome["error"]) == ("done", "")
        assert outcome["seconds"] >= outcome["stage_seconds"]["network"] > 0


PROGRAM = """
import sys
from ctseg.cli import main
try:
    main()
finally:
    print(*sorted({"torch", "monai"} & set(sys.modules)), file=sys.stderr)
"""


@pytest.mark.parametrize("backend", ["auto", "openvino"])
def test_what_runs_without_torch_does_not_import_it(
    cli: Callable[..., Any], cts: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """An ONNX file on onnxruntime, and a checkpoint on another backend than torch from its second run on."""
    monkeypatch.setenv("CTSEG_CACHE", str(tmp_path / "cache"))

    cli("export", "--model", tiny_model, "--format", "onnx", "--output", tmp_path / "model.onnx", "--device", "cpu")
    model = tmp_path / "model.onnx"
    if backend == "openvino":
        pytest.importorskip("openvino")
        model = tiny_model
    for output, names in (("first", "monai torch" if model == tiny_model else ""), ("second", "")):
        call = ["infer", "cts", "--output", output, "--model", str(model), "--device", "cpu", "--backend", backend]
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *call], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert done.stderr.splitlines()[-1] == names
    cli("infer", "cts", "--output", "exact", "--model", tiny_model, "--device", "cpu", "--backend", "torch")
    for mask in (tmp_path / "exact").glob("*_seg.*"):
        ours, wanted = read_labels(tmp_path / "second" / mask.name).array, read_labels(mask).array
        assert np.count_nonzero(ours != wanted) <= 1e-3 * np.count_nonzero(wanted)


@pytest.mark.parametrize(
    ("done", "options", "begun"),
    [
        ([], [], ["one.nii.gz"]),
        (["one.nii.gz"], [], ["two.nii.gz"]),
        (["one.nii.gz"], ["--overwrite"], ["one.nii.gz"]),
        ([], ["--shard", "2/2"], ["two.nii.gz"]),
        ([], ["--dry-run"], []),
        (["one.nii.gz", "two.nii.gz"], [], []),
    ],
)
def test_the_first_ct_to_do_is_unpacked_ahead(
    cli: Callable[..., Any],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    done: list[str],
    options: list[str],
    begun: list[str],
):
    for seed, name in enumerate(("one.nii.gz", "two.nii.gz")):
        (tmp_path / name).write_bytes(gzip.compress(header(ct(seed))))
    taken: list[str] = []
    begun_files: list[str] = []

    class Told(UnpackedAhead):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            begun_files.append(path.name)

        def readinto(self, target: memoryview | bytearray) -> int:
            taken.append(self._file.name)
            return super().readinto(target)

    call = ("--output", "masks", "--model", tiny_model, "--device", "cpu", "--backend", "torch")
    if done:
        cli("infer", *done, *call)
    monkeypatch.setattr("ctseg.ahead.UnpackedAhead", Told)
    assert cli("infer", "one.nii.gz", "two.nii.gz", *call, *options).code == 0
    assert sorted({Path(name).name for name in taken}) == begun_files == begun


def test_fast_says_so_and_keeps_its_masks_apart(cli: Callable[..., Any], cts: Path, tiny_model: Path, tmp_path: Path):
    from ctseg.engine.process import cpu_has_bfloat16

    call = ("infer", "cts", "--output", "masks", "--model", tiny_model, "--device", "cpu")
    result = cli(*call, "--fast")
    assert result.code == 0
    assert re.search(rf"{'bfloat16' if cpu_has_bfloat16() else 'float32'}, (torch|openvino), fast\n", result.err)
    assert json.loads((tmp_path / "masks" / "ctseg_model.json").read_text())["fast"] is True
    refused = cli(*call)
    assert refused.code == 2
    assert refused.message.startswith("'masks' holds masks made with other options (fast True); choose another")
    assert (
        "float32, torch, fast\n"
        in cli(*call, "--fast", "--precision", "float32", "--backend", "torch", "--overwrite").err
    )


def test_second_run_skips_what_is_done_and_redoes_what_is_not(
    cli: Callable[..., Any], cts: Path, tiny_model: Path, tmp_path: Path
):
    call = ("infer", "cts", "--output", "masks", "--model", tiny_model, "--json")
    cli(*call)
    mask, gone = tmp_path / "masks" / "one_seg.nii.gz", tmp_path / "masks" / "two_seg.nii"
    before = mask.read_bytes()
    mask.write_bytes(b"kept as it is")
    gone.unlink()
    changed = cts / "four.mha"
    os.utime(changed, (2**31, 2**31))
    status = {Path(o["image"]).name: o["status"] for o in json.loads(cli(*call).out)}
    assert status == {"one.nii.gz": "skipped", "two.nii": "done", "three.nrrd": "skipped", "four.mha": "done"}
    assert mask.read_bytes() == b"kept as it is"
    assert {o["status"] for o in json.loads(cli(*call, "--overwrite").out)} == {"done"}
    assert mask.read_bytes() == before


def test_failures_are_forgotten_once_they_are_mended(
    cli: Callable[..., Any], cts: Path, tiny_model: Path, tmp_path: Path
):
    good = (cts / "two.nii").read_bytes()
    (cts / "two.nii").write_bytes(b"")
    call = ("infer", "cts", "--output", "masks", "--model", tiny_model)
    assert cli(*call).code == 1
    (cts / "two.nii").write_bytes(good)
    assert cli(*call).code == 0
    assert not (tmp_path / "masks" / "failures.csv").exists()


def test_masks_of_two_models_never_mix(
    cli: Callable[..., Any], cts: Path, tiny_model: Path, other_model: Path, tmp_path: Path
):
    call = ("infer", "cts", "--output", "masks", "--model")
    assert cli(*call, tiny_model).code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "masks").iterdir()}
    refused = cli(*call, other_model)
    assert refused.code == 2
    assert refused.message.startswith("'masks' holds masks of another model (spleen:small, best.pt); choose another")
    assert {path.name: path.read_bytes() for path in (tmp_path / "masks").iterdir()} == before
    assert cli(*call, other_model, "--overwrite").code == 0
    after = {path.name: path.read_bytes() for path in (tmp_path / "masks").iterdir()}
    assert after.keys() == before.keys()
    assert after["ctseg_model.json"] != before["ctseg_model.json"]
    assert cli(*call, other_model).code == 0


def masks_of(result: Any) -> dict[str, str]:
    return {o["image"]: o["mask"] for o in json.loads(result.out)}


def test_a_folder_keeps_its_subfolders(cli: Callable[..., Any], cts: Path, tiny_model: Path):
    for name in ("p1/ct.nii", "p2/ct.nii", "p2/.hidden.nii", "p2/notes.txt"):
        (cts / name).parent.mkdir(exist_ok=True)
        shutil.copy(cts / "two.nii", cts / name)
    for name in ("one.nii.gz", "three.nrrd", "four.mha"):
        (cts / name).unlink()
    call = ("infer", "cts", "--output", "cts/masks", "--model", tiny_model, "--json")
    expected = {"cts/p1/ct.nii": "cts/masks/p1/ct_seg.nii", "cts/p2/ct.nii": "cts/masks/p2/ct_seg.nii",
                "cts/two.nii": "cts/masks/two_seg.nii"}  # fmt: skip
    assert masks_of(cli(*call)) == expected
    assert masks_of(cli(*call)) == expected, "the masks below the folder are not taken for CTs"


def test_names_that_collide_keep_their_folders(cli: Callable[..., Any], cts: Path, tiny_model: Path, tmp_path: Path):
    for name in ("a/ct.nii", "b/ct.nii", "work/here"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(cts / "two.nii", tmp_path / name)
    paths = ["a/ct.nii", "b/ct.nii", "cts/two.nii", "work/../a/ct.nii"]
    result = cli("infer", *paths, "--output", "masks", "--model", tiny_model, "--json")
    assert list(masks_of(result).values()) == ["masks/a/ct_seg.nii", "masks/b/ct_seg.nii", "masks/two_seg.nii"]


def test_masks_stay_below_the_output_folder(run_cli: Callable[..., Any], cts: Path, tiny_model: Path, tmp_path: Path):
    """Inputs above the current folder, whose names collide."""
    work = tmp_path / "work"
    for name in ("ct.nii", "work/ct.nii"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(cts / "two.nii", tmp_path / name)
    run_cli(work, "infer", "../ct.nii", "ct.nii", "--output", "masks", "--model", tiny_model)
    assert files_below(work) == [
        "ct.nii", "masks/ct_seg.nii", "masks/ctseg_model.json", "masks/ctseg_run.json", "masks/work/ct_seg.nii",
    ]  # fmt: skip
    assert files_below(tmp_path)[:1] == ["ct.nii"]


def test_shards_do_each_ct_once(cli: Callable[..., Any], cts: Path, tiny_model: Path, tmp_path: Path):
    """And list their failures apart: the bad CT is in one part, and the other parts do not forget it."""
    (cts / "bad.nii").write_bytes(b"")
    call = ("infer", "cts", "--output", "masks", "--model", tiny_model, "--json", "--shard")
    answers = [cli(*call, f"{part}/6") for part in (1, 2, 3, 4, 5, 6)]
    images = [o["image"] for answer in answers for o in json.loads(answer.out)]
    assert sorted(images) == sorted(f"cts/{path.name}" for path in cts.iterdir())
    assert sorted(answer.code for answer in answers) == [0, 0, 0, 0, 0, 1]
    (failures,) = (tmp_path / "masks").glob("failures*")
    assert failures.name == f"failures-{[a.code for a in answers].index(1) + 1}-of-6.csv"
    assert [len(json.loads(answer.out)) for answer in answers].count(0) == 1
    assert "part 6/6 of the CTs" in answers[5].err


def test_lists_of_another_number_of_parts_lose_what_is_told_anew(
    cli: Callable[..., Any], cts: Path, tiny_model: Path, tmp_path: Path
):
    good = (cts / "two.nii").read_bytes()
    for name in ("two.nii", "bad.nii", "other.nii"):
        (cts / name).write_bytes(b"")
    call = ("infer", "--output", "masks", "--model", tiny_model)

    def lists() -> dict[str, list[str]]:
        found = {}
        for path in sorted((tmp_path / "masks").glob("failures*")):
            found[path.name] = [row["image"] for row in csv.DictReader(path.read_text().splitlines())]
        return found

    for part in (1, 2, 3):
        cli(*call, "cts", "--shard", f"{part}/3")
    listed = [image for images in lists().values() for image in images]
    assert sorted(listed) == ["cts/bad.nii", "cts/other.nii", "cts/two.nii"]
    (cts / "two.nii").write_bytes(good)
    (tmp_path / "masks" / "failures-mine.csv").write_text("image,error\ncts/two.nii,mine\n")
    assert cli(*call, "cts/two.nii", "cts/bad.nii").code == 1
    after = lists()
    assert after.pop("failures-mine.csv") == ["cts/two.nii"]
    assert after.pop("failures.csv") == ["cts/bad.nii"]
    assert list(after.values()) == [["cts/other.nii"]]  # which this run was not about
    for part in (1, 2):
        cli(*call, "cts", "--shard", f"{part}/2")
    assert {name for name in lists() if name != "failures-mine.csv"} <= {"failures-1-of-2.csv", "failures-2-of-2.csv"}
    listed = [image for name, images in lists().items() if name != "failures-mine.csv" for image in images]
    assert sorted(listed) == ["cts/bad.nii", "cts/other.nii"]


def test_a_part_without_a_ct(cli: Callable[..., Any], cts: Path, tiny_model: Path):
    result = cli("infer", "cts", "--output", "masks", "--model", tiny_model, "--shard", "5/5")
    assert (result.code, result.out) == (0, f"model {tiny_model}\n\nno CT in this part\n")


def test_shards_replace_no_other_models_masks(
    cli: Callable[..., Any], cts: Path, tiny_model: Path, other_model: Path, tmp_path: Path
):
    """What one takes for old masks could be another one's new ones."""
    call = ("infer", "cts", "--output", "masks", "--shard", "1/2", "--overwrite", "--model")
    assert cli(*call, tiny_model).code == 0
    assert {o["status"] for o in json.loads(cli(*call, tiny_model, "--json").out)} == {"done"}
    result = cli(*call, other_model)
    assert result.code == 2
    assert "choose another --output, or --overwrite (without --shard and --gpus) to replace them" in result.message


def test_a_plan_is_of_one_process(cli: Callable[..., Any], cts: Path, tiny_model: Path, tmp_path: Path):
    result = cli("infer", "cts", "--output", "masks", "--model", tiny_model, "--gpus", 2, "--dry-run")
    assert (result.code, result.message) == (2, "--dry-run tells what one process takes; leave --gpus out")
    assert not (tmp_path / "masks").exists()


def test_more_gpus_than_there_are(
    cli: Callable[..., Any], cts: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    call = ("infer", "cts", "--output", "masks", "--model", tiny_model, "--gpus", 2)
    result = cli(*call)
    assert (result.code, result.out) == (2, "")
    assert result.err == "ctseg: --gpus 2: 0 CUDA GPU(s) here; use fewer, or --device cpu\n"
    assert not (tmp_path / "masks").exists()
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert cli(*call, "--shard", "1/1").message.startswith("--gpus 2: srun has started 4 tasks already")


def test_the_table_of_several_processes_is_that_of_one(
    cli: Callable[..., Any], cts: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
):
    from ctseg.engine import parts

    call = ("infer", "cts", "--output", "masks", "--model", tiny_model, "--device", "cpu", "--shard", "1/2")
    one = cli(*call, "--json")
    asked = []

    def answers(number: int, arguments: list[str]) -> parts.Answers:
        asked.append((number, arguments[1:4]))
        return parts.Answers(json.loads(one.out), True)

    monkeypatch.setattr(parts, "run_parts", answers)
    several = cli(*call, "--gpus", 2)
    assert asked == [(2, ["--json", "--shard", "1/2"])]
    assert (several.code, several.err) == (1, ""), "each process has told what failed"
    assert several.out.splitlines()[-1] == "2 done"
    assert "spleen_ml" in several.out


@pytest.mark.parametrize(
    "backend",
    ["torch", pytest.param("openvino", marks=pytest.mark.skipif(find_spec("openvino") is None, reason="no OpenVINO"))],
)
def test_stopped_by_a_signal_and_done_by_the_same_command(
    cli: Callable[..., Any], cts: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, backend: str
):
    from ctseg.engine import infer as engine

    real = engine.scores_taken  # of the first CT, which is prepared while it is read

    def signalled(*args: Any, **options: Any) -> Any:
        mask = real(*args, **options)
        os.kill(os.getpid(), signal.SIGUSR1)
        return mask

    monkeypatch.setattr(engine, "scores_taken", signalled)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    call = ("infer", "cts", "--output", "masks", "--model", tiny_model, "--device", "cpu", "--backend", backend)
    try:
        result = cli(*call)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert (result.code, result.out) == (75, "")
    assert result.message == "stopped by a signal after 1 of 4 CTs; the same command goes on"
    assert len(list((tmp_path / "masks").glob("*_seg.*"))) == 1
    monkeypatch.setattr(engine, "scores_taken", real)
    assert sorted(o["status"] for o in json.loads(cli(*call, "--json").out)) == ["done", "done", "done", "skipped"]


def test_lists(cli: Callable[..., Any], cts: Path, tiny_model: Path, tmp_path: Path):
    (tmp_path / "list.txt").write_text("cts/two.nii\ncts/gone.nii\n\ncts/four.mha\n")
    result = cli("infer", "list.txt", "--output", "masks", "--model", tiny_model, "--json")
    assert result.code == 1
    names = [(Path(o["mask"]).name, o["status"]) for o in json.loads(result.out)]
    assert names == [("two_seg.nii", "done"), ("gone_seg.nii", "failed"), ("four_seg.mha", "done")]
    assert "gone.nii': No such file or directory; check the path" in result.message


def test_a_name_that_is_no_text(cli: Callable[..., Any], cts: Path, tiny_model: Path, tmp_path: Path):
    """Bytes that are not UTF-8, and a terminal's control characters."""
    names = [os.fsdecode(b"caf\xe9.nii"), "red\x1b[31m.nii"]
    for name in names:
        (tmp_path / name).write_bytes(b"")
    result = cli("infer", *names, "--output", "masks", "--model", tiny_model)
    assert result.code == 1
    assert "\x1b" not in result.err
    assert (tmp_path / "masks" / "failures.csv").read_bytes().count(b"the file is empty") == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(extra=1), "recipe inside '{path}': extra: unknown key"),
        (lambda data: data["training"].update(epochs=0), "recipe inside '{path}': training.epochs: must be at least 1"),
        (lambda data: data.pop("network"), "recipe inside '{path}': network: missing"),
        (
            lambda data: data["network"].update(channels=[4, 9]),
            "checkpoint '{path}': its weights do not fit its recipe",
        ),
    ],
)
def test_model_with_a_wrong_recipe(
    cli: Callable[..., Any],
    cts: Path,
    tmp_path: Path,
    tiny_recipe: Any,
    change: Callable[[Any], None],
    message: str,
):
    from ctseg.engine.checkpoint import save_checkpoint
    from ctseg.networks import network_for

    recipe = tiny_recipe.to_dict()
    change(recipe)
    save_checkpoint(tmp_path / "m.pt", {"recipe": recipe, "model": network_for(tiny_recipe).state_dict()})
    result = cli("infer", "cts", "--output", "masks", "--model", "m.pt")
    assert (result.code, result.out) == (2, "")
    assert result.message.startswith(message.format(path="m.pt"))
    assert files_below(tmp_path / "masks") == []


def test_file_that_is_no_model(cli: Callable[..., Any], cts: Path, tmp_path: Path):
    (tmp_path / "m.pt").write_bytes(b"no model")
    (tmp_path / "m.txt").write_bytes(b"no model")
    for name, text in (("m.pt", "checkpoint 'm.pt': "), ("m.txt", "model 'm.txt': unknown kind of file")):
        result = cli("infer", "cts", "--output", "masks", "--model", name)
        assert result.code == 2
        assert result.message.startswith(text)
        assert len(result.message.splitlines()) == 1


def test_output_on_a_read_only_disk(cli: Callable[..., Any], cts: Path, tiny_model: Path, mount: Callable[[str], Path]):
    folder = mount("ro")
    result = cli("infer", "cts", "--output", folder, "--model", tiny_model)
    assert (result.code, result.out) == (2, "")
    assert result.err == (
        f"ctseg: cannot write '{folder}': no permission to write here; free space or choose another output folder\n"
    )


def test_output_on_a_full_disk(cli: Callable[..., Any], cts: Path, tiny_model: Path, mount: Callable[[str], Path]):
    """A volume whose raw mask is larger than the disk comes second: the first mask stays, the second leaves nothing."""
    folder = mount("size=64k")
    nibabel.save(nibabel.Nifti1Image(np.tile(ct(), (4, 4, 4)), AFFINE), cts / "large.nii")
    result = cli("infer", "cts/two.nii", "cts/large.nii", "--output", folder, "--model", tiny_model)
    assert (result.code, result.out) == (2, "")
    assert result.message.startswith(f"cannot write '{folder / 'large_seg.nii'}': No space left on device; free space")
    assert files_below(folder) == ["ctseg_model.json", "ctseg_run.json", "two_seg.nii"]
    assert read_labels(folder / "two_seg.nii").array.shape == SIZE


def test_dicom_in_and_out(tiny_model: Path, cli, tmp_path: Path, monkeypatch) -> None:
    """One series of a study is chosen, one of another fails; notes and masks are told to scripts."""
    monkeypatch.setenv("CTSEG_PSEUDONYM_KEY", "k" * 40)
    plan = Plan(size=(24, 20, 16), spacing_mm=(9, 9, 9), hu=lambda points: points @ np.array([1.0, 2.0, 0.5]))
    study = {"StudyInstanceUID": "1.2.3.4.5.6"}
    write_series(tmp_path / "scans" / "thin", dataclasses.replace(plan, tags=study, drop=["FrameOfReferenceUID"]))
    write_series(tmp_path / "scans" / "thick", dataclasses.replace(plan, tags=study, spacing_mm=(9, 9, 18)))
    write_series(tmp_path / "scans" / "gap", dataclasses.replace(plan, missing=[5]))
    options = ["--output", "out", "--model", tiny_model, "--device", "cpu", "--format", "dicom-seg"]
    result = cli("infer", "scans", *options, "--series", "thinnest", "--json")
    assert result.code == 1
    assert "1 of 2 files failed" in result.message
    assert "missing slices" in result.message
    done, failed = sorted(json.loads(result.out), key=lambda row: row["status"])
    assert (done["status"], failed["status"]) == ("done", "failed")
    assert pydicom.dcmread(tmp_path / done["mask"]).Modality == "SEG"
    assert done["notes"] == ["FrameOfReferenceUID of the CT is missing or breaks DICOM's rules: a new one was made"]
    assert done["notes"][0] in result.err
    again = cli("infer", "scans", *options, "--series", "thinnest", "--gaps", "fill", "--quiet")
    assert again.code == 0
    assert "1 done, 1 skipped" in again.out or "1 skipped, 1 done" in again.out
    assert len(list((tmp_path / "out").glob("ct-*_seg.dcm"))) == 2


# Memory


@pytest.fixture
def two_cts(tmp_path: Path) -> None:
    write_good(tmp_path / "ct")


def test_a_dry_run_tells_and_writes_nothing(cli: Callable[..., Any], two_cts: None, tiny_model: Path, tmp_path: Path):
    before = files_below(tmp_path)
    result = cli("infer", "ct", "--output", "masks", "--model", tiny_model, "--dry-run")
    assert (result.code, files_below(tmp_path), (tmp_path / "masks").exists()) == (0, before, False)
    header = ["image", "voxels", "windows", "memory_GB", "disk_GB", "seconds", "way"]
    assert header in [line.split() for line in result.out.splitlines()]
    assert result.out.count("  in memory\n") == 4
    assert re.search(r"\n4 CTs, about \d+ s, up to \d\.\d\d GB of \d+\.\d\d GB \(.*\)\n$", result.out)


def test_a_dry_run_for_scripts(cli: Callable[..., Any], two_cts: None, tiny_model: Path):
    arguments = ("infer", "ct", "--output", "masks", "--model", tiny_model, "--dry-run", "--json")
    plans = json.loads(cli(*arguments, "--max-memory", "4GiB").out)
    assert (plans["max_bytes"], plans["limited_by"]) == (4 * 2**30, "--max-memory")
    case = plans["cases"][0]
    assert (case["image"], case["way"], case["size"], case["error"]) == ("ct/four.mha", "in memory", list(SIZE), "")
    assert 0 < case["memory_bytes"] < 4 * 2**30
    assert case["windows"] == 1
    assert case["seconds"] > 0


@pytest.mark.skipif(find_spec("openvino") is None, reason="needs pip install 'ctseg[openvino]'")
def test_a_dry_run_that_compiles_tells_what_the_next_run_needs(two_cts: None, tiny_model: Path, tmp_path: Path):
    """Compiling brings torch and MONAI along, hundreds of megabytes that the run itself does not have."""
    command = [sys.executable, "-m", "ctseg", "infer", "ct", "--output", "masks", "--model", str(tiny_model)]
    command += ["--backend", "openvino", "--device", "cpu", "--dry-run", "--json", "--max-memory"]
    environ = {**os.environ, "CTSEG_CACHE": str(tmp_path / "cache")}
    environ.pop("CTSEG_ASKED_AGAIN", None)
    asked = []
    for limit, code in (("8G", 0), ("8G", 0), ("1M", 1)):
        done = subprocess.run([*command, limit], cwd=tmp_path, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert done.stderr.count("its network is compiled") == (not asked)
        asked.append(json.loads(done.stdout)["cases"][0]["memory_bytes"])
    assert asked[0] == pytest.approx(asked[1], rel=0.1)


def test_a_dry_run_leaves_out_what_is_done(cli: Callable[..., Any], two_cts: None, tiny_model: Path):
    arguments = ("infer", "ct", "--output", "masks", "--model", tiny_model)
    assert cli(*arguments, "--quiet").code == 0
    result = cli(*arguments, "--dry-run")
    assert (result.code, result.out.splitlines()[-1]) == (0, "0 CTs")
    assert "4 CTs" in cli(*arguments, "--dry-run", "--overwrite").out


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_ct_that_does_not_fit_is_refused_before_it_is_read(
    cli: Callable[..., Any], two_cts: None, tiny_model: Path, tmp_path: Path, dry_run: bool
):
    options = ("--dry-run",) if dry_run else ()
    result = cli("infer", "ct", "--output", "masks", "--model", tiny_model, "--max-memory", "10M", *options)
    assert result.code == 1
    first, *lines = result.message.splitlines()
    assert first == ("4 of 4 CTs cannot be done:" if dry_run else "4 of 4 files failed, listed in masks/failures.csv:")
    needs = (
        r"  'ct/four\.mha': needs \d\.\d\d GB of memory, allowed are 0\.01 GB; allow more with --max-memory or crop it"
    )
    assert re.fullmatch(needs, lines[0])
    assert dry_run or files_below(tmp_path / "masks") == ["ctseg_model.json", "ctseg_run.json", "failures.csv"]


@pytest.mark.parametrize("size", ["much", "0G", "-1G", ""])
def test_sizes_that_are_none(cli: Callable[..., Any], two_cts: None, tiny_model: Path, size: str):
    result = cli("infer", "ct", "--output", "masks", "--model", tiny_model, f"--max-memory={size}")
    assert (result.code, result.message) == (2, f"--max-memory: expected a size such as 12G or 800M, got '{size}'")


@pytest.mark.parametrize("size", ["4G", "4GB", "4GiB", "4096M", "4 g"])
def test_sizes_of_memory(size: str):
    assert parse_bytes(size, "--max-memory") == 4 * 2**30
