"""A whole training: what it needs, what it leaves, and that `kill -9` at any moment costs nothing but time."""

import csv
import dataclasses
import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ctseg.engine.bank import bank_folder
from ctseg.engine.checkpoint import read_checkpoint
from ctseg.engine.runtime import Runtime
from ctseg.engine.train import TrainResult, train
from ctseg.errors import CtsegError, ManifestError, NotEnoughMemory, OutputError, Stopped
from ctseg.manifest import Manifest
from ctseg.networks import network_for
from ctseg.progress import Silent
from ctseg.recipe import Recipe

Start = Callable[..., "subprocess.Popen[str]"]


def test_a_run_holds_all_that_belongs_to_it(tiny_result: TrainResult, tiny_recipe: Recipe, changed) -> None:
    names = {path.name for path in tiny_result.run.iterdir()}
    checkpoints = {"last.pt", "previous.pt", "best.pt"}
    files = {"recipe.json", "data.json", *checkpoints, "log.csv", "log.jsonl", "curves.png", "tensorboard"}
    assert names == files
    assert (
        json.loads((tiny_result.run / "recipe.json").read_text())
        == changed(tiny_recipe, training={"epochs": 25}).to_dict()
    )


def test_the_result_says_what_the_log_says(tiny_result: TrainResult) -> None:
    rows = list(csv.DictReader((tiny_result.run / "log.csv").read_text().splitlines()))
    assert tiny_result.epochs == len(rows) == 25
    assert tiny_result.loss == float(rows[-1]["loss"])
    best = max(rows, key=lambda row: float(row["mean_dice"]))
    assert (tiny_result.best_epoch, tiny_result.best_mean_dice) == (int(best["epoch"]), float(best["mean_dice"]))
    assert tiny_result.checkpoint == tiny_result.run / "best.pt"


def test_without_a_validation_split_the_last_weights_are_the_result(
    tiny_recipe: Recipe, tiny_manifest: Manifest, tmp_path: Path, train_tiny, read_events
) -> None:
    cases = tuple(case for case in tiny_manifest.cases if case.split == "training")
    result = train_tiny(tiny_recipe, tmp_path / "run", manifest=dataclasses.replace(tiny_manifest, cases=cases))
    assert (result.best_epoch, result.best_mean_dice) == (None, None)
    assert result.checkpoint == tmp_path / "run" / "last.pt"
    assert not (tmp_path / "run" / "best.pt").exists()
    assert (tmp_path / "run" / "curves.png").exists()
    assert set(read_events(tmp_path / "run")) == {"loss", "lr"}


def test_without_a_training_split_nothing_is_begun(
    tiny_recipe: Recipe, tiny_manifest: Manifest, tmp_path: Path, train_tiny
) -> None:
    cases = tuple(case for case in tiny_manifest.cases if case.split != "training")
    with pytest.raises(ManifestError, match="split 'training' has no cases"):
        train_tiny(tiny_recipe, tmp_path / "run", manifest=dataclasses.replace(tiny_manifest, cases=cases))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("error", "stays"), [(Stopped("stopped"), True), (NotEnoughMemory("no room"), False)])
def test_a_run_that_never_began_leaves_nothing_unless_it_was_stopped(
    tiny_recipe: Recipe,
    tiny_manifest,
    tiny_prepared: Path,
    tmp_path: Path,
    cpu,
    monkeypatch,
    error: Exception,
    stays: bool,
) -> None:
    def refuse(*_: object) -> None:
        raise error

    arguments = (tiny_recipe, tmp_path / "run", lambda _: tiny_manifest, cpu, Silent(), tiny_prepared)
    start = {"model": network_for(tiny_recipe).state_dict(), "report": {"source": "here"}}
    with monkeypatch.context() as patch:
        patch.setattr("ctseg.engine.train.prepare_bank", refuse)
        with pytest.raises(type(error)):
            train(*arguments, start=start)
    assert (tmp_path / "run").exists() is stays
    if stays:
        assert {path.name for path in (tmp_path / "run").iterdir()} == {
            "recipe.json", "data.json", "start.pt", "start.json",
        }  # fmt: skip
    else:
        assert train(*arguments).epochs == tiny_recipe.training.epochs


def test_only_training_and_validation_cases_are_prepared(tiny_recipe, tiny_manifest, tmp_path: Path, cpu) -> None:
    train(tiny_recipe, tmp_path / "run", lambda _: tiny_manifest, cpu, Silent(), tmp_path / "prepared")
    names = {folder.name[:6] for folder in bank_folder(tmp_path / "prepared", tiny_recipe).iterdir()}
    assert names == {"case_0", "case_1", "case_2", "case_3"}


def test_a_run_is_not_begun_twice(tiny_recipe, tiny_manifest, tiny_prepared, tmp_path: Path, cpu) -> None:
    arguments = (tiny_recipe, tmp_path / "run", lambda _: tiny_manifest, cpu, Silent(), tiny_prepared)
    train(*arguments)
    before = (tmp_path / "run" / "last.pt").read_bytes()
    with pytest.raises(CtsegError, match="already holds a run; continue it with --resume"):
        train(*arguments)
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_resuming_a_finished_run_changes_nothing(tiny_recipe, tmp_path: Path, train_tiny) -> None:
    first = train_tiny(tiny_recipe, tmp_path / "run")
    before = {name: (tmp_path / "run" / name).read_bytes() for name in ("last.pt", "best.pt", "log.csv")}
    again = train_tiny(tiny_recipe, tmp_path / "run")
    assert dataclasses.replace(again, peak_memory_gb=first.peak_memory_gb) == first
    assert {name: (tmp_path / "run" / name).read_bytes() for name in before} == before


def test_resuming_says_which_files_have_gone(tiny_recipe, tmp_path: Path, cpu, train_tiny, tiny_prepared) -> None:
    run = tmp_path / "run"
    train_tiny(tiny_recipe, run)
    data = json.loads((run / "data.json").read_text())
    data["training"][1]["image"] = str(tmp_path / "gone.nii.gz")
    (run / "data.json").write_text(json.dumps(data))
    with pytest.raises(ManifestError, match=rf"file not found: {tmp_path}/gone.nii.gz"):
        train(tiny_recipe, run, None, cpu, Silent(), tiny_prepared)


def wait_for_checkpoint(process: "subprocess.Popen[str]", file: Path) -> None:
    """Returns when `file` is written anew, or the process has ended."""
    before = file.stat().st_mtime_ns if file.exists() else 0
    while process.poll() is None and (not file.exists() or file.stat().st_mtime_ns == before):
        time.sleep(0.005)


def kill_and_resume(start: Start, recipe: Recipe, run: Path, kills: int, seed: int) -> int:
    """Trains to the end through `kills` times SIGKILL at random moments; returns how many hit a running training.

    Every fourth comes anywhere from the process's start on; the others soon after a checkpoint, as processes spend most
    of their time on imports.
    """
    rng, hits = random.Random(seed), 0
    for n in range(kills):
        process = start(recipe, run)
        if n % 4 == 0:
            time.sleep(rng.uniform(0, 6))
        else:
            wait_for_checkpoint(process, run / "last.pt")
            time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if (run / "last.pt").exists():
            hits += 0 < read_checkpoint(run / "last.pt")["epoch"] < recipe.training.epochs
    process = start(recipe, run)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    return hits


def check_killed_run(
    recipe: Recipe, tmp_path: Path, start: Start, train_tiny, assert_same, read_events, kills: int
) -> None:
    train_tiny(recipe, tmp_path / "whole")
    run = tmp_path / "run"
    assert kill_and_resume(start, recipe, run, kills, seed=kills) >= kills // 2
    for name in ("last.pt", "best.pt"):
        assert_same(read_checkpoint(run / name), read_checkpoint(tmp_path / "whole" / name))
    for name in ("log.csv", "log.jsonl"):
        assert (run / name).read_text() == (tmp_path / "whole" / name).read_text()
    assert read_events(run) == read_events(tmp_path / "whole")
    assert (run / "curves.png").exists()


def test_killed_four_times_it_ends_with_the_same_bits(
    tiny_recipe, tmp_path: Path, ctseg_train, train_tiny, assert_same, read_events, changed
) -> None:
    recipe = changed(tiny_recipe, training={"epochs": 40, "validation_interval_epochs": 3})
    check_killed_run(recipe, tmp_path, ctseg_train, train_tiny, assert_same, read_events, kills=4)


@pytest.mark.slow
def test_killed_twenty_times_it_ends_with_the_same_bits(
    tiny_recipe, tmp_path: Path, ctseg_train, train_tiny, assert_same, read_events, changed
) -> None:
    recipe = changed(tiny_recipe, training={"epochs": 150, "validation_interval_epochs": 3})
    check_killed_run(recipe, tmp_path, ctseg_train, train_tiny, assert_same, read_events, kills=20)


def test_a_signal_stops_the_process_with_its_own_code(tiny_recipe, tmp_path: Path, ctseg_train, changed) -> None:
    recipe = changed(tiny_recipe, training={"epochs": 40})
    run = tmp_path / "run"
    process = ctseg_train(recipe, run)
    wait_for_checkpoint(process, run / "last.pt")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    assert f"--resume --output {run}" in errors
    assert 0 < read_checkpoint(run / "last.pt")["epoch"] < 40


def test_a_full_disk_ends_the_training_in_one_line_and_leaves_whole_files(
    tiny_recipe, tiny_manifest, tiny_prepared: Path, mount: Callable[[str], Path], cpu: Runtime
) -> None:
    run = mount("size=96k") / "run"
    with pytest.raises(OutputError, match="No space left on device"):
        train(tiny_recipe, run, lambda _: tiny_manifest, cpu, Silent(), tiny_prepared)
    assert not list(run.glob(".*"))
    for checkpoint in run.glob("*.pt"):
        read_checkpoint(checkpoint)
