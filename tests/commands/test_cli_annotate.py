"""`ctseg annotate`, `ctseg validate --clicks` and what other commands say to an annotation model."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctseg.commands.annotate import parse_clicks
from ctseg.engine.checkpoint import save_checkpoint
from ctseg.errors import ClickError
from ctseg.io.images import read_labels
from ctseg.manifest import read_manifest
from ctseg.networks import network_for
from ctseg.recipe import Recipe
from ctseg.workspace import start_run


@pytest.fixture(scope="session")
def click_model(tmp_path_factory: pytest.TempPathFactory, clicks_recipe: Recipe, tiny_organs: Path) -> Path:
    """A run of the tiny deepgrow recipe with random weights."""
    run = tmp_path_factory.mktemp("clicks") / "run"
    torch.manual_seed(0)
    start_run(run, clicks_recipe, read_manifest(tiny_organs))
    save_checkpoint(
        run / "best.pt", {"recipe": clicks_recipe.to_dict(), "model": network_for(clicks_recipe).state_dict()}
    )
    return run / "best.pt"


@pytest.fixture
def image(tiny_organs: Path) -> Path:
    return read_manifest(tiny_organs).split("testing")[0].image


def test_a_mask_on_the_images_grid(cli: Callable[..., Any], click_model: Path, image: Path, tmp_path: Path) -> None:
    common = ("annotate", image, "--model", click_model, "--quiet", "--json")
    result = cli(*common, "--click", "24,20,15", "--click", "3,4,5-", "--output", "out/mask.nii.gz")
    assert (result.code, result.err) == (0, "")
    answer = json.loads(result.out)
    assert answer["clicks"] == [{"point": [24, 20, 15], "positive": True}, {"point": [3, 4, 5], "positive": False}]
    mask = read_labels(tmp_path / "out" / "mask.nii.gz")
    assert mask.array.shape == (48, 40, 30)
    assert answer["volume_ml"] == pytest.approx(int(mask.array.sum()) * 0.125)
    from ctseg.io.images import read_image

    geometry = read_image(image).geometry
    assert np.allclose(mask.geometry.affine, geometry.affine)
    x, y, z = (geometry.affine @ [24, 20, 15, 1])[:3]
    a, b, c = (geometry.affine @ [3, 4, 5, 1])[:3]
    same = cli(
        *common, f"--click={x},{y},{z}+", f"--click={a},{b},{c}-", "--coordinates", "lps", "--output", "lps.nii.gz"
    )
    assert same.code == 0
    assert np.array_equal(read_labels(tmp_path / "lps.nii.gz").array, mask.array)
    ras = cli(
        *common, f"--click={-x},{-y},{z}", f"--click={-a},{-b},{c}-", "--coordinates", "ras", "--output", "r.nii.gz"
    )
    assert ras.code == 0
    assert np.array_equal(read_labels(tmp_path / "r.nii.gz").array, mask.array)


def test_the_largest_component(cli: Callable[..., Any], click_model: Path, image: Path, tmp_path: Path) -> None:
    import cc3d

    common = ("annotate", image, "--model", click_model, "--click", "24,20,15", "--quiet")
    assert cli(*common, "--output", "all.nii.gz").code == 0
    assert cli(*common, "--output", "one.nii.gz", "--largest-component").code == 0
    whole, one = (read_labels(tmp_path / f"{name}.nii.gz").array for name in ("all", "one"))
    assert cc3d.connected_components(one, return_N=True)[1] == 1
    assert one.sum() <= whole.sum()
    assert not (one > whole).any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--click", "48,0,0", "--output", "m.nii.gz"], "click (48, 0, 0): outside the image, which has 48 x 40 x 30"),
        (["--click", "4,5", "--output", "m.nii.gz"], "--click 4,5: expected x,y,z with + or - after it, such as"),
        (["--click", "4,5,6-", "--output", "m.nii.gz"], "--click: none is positive"),
        (["--click", "4,5,6", "--output", "m.png"], "--output m.png: a mask's name must end in .nii.gz"),
        (["--click", "4,5,6", "--output", "there.nii.gz"], "--output there.nii.gz: exists; name another file"),
    ],
)
def test_wrong_use(
    cli: Callable[..., Any], click_model: Path, image: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "there.nii.gz").write_bytes(b"")
    result = cli("annotate", image, "--model", click_model, *arguments)
    assert result.code == 2
    assert result.message.startswith(message)
    assert not (tmp_path / "m.nii.gz").exists()


def test_the_image_is_not_overwritten(cli: Callable[..., Any], click_model: Path, image: Path, tmp_path: Path) -> None:
    shutil.copy(image, tmp_path / "ct.nii.gz")
    arguments = ("--click", "4,5,6", "--output", "ct.nii.gz", "--overwrite", "--model", click_model)
    result = cli("annotate", "ct.nii.gz", *arguments)
    assert (result.code, result.message) == (2, "--output ct.nii.gz: is the image itself; name another file")


def test_clicks_as_they_are_typed() -> None:
    assert parse_clicks(["1,2,3", " 1.5, -2, +3 -", "4,5,6+"]) == [
        ((1.0, 2.0, 3.0), True),
        ((1.5, -2.0, 3.0), False),
        ((4.0, 5.0, 6.0), True),
    ]
    for wrong in ("", "1,2", "1,2,3,4", "a,b,c", "1,2,nan", "1e3,2,3", "1,2,3*"):
        with pytest.raises(ClickError, match="expected x,y,z"):
            parse_clicks([wrong])
    with pytest.raises(ClickError, match="at most 1000 clicks, got 1001"):
        parse_clicks(["1,2,3"] * 1001)


def test_models_that_need_no_clicks(cli: Callable[..., Any], tiny_model: Path, image: Path) -> None:
    result = cli("annotate", image, "--model", tiny_model, "--click", "4,5,6", "--output", "m.nii.gz")
    assert result.code == 2
    assert "segments without clicks; use `ctseg infer`" in result.message
    result = cli("validate", "--model", tiny_model, "--clicks", "3", "--output", "t")
    assert (result.code, result.message) == (2, "--clicks: recipe spleen:small segments without clicks; leave it out")


@pytest.mark.parametrize("file_format", [("torchscript", "m.ts"), ("onnx", "m.onnx")])
def test_an_exported_model_annotates(
    cli: Callable[..., Any], click_model: Path, image: Path, tmp_path: Path, file_format: tuple[str, str]
) -> None:
    kind, name = file_format
    assert cli("export", "--model", click_model, "--format", kind, "--output", name).code == 0
    common = ("annotate", image, "--click", "24,20,15", "--click", "3,4,5-", "--quiet")
    assert cli(*common, "--model", click_model, "--output", "own.nii.gz").code == 0
    assert cli(*common, "--model", name, "--output", "exported.nii.gz").code == 0
    own, exported = (read_labels(tmp_path / f"{one}.nii.gz").array for one in ("own", "exported"))
    assert (own == exported).mean() >= 0.9999
    assert exported.any()


def test_commands_that_know_no_clicks(cli: Callable[..., Any], click_model: Path, image: Path, tmp_path: Path) -> None:
    infer = cli("infer", image, "--model", click_model, "--output", "masks")
    assert (infer.code, "use `ctseg annotate`" in infer.message) == (2, True)
    assert not (tmp_path / "masks").exists()
    (tmp_path / "there").mkdir()
    assert cli("infer", image, "--model", click_model, "--output", "there/a/b").code == 2
    assert list((tmp_path / "there").iterdir()) == []
    export = cli("export", "--model", click_model, "--format", "bundle", "--output", "b")
    assert (export.code, "segments by clicks" in export.message) == (2, True)
    overlays = cli("validate", "--model", click_model, "--overlays", "--output", "t")
    assert (overlays.code, overlays.message[:11]) == (2, "--overlays:")


def test_validate_by_clicks(cli: Callable[..., Any], click_model: Path, tmp_path: Path) -> None:
    result = cli("validate", "--model", click_model, "--clicks", "2", "--output", "table", "--seed", "4")
    assert result.code == 0, result.err
    assert "organ             cases  dice@1  dice@2  clicks to 0.85" in result.out
    assert "mean over organs" in result.out
    rows = list(csv.DictReader((tmp_path / "table" / "clicks.csv").read_text().splitlines()))
    assert [row["organ"] for row in rows] == ["spleen", "right kidney", "left kidney", "liver", "stomach"]
    assert json.loads((tmp_path / "table" / "summary.json").read_text())["seed"] == 4
    assert (tmp_path / "table" / "clicks.png").is_file()


def test_without_a_number_the_recipes_clicks_are_made(
    cli: Callable[..., Any], click_model: Path, tmp_path: Path
) -> None:
    answer = json.loads(cli("validate", "--model", click_model, "--output", "t", "--json", "--quiet").out)
    assert answer["num_clicks"] == 3
    assert {len(score["dice"]) for score in answer["scores"]} == {3}


def test_prepare_dataset_counts_organs_and_takes_a_limit(
    cli: Callable[..., Any], tiny_organs: Path, clicks_recipe: Recipe, tmp_path: Path
) -> None:
    (tmp_path / "r.json").write_text(json.dumps(clicks_recipe.to_dict()))
    result = cli("prepare-dataset", "r.json", "--manifest", tiny_organs, "--limit", "1", "--quiet", "--json")
    assert result.code == 0, result.err
    answer = json.loads(result.out)
    assert answer["splits"] == {"training": 1, "validation": 1, "testing": 1}
    assert [(o["value"], o["organ"], o["samples"]) for o in answer["organs"]][:2] == [
        (1, "spleen", 2),
        (2, "right kidney", 2),
    ]
    listed = json.loads((tmp_path / answer["manifest"]).read_text())
    assert [len(listed[split]) for split in ("training", "validation", "testing")] == [1, 1, 1]
    text = cli("prepare-dataset", "r.json", "--manifest", tiny_organs).out
    assert "value  organ         samples  voxels" in text
    assert "4 cases prepared, 2 were ready" in text or "2 cases prepared, 2 were ready" in text
