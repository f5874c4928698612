"""The whole journey on made data, through the same functions as the commands."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ctseg.engine.evaluate import Evaluation, evaluate, write_evaluation
from ctseg.engine.export import ExportReport, export
from ctseg.engine.infer import infer
from ctseg.engine.model import load_model
from ctseg.engine.run_manifest import model_facts
from ctseg.engine.runtime import Runtime
from ctseg.engine.train import train
from ctseg.errors import CtsegError
from ctseg.jobs import find_jobs
from ctseg.manifest import read_manifest
from ctseg.progress import Progress
from ctseg.recipe import Recipe
from ctseg.sources.catalogue import find_data
from ctseg.workspace import DATA_FILE, EXPORT_SUFFIXES, RECIPE_FILE, run_recipe


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured and where it left everything."""

    folder: Path
    evaluation: Evaluation
    exports: tuple[ExportReport, ...]
    contents: tuple[str, ...]
    seconds: float

    @property
    def mean_dice(self) -> float | None:
        """Mean Dice on the testing split."""
        return self.evaluation.mean_dice

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {"mean_dice": self.mean_dice, **dataclasses.asdict(self)}


def run_demo(recipe: Recipe, folder: Path, runtime: Runtime, progress: Progress) -> DemoResult:
    """Makes, prepares, trains, validates, infers, exports and draws, all below `folder`; goes on after a stop.

    Raises:
        CtsegError: if `folder` holds a run of another recipe, or any step fails.
    """
    started = time.perf_counter()
    run = folder / "run"
    resuming = (run / RECIPE_FILE).exists()
    if resuming and run_recipe(run) != recipe:
        raise CtsegError(f"'{run}' holds a run of another recipe; choose another --output or delete it")
    find = None if resuming else partial(find_data, recipe.data.manifest, folder / "data")
    trained = train(recipe, run, find, runtime, progress, folder / "prepared")
    model = load_model(trained.checkpoint, runtime)
    cases = read_manifest(run / DATA_FILE).split("testing")
    evaluation = evaluate(model, cases, progress, folder / "overlays")
    about = {**model_facts(model), "model": str(trained.checkpoint), "split": "testing"}
    write_evaluation(run / "validation-testing", evaluation, about)
    masks = folder / "masks"
    infer(model, find_jobs([case.image for case in cases], masks), masks, progress)
    exports = tuple(
        export(trained.checkpoint, kind, run / f"model{suffix}", runtime) for kind, suffix in EXPORT_SUFFIXES.items()
    )
    seconds = time.perf_counter() - started
    return DemoResult(folder, evaluation, exports, _contents(folder), seconds)


def _contents(folder: Path) -> tuple[str, ...]:
    described = {
        "data": "the made CT and its labels",
        "run": "checkpoints, log.csv, curves.png, tensorboard, model.ts, model.onnx",
        "run/validation-testing": "cases.csv, summary.json",
        "masks": "one mask for each CT of the testing split",
        "overlays": "pictures of masks and labels",
    }
    return tuple(f"{folder / name}: {what}" for name, what in described.items())
