"""What a training leaves for people: a CSV and a JSONL log, TensorBoard events, curves."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ctseg.engine.mlflow_log import MlflowLog
from ctseg.files import output_errors, write_csv, write_text
from ctseg.recipe import Recipe
from ctseg.report.curves import draw_training_curves

COLUMNS = ("epoch", "loss", "mean_dice", "lr")
DRAW_INTERVAL_SECONDS = 60.0
"""`curves.png` is drawn anew at most this often while training, and once at the end or at a stop."""


class Recorder:
    """Writes the history of a run. Rows after a resumed epoch replace those of the interrupted one."""

    def __init__(
        self,
        run: Path,
        recipe: Recipe,
        history: list[dict[str, Any]],
        mlflow: MlflowLog | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self.run = run
        self.title = recipe.title
        self.mlflow = mlflow
        self.warn = warn
        # Events from after the checkpoint that we resume from are struck out by purge_step.
        with output_errors(run / "tensorboard"):
            self.events = SummaryWriter(str(run / "tensorboard"), purge_step=len(history) + 1)
        self._history = history  # a run killed after its last epoch still gets its curves
        self._drawn_seconds = time.monotonic()

    def write(self, history: list[dict[str, Any]]) -> None:
        """Brings the logs up to the last row of `history`."""
        write_csv(self.run / "log.csv", COLUMNS, history)
        write_text(self.run / "log.jsonl", "".join(json.dumps(row) + "\n" for row in history))
        row = history[-1]
        for name in ("loss", "mean_dice", "lr"):
            if row[name] is not None:
                self.events.add_scalar(name, row[name], row["epoch"])
        with output_errors(self.run / "tensorboard"):
            self.events.flush()  # before the checkpoint is written, so that a killed run misses no epoch
        if self.mlflow is not None and (warning := self.mlflow.write(history)):
            self.warn(warning)
        self._history = history
        if time.monotonic() - self._drawn_seconds >= DRAW_INTERVAL_SECONDS:
            self._draw()

    def _draw(self) -> None:
        draw_training_curves(self.run / "curves.png", self._history, self.title)
        self._drawn_seconds = time.monotonic()

    def close(self, *, finished: bool = True) -> None:
        """Draws `curves.png` with all epochs written and closes the event file."""
        if self.mlflow is not None and (warning := self.mlflow.close(finished=finished)):
            self.warn(warning)
        if self._history:
            self._draw()
        with output_errors(self.run / "tensorboard"):
            self.events.close()
