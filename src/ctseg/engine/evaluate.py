"""Scores of a model on labelled cases: during training on the network's grid, afterwards on the label's own grid.

Rules for what cannot be scored, the same everywhere:

- No label, an unreadable file, or a label on another grid than its image: the case has failed. It is reported with
  its reason, leaves the others alone, and makes the command exit with 1.
- A label without a single voxel of a structure: Dice is undefined (None) there and left out of mean, sd and range;
  the predicted volume is still reported, as it is all false positive.
- An empty mask where the label has voxels: Dice is 0 and counts.

Where the recipe asks for it, every lesion is scored too (`lesions.py` has the definitions); cases that failed are left
out there.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctseg.engine.bank import read_case
from ctseg.engine.model import Model
from ctseg.engine.predict import predict, scores_from_logits, window_logits
from ctseg.errors import CtsegError, ImageError
from ctseg.files import make_folder, write_csv, write_json
from ctseg.lesions import CaseLesions, Lesion, LesionSummary, match_lesions, summarise_lesions, volume_class
from ctseg.manifest import Case
from ctseg.metrics import dice, mean_or_none, sd_or_none
from ctseg.progress import Progress
from ctseg.report.overlay import draw_overlay
from ctseg.sampling import CaseArrays
from ctseg.scratch import count_values
from ctseg.specs import LesionSpec
from ctseg.volume import Volume


@dataclass(frozen=True)
class CaseScore:
    """One structure of one case. `error` is empty unless the case failed; then there are no numbers."""

    case: str
    structure: str
    dice: float | None
    label_ml: float | None
    mask_ml: float | None
    seconds: float
    error: str = ""


@dataclass(frozen=True)
class Summary:
    """Dice of one structure over cases: how many counted, mean, sample standard deviation and range."""

    structure: str
    cases: int
    failed: int
    undefined: int
    mean_dice: float | None
    sd_dice: float | None
    min_dice: float | None
    max_dice: float | None


@dataclass(frozen=True)
class LesionScores:
    """Scores of single lesions: for each case and structure, and their summaries by volume class.

    `volume_limits_ml` and `min_overlap` are the recipe's, so that a table says what its figures mean.
    """

    volume_limits_ml: tuple[float, ...]
    min_overlap: float
    cases: tuple[CaseLesions, ...]
    summaries: tuple[LesionSummary, ...]

    def rows(self) -> list[dict[str, Any]]:
        """One row for each lesion."""
        return [
            {
                "case": case.case,
                "structure": case.structure,
                "volume_class_ml": volume_class(lesion.volume_ml, self.volume_limits_ml),
                **dataclasses.asdict(lesion),
            }
            for case in self.cases
            for lesion in case.lesions
        ]

    def counts(self, case: str, structure: str) -> dict[str, Any]:
        """The lesion columns of one row of `cases.csv`; all None where the case failed."""
        own = next((c for c in self.cases if (c.case, c.structure) == (case, structure)), None)
        return {
            "lesions": None if own is None else len(own.lesions),
            "lesions_found": None if own is None else own.found,
            "lesion_sensitivity": None if own is None else own.sensitivity,
            "false_positives": None if own is None else own.false_positives,
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        cases = [{**dataclasses.asdict(c), "found": c.found, "sensitivity": c.sensitivity} for c in self.cases]
        return {**dataclasses.asdict(self), "cases": cases}


@dataclass(frozen=True)
class Evaluation:
    """Per-case scores and their summaries, one for each structure of the recipe; `lesions` where it asks for them."""

    scores: tuple[CaseScore, ...]
    summaries: tuple[Summary, ...]
    lesions: LesionScores | None = None

    @property
    def failed(self) -> tuple[CaseScore, ...]:
        """The failed cases, one entry for each."""
        return tuple({s.case: s for s in self.scores if s.error}.values())

    @property
    def mean_dice(self) -> float | None:
        """Mean over structures of their mean Dice."""
        return mean_or_none([s.mean_dice for s in self.summaries if s.mean_dice is not None])

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        lesions = None if self.lesions is None else self.lesions.to_dict()
        return {"mean_dice": self.mean_dice, **dataclasses.asdict(self), "lesions": lesions}


def evaluate(
    model: Model, cases: tuple[Case, ...], progress: Progress, overlays: Path | None = None, *, fast: bool = False
) -> Evaluation:
    """Dice of every structure and case on the label's own native grid; pictures in the folder `overlays` if given.

    `fast` is that of `predict`.
    """
    scores: list[CaseScore] = []
    lesions: list[CaseLesions] = []
    progress.start(f"validating {model.recipe.name}", len(cases))
    for case in cases:
        own_scores, own_lesions = score_case(model, case, overlays, fast=fast, note=progress.note)
        scores.extend(own_scores)
        lesions.extend(own_lesions)
        progress.advance(_detail(scores[-1]))
    progress.finish()
    structures = tuple(model.recipe.labels.values())
    return Evaluation(
        tuple(scores),
        tuple(summarise(name, scores) for name in structures),
        _lesion_scores(model.recipe.lesions, structures, lesions) if model.recipe.lesions is not None else None,
    )


def score_case(
    model: Model,
    case: Case,
    overlays: Path | None = None,
    *,
    fast: bool = False,
    note: Callable[[str], None] = lambda _: None,
) -> tuple[list[CaseScore], list[CaseLesions]]:
    """The scores of one case, or one failed entry for each structure; `CASE.png` in `overlays` if given.

    And its lesions: none if the case failed or the recipe does not ask for them. `note` is told what users should know.
    """
    started = time.perf_counter()
    structures = {int(value): name for value, name in model.recipe.labels.items()}
    try:
        image, labels = read_case(case, model.recipe.preprocess.binarize_labels)
        _check_labels(labels, case, len(structures))
        mask = predict(model, image, fast=fast, note=lambda told: note(f"{case.name}: {told}"))
    except CtsegError as error:
        seconds = time.perf_counter() - started
        return [CaseScore(case.name, name, None, None, None, seconds, str(error)) for name in structures.values()], []
    voxel_ml = image.geometry.voxel_volume_ml
    seconds = time.perf_counter() - started
    if overlays is not None:
        path = make_folder(overlays) / f"{case.name}.png"
        draw_overlay(path, image, mask, labels.array, model.recipe.preprocess.hu_window, case.name)
    scores = [
        CaseScore(
            case=case.name,
            structure=name,
            dice=dice(mask, labels.array, value),
            label_ml=int((labels.array == value).sum()) * voxel_ml,
            mask_ml=int((mask == value).sum()) * voxel_ml,
            seconds=seconds,
        )
        for value, name in structures.items()
    ]
    spec = model.recipe.lesions
    if spec is None:
        return scores, []
    return scores, [
        CaseLesions(case.name, name, *match_lesions(mask, labels.array, voxel_ml, spec.min_overlap, value))
        for value, name in structures.items()
    ]


def _check_labels(labels: Volume, case: Case, num_labels: int) -> None:
    """Raises ImageError for a label that has voxels, but none that the recipe knows: it is not an empty one."""
    values = count_values(labels.array, 256)
    present = [value for value in range(1, len(values)) if values[value]]
    if present and min(present) > num_labels:
        told = ", ".join(map(str, present[:5]))
        raise ImageError(
            f"'{case.label}': label values {told}, but the recipe has values 1..{num_labels}; correct them"
        )


def _lesion_scores(spec: LesionSpec, structures: tuple[str, ...], cases: list[CaseLesions]) -> LesionScores:
    summaries = [row for name in structures for row in summarise_lesions(name, cases, spec.volume_limits_ml)]
    return LesionScores(spec.volume_limits_ml, spec.min_overlap, tuple(cases), tuple(summaries))


def summarise(structure: str, scores: list[CaseScore]) -> Summary:
    """Mean, sd and range of one structure's defined Dice values."""
    own = [s for s in scores if s.structure == structure]
    values = [s.dice for s in own if s.dice is not None]
    failed = sum(1 for s in own if s.error)
    return Summary(
        structure=structure,
        cases=len(values),
        failed=failed,
        undefined=len(own) - failed - len(values),
        mean_dice=mean_or_none(values),
        sd_dice=sd_or_none(values),
        min_dice=min(values, default=None),
        max_dice=max(values, default=None),
    )


def write_evaluation(folder: Path, evaluation: Evaluation, about: Mapping[str, Any]) -> None:
    """Writes `cases.csv` (a row for each case and structure) and `summary.json` into `folder`.

    `about` stands at the head of the summary: the model, the split and how it ran. Where lesions were scored,
    `cases.csv` has their counts and `lesions.csv` a row for each lesion.
    """
    make_folder(folder)
    rows = [dataclasses.asdict(score) for score in evaluation.scores]
    columns = [field.name for field in dataclasses.fields(CaseScore)]
    lesions = evaluation.lesions
    if lesions is not None:
        counts = [lesions.counts(score.case, score.structure) for score in evaluation.scores]
        rows = [{**row, **own} for row, own in zip(rows, counts, strict=True)]
        columns += list(lesions.counts("", ""))
        lesion_columns = ["case", "structure", "volume_class_ml", *(f.name for f in dataclasses.fields(Lesion))]
        write_csv(folder / "lesions.csv", lesion_columns, lesions.rows())
    write_csv(folder / "cases.csv", columns, rows)
    write_json(folder / "summary.json", {**about, **evaluation.to_dict()})


def bank_dice(model: Model, case: CaseArrays, overlap: float) -> list[float]:
    """Dice of each structure of a prepared case on the network's grid; structures without a label are left out."""
    inference = dataclasses.replace(model.recipe.inference, overlap=overlap)
    image_XYZ = case.image_XYZ.to(model.runtime.device).float()
    scores = scores_from_logits(window_logits(model, image_XYZ, inference))
    mask = (scores[0] > 0) if len(scores) == 1 else scores.argmax(dim=0)
    mask_array = mask.to(torch.uint8).cpu().numpy()
    values = [dice(mask_array, case.host_label, int(value)) for value in model.recipe.labels]
    return [value for value in values if value is not None]


def _detail(score: CaseScore) -> str:
    if score.error:
        return f"{score.case}: failed"
    return f"{score.case}: Dice {'undefined (empty label)' if score.dice is None else f'{score.dice:.4f}'}"
