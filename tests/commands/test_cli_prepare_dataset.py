"""`ctseg prepare-dataset`: what it chooses, checks, splits, mends and prepares, and what it says about it."""

import csv
import dataclasses
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctseg.files import write_json
from ctseg.io.images import read_labels, write_labels
from ctseg.manifest import Manifest, read_manifest
from ctseg.recipe import Recipe, load_recipe
from ctseg.workspace import start_run

TINY_OVERRIDES = [
    "network.channels=[4,8]",
    "network.strides=[2]",
    "preprocess.spacing_mm=[8,8,8]",
    "sampling.patch_size=[16,16,16]",
    "sampling.patches_per_case=2",
    "training.batch_cases=2",
    "training.epochs=1",
    "training.validation_interval_epochs=1",
    "inference.window_size=[16,16,16]",
]


def test_without_a_recipe_the_demo_data_are_made(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CTSEG_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("ctseg.sources.catalogue.DEMO_COUNTS", {"training": 1, "testing": 1})
    result = cli("prepare-dataset")
    assert result.code == 0
    assert result.err.splitlines()[0] == (
        "ctseg: no recipe named and no run here: making the built-in demo data set and preparing it for spleen:small"
    )
    assert "making CT phantoms 2/2" in result.err
    first, second = result.out.splitlines()
    assert first.startswith("data set phantom: 1 cases prepared, 0 were ready, ")
    assert second == "train on it with: ctseg train spleen:small"
    assert len(list((tmp_path / "data" / "phantom" / "imagesTr").iterdir())) == 2
    again = cli("prepare-dataset", "--quiet")
    assert again.err == ""
    assert again.out.startswith("data set phantom: 0 cases prepared, 1 were ready, ")


def test_in_a_folder_with_a_run_its_recipe_and_its_cases(
    cli: Callable[..., Any], tmp_path: Path, tiny_recipe: Recipe, tiny_manifest: Manifest
):
    start_run(tmp_path / "runs" / "spleen-small-001", tiny_recipe, tiny_manifest)
    result = cli("prepare-dataset", "--json", "--prepared", "there")
    assert result.code == 0
    assert result.err.startswith(
        "ctseg: no recipe named: preparing for spleen:small, the recipe of the newest run here"
    )
    answer = json.loads(result.out)
    assert (answer["data"], answer["recipe"]) == ("tiny", "spleen:small")
    assert answer["made"] == [f"case_{n}" for n in range(4)], "training and validation, not testing"
    assert answer["ready"] == []
    files = [path for path in (tmp_path / answer["folder"]).rglob("*") if path.is_file()]
    assert answer["num_bytes"] == sum(path.stat().st_size for path in files)
    assert answer["folder"].startswith("there/")


def test_named_recipe(cli: Callable[..., Any], tiny_data: Path):
    result = cli("prepare-dataset", "spleen", "--set", "preprocess.spacing_mm=[9,9,9]", "--manifest", tiny_data)
    assert result.code == 0
    assert result.err.startswith("ctseg: preparing for recipe spleen\n")
    assert result.out.startswith("data set tiny: 4 cases prepared")


@pytest.fixture
def own_data(tiny_data: Path, tmp_path: Path) -> Path:
    """A folder of imagesTr and labelsTr with five labelled cases, which a test may change."""
    folder = tmp_path / "own"
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True)
    for n in range(5):
        shutil.copy(tiny_data.with_name(f"case_{n}.nii.gz"), folder / "imagesTr" / f"case_{n}.nii.gz")
        shutil.copy(tiny_data.with_name(f"case_{n}_label.nii.gz"), folder / "labelsTr" / f"case_{n}.nii.gz")
    return folder


def options(*more: object) -> tuple[object, ...]:
    return ("prepare-dataset", "spleen:small", *(word for o in TINY_OVERRIDES for word in ("--set", o)), *more)


def shift_label(folder: Path, name: str, mm: float) -> None:
    path = folder / "labelsTr" / f"{name}.nii.gz"
    labels = read_labels(path)
    affine = labels.geometry.affine.copy()
    affine[:3, 3] += mm
    write_labels(path, labels.array, dataclasses.replace(labels.geometry, affine=affine))


def test_a_folder_is_split_prepared_and_trained_on_as_it_is_told(
    cli: Callable[..., Any], own_data: Path, tmp_path: Path
):
    result = cli(*options("--manifest", "own", "--split", "60/20/20", "--seed", 3))
    assert result.code == 0
    lines = result.out.splitlines()
    listed = "prepared/own-split-60-20-20-seed-3.json"
    assert lines[0].startswith("warning: data set  5 labelled cases name no patient; each was taken for a patient of")
    assert f"data list of 3 training, 1 validation, 1 testing in {listed}" in lines
    assert lines[-2].startswith("data set own: 4 cases prepared, 0 were ready")
    assert lines[-1].startswith(f"train on it with: ctseg train spleen:small --manifest {listed} --set ")
    train = shlex.split(lines[-1].partition(": ctseg ")[2])
    trained = cli(*train, "--json")
    assert trained.code == 0
    assert "spleen:small 4/4 took" in trained.err
    run = Path(json.loads(trained.out)["run"])
    scored = cli("validate", "--split", "testing", "--manifest", tmp_path / listed, "--model", tmp_path / run, "--json")
    assert scored.code == 0
    assert len(json.loads(scored.out)["scores"]) == 1


def test_train_takes_a_folder_itself(cli: Callable[..., Any], own_data: Path, tmp_path: Path):
    result = cli("train", "spleen:small", *options()[2:], "--manifest", "own", "--output", "run")
    assert result.code == 0
    assert len(read_manifest(tmp_path / "run" / "data.json").split("training")) == 5


def test_folds_have_lists_of_their_own(cli: Callable[..., Any], own_data: Path, tmp_path: Path):
    validated = []
    for fold in (1, 2):
        result = cli(*options("--manifest", "own", "--folds", 2, "--fold", fold, "--check-only", "--json"))
        answer = json.loads(result.out)
        assert (result.code, answer["manifest"]) == (0, f"prepared/own-fold-{fold}-of-2-seed-0.json")
        validated += [case.name for case in read_manifest(tmp_path / answer["manifest"]).validation]
    assert sorted(validated) == [f"case_{n}" for n in range(5)]


def test_every_problem_of_every_case_in_one_report(cli: Callable[..., Any], own_data: Path, tmp_path: Path):
    shutil.copy(own_data / "imagesTr/case_0.nii.gz", tmp_path / "copy.nii.gz")
    entry = [{"image": f"own/imagesTr/case_{n}.nii.gz", "label": f"own/labelsTr/case_{n}.nii.gz"} for n in range(4)]
    data = {"training": entry[:3], "validation": [entry[3], {"image": "gone.nii.gz"}], "test": ["copy.nii.gz"]}
    write_json(tmp_path / "list.json", data)
    shift_label(own_data, "case_1", 20)
    (own_data / "imagesTr/case_2.nii.gz").write_bytes(b"no image")
    result = cli(*options("--manifest", "list.json"))
    assert result.code == 2
    assert result.message == (
        "data set 'list': errors to put right: 5, listed above and in prepared/checks-spleen-small.csv; nothing was "
        "prepared"
    )
    assert [line.split()[:2] for line in result.out.splitlines()[:5]] == [
        ["error:", case] for case in ("case_1", "case_2", "gone", "gone", "copy")
    ]
    rows = [
        ["error", "case_1", "grid"],
        ["error", "case_2", "unreadable"],
        ["error", "gone", "no-label"],
        ["error", "gone", "missing-file"],
        ["error", "copy", "duplicate"],
    ]
    with (tmp_path / "prepared" / "checks-spleen-small.csv").open(newline="") as file:
        assert [[row["severity"], row["case"], row["code"]] for row in csv.DictReader(file)] == rows
    assert sorted(path.name for path in (tmp_path / "prepared").iterdir()) == [
        "checks", "checks-spleen-small.csv", "checks-spleen-small.json",
    ]  # fmt: skip
    answer = json.loads(cli(*options("--manifest", "list.json", "--json", "--quiet")).out)
    assert [finding["case"] for finding in answer["findings"]] == [row[1] for row in rows]
    assert "made" not in answer


def test_fix_mends_and_the_list_of_the_mended_is_trained_on(cli: Callable[..., Any], own_data: Path, tmp_path: Path):
    shift_label(own_data, "case_1", 1)
    shutil.copy(own_data / "imagesTr/case_0.nii.gz", own_data / "imagesTr/twin.nii.gz")
    shutil.copy(own_data / "labelsTr/case_0.nii.gz", own_data / "labelsTr/twin.nii.gz")
    before = {path: path.read_bytes() for path in own_data.rglob("*.nii.gz")}
    assert cli(*options("--manifest", "own")).code == 2
    result = cli(*options("--manifest", "own", "--fix", "--write-manifest", "lists/mine.json"))
    assert result.code == 0
    assert [line.split()[:2] for line in result.out.splitlines()[:2]] == [["fixed:", "twin"], ["fixed:", "case_1"]]
    assert "data list of 5 training in lists/mine.json" in result.out
    assert "--manifest lists/mine.json" in result.out
    assert {path: path.read_bytes() for path in own_data.rglob("*.nii.gz")} == before
    again = cli(*options("--manifest", "lists/mine.json"))
    assert again.code == 0
    assert again.out.startswith("data set own: 0 cases prepared, 5 were ready"), "nothing is made or mended twice"


def test_patients_are_not_named(cli: Callable[..., Any], own_data: Path, tmp_path: Path):
    rows = [f"own/imagesTr/case_{n}.nii.gz,own/labelsTr/case_{n}.nii.gz,Jane Doe {n // 2}" for n in range(5)]
    (tmp_path / "list.csv").write_text("\n".join(["image,label,patient", *rows]))
    result = cli(*options("--manifest", "list.csv", "--split", "50/50", "--json"))
    assert result.code == 0
    cases = read_manifest(tmp_path / "prepared" / "list-split-50-50-seed-0.json").cases
    assert len({case.patient for case in cases}) == 3
    assert len({(case.patient, case.split) for case in cases}) == 3
    rows = [row + (",training" if n else ",testing") for n, row in enumerate(rows)]
    (tmp_path / "leak.csv").write_text("\n".join(["image,label,patient,split", *rows]))
    leak = cli(*options("--manifest", "leak.csv"))
    assert leak.code == 2
    assert "the patient of this case in testing is also in training (case_1)" in leak.out
    told = [result.out, result.err, leak.out, leak.err]
    told += [path.read_text() for path in (tmp_path / "prepared").rglob("*.*") if path.suffix in (".csv", ".json")
             and "-split-" not in path.name]  # fmt: skip
    assert len(told) > 8
    assert not any("Jane" in text for text in told)


def test_stopped_by_sigterm_and_done_by_the_same_command(cli: Callable[..., Any], own_data: Path, tmp_path: Path):
    """The signal comes once the first case of many is ready."""
    for n in range(5, 40):
        for kind in ("imagesTr", "labelsTr"):
            shutil.copy(own_data / kind / "case_0.nii.gz", own_data / kind / f"case_{n}.nii.gz")
    words = [*map(str, options("--manifest", "own", "--workers", 2)), "--set", "preprocess.spacing_mm=[2,2,2]"]
    command = [sys.executable, "-m", "ctseg", *words]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob("prepared/spleen-small-*/case_*")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (75, "")
    assert "ctseg: stopped by a signal while preparing, " in err.splitlines()[-1]
    assert "Traceback" not in err
    ready = len(list(tmp_path.glob("prepared/spleen-small-*/case_*")))
    assert 1 <= ready < 40
    assert not list(tmp_path.glob("prepared/spleen-small-*/.*"))
    result = cli(*words)
    assert result.code == 0
    assert f"data set own: {40 - ready} cases prepared, {ready} were ready" in result.out


def test_the_printed_command_trains_what_the_newest_run_here_was(
    cli: Callable[..., Any], tiny_recipe: Recipe, tiny_manifest: Manifest, tmp_path: Path
) -> None:
    """Its recipe may have been changed with --set, and its name may be that of a file elsewhere."""
    changed = dataclasses.replace(tiny_recipe, name="mine")
    start_run(tmp_path / "runs" / "mine-001", changed, tiny_manifest)
    result = cli("prepare-dataset", "-q")
    assert result.code == 0
    words = shlex.split(result.out.rpartition("train on it with: ctseg ")[2])
    assert words[:2] == ["train", "runs/mine-001/recipe.json"]
    assert load_recipe(str(tmp_path / words[1])).preprocess == tiny_recipe.preprocess


def test_a_data_list_is_never_replaced_by_another(cli: Callable[..., Any], tiny_data: Path, tmp_path: Path) -> None:
    options = ("prepare-dataset", "spleen:small", "--check-only", "-q", "--split", "50/50", "--resplit")
    same = (*options, "--manifest", tiny_data, "--write-manifest", "mine.json")
    assert cli(*same).code == 0
    before = (tmp_path / "mine.json").read_bytes()
    assert cli(*same).code == 0
    result = cli(*same, "--seed", "5")
    assert (result.code, (tmp_path / "mine.json").read_bytes()) == (2, before)
    assert result.message == "'mine.json' is there already with other content; name another file with --write-manifest"
