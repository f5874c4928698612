"""`ctseg prepare-dataset`: which recipe and which data it chooses, and that it says so."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctseg.manifest import Manifest
from ctseg.recipe import Recipe
from ctseg.workspace import start_run


def test_without_a_recipe_the_demo_data_are_made(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CTSEG_DATA", str(tmp_path / "data"))
    monkeypatch.setattr("ctseg.sources.catalogue.DEMO_COUNTS", {"training": 1, "testing": 1})
    result = cli("prepare-dataset")
    assert result.code == 0
    assert result.err.splitlines()[0] == (
        "ctseg: no recipe named and no run here: making the built-in demo data set and preparing it for spleen:small"
    )
    assert "making CT phantoms 2/2" in result.err
    first, second = result.out.splitlines()
    assert first.startswith("data set phantom: 1 cases prepared, 0 were ready, ")
    assert second == "train on it with: ctseg train spleen:small"
    assert len(list((tmp_path / "data" / "phantom" / "imagesTr").iterdir())) == 2
    again = cli("prepare-dataset", "--quiet")
    assert again.err == ""
    assert again.out.startswith("data set phantom: 0 cases prepared, 1 were ready, ")


def test_in_a_folder_with_a_run_its_recipe_and_its_cases(
    cli: Callable[..., Any], tmp_path: Path, tiny_recipe: Recipe, tiny_manifest: Manifest
):
    start_run(tmp_path / "runs" / "spleen-small-001", tiny_recipe, tiny_manifest)
    result = cli("prepare-dataset", "--json", "--prepared", "there")
    assert result.code == 0
    assert result.err.startswith(
        "ctseg: no recipe named: preparing for spleen:small, the recipe of the newest run here"
    )
    answer = json.loads(result.out)
    assert (answer["data"], answer["recipe"]) == ("tiny", "spleen:small")
    assert answer["made"] == [f"case_{n}" for n in range(4)], "training and validation, not testing"
    assert answer["ready"] == []
    files = [path for path in (tmp_path / answer["folder"]).rglob("*") if path.is_file()]
    assert answer["num_bytes"] == sum(path.stat().st_size for path in files)
    assert answer["folder"].startswith("there/")


def test_named_recipe(cli: Callable[..., Any], tiny_data: Path):
    result = cli("prepare-dataset", "spleen", "--set", "preprocess.spacing_mm=[9,9,9]", "--manifest", tiny_data)
    assert result.code == 0
    assert result.err.startswith("ctseg: preparing for recipe spleen\n")
    assert result.out.startswith("data set tiny: 4 cases prepared")
