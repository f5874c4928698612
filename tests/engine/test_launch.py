"""Several processes train as one: the same network where mathematics allows it, and none waits for a dead one.

Each launch costs the start of three processes, so what can be is tested on one process in `test_fit`.
"""

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch

from ctseg.engine import launch
from ctseg.engine.bank import bank_folder, open_bank
from ctseg.engine.checkpoint import read_checkpoint
from ctseg.engine.evaluate import bank_dice
from ctseg.engine.launch import check_gpus, is_launched
from ctseg.engine.model import forward_of, load_model
from ctseg.engine.runtime import Runtime
from ctseg.engine.trainer import Trainer
from ctseg.errors import CtsegError, DeviceError, PeerLost, Stopped
from ctseg.manifest import Manifest, read_manifest
from ctseg.recipe import Recipe

TWO = ("--gpus", "2")
SECONDS = 150
"""A launch takes about ten seconds; one that waits for a dead process would take an hour."""


@pytest.fixture
def four_cases(tiny_manifest: Manifest, tmp_path: Path) -> Path:
    """The tiny data with two validation cases, one for each process."""
    path = tmp_path / "four.json"
    splits = {"training": ("training",), "validation": ("validation", "testing")}
    entries = {
        split: [{"image": str(c.image), "label": str(c.label)} for c in tiny_manifest.cases if c.split in sources]
        for split, sources in splits.items()
    }
    path.write_text(json.dumps({"name": "four", **entries}))
    return path


def finished(process, run: Path) -> list[dict]:
    """The history of a launch that went well."""
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, errors
    return read_checkpoint(run / "last.pt")["history"]


def test_two_processes_are_one_where_no_sum_runs_over_patches(
    tiny_recipe: Recipe, tmp_path: Path, ctseg_train, train_tiny, changed, cpu: Runtime
) -> None:
    """Instance normalisation and Dice of each patch alone: the mean gradient over processes is that over patches.

    Three patches a case and two cases, then one, a step: the processes hold unequal shares (3 + 3, then 2 + 1).
    The order of sums in float32 is all that differs. Scores are compared, not weights: a bias before a normalisation
    changes nothing, its gradient is rounding noise, and the optimizer makes full steps of it.
    """
    recipe = changed(
        tiny_recipe,
        network={"norm": "instance"},
        objective={"batch": False},
        optimizer={"kind": "novograd"},
        sampling={"patches_per_case": 3},
    )
    train_tiny(recipe, tmp_path / "one")
    finished(ctseg_train(recipe, tmp_path / "two", *TWO), tmp_path / "two")
    one, two = (load_model(tmp_path / name / "last.pt", cpu).forward for name in ("one", "two"))
    fresh = forward_of(Trainer.fresh(recipe, cpu).network, cpu)
    image = torch.rand(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    assert (one(image) - fresh(image)).abs().max() > 0.05
    torch.testing.assert_close(two(image), one(image), rtol=0, atol=1e-4)


def test_two_processes_train_the_recipe_as_it_is(
    tiny_recipe: Recipe, tmp_path: Path, ctseg_train, train_tiny, changed, cpu: Runtime, four_cases: Path
) -> None:
    """Batch normalisation and Dice sums over the whole batch: the losses of twelve epochs are those of one process.

    One run folder, every epoch logged once, and the score in the log is exactly that of the weights in the checkpoint,
    although each process has scored another case and seen other patches.
    """
    recipe = changed(tiny_recipe, training={"epochs": 12, "batch_cases": 3}, preprocess={"spacing_mm": [5.0, 5.0, 5.0]})
    alone, run = train_tiny(recipe, tmp_path / "one"), tmp_path / "two"
    history = finished(ctseg_train(recipe, run, *TWO, manifest=four_cases), run)
    assert [row["epoch"] for row in history] == list(range(1, 13))
    losses = [row["loss"] for row in read_checkpoint(alone.run / "last.pt")["history"]]
    assert [row["loss"] for row in history] == pytest.approx(losses, rel=1e-3)
    assert history[0]["loss"] == pytest.approx(losses[0], rel=1e-5)
    names = {path.name for path in run.iterdir()}
    assert names == {path.name for path in alone.run.iterdir()}
    assert len((run / "log.csv").read_text().splitlines()) == 13
    assert len(list((run / "tensorboard").iterdir())) == 1
    model = load_model(run / "last.pt", cpu)
    validation = read_manifest(four_cases).split("validation")
    cases = open_bank(validation, bank_folder(tmp_path / "prepared", recipe), cpu.device)
    scores = [bank_dice(model, case, recipe.training.validation_overlap) for case in cases]
    assert history[-1]["mean_dice"] == pytest.approx(sum(map(sum, scores)) / 2, rel=1e-9)
    assert all(0 < score < 1 for (score,) in scores)


def test_a_process_without_patches_ends_all(tiny_recipe: Recipe, tmp_path: Path, ctseg_train, changed) -> None:
    """Only the second process sees the error, while the first waits for its gradient."""
    recipe = changed(tiny_recipe, training={"batch_cases": 1}, sampling={"patches_per_case": 1})
    process = ctseg_train(recipe, tmp_path / "run", *TWO)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 2, errors
    assert "ctseg: 2 processes, but the smallest step of an epoch has only 1 patches" in errors
    assert "failed with exit code 2; its error is above" in errors


@pytest.mark.slow
def test_bad_data_that_only_the_main_process_reads_ends_all(
    tiny_recipe: Recipe, tmp_path: Path, ctseg_train, tiny_manifest: Manifest
) -> None:
    manifest, broken = tmp_path / "bad.json", tmp_path / "broken.nii.gz"
    broken.write_bytes(b"not a CT")
    entry = {"image": str(broken), "label": str(tiny_manifest.cases[0].label)}
    manifest.write_text(json.dumps({"training": [entry]}))
    process = ctseg_train(tiny_recipe, tmp_path / "run", *TWO, manifest=manifest)
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 2, errors
    assert f"broken: cannot read '{broken}'" in errors


@pytest.mark.slow
def test_a_signal_stops_all_processes_at_one_step(
    tiny_recipe: Recipe, tmp_path: Path, ctseg_train, train_tiny, changed, assert_same
) -> None:
    """Stopped with 75, resumed on two processes, it ends with the bits of an uninterrupted run of two processes."""
    recipe, run = changed(tiny_recipe, training={"epochs": 60}), tmp_path / "run"
    whole = finished(ctseg_train(recipe, tmp_path / "whole", *TWO), tmp_path / "whole")
    process = ctseg_train(recipe, run, *TWO)
    while process.poll() is None and not (run / "last.pt").exists():
        time.sleep(0.05)
    process.terminate()
    _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 75, errors
    assert read_checkpoint(run / "last.pt")["epoch"] < 60
    resumed = finished(ctseg_train(recipe, run, *TWO), run)
    assert [row["epoch"] for row in resumed] == [row["epoch"] for row in whole]
    assert_same(read_checkpoint(run / "last.pt")["model"], read_checkpoint(tmp_path / "whole" / "last.pt")["model"])


def test_too_many_gpus_are_refused_unless_on_the_cpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    check_gpus(2, "auto")
    check_gpus(9, "cpu")
    with pytest.raises(DeviceError, match=r"--gpus 3: 2 CUDA GPU\(s\) here"):
        check_gpus(3, "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=r"--gpus 1: 0 CUDA GPU\(s\) here; use fewer, or --device cpu"):
        check_gpus(1, "auto")


def test_a_launched_process_knows_it(monkeypatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert not is_launched()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        assert not is_launched()
        monkeypatch.setenv(name, "1")
    assert is_launched()


@dataclasses.dataclass
class Failure:
    """What torch elastic tells of a failed process."""

    exitcode: int


@pytest.mark.parametrize(("code", "error"), [(75, Stopped), (2, CtsegError), (1, PeerLost), (-9, PeerLost)])
def test_exit_codes_of_processes_become_errors(monkeypatch, code: int, error: type[CtsegError]) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher import api

    class Failed(ChildFailedError):
        def __init__(self) -> None:
            pass

        def get_first_failure(self) -> tuple[int, Failure]:
            return 1, Failure(code)

    def elastic(_config, _command):
        def run(*_arguments):
            raise Failed

        return run

    monkeypatch.setattr(api, "elastic_launch", elastic)
    with pytest.raises(CtsegError) as caught:
        launch.launch(2, ["train"])
    assert type(caught.value) is error
    if error is not Stopped:
        how = "was ended by SIGKILL" if code == -9 else f"failed with exit code {code}"
        assert str(caught.value).startswith(f"process 2 of 2 {how}")
