"""Scores of a model that segments by clicks: Dice after each of them, and how many it takes to a given Dice.

Clicks are simulated by the law in `clicks.py`: the first in the organ, each next one, always, in the larger error of
the mask before, until the mask is the label; from then on the last Dice counts. All is on the CT's own grid, through
the `Session` that people use. Which clicks come follows from the seed, the case's place in the split and the organ.

Rules for what cannot be scored are those of `evaluate`: a case that cannot be read has failed and is reported; an organ
that a label lacks is not asked for there. The number of clicks (NoC) of an organ that does not reach a Dice counts as
all clicks in the mean, as is usual, and as failed beside it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ctseg.clicks import Click, draw_voxel, network_input, next_click
from ctseg.engine.bank import read_case
from ctseg.engine.model import Model
from ctseg.engine.samples import organ_name
from ctseg.engine.session import Session, clicks_of
from ctseg.errors import CtsegError
from ctseg.files import make_folder, write_csv, write_json
from ctseg.manifest import Case
from ctseg.metrics import dice, mean_or_none
from ctseg.progress import Progress
from ctseg.regions import region_around
from ctseg.report.curves import draw_click_curves
from ctseg.sampling import VALIDATION_CLICKS, CaseArrays, Draw, cut_batch, generator

TARGETS = (0.85, 0.90, 0.95)
"""Dice values to which clicks are counted."""


@dataclass(frozen=True)
class OrganScore:
    """Dice of one organ of one case after each click."""

    case: str
    organ: str
    dice: tuple[float, ...]

    def clicks_to(self, target: float) -> int | None:
        """The first click after which Dice is at least `target`, counted from 1; None if it never is."""
        return next((n for n, value in enumerate(self.dice, start=1) if value >= target), None)


@dataclass(frozen=True)
class ClickSummary:
    """One organ over its cases, or all organs: means, and clicks to each of TARGETS.

    Attributes:
        mean_dice: After each click.
        mean_clicks: To each target, one that is not reached counted as all clicks.
        not_reached: How many did not reach each target.
    """

    organ: str
    cases: int
    mean_dice: tuple[float, ...]
    mean_clicks: dict[str, float]
    not_reached: dict[str, int]


@dataclass(frozen=True)
class ClickEvaluation:
    """Scores of all organs and cases, their summaries, and the cases that failed with the reason.

    Attributes:
        overall: Its means are those over organs of each organ's own mean; None without any score.
    """

    num_clicks: int
    seed: int
    scores: tuple[OrganScore, ...]
    organs: tuple[ClickSummary, ...]
    overall: ClickSummary | None
    failed: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def evaluate_clicks(
    model: Model, cases: tuple[Case, ...], labels: Mapping[str, str], num_clicks: int, seed: int, progress: Progress
) -> ClickEvaluation:
    """Dice after each of `num_clicks` clicks for every organ of every case; `labels` names the values of a label map.

    Raises:
        ModelError: if the model is not one for clicks.
    """
    clicks_of(model)
    scores: list[OrganScore] = []
    failed: dict[str, str] = {}
    progress.start(f"validating {model.recipe.name} by clicks", len(cases))
    for number, case in enumerate(cases):
        try:
            own = _score_case(model, case, labels, num_clicks, (seed, number))
        except CtsegError as error:
            failed[case.name] = str(error)
            progress.advance(f"{case.name}: failed")
            continue
        scores += own
        mean = mean_or_none([score.dice[-1] for score in own])
        progress.advance(f"{case.name}: Dice {'undefined (empty label)' if mean is None else f'{mean:.4f}'}")
    progress.finish()
    names = list(dict.fromkeys(score.organ for score in scores))
    organs = tuple(_summarise(name, [s for s in scores if s.organ == name], num_clicks) for name in names)
    return ClickEvaluation(num_clicks, seed, tuple(scores), organs, _overall(organs), failed)


def _score_case(
    model: Model, case: Case, labels: Mapping[str, str], num_clicks: int, place: tuple[int, int]
) -> list[OrganScore]:
    image, label = read_case(case)
    session = Session(model, image)
    values = [int(value) for value in np.unique(label.array) if value > 0]
    return [
        OrganScore(
            case.name,
            organ_name(value, labels),
            _dice_by_click(session, label.array == value, num_clicks, (*place, value)),
        )
        for value in values
    ]


def _dice_by_click(
    session: Session, label: NDArray[np.bool_], num_clicks: int, place: tuple[int, ...]
) -> tuple[float, ...]:
    rng = generator(place[0], VALIDATION_CLICKS, *place[1:])
    wanted = torch.from_numpy(np.ascontiguousarray(label))
    mask = session.reset()
    values: list[float] = []
    while len(values) < num_clicks:
        have = torch.from_numpy(np.ascontiguousarray(mask)).bool()
        click = next_click(wanted, have, rng)
        if click is None:
            break
        mask = session.click(click.point, click.positive)
        score = dice(mask, label.astype(np.uint8))
        assert score is not None  # the organ has voxels
        values.append(score)
    return (*values, *values[-1:] * (num_clicks - len(values)))


def _summarise(organ: str, scores: list[OrganScore], num_clicks: int) -> ClickSummary:
    mean_dice = np.mean([score.dice for score in scores], axis=0)
    clicks = {_key(target): [score.clicks_to(target) for score in scores] for target in TARGETS}
    return ClickSummary(
        organ,
        len(scores),
        tuple(float(value) for value in mean_dice),
        {key: float(np.mean([n or num_clicks for n in own])) for key, own in clicks.items()},
        {key: sum(n is None for n in own) for key, own in clicks.items()},
    )


def _overall(organs: tuple[ClickSummary, ...]) -> ClickSummary | None:
    if not organs:
        return None
    keys = [_key(target) for target in TARGETS]
    return ClickSummary(
        "mean over organs",
        sum(o.cases for o in organs),
        tuple(float(value) for value in np.mean([o.mean_dice for o in organs], axis=0)),
        {key: float(np.mean([o.mean_clicks[key] for o in organs])) for key in keys},
        {key: sum(o.not_reached[key] for o in organs) for key in keys},
    )


def _key(target: float) -> str:
    return f"{target:.2f}"


def write_click_evaluation(folder: Path, evaluation: ClickEvaluation, about: Mapping[str, Any]) -> None:
    """Writes `clicks.csv` (a row for each case and organ), `summary.json` and `clicks.png` into `folder`.

    `about` stands at the head of the summary: the "split", the "model" and how it ran.
    """
    make_folder(folder)
    by_click = [f"dice_{n}" for n in range(1, evaluation.num_clicks + 1)]
    to_target = {f"clicks_to_{_key(target)}": target for target in TARGETS}
    rows = [
        {
            "case": score.case,
            "organ": score.organ,
            "error": "",
            **dict(zip(by_click, score.dice, strict=True)),
            **{column: score.clicks_to(target) for column, target in to_target.items()},
        }
        for score in evaluation.scores
    ]
    nothing = dict.fromkeys([*by_click, *to_target])
    rows += [{"case": case, "organ": "", "error": error, **nothing} for case, error in evaluation.failed.items()]
    write_csv(folder / "clicks.csv", ["case", "organ", *to_target, *by_click, "error"], rows)
    write_json(folder / "summary.json", {**about, **evaluation.to_dict()})
    if evaluation.overall is not None:
        curves = {summary.organ: summary.mean_dice for summary in evaluation.organs}
        draw_click_curves(
            folder / "clicks.png", curves, evaluation.overall.mean_dice, f"Dice after each click, {about['split']}"
        )


def sample_dice(model: Model, sample: CaseArrays, number: int) -> float:
    """Dice of a sample after the recipe's number of clicks, on the network's window around the organ; for training.

    Args:
        model: The network as it is.
        sample: An organ of a prepared case.
        number: Its place among all, from which the clicks follow.
    """
    spec, sampling, device = clicks_of(model), model.recipe.sampling, model.runtime.device
    assert sample.organ is not None
    rng = generator(model.recipe.training.seed, VALIDATION_CLICKS, number)
    image, label = cut_batch([sample], [_central(sample, sampling.patch_size)], sampling, device)
    label_XYZ = label[0, 0] > 0
    first = draw_voxel(label_XYZ, rng)
    clicks = [] if first is None else [Click(first)]
    mask_XYZ = torch.zeros_like(label_XYZ)
    while clicks:
        mask_XYZ = model.forward(network_input(image, [clicks], spec.sigma_voxels))[0, 0] > 0
        click = next_click(label_XYZ, mask_XYZ, rng) if len(clicks) < spec.num_clicks else None
        if click is None:
            break
        clicks.append(click)
    score = dice(mask_XYZ.to(torch.uint8).cpu().numpy(), label_XYZ.to(torch.uint8).cpu().numpy())
    return score or 0.0  # None: an organ so small that the shrunk window has none of it


def _central(sample: CaseArrays, window: tuple[int, int, int]) -> Draw:
    """The region with the organ in its middle."""
    assert sample.organ is not None
    low, high = sample.organ.low, sample.organ.high
    x, y, z = sample.host_label.shape
    region = region_around(low, high, (x, y, z), window, sample.organ.margin)
    return Draw(0, region.start, size=None if region.size == window else region.size)
