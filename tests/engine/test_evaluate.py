"""Scores, and the rules for what cannot be scored."""

import csv
import dataclasses
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from ctseg.engine import evaluate
from ctseg.engine.bank import bank_folder, open_bank
from ctseg.engine.evaluate import CaseScore, Evaluation, bank_dice, score_case, summarise
from ctseg.engine.model import Model
from ctseg.errors import CtsegError
from ctseg.io.images import read_labels, write_labels
from ctseg.manifest import Case, Manifest
from ctseg.metrics import dice
from ctseg.progress import Silent
from ctseg.recipe import load_recipe
from ctseg.sampling import CaseArrays


def scored(case: str, value: float | None, structure: str = "spleen", error: str = "") -> CaseScore:
    return CaseScore(case, structure, value, None if error else 1.0, None if error else 1.0, 0.1, error)


@pytest.fixture
def testing_case(tiny_manifest: Manifest) -> Case:
    (case,) = tiny_manifest.split("testing")
    return case


@pytest.fixture
def answer(monkeypatch):
    """A function that sets the mask which `predict` gives."""

    def give(mask: np.ndarray) -> None:
        monkeypatch.setattr(evaluate, "predict", lambda *_, **__: mask)

    return give


def relabelled(case: Case, path: Path, array: np.ndarray) -> Case:
    """The case with another label on the same grid."""
    write_labels(path, array, read_labels(case.label).geometry)
    return dataclasses.replace(case, label=path)


def test_mean_sample_deviation_and_range() -> None:
    values = [0.5, 0.75, 1.0, 0.25]
    summary = summarise("spleen", [scored(f"c{n}", value) for n, value in enumerate(values)])
    assert summary.mean_dice == pytest.approx(0.625)
    assert summary.sd_dice == pytest.approx(statistics.stdev(values))
    assert (summary.min_dice, summary.max_dice) == (0.25, 1.0)
    assert (summary.cases, summary.failed, summary.undefined) == (4, 0, 0)


def test_failed_and_undefined_cases_are_counted_apart_and_left_out() -> None:
    scores = [scored("a", 0.5), scored("b", None), scored("c", None, error="broken"), scored("d", 0.0)]
    summary = summarise("spleen", [*scores, scored("a", 0.125, structure="liver")])
    assert (summary.cases, summary.failed, summary.undefined) == (2, 1, 1)
    assert summary.mean_dice == 0.25


def test_one_case_has_no_deviation_and_none_has_nothing() -> None:
    one = summarise("spleen", [scored("a", 0.5)])
    assert (one.mean_dice, one.sd_dice, one.min_dice, one.max_dice) == (0.5, None, 0.5, 0.5)
    none = summarise("spleen", [scored("a", None)])
    assert (none.cases, none.mean_dice, none.sd_dice, none.min_dice, none.max_dice) == (0, None, None, None, None)


def test_mean_dice_is_the_mean_over_structures() -> None:
    """Three spleens of 1.0 and one liver of 0.5: 0.75, not the mean of the four values."""
    spleens = [scored(name, 1.0) for name in "abc"]
    scores = [*spleens, scored("a", 0.5, "liver"), scored("a", None, "kidney")]
    summaries = tuple(summarise(name, scores) for name in ("spleen", "liver", "kidney"))
    assert Evaluation(tuple(scores), summaries).mean_dice == 0.75
    assert Evaluation((), ()).mean_dice is None


def test_a_failed_case_is_told_once_whatever_its_structures() -> None:
    scores = tuple(scored(c, None, s, error="broken") for c in "ab" for s in ("spleen", "liver"))
    assert [s.case for s in Evaluation(scores, ()).failed] == ["a", "b"]


def test_dice_and_volumes_on_the_grid_of_the_label(tiny_model: Model, testing_case: Case, answer) -> None:
    """A mask of the label's first three quarters: with |A| = n3 and |B| = n, Dice is 2 n3 / (n3 + n)."""
    label = read_labels(testing_case.label).array
    voxels = np.argwhere(label == 1)
    kept = voxels[: 3 * len(voxels) // 4]
    mask = np.zeros_like(label)
    mask[tuple(kept.T)] = 1
    answer(mask)
    ((score,), _) = score_case(tiny_model, testing_case)
    assert score.dice == pytest.approx(2 * len(kept) / (len(kept) + len(voxels)))
    assert score.label_ml == pytest.approx(len(voxels) * 0.125)  # voxels of 5 mm
    assert score.mask_ml == pytest.approx(len(kept) * 0.125)
    assert (score.case, score.structure, score.error) == (testing_case.name, "spleen", "")


def test_an_empty_mask_is_zero_and_counts(tiny_model: Model, testing_case: Case, answer) -> None:
    answer(np.zeros_like(read_labels(testing_case.label).array))
    ((score,), _) = score_case(tiny_model, testing_case)
    assert (score.dice, score.mask_ml) == (0.0, 0.0)
    assert summarise("spleen", [score]).cases == 1


def test_an_empty_label_is_undefined_with_the_mask_still_measured(tiny_model, testing_case, tmp_path, answer) -> None:
    label = np.zeros_like(read_labels(testing_case.label).array)
    mask = label.copy()
    mask[:2, :2, :2] = 1
    answer(mask)
    ((score,), _) = score_case(tiny_model, relabelled(testing_case, tmp_path / "empty.nii.gz", label))
    assert (score.dice, score.label_ml, score.error) == (None, 0.0, "")
    assert score.mask_ml == pytest.approx(8 * 0.125)
    assert summarise("spleen", [score]).undefined == 1


def test_a_label_of_other_values_is_no_empty_one(tiny_model, testing_case, tmp_path, answer) -> None:
    label = read_labels(testing_case.label).array
    answer(label)
    ((score,), _) = score_case(tiny_model, relabelled(testing_case, tmp_path / "255.nii.gz", label * np.uint8(255)))
    assert score.dice is None
    assert score.error.endswith("255.nii.gz': label values 255, but the recipe has values 1..1; correct them")


def test_each_structure_has_its_own_score(tiny_model: Model, testing_case: Case, tmp_path: Path, answer) -> None:
    label = np.zeros_like(read_labels(testing_case.label).array)
    label[0:4, 0, 0], label[0:4, 1, 0] = 1, 2
    mask = label.copy()
    mask[2:4, 1, 0] = 0
    answer(mask)
    recipe = load_recipe("spleen:small", ['labels.2="liver"'])
    case = relabelled(testing_case, tmp_path / "two.nii.gz", label)
    (spleen, liver), _ = score_case(dataclasses.replace(tiny_model, recipe=recipe), case)
    assert (spleen.structure, spleen.dice) == ("spleen", 1.0)
    assert (liver.structure, liver.dice) == ("liver", pytest.approx(2 * 2 / (2 + 4)))


@pytest.mark.parametrize(
    ("problem", "reason"),
    [("no label", "has no label"), ("other grid", "does not lie on its image's grid"), ("broken", "cannot read")],
)
def test_a_case_that_cannot_be_scored_has_failed_with_its_reason_and_leaves_the_others_alone(
    tiny_model: Model, testing_case: Case, tmp_path: Path, problem: str, reason: str
) -> None:
    labels = read_labels(testing_case.label)
    path = tmp_path / "label.nii.gz"
    if problem == "other grid":
        write_labels(path, labels.array[:-1], dataclasses.replace(labels.geometry, size=labels.array[:-1].shape))
    elif problem == "broken":
        path.write_bytes(b"x")
    bad = dataclasses.replace(testing_case, name="bad", label=None if problem == "no label" else path)
    evaluation = evaluate.evaluate(tiny_model, (bad, testing_case), Silent())
    failed, good = evaluation.scores
    assert reason in failed.error
    assert (failed.dice, failed.label_ml, failed.mask_ml) == (None, None, None)
    assert good.dice is not None
    assert evaluation.failed == (failed,)
    assert (evaluation.summaries[0].cases, evaluation.summaries[0].failed) == (1, 1)


def test_a_bug_is_not_a_failed_case(tiny_model: Model, testing_case: Case, monkeypatch) -> None:
    def bug(*_, **__):
        raise ZeroDivisionError

    monkeypatch.setattr(evaluate, "predict", bug)
    with pytest.raises(ZeroDivisionError):
        score_case(tiny_model, testing_case)

    def refused(*_, **__):
        raise CtsegError("no")

    monkeypatch.setattr(evaluate, "predict", refused)
    assert score_case(tiny_model, testing_case)[0][0].error == "no"


def test_an_evaluation_is_plain_data(tiny_model: Model, testing_case: Case) -> None:
    evaluation = evaluate.evaluate(tiny_model, (testing_case,), Silent())
    data = json.loads(json.dumps(evaluation.to_dict()))
    assert data["mean_dice"] == evaluation.mean_dice == evaluation.scores[0].dice
    assert data["summaries"][0]["structure"] == "spleen"


def constant_model(tiny_model: Model, recipe, scores_XYZ: torch.Tensor) -> Model:
    """A model of one window that gives each class its constant scores."""
    return dataclasses.replace(tiny_model, recipe=recipe, forward=lambda image: scores_XYZ[None].clone())


def made_case(label: np.ndarray) -> CaseArrays:
    image = np.zeros(label.shape, np.float16)
    found = np.flatnonzero(label).astype(np.int32)
    return CaseArrays("made", torch.from_numpy(image), torch.from_numpy(label), image, label, found)


def test_dice_of_a_prepared_case(tiny_model: Model, tiny_recipe) -> None:
    label = np.zeros((16, 16, 16), np.uint8)
    label[:8] = 1
    logits = torch.zeros(2, 16, 16, 16)
    logits[1] = -1
    logits[1, 4:12] = 1  # half of the label is found, as much again is wrong
    assert bank_dice(constant_model(tiny_model, tiny_recipe, logits), made_case(label), 0.0) == [0.5]
    assert bank_dice(constant_model(tiny_model, tiny_recipe, logits), made_case(label * 0), 0.0) == []


def test_dice_of_a_prepared_case_with_several_structures(tiny_model: Model, changed, tiny_recipe) -> None:
    """The structure without a label is left out."""
    recipe = changed(tiny_recipe, labels={"2": "liver", "3": "kidney"})
    label = np.zeros((16, 16, 16), np.uint8)
    label[:8], label[12:] = 1, 3
    logits = torch.zeros(4, 16, 16, 16)
    logits[1, :4], logits[3, 12:], logits[2, 9] = 5, 5, 5
    assert bank_dice(constant_model(tiny_model, recipe, logits), made_case(label), 0.0) == [
        pytest.approx(2 * 4 / (4 + 8)),
        1.0,
    ]


def test_dice_of_a_prepared_case_is_that_of_its_mask(tiny_model, tiny_manifest, tiny_prepared, tiny_recipe) -> None:
    """By MONAI's sliding window on the whole prepared case."""
    from monai.inferers import sliding_window_inference

    folder = bank_folder(tiny_prepared, tiny_recipe)
    (case,) = open_bank(tiny_manifest.split("validation"), folder, torch.device("cpu"))
    image = case.image_XYZ.float()[None, None]
    window = tiny_recipe.inference.window_size
    logits = sliding_window_inference(image, window, 1, lambda x: tiny_model.forward(x).clone(), overlap=0.25)
    mask = (logits[0, 0] > 0).numpy().astype(np.uint8)
    expected = dice(mask, case.host_label)
    assert 0 < expected < 1
    assert bank_dice(tiny_model, case, 0.25) == [pytest.approx(expected, abs=1e-3)]


def with_lesions(model: Model, *overrides: str) -> Model:
    recipe = load_recipe("spleen:small", ["lesions.volume_limits_ml=[0.5]", "lesions.min_overlap=0.5", *overrides])
    return dataclasses.replace(model, recipe=recipe)


def test_without_a_lesions_table_there_are_no_lesions(tiny_model: Model, testing_case: Case, tmp_path: Path) -> None:
    evaluation = evaluate.evaluate(tiny_model, (testing_case,), Silent())
    evaluate.write_evaluation(tmp_path, evaluation, {"model": "m.pt", "split": "testing"})
    assert evaluation.lesions is None
    assert json.loads((tmp_path / "summary.json").read_text())["lesions"] is None
    assert not (tmp_path / "lesions.csv").exists()
    assert "lesions" not in (tmp_path / "cases.csv").read_text()


def test_lesions_of_all_cases_and_a_failed_one_left_out(
    tiny_model: Model, testing_case: Case, tmp_path: Path, answer
) -> None:
    """Voxels of 0.125 ml: a lesion of 8 voxels that is found, one of 2 that is missed, one part too many."""
    label = np.zeros_like(read_labels(testing_case.label).array)
    label[2:4, 2:4, 2:4] = 1
    label[10:12, 10, 10] = 1
    mask = np.zeros_like(label)
    mask[2:4, 2:4, 2:4] = mask[20, 20, 20] = 1
    answer(mask)
    good = relabelled(testing_case, tmp_path / "lesions.nii.gz", label)
    healthy = dataclasses.replace(relabelled(testing_case, tmp_path / "none.nii.gz", label * 0), name="healthy")
    bad = dataclasses.replace(testing_case, name="bad", label=None)
    evaluation = evaluate.evaluate(with_lesions(tiny_model), (good, bad, healthy), Silent())
    lesions = evaluation.lesions
    assert lesions is not None
    assert [(c.case, len(c.lesions), c.found, c.sensitivity, c.false_positives) for c in lesions.cases] == [
        (good.name, 2, 1, 0.5, 1),
        ("healthy", 0, 0, None, 2),
    ]
    every, small, large = lesions.summaries
    assert (every.lesions, every.found, every.sensitivity, every.false_positives_per_case) == (2, 1, 0.5, 1.5)
    assert (small.volume_ml, small.found, small.mean_dice) == ("< 0.5", 0, 0.0)
    assert (large.volume_ml, large.found, large.mean_dice) == (">= 0.5", 1, 1.0)
    assert [s.error != "" for s in evaluation.scores] == [False, True, False]

    evaluate.write_evaluation(tmp_path / "out", evaluation, {"model": "m.pt", "split": "testing"})
    rows = list(csv.DictReader((tmp_path / "out" / "lesions.csv").read_text().splitlines()))
    assert [(r["case"], float(r["volume_ml"]), r["volume_class_ml"], r["found"], float(r["dice"])) for r in rows] == [
        (good.name, pytest.approx(1.0), ">= 0.5", "True", 1.0),
        (good.name, pytest.approx(0.25), "< 0.5", "False", 0.0),
    ]
    counts = ("lesions", "lesions_found", "lesion_sensitivity", "false_positives")
    rows = list(csv.DictReader((tmp_path / "out" / "cases.csv").read_text().splitlines()))
    assert [[row[name] for name in counts] for row in rows] == [["2", "1", "0.5", "1"], [""] * 4, ["0", "0", "", "2"]]
    written = json.loads((tmp_path / "out" / "summary.json").read_text())["lesions"]
    assert written["min_overlap"] == 0.5
    assert written["summaries"][0]["sensitivity"] == 0.5
    assert written["cases"][0]["found"] == 1
    assert written["cases"][0]["lesions"][0]["volume_ml"] == pytest.approx(1.0)


def test_labels_above_one_count_where_the_recipe_binarises(
    tiny_model: Model, testing_case: Case, tmp_path: Path, answer
) -> None:
    label = np.zeros_like(read_labels(testing_case.label).array)
    label[2:4, 2:4, 2:4], label[10:14, 10, 10] = 1, 7
    answer((label > 0).astype(np.uint8))
    case = relabelled(testing_case, tmp_path / "values.nii.gz", label)
    ((score,), _) = score_case(with_lesions(tiny_model, "preprocess.binarize_labels=true"), case)
    assert (score.dice, score.label_ml) == (1.0, pytest.approx(12 * 0.125))
    ((score,), _) = score_case(with_lesions(tiny_model), case)
    assert score.label_ml == pytest.approx(8 * 0.125)
