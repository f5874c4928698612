"""Run folders: numbering, the newest, and what a `--model` means."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ctseg.errors import CtsegError, ModelError, OutputError, RecipeError
from ctseg.manifest import Manifest, read_manifest
from ctseg.recipe import Recipe, load_recipe, recipe_path
from ctseg.workspace import (
    DATA_FILE,
    RECIPE_FILE,
    manifest_to_dict,
    new_run,
    newest_run,
    reserve_run,
    resolve_model,
    run_of,
    run_recipe,
    start_run,
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make_run(name: str, manifest: Manifest, recipe: str = "spleen", age_seconds: int = 0, **checkpoints: int) -> Path:
    """A run whose recipe.json is `age_seconds` old; `best=5` makes a best.pt that is 5 s old."""
    run = Path("runs") / name
    start_run(run, load_recipe(recipe), manifest)
    for file, age in {RECIPE_FILE: age_seconds, **{f"{k}.pt": v for k, v in checkpoints.items()}}.items():
        (run / file).touch()
        os.utime(run / file, (1_700_000_000 - age, 1_700_000_000 - age))
    return run


def test_new_runs_are_numbered_per_recipe(tiny_manifest: Manifest):
    spleen, small = load_recipe("spleen"), load_recipe("spleen:small")
    assert new_run(spleen) == Path("runs/spleen-001")
    make_run("spleen-001", tiny_manifest)
    Path("runs/spleen-002").touch()
    assert new_run(spleen) == Path("runs/spleen-003")
    assert new_run(small) == Path("runs/spleen-small-001")


def test_started_run_gives_back_recipe_and_cases(tiny_recipe: Recipe, tiny_manifest: Manifest):
    start_run(Path("deep/run"), tiny_recipe, tiny_manifest)
    assert run_recipe(Path("deep/run")) == tiny_recipe
    again = read_manifest(Path("deep/run") / DATA_FILE)
    assert again == tiny_manifest
    with pytest.raises(CtsegError, match="'deep/run' already holds a run; continue it with --resume or choose"):
        start_run(Path("deep/run"), load_recipe("spleen"), tiny_manifest)
    assert run_recipe(Path("deep/run")) == tiny_recipe


def test_start_run_where_nothing_can_be_locked(
    tiny_recipe: Recipe, tiny_manifest: Manifest, monkeypatch: pytest.MonkeyPatch
):
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("ctseg.workspace.fcntl.flock", no_locks)
    with pytest.raises(OutputError, match=r"cannot write 'runs/x': No locks available; .* another output folder"):
        start_run(Path("runs/x"), tiny_recipe, tiny_manifest)
    assert not (Path("runs/x") / RECIPE_FILE).exists()


def test_start_run_where_a_file_is(tiny_recipe: Recipe, tiny_manifest: Manifest):
    Path("runs").touch()
    with pytest.raises(OutputError):
        start_run(Path("runs/x"), tiny_recipe, tiny_manifest)


def test_cases_of_a_run_are_found_from_any_folder(here: Path, monkeypatch: pytest.MonkeyPatch):
    Path("list.json").write_text('{"training": [{"image": "a.nii", "label": "b.nii"}], "test": ["c.nii"]}')
    data = manifest_to_dict(read_manifest(Path("list.json")))
    assert data["training"] == [{"image": str(here / "a.nii"), "label": str(here / "b.nii")}]
    assert data["test"] == [{"image": str(here / "c.nii")}]


def test_wrong_run_folders(tiny_manifest: Manifest):
    with pytest.raises(CtsegError, match=r"'nowhere' is not a run folder: it has no recipe\.json"):
        run_recipe(Path("nowhere"))
    run = make_run("spleen-001", tiny_manifest)
    (run / RECIPE_FILE).write_text("{")
    with pytest.raises(RecipeError, match=r"recipe\.json': cannot be read"):
        run_recipe(run)
    (run / RECIPE_FILE).write_text('{"name": "x"}')
    with pytest.raises(RecipeError, match="recipe of run 'runs/spleen-001': 13 problems"):
        run_recipe(run)


def test_newest_run_is_the_one_written_to_last(tiny_manifest: Manifest):
    assert newest_run() is None
    old = make_run("spleen-001", tiny_manifest, age_seconds=100, last=10)
    small = make_run("mine", tiny_manifest, "spleen:small", age_seconds=50)
    assert newest_run() == old, "its checkpoint is younger than the other's start"
    assert newest_run("spleen") == old
    assert newest_run("spleen:small") == small
    assert newest_run("spleen:v1") is None
    os.utime(small / RECIPE_FILE, (1_700_000_000, 1_700_000_000))
    assert newest_run() == small


def test_newest_run_passes_over_what_is_no_run(tiny_manifest: Manifest):
    run = make_run("spleen-001", tiny_manifest, age_seconds=100)
    for name, text in (("broken", "{"), ("list", "[]")):
        Path("runs", name).mkdir()
        Path("runs", name, RECIPE_FILE).write_text(text)
    Path("runs/file").touch()
    assert newest_run("spleen") == run


def test_model_by_default_folder_file_and_recipe(tiny_manifest: Manifest):
    first = make_run("spleen-001", tiny_manifest, age_seconds=100, best=90, last=80)
    make_run("spleen-small-001", tiny_manifest, "spleen:small", age_seconds=50, last=40)
    assert resolve_model(None) == Path("runs/spleen-small-001/last.pt")
    assert resolve_model(str(first)) == first / "best.pt"
    assert resolve_model(str(first / "last.pt")) == first / "last.pt"
    assert resolve_model("spleen") == first / "best.pt"
    assert resolve_model("spleen:small") == Path("runs/spleen-small-001/last.pt")
    Path("exported.onnx").touch()
    assert resolve_model("exported.onnx") == Path("exported.onnx")
    assert run_of(first / "best.pt") == first
    assert run_of(Path("exported.onnx")) is None


def test_model_by_recipe_file(tiny_manifest: Manifest):
    Path("mine.toml").write_text(recipe_path("spleen").read_text())
    make_run("spleen-001", tiny_manifest, best=1)
    make_run("spleen-small-001", tiny_manifest, "spleen:small", best=1)
    assert resolve_model("mine.toml") == Path("runs/spleen-001/best.pt")
    assert resolve_model("mine.toml:small") == Path("runs/spleen-small-001/best.pt")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "no trained run in 'runs/' of this folder; train one with `ctseg train`, or name a --model"),
        ("spleen", "no trained run of recipe 'spleen' in 'runs/' of this folder"),
        ("spleen:small", "no trained run of recipe 'spleen:small'"),
        ("splen", "model 'splen': no file, run, downloaded model or recipe of that name here; known recipes: "),
        ("spleen:big", "recipe 'spleen:big': no variant 'big'"),
        ("mine.toml", "model 'mine.toml': no file, run, downloaded model or recipe of that name here"),
        ("best.pt", "model 'best.pt': no such file or folder"),
        ("runs/none", "model 'runs/none': no such file or folder"),
    ],
)
def test_model_that_is_not_there(name: str | None, message: str):
    with pytest.raises((ModelError, RecipeError)) as caught:
        resolve_model(name)
    assert str(caught.value).startswith(message)


def test_run_without_a_checkpoint_is_passed_over_unless_it_is_named(tiny_manifest: Manifest):
    trained = make_run("spleen-001", tiny_manifest, age_seconds=100, last=90)
    started = make_run("spleen-002", tiny_manifest)
    assert newest_run() == started
    assert resolve_model(None) == resolve_model("spleen") == trained / "last.pt"
    with pytest.raises(ModelError, match=r"run 'runs/spleen-002': no checkpoint yet \(best\.pt or last\.pt\)"):
        resolve_model(str(started))


@pytest.mark.parametrize("name", ["data.json", "start.pt", "best.pt", "last.pt"])
def test_a_run_does_not_begin_where_files_of_others_lie(tmp_path: Path, tiny_manifest: Manifest, name: str) -> None:
    """The data list that a training reads may lie there."""
    (tmp_path / name).write_text("mine")
    with pytest.raises(CtsegError, match=f"holds {name}, but no run of ctseg, which would replace them"):
        start_run(tmp_path, load_recipe("spleen:small"), tiny_manifest)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_runs_that_begin_at_the_same_moment_have_folders_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("spleen:small")
    with ThreadPoolExecutor(8) as pool:
        runs = list(pool.map(lambda _: reserve_run(recipe), range(32)))
    assert sorted(runs) == [Path("runs") / f"spleen-small-{n:03d}" for n in range(1, 33)]
