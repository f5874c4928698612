"""`ctseg validate`: the same Dice as that of the masks `infer` writes, and the rules for what cannot be scored."""

import csv
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctseg.files import write_json
from ctseg.io.images import read_labels, write_labels
from ctseg.manifest import Case, Manifest
from ctseg.volume import Geometry
from ctseg.workspace import DATA_FILE, RECIPE_FILE
from marks import needs_openvino


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Path:
    """The tiny model's run, of which a test may do what it wants."""
    shutil.copytree(tiny_model.parent, tmp_path / "runs" / "spleen-small-001")
    return Path("runs/spleen-small-001")


def case_of(manifest: Manifest, split: str) -> Case:
    return manifest.split(split)[0]


def rows_of(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_scores_are_those_of_the_written_masks(
    cli: Callable[..., Any], run: Path, tiny_manifest: Manifest, tmp_path: Path
):
    result = cli("validate", "--json", "--quiet")
    assert (result.code, result.err) == (0, "")
    case = case_of(tiny_manifest, "testing")
    cli("infer", case.image, "--output", "masks")
    label = read_labels(case.label)
    mask = read_labels(tmp_path / "masks" / f"{case.name}_seg.nii.gz").array > 0
    inside = label.array > 0
    expected = 2 * (mask & inside).sum() / (mask.sum() + inside.sum())
    answer = json.loads(result.out)
    assert (answer["model"], answer["split"]) == (str(run / "best.pt"), "testing")
    assert answer["folder"] == str(run / "validation-testing")
    (score,) = answer["scores"]
    assert (score["case"], score["structure"], score["error"]) == (case.name, "spleen", "")
    assert score["dice"] == pytest.approx(expected)
    assert score["label_ml"] == pytest.approx(inside.sum() * 0.125)
    assert score["mask_ml"] == pytest.approx(mask.sum() * 0.125)
    assert answer["mean_dice"] == answer["summaries"][0]["mean_dice"] == score["dice"]
    (row,) = rows_of(tmp_path / run / "validation-testing" / "cases.csv")
    assert {**row, "dice": float(row["dice"])} == {k: score[k] if k == "dice" else str(v) for k, v in score.items()}
    written = json.loads((tmp_path / run / "validation-testing" / "summary.json").read_text())
    assert written == {k: v for k, v in answer.items() if k != "folder"}


def test_fast_has_tables_of_its_own(cli: Callable[..., Any], run: Path, tiny_manifest: Manifest, tmp_path: Path):
    case = case_of(tiny_manifest, "testing")
    result = cli("validate", "--fast", "--json", "--backend", "torch")
    cli("infer", case.image, "--output", "masks", "--fast", "--backend", "torch")
    assert result.code == 0
    assert ", fast\n" in result.err
    answer = json.loads(result.out)
    assert answer["folder"] == str(run / "validation-testing-fast")
    mask = read_labels(tmp_path / "masks" / f"{case.name}_seg.nii.gz").array > 0
    inside = read_labels(case.label).array > 0
    assert answer["scores"][0]["dice"] == pytest.approx(2 * (mask & inside).sum() / (mask.sum() + inside.sum()))


@pytest.mark.parametrize(
    "backend",
    [
        "auto",
        "onnxruntime",
        pytest.param("openvino", marks=needs_openvino),
    ],
)
@pytest.mark.usefixtures("run")
def test_every_backend_has_the_same_scores(cli: Callable[..., Any], backend: str):
    """In float32 they differ in rounding alone."""
    found = []
    for chosen in ("torch", backend):
        result = cli("validate", "--json", "--backend", chosen, "--device", "cpu")
        runs = "(torch|openvino)" if chosen == "auto" else chosen
        assert re.search(rf" on cpu \({torch.get_num_threads()} threads\), float32, {runs}\n", result.err)
        found.append(json.loads(result.out)["mean_dice"])
    assert found[1] == pytest.approx(found[0], abs=1e-3)


def test_a_backend_that_cannot_be_had_is_refused_before_anything_is_written(
    cli: Callable[..., Any], run: Path, tmp_path: Path
):
    result = cli("validate", "--backend", "onnxruntime", "--precision", "bfloat16", "--device", "cpu")
    assert result.code == 2
    assert "backend 'onnxruntime': has no bfloat16; choose --precision float32" in result.err
    assert not (tmp_path / run / "validation-testing").exists()


def test_table_for_people(cli: Callable[..., Any], run: Path, tiny_manifest: Manifest, tmp_path: Path):
    result = cli("validate", "--split", "training", "--output", "tables")
    assert result.code == 0
    assert result.out.startswith(f"model {run}/best.pt\n\ncase ")
    assert "spleen: mean Dice 0." in result.out
    assert ", 3 cases\n" in result.out
    assert result.out.endswith("tables in tables\n")
    assert "validating spleen:small 3/3" in result.err
    assert [row["case"] for row in rows_of(tmp_path / "tables" / "cases.csv")] == ["case_0", "case_1", "case_2"]
    assert not (tmp_path / run / "validation-training").exists()


@pytest.fixture
def odd_list(tmp_path: Path, tiny_manifest: Manifest) -> str:
    """A list of one good case and of one for each rule."""
    good = case_of(tiny_manifest, "testing")
    label = read_labels(good.label)
    size, affine = label.geometry.size, label.geometry.affine
    moved = affine.copy()
    moved[0, 3] += 20
    write_labels(tmp_path / "none_label.nii.gz", np.zeros(size, np.uint8), label.geometry)
    write_labels(tmp_path / "cut_label.nii.gz", label.array[:-1], Geometry((size[0] - 1, *size[1:]), affine))
    write_labels(tmp_path / "moved_label.nii.gz", label.array, Geometry(size, moved))
    (tmp_path / "broken.nii").write_bytes(b"")
    labels = {
        "nothing": "none_label.nii.gz",
        "cut": "cut_label.nii.gz",
        "moved": "moved_label.nii.gz",
        "unlabelled": None,
    }
    for name in labels:
        shutil.copy(good.image, tmp_path / f"{name}.nii.gz")
    entries = [{"image": f"{name}.nii.gz", "label": label} for name, label in labels.items()]
    broken = {"image": "broken.nii", "label": "cut_label.nii.gz"}
    whole = {"image": str(good.image), "label": str(good.label)}
    write_json(tmp_path / "odd.json", {"testing": [whole, *entries, broken]})
    return "odd.json"


def test_cases_that_cannot_be_scored(cli: Callable[..., Any], run: Path, odd_list: str, tmp_path: Path):
    result = cli("validate", "--manifest", odd_list, "--output", "tables", "--json")
    assert result.code == 1
    assert result.message.startswith("4 of 6 cases failed")
    answer = json.loads(result.out)
    errors = {score["case"]: score["error"] for score in answer["scores"]}
    assert errors.pop("case_4") == errors.pop("nothing") == ""
    assert errors["unlabelled"] == "case 'unlabelled' has no label"
    assert errors["cut"].startswith("'cut_label.nii.gz' does not lie on its image's grid: label 47x")
    assert "does not lie on its image's grid" in errors["moved"]
    assert errors["broken"].startswith("cannot read 'broken.nii': the file is empty")
    scores = {score["case"]: score for score in answer["scores"]}
    assert (scores["nothing"]["dice"], scores["nothing"]["label_ml"]) == (None, 0.0)
    assert scores["nothing"]["mask_ml"] == scores["case_4"]["mask_ml"], "all of it false positive"
    (summary,) = answer["summaries"]
    assert {k: summary[k] for k in ("cases", "failed", "undefined")} == {"cases": 1, "failed": 4, "undefined": 1}
    assert summary["mean_dice"] == scores["case_4"]["dice"]
    rows = {row["case"]: row for row in rows_of(tmp_path / "tables" / "cases.csv")}
    assert {name: row["error"] for name, row in rows.items() if row["error"]} == errors
    assert rows["nothing"]["dice"] == rows["unlabelled"]["dice"] == ""
    table = cli("validate", "--manifest", odd_list, "--output", "tables").out
    assert "1 cases, 1 with an empty label (left out), 4 failed" in table
    assert "failed: unlabelled: case 'unlabelled' has no label" in table


def test_model_outside_a_run_brings_its_recipes_data(
    cli: Callable[..., Any], tiny_model: Path, tiny_data: Path, tmp_path: Path
):
    shutil.copy(tiny_model, tmp_path / "m.pt")
    result = cli("validate", "--model", "m.pt", "--manifest", tiny_data, "--split", "validation")
    assert result.code == 0
    assert (tmp_path / "validation-validation" / "cases.csv").is_file()


def test_run_without_its_list_uses_the_recipes(cli: Callable[..., Any], run: Path, tmp_path: Path):
    (tmp_path / run / DATA_FILE).unlink()
    recipe = json.loads((tmp_path / run / RECIPE_FILE).read_text())
    recipe["data"]["manifest"] = "msd_spleen"
    write_json(tmp_path / run / RECIPE_FILE, recipe)
    result = cli("validate", "--data", "nowhere")
    assert result.code == 2
    assert result.message.startswith("data set 'msd_spleen': no image found below 'nowhere/Task09_Spleen'")
    assert not (tmp_path / run / "validation-testing").exists()


def test_a_model_that_is_refused_leaves_no_folder(cli: Callable[..., Any], tiny_data: Path, tmp_path: Path):
    (tmp_path / "bad.pt").write_bytes(b"x")
    result = cli("validate", "--model", "bad.pt", "--manifest", tiny_data, "--output", "scores/of/bad")
    assert result.code == 2
    assert result.message.startswith("checkpoint 'bad.pt': ")
    assert not (tmp_path / "scores").exists()


def test_table_of_lesions(cli: Callable[..., Any], run: Path, tiny_manifest: Manifest, tmp_path: Path):
    """A recipe with a lesions table, here the tiny one with random weights, prints what `summary.json` holds."""
    checkpoint = torch.load(tmp_path / run / "best.pt", weights_only=True)
    checkpoint["recipe"]["lesions"] = {"volume_limits_ml": [5.0], "min_overlap": 0.1}
    torch.save(checkpoint, tmp_path / run / "best.pt")
    result = cli("validate")
    assert result.code == 0
    summary = json.loads((tmp_path / "runs/spleen-small-001/validation-testing/summary.json").read_text())
    assert [s["volume_ml"] for s in summary["lesions"]["summaries"]] == ["all", "< 5", ">= 5"]
    assert "lesions of  volume_ml  lesions  found  sensitivity  mean_dice" in result.out
    false_positives = summary["lesions"]["summaries"][0]["false_positives_per_case"]
    assert f"spleen: {false_positives:.2f} false positives per case" in result.out
    assert "a lesion is a 26-connected part of the label, found when the mask covers 10% of it" in result.out
    (case,) = tiny_manifest.split("testing")
    assert {row["case"] for row in rows_of(tmp_path / "runs/spleen-small-001/validation-testing/lesions.csv")} == {
        case.name
    }
