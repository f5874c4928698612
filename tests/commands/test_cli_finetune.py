"""`ctseg finetune`: where the weights come from, what a run keeps of it, and what is refused."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ctseg.engine.checkpoint import save_checkpoint
from ctseg.files import write_json
from ctseg.networks import network_for
from ctseg.recipe import Recipe
from ctseg.workspace import run_recipe

SLOW_RATE = ["--set", "optimizer.lr=1e-12", "--set", "training.epochs=1"]
"""Weights stay where they started, to float rounding."""


@pytest.fixture
def recipe_file(tiny_recipe: Recipe, tmp_path: Path) -> Path:
    """The tiny recipe as a file."""
    write_json(tmp_path / "recipe.json", tiny_recipe.to_dict())
    return tmp_path / "recipe.json"


def weights_of(file: Path) -> dict[str, torch.Tensor]:
    content: dict[str, torch.Tensor] = torch.load(file, weights_only=True)["model"]
    return content


@pytest.mark.parametrize("kind", ["checkpoint", "run", "mmar", "bundle", "file"])
def test_training_starts_from_the_weights(
    cli: Callable[..., Any], recipe_file: Path, tiny_data: Path, tiny_model: Path, tmp_path: Path, kind: str
):
    wanted = weights_of(tiny_model)
    (tmp_path / "other" / "models").mkdir(parents=True)
    content = {"mmar": {"model": wanted, "train_conf": {"epochs": 3}}, "bundle": wanted}
    if kind in content:
        torch.save(content[kind], tmp_path / "other" / "models" / "model.pt")
    torch.save({"state_dict": {f"module.{n}": v for n, v in wanted.items()}}, tmp_path / "old.pth")
    names = {"checkpoint": tiny_model, "run": tiny_model.parent, "mmar": "other", "bundle": "other", "file": "old.pth"}
    options = ["--manifest", tiny_data, *SLOW_RATE, "--json", "--quiet"]
    result = cli("finetune", "recipe.json", "--from", names[kind], *options)
    assert (result.code, result.err) == (0, "")
    answer = json.loads(result.out)
    run = tmp_path / "runs" / "spleen-small-finetuned-001"
    assert Path(answer["run"]) == run.relative_to(tmp_path)
    report = json.loads((run / "start.json").read_text())
    assert answer["start"] == report
    assert report["matched"] == list(wanted)
    assert report["notes"] == (["prefix 'module.' removed from every name"] if kind == "file" else [])
    trained = weights_of(run / "last.pt")
    for name, value in trained.items():
        if "running" not in name and "num_batches" not in name:
            torch.testing.assert_close(value, wanted[name], rtol=0, atol=1e-6)


def test_what_people_see_and_what_is_frozen(
    cli: Callable[..., Any], recipe_file: Path, tiny_data: Path, tiny_model: Path, tmp_path: Path
):
    result = cli(
        *("finetune", "recipe.json", "--from", tiny_model, "--manifest", tiny_data, "--output", "tuned", "--quiet"),
        *("--freeze", "model.0", "--freeze", "model.1.submodule.conv", "--set", "training.epochs=1"),
    )
    assert (result.code, result.err) == (0, "")
    first = {line[:20].strip(): line[20:].strip() for line in result.out.splitlines()}
    assert first["started from"] == f"{tiny_model} (ctseg checkpoint)"
    assert "tensors: model.0.conv.unit0.conv.weight, model.0.conv" in result.out
    assert "(all in start.json)" in result.out
    assert run_recipe(tmp_path / "tuned").training.freeze == ("model.0", "model.1.submodule.conv")
    before, after = weights_of(tiny_model), weights_of(tmp_path / "tuned" / "last.pt")
    moved = {name for name, _ in network_for(run_recipe(tmp_path / "tuned")).named_parameters()}
    moved = {name for name in moved if not torch.equal(before[name], after[name])}
    assert moved
    assert not [name for name in moved if name.startswith(("model.0", "model.1.submodule.conv"))]


def test_a_new_head(cli: Callable[..., Any], tiny_recipe: Recipe, recipe_file: Path, tiny_data: Path, tmp_path: Path):
    three = replace(tiny_recipe, labels={"1": "a", "2": "b"})
    save_checkpoint(tmp_path / "three.pt", {"recipe": three.to_dict(), "model": network_for(three).state_dict()})
    arguments = ["finetune", "recipe.json", "--from", "three.pt", "--manifest", tiny_data, *SLOW_RATE, "--quiet"]
    refused = cli(*arguments)
    assert refused.code == 2
    assert "another number of classes is possible with --new-head" in refused.message
    assert "of another shape: model.2.0.conv.weight: file [12, 3, 3, 3, 3], network [12, 2, 3, 3, 3]" in refused.message
    assert not (tmp_path / "runs").exists()
    result = cli(*arguments, "--new-head")
    assert (result.code, result.err) == (0, "")
    assert "started anew" in result.out
    report = json.loads((tmp_path / "runs/spleen-small-finetuned-001/start.json").read_text())
    assert all(line.startswith("model.2.") for line in report["new"])


def test_killed_and_resumed_ends_like_uninterrupted(
    cli: Callable[..., Any], recipe_file: Path, tiny_data: Path, tiny_model: Path, tmp_path: Path
):
    arguments = ["finetune", "recipe.json", "--from", str(tiny_model), "--manifest", str(tiny_data), "--device", "cpu"]
    assert cli(*arguments, "--output", "whole").code == 0
    command = [sys.executable, "-m", "ctseg", *arguments, "--output", "killed"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        while not (tmp_path / "killed" / "recipe.json").exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=120)
    assert (tmp_path / "killed" / "start.json").is_file()
    result = cli("finetune", "recipe.json", "--resume", "--output", "killed", "--device", "cpu")
    assert result.code == 0
    whole, resumed = weights_of(tmp_path / "whole/last.pt"), weights_of(tmp_path / "killed/last.pt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_resume_goes_on_only_with_a_finetuned_run(
    cli: Callable[..., Any], recipe_file: Path, tiny_data: Path, tmp_path: Path
):
    cli("train", "recipe.json", "--manifest", tiny_data, "--set", "training.epochs=1", "--quiet")
    result = cli("finetune", "recipe.json", "--resume", "--set", "training.epochs=1")
    assert result.code == 2
    assert "no run of recipe 'spleen:small' by `ctseg finetune` in 'runs/'" in result.message
    result = cli(
        "finetune", "recipe.json", "--resume", "--set", "training.epochs=1", "--output", "runs/spleen-small-001"
    )
    assert result.code == 2
    assert "run 'runs/spleen-small-001' was not started by finetune" in result.message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--from: missing; name a run, a checkpoint, an MMAR, a bundle or a .pt file, or use --resume"),
        (["--from", ""], "--from: missing"),
        (["--from", "a" * 5000], "File name too long; name another path or ask for access to it"),
        (["--from", "none.pt"], "--from: model 'none.pt': no such file or folder"),
        (
            ["--from", "empty"],
            "--from: model 'empty': not a run folder, it has no recipe.json; nor has it models/model.",
        ),
        (["--from", "model.onnx"], "--from model.onnx: an exported model cannot be trained"),
        (["--from", "list.json"], "recipe 'list.json': cannot be read as JSON"),
        (["--from", "bad.pt", "--set", "training.freese=1"], "training.freese: unknown key; did you mean 'freeze'?"),
        (["--from", "bad.pt"], "weights 'bad.pt': "),
        (["--resume", "--from", "bad.pt"], "--resume: goes on with the weights of the run, so --from and --new-head"),
        (["--from", "MODEL", "--freeze", "encoder"], "training.freeze (--freeze): no parameter starts with 'encoder'"),
        (["--from", "MODEL", "--freeze", "model"], "training.freeze (--freeze): nothing is left to train"),
        (["--from", "MODEL", "--new-head"], "--new-head: every tensor of"),
    ],
)
def test_refusals_leave_nothing(
    cli: Callable[..., Any],
    recipe_file: Path,
    tiny_data: Path,
    tiny_model: Path,
    tmp_path: Path,
    arguments: list[str],
    message: str,
):
    (tmp_path / "empty").mkdir()
    for name in ("bad.pt", "model.onnx", "list.json"):
        (tmp_path / name).write_text("nothing")
    before = sorted(tmp_path.rglob("*"))
    given = [str(tiny_model) if a == "MODEL" else a for a in arguments]
    source = [] if "--resume" in arguments else ["--manifest", tiny_data]
    result = cli("finetune", "recipe.json", *given, *source)
    assert (result.code, result.out) == (2, "")
    assert message in result.message
    assert sorted(tmp_path.rglob("*")) == before
