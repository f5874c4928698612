"""Validation by clicks: Dice after each, clicks to a Dice, and what it leaves on disk."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ctseg.engine.click_evaluate import TARGETS, OrganScore, evaluate_clicks, write_click_evaluation
from ctseg.engine.model import Model
from ctseg.engine.runtime import Runtime
from ctseg.errors import ModelError
from ctseg.io.images import read_labels
from ctseg.manifest import Case, Manifest, read_manifest
from ctseg.progress import Silent
from ctseg.recipe import Recipe


def around_clicks(image_BCXYZ: Tensor) -> Tensor:
    """A network that paints where the maps of clicks say, so more clicks mean a better mask."""
    return (image_BCXYZ[:, 1:2] - image_BCXYZ[:, 2:] - 0.3) * 9


@pytest.fixture(scope="module")
def organs(tiny_organs: Path) -> Manifest:
    return read_manifest(tiny_organs)


@pytest.fixture(scope="module")
def model(clicks_recipe: Recipe) -> Model:
    return Model(clicks_recipe, around_clicks, Runtime(torch.device("cpu")), Path("made.pt"), "")


def test_every_organ_of_every_case_after_every_click(model: Model, organs: Manifest) -> None:
    cases = organs.split("training")[:2]
    evaluation = evaluate_clicks(model, cases, organs.labels, 6, 0, Silent())
    assert [(s.case, s.organ) for s in evaluation.scores] == [
        (c.name, o) for c in cases for o in organs.labels.values()
    ]
    assert all(len(s.dice) == 6 and all(0 <= d <= 1 for d in s.dice) for s in evaluation.scores)
    assert [o.organ for o in evaluation.organs] == list(organs.labels.values())
    for summary in evaluation.organs:
        own = [s.dice for s in evaluation.scores if s.organ == summary.organ]
        assert summary.mean_dice == pytest.approx(np.mean(own, axis=0))
    assert evaluation.overall is not None
    assert evaluation.overall.mean_dice == pytest.approx(np.mean([o.mean_dice for o in evaluation.organs], axis=0))
    assert evaluation.overall.mean_dice[-1] > evaluation.overall.mean_dice[0] + 0.05, "clicks help"


def test_it_follows_from_the_seed(model: Model, organs: Manifest) -> None:
    cases = organs.split("testing")
    a, b, other = (evaluate_clicks(model, cases, organs.labels, 3, seed, Silent()) for seed in (0, 0, 1))
    assert a == b
    assert a.scores != other.scores


def test_a_mask_that_is_the_label_needs_no_more_clicks(clicks_recipe: Recipe, organs: Manifest, tmp_path: Path) -> None:
    """The whole image is the organ, and the network finds it at once: no error is left to click on."""
    from ctseg.io.images import write_labels

    case = organs.split("testing")[0]
    label = read_labels(case.label)
    small = label.array[:20, :14, :12]
    grid = type(label.geometry)(small.shape, label.geometry.affine)
    write_labels(tmp_path / "all.nii.gz", np.ones(small.shape, np.uint8), grid)
    write_labels(tmp_path / "image.nii.gz", np.arange(small.size, dtype=np.uint8).reshape(small.shape), grid)
    calls = []

    def everything(image: Tensor) -> Tensor:
        calls.append(1)
        return torch.full_like(image[:, :1], 9.0)

    model = Model(clicks_recipe, everything, Runtime(torch.device("cpu")), Path("made.pt"), "")
    whole = Case(name="whole", split="testing", image=tmp_path / "image.nii.gz", label=tmp_path / "all.nii.gz")
    (score,) = evaluate_clicks(model, (whole,), {}, 5, 0, Silent()).scores
    assert score == OrganScore("whole", "label 1", (1.0,) * 5)
    assert len(calls) == 1


def test_clicks_to_a_dice() -> None:
    score = OrganScore("c", "o", (0.5, 0.86, 0.84, 0.91))
    assert [score.clicks_to(t) for t in TARGETS] == [2, 4, None]


def test_targets_that_are_not_reached_count_as_all_clicks(model: Model, organs: Manifest) -> None:
    evaluation = evaluate_clicks(model, organs.split("testing"), organs.labels, 2, 0, Silent())
    assert evaluation.overall is not None
    assert evaluation.overall.not_reached["0.95"] == 5
    assert evaluation.overall.mean_clicks["0.95"] == 2


def test_tables_and_curves(model: Model, organs: Manifest, tmp_path: Path) -> None:
    case = organs.split("testing")[0]
    broken = Case(name="broken", split="testing", image=case.image, label=None)
    evaluation = evaluate_clicks(model, (case, broken), organs.labels, 3, 0, Silent())
    assert evaluation.failed == {"broken": "case 'broken' has no label"}
    write_click_evaluation(tmp_path, evaluation, {"model": "m.pt", "split": "testing"})
    rows = list(csv.DictReader((tmp_path / "clicks.csv").read_text().splitlines()))
    assert [row["organ"] for row in rows] == [*organs.labels.values(), ""]
    for row, score in zip(rows, evaluation.scores, strict=False):
        assert [float(row[f"dice_{n}"]) for n in (1, 2, 3)] == list(score.dice)
        assert row["clicks_to_0.85"] == str(score.clicks_to(0.85) or "")
    assert (rows[-1]["case"], rows[-1]["error"]) == ("broken", "case 'broken' has no label")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["overall"]["mean_dice"] == list(evaluation.overall.mean_dice)
    assert (summary["seed"], summary["num_clicks"], summary["split"]) == (0, 3, "testing")
    assert (tmp_path / "clicks.png").read_bytes()[:4] == b"\x89PNG"


def test_a_model_without_clicks_is_refused(tiny_recipe: Recipe, organs: Manifest) -> None:
    model = Model(tiny_recipe, around_clicks, Runtime(torch.device("cpu")), Path("made.pt"), "")
    with pytest.raises(ModelError, match="segments without clicks"):
        evaluate_clicks(model, organs.split("testing"), {}, 3, 0, Silent())
