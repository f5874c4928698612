"""What a training leaves for people: each epoch stands once in every log, whatever happened in between."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from ctseg.engine.record import Recorder
from ctseg.recipe import Recipe

HISTORY: list[dict[str, Any]] = [
    {"epoch": 1, "loss": 1.25, "mean_dice": None, "lr": 0.002},
    {"epoch": 2, "loss": 0.75, "mean_dice": 0.5, "lr": 0.002},
    {"epoch": 3, "loss": 0.5, "mean_dice": None, "lr": 0.0002},
    {"epoch": 4, "loss": 0.25, "mean_dice": 0.75, "lr": 0.0002},
]


def record(run: Path, recipe: Recipe, done: int, until: int) -> Recorder:
    """A recorder that has written the epochs after `done`."""
    recorder = Recorder(run, recipe, HISTORY[:done])
    for n in range(done + 1, until + 1):
        recorder.write(HISTORY[:n])
    return recorder


def scalars(name: str) -> list[tuple[int, float]]:
    """The values that TensorBoard, which holds float32, shows of the whole history."""
    return [(row["epoch"], pytest.approx(row[name])) for row in HISTORY if row[name] is not None]


def test_logs_hold_one_row_for_each_epoch(tmp_path: Path, tiny_recipe: Recipe, read_events) -> None:
    record(tmp_path, tiny_recipe, done=0, until=4).close()
    rows = list(csv.DictReader((tmp_path / "log.csv").read_text().splitlines()))
    assert list(rows[0]) == ["epoch", "loss", "mean_dice", "lr"]
    assert [(int(r["epoch"]), float(r["loss"]), r["mean_dice"]) for r in rows] == [
        (1, 1.25, ""),
        (2, 0.75, "0.5"),
        (3, 0.5, ""),
        (4, 0.25, "0.75"),
    ]
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == HISTORY
    assert read_events(tmp_path) == {name: scalars(name) for name in ("loss", "mean_dice", "lr")}


def test_epochs_after_the_checkpoint_are_struck_out(tmp_path: Path, tiny_recipe: Recipe, read_events) -> None:
    """Three epochs are logged, but the run goes on from the checkpoint of the first."""
    first = Recorder(tmp_path, tiny_recipe, [])
    first.write(HISTORY[:1])
    for n in (2, 3):
        first.write([*HISTORY[: n - 1], {**HISTORY[n - 1], "loss": 99.0}])
    first.close()
    record(tmp_path, tiny_recipe, done=1, until=4).close()
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 5
    assert read_events(tmp_path) == {name: scalars(name) for name in ("loss", "mean_dice", "lr")}


def test_every_epoch_is_on_disk_before_the_next(tmp_path: Path, tiny_recipe: Recipe, read_events) -> None:
    """A killed process closes nothing."""
    recorder = record(tmp_path, tiny_recipe, done=0, until=3)
    assert read_events(tmp_path)["loss"] == scalars("loss")[:3]
    recorder.close()


def test_curves_are_a_picture(tmp_path: Path, tiny_recipe: Recipe) -> None:
    record(tmp_path, tiny_recipe, done=0, until=3).close()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_a_run_killed_after_its_last_epoch_still_gets_its_curves(tmp_path: Path, tiny_recipe: Recipe) -> None:
    Recorder(tmp_path, tiny_recipe, HISTORY).close()
    assert (tmp_path / "curves.png").exists()
