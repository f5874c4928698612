"""`ctseg train`: what a run leaves, how it goes on after a stop, and what it refuses."""

import csv
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ctseg.engine.process import cpu_has_bfloat16
from ctseg.files import write_json
from ctseg.manifest import Manifest, read_manifest
from ctseg.recipe import Recipe, load_recipe, recipe_from_dict
from ctseg.workspace import run_recipe


@pytest.fixture(scope="module")
def options(tiny_recipe: Recipe) -> list[str]:
    """`--set` for all that the tiny recipe changes in spleen:small."""
    base, tiny = load_recipe("spleen:small").to_dict(), tiny_recipe.to_dict()
    changed = [
        f"{section}.{key}={json.dumps(value)}"
        for section, values in tiny.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if base[section][key] != value
    ]
    return [part for change in changed for part in ("--set", change)]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, run_cli: Callable[..., Any], tiny_data: Path, options: list[str]
) -> tuple[Path, Any]:
    """The folder in which the tiny recipe was trained, and what the command answered."""
    folder = tmp_path_factory.mktemp("trained")
    return folder, run_cli(folder, "train", "spleen:small", *options, "--manifest", tiny_data, "--json")


def test_run_folder(trained: tuple[Path, Any], tiny_recipe: Recipe, tiny_manifest: Manifest):
    folder, result = trained
    run = folder / "runs" / "spleen-small-001"
    assert result.code == 0
    assert run_recipe(run) == tiny_recipe
    assert read_manifest(run / "data.json") == tiny_manifest
    names = {path.name for path in run.iterdir()}
    assert names >= {"recipe.json", "data.json", "last.pt", "log.csv", "log.jsonl", "curves.png", "tensorboard"}
    assert not [name for name in names if name.endswith(".tmp")]
    content = torch.load(run / "last.pt", weights_only=True)
    assert recipe_from_dict(content["recipe"], "") == tiny_recipe
    assert content["epoch"] == 2


def test_log_and_result(trained: tuple[Path, Any]):
    folder, result = trained
    answer = json.loads(result.out)
    run = Path(answer["run"])
    assert run == Path("runs/spleen-small-001")
    rows = list(csv.DictReader((folder / run / "log.csv").read_text().splitlines()))
    assert [list(row) for row in rows] == [["epoch", "loss", "mean_dice", "lr"]] * 2
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert float(rows[-1]["loss"]) == answer["loss"]
    assert {row["lr"] for row in rows} == {"0.002"}
    best = max(rows, key=lambda row: float(row["mean_dice"]))
    assert (answer["best_epoch"], answer["best_mean_dice"]) == (int(best["epoch"]), float(best["mean_dice"]))
    assert answer["checkpoint"] == str(run / "best.pt")
    assert (folder / answer["checkpoint"]).is_file()
    assert "training spleen:small 2/2" in result.err


def test_resume_of_a_finished_run_changes_nothing(
    trained: tuple[Path, Any], run_cli: Callable[..., Any], options: list[str]
):
    folder, result = trained
    run = folder / "runs" / "spleen-small-001"
    before = {name: (run / name).read_bytes() for name in ("log.csv", "best.pt", "recipe.json", "data.json")}
    again = run_cli(folder, "train", "spleen:small", *options, "--resume", "--json", "--quiet")
    assert (again.code, again.err) == (0, "")
    answers = [json.loads(r.out) for r in (again, result)]
    assert all(answer.pop("peak_memory_gb") > 0.1 for answer in answers)
    assert answers[0] == answers[1]
    assert {name: (run / name).read_bytes() for name in before} == before
    assert [path.name for path in (folder / "runs").iterdir()] == ["spleen-small-001"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--resume", "--set", "training.epochs=3"], "it differs in training.epochs; --change-recipe goes on with the"),
        (["--change-recipe"], "--change-recipe: only a run that is resumed has a recipe to change; add --resume"),
        (["--max-gpu-memory", "much"], "--max-gpu-memory: expected a size such as 12G or 800M, got 'much'"),
        (["--max-gpu-memory", "0G"], "--max-gpu-memory: expected a size such as 12G or 800M, got '0G'"),
        (["--resume", "--manifest", "x.json"], "--resume: goes on with the data of the run"),
        (["--output", "runs/spleen-small-001"], "'runs/spleen-small-001' already holds a run; continue it with"),
    ],
)
def test_refusals(
    trained: tuple[Path, Any],
    run_cli: Callable[..., Any],
    options: list[str],
    tiny_data: Path,
    arguments: list[str],
    message: str,
):
    folder, _ = trained
    source = [] if "--resume" in arguments else ["--manifest", tiny_data]
    before = sorted(folder.rglob("*"))
    result = run_cli(folder, "train", "spleen:small", *options, *source, *arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.message
    assert sorted(folder.rglob("*")) == before


def test_a_changed_recipe_goes_on_from_the_same_weights(
    cli: Callable[..., Any], options: list[str], tiny_data: Path, tmp_path: Path
):
    """One more epoch at another rate; the run's file tells the new recipe, the old one is kept."""
    assert cli("train", "spleen:small", *options, "--manifest", tiny_data, "--quiet").code == 0
    run = tmp_path / "runs/spleen-small-001"
    before = json.loads((run / "recipe.json").read_text())
    changes = ["--set", "training.epochs=3", "--set", "optimizer.lr=5e-4"]
    result = cli("train", "spleen:small", "--resume", "--change-recipe", *changes, "--json")
    assert (result.code, json.loads(result.out)["epochs"]) == (0, 3)
    rows = list(csv.DictReader((run / "log.csv").read_text().splitlines()))
    assert [row["lr"] for row in rows] == ["0.002", "0.002", "0.0005"]
    assert json.loads((run / "recipe.json").read_text())["training"]["epochs"] == 3
    assert json.loads((run / "recipe-before-001.json").read_text()) == before
    again = cli("train", "spleen:small", "--resume", "--json")
    assert (again.code, json.loads(again.out)["epochs"]) == (0, 3)
    other = cli("train", "spleen:small", "--resume", "--change-recipe", "--set", "network.channels=[4,16]")
    assert other.code == 2
    assert "weights do not fit the recipe's network" in other.message
    assert json.loads((run / "recipe.json").read_text())["network"] == before["network"]


def test_a_limit_of_gpu_memory_needs_a_gpu(cli: Callable[..., Any], options: list[str], tiny_data: Path):
    result = cli(
        "train", "spleen:small", *options, "--manifest", tiny_data, "--device", "cpu", "--max-gpu-memory", "8G"
    )
    assert result.code == 2
    assert "--max-gpu-memory: training runs on the CPU" in result.message


def test_resume_by_name_goes_on_with_the_runs_own_recipe(trained: tuple[Path, Any], run_cli: Callable[..., Any]):
    folder, _ = trained
    before = (folder / "runs/spleen-small-001/last.pt").read_bytes()
    result = run_cli(folder, "train", "spleen:small", "--resume", "--json", "--quiet")
    assert result.code == 0
    assert json.loads(result.out)["epochs"] == 2, "the run's, not the 32 of the shipped recipe"
    assert (folder / "runs/spleen-small-001/last.pt").read_bytes() == before


def test_resume_with_a_file_that_says_otherwise_is_refused(trained: tuple[Path, Any], run_cli: Callable[..., Any]):
    folder, _ = trained
    run = folder / "runs/spleen-small-001"
    changed = json.loads((run / "recipe.json").read_text())
    changed["training"]["epochs"] = 3
    write_json(folder / "mine.json", changed)
    result = run_cli(folder, "train", "mine.json", "--resume", "--output", "runs/spleen-small-001")
    assert result.code == 2
    assert "it differs in training.epochs" in result.message
    (folder / "mine.json").unlink()


def test_summary_for_people_and_a_folder_of_ones_own(
    trained: tuple[Path, Any], run_cli: Callable[..., Any], options: list[str], tiny_data: Path
):
    folder, _ = trained
    output = ["--output", "elsewhere/mine", "--set", "training.validation_interval_epochs=5", "--quiet"]
    result = run_cli(folder, "train", "spleen:small", *options, "--manifest", tiny_data, *output)
    assert (result.code, result.err) == (0, "")
    lines = dict(line.split(maxsplit=1) for line in result.out.splitlines())
    assert (lines["run"], lines["epochs"]) == ("elsewhere/mine", "2")
    assert lines["model"].startswith("elsewhere/mine/")


def test_a_broken_training_case_is_named(cli: Callable[..., Any], options: list[str], tmp_path: Path):
    (tmp_path / "ct.nii").write_bytes(b"")
    write_json(tmp_path / "list.json", {"training": [{"image": "ct.nii", "label": "ct.nii"}]})
    result = cli("train", "spleen:small", *options, "--manifest", "list.json")
    assert (result.code, result.out) == (2, "")
    assert result.message.startswith(f"data set: ct: cannot read '{tmp_path / 'ct.nii'}': the file is empty")


def test_unlabelled_training_case(cli: Callable[..., Any], options: list[str], tiny_manifest: Manifest, tmp_path: Path):
    image = str(tiny_manifest.split("training")[0].image)
    write_json(tmp_path / "list.json", {"training": [image]})
    result = cli("train", "spleen:small", *options, "--manifest", "list.json")
    assert result.code == 2
    assert "case 'case_0' has no label" in result.message


def test_stopped_by_sigterm_and_resumed(cli: Callable[..., Any], options: list[str], tiny_data: Path, tmp_path: Path):
    """The signal comes as soon as there is a run, before its cases are prepared or its first step is done."""
    arguments = ["train", "spleen:small", *options]
    command = [sys.executable, "-m", "ctseg", *arguments, "--manifest", str(tiny_data)]
    run = tmp_path / "runs" / "spleen-small-001"
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (run / "recipe.json").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (75, "")
    assert err.splitlines()[-1].startswith("ctseg: ")
    assert "--resume" in err.splitlines()[-1]
    assert "Traceback" not in err
    assert "preparing" in err.splitlines()[-1] or torch.load(run / "last.pt", weights_only=True)["step"] == 1
    result = cli(*arguments, "--resume", "--json")
    assert result.code == 0
    assert json.loads(result.out)["epochs"] == 2
    rows = (run / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "1", "2"]


@pytest.mark.skipif(not cpu_has_bfloat16(), reason="this CPU has no bfloat16 arithmetic")
def test_a_resumed_run_keeps_its_precision(cli: Callable[..., Any], options: list[str], tiny_data: Path):
    started = cli("train", "spleen:small", *options, "--manifest", tiny_data, "--precision", "bfloat16")
    assert "bfloat16" in started.err.splitlines()[0]
    resumed = cli("train", "spleen:small", "--resume")
    assert (resumed.code, "bfloat16" in resumed.err.splitlines()[0]) == (0, True)


def test_gpus_inside_of_several_tasks_are_refused(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    result = cli("train", "spleen:small", "--gpus", "2")
    assert (result.code, result.out) == (2, "")
    assert result.message.startswith("--gpus 2: srun has started 4 tasks already, each of them one process on one GPU")


def test_many_processes_on_one_named_gpu_are_refused(cli: Callable[..., Any]):
    result = cli("train", "spleen:small", "--gpus", "2", "--device", "cuda:0")
    assert result.code == 2
    assert "--gpus 2 with --device cuda:0" in result.message
