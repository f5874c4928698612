"""Scores as files: a table for each case, a summary for all."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from ctseg.files import make_folder, write_csv, write_json

if TYPE_CHECKING:
    from ctseg.engine.evaluate import Evaluation

COLUMNS = ("case", "structure", "dice", "label_ml", "mask_ml", "seconds", "error")


def write_evaluation(folder: Path, evaluation: Evaluation, model: Path, split: str) -> None:
    """Writes `cases.csv` (a row for each case and structure) and `summary.json` into `folder`."""
    make_folder(folder)
    write_csv(folder / "cases.csv", COLUMNS, [dataclasses.asdict(s) for s in evaluation.scores])
    write_json(folder / "summary.json", {"model": str(model), "split": split, **evaluation.to_dict()})
