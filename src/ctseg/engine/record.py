"""What a training leaves for people: a CSV and a JSONL log, TensorBoard events, curves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ctseg.files import write_csv, write_text
from ctseg.recipe import Recipe
from ctseg.report.curves import draw_training_curves

COLUMNS = ("epoch", "loss", "mean_dice", "lr")


class Recorder:
    """Writes the history of a run. Rows after a resumed epoch replace those of the interrupted one."""

    def __init__(self, run: Path, recipe: Recipe, epochs_done: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self.run = run
        self.title = recipe.title
        # Events from after the checkpoint that we resume from are struck out by purge_step.
        self.events = SummaryWriter(str(run / "tensorboard"), purge_step=epochs_done + 1)

    def write(self, history: list[dict[str, Any]]) -> None:
        """Brings the logs up to the last row of `history`."""
        write_csv(self.run / "log.csv", COLUMNS, history)
        write_text(self.run / "log.jsonl", "".join(json.dumps(row) + "\n" for row in history))
        row = history[-1]
        for name in ("loss", "mean_dice", "lr"):
            if row[name] is not None:
                self.events.add_scalar(name, row[name], row["epoch"])
        self.events.flush()  # before the checkpoint is written, so that a killed run misses no epoch

    def draw(self, history: list[dict[str, Any]]) -> None:
        """Draws `curves.png`: loss per epoch and validation mean Dice per epoch."""
        draw_training_curves(self.run / "curves.png", history, self.title)

    def close(self) -> None:
        """Closes the event file."""
        self.events.close()
