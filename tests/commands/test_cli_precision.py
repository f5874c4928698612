"""`--precision bfloat16` and `--fast` reach the network that they should; what cannot be settled is told."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from ctseg.engine import predict as predicting
from ctseg.engine.checkpoint import save_checkpoint
from ctseg.engine.model import Model, load_model
from ctseg.manifest import Manifest
from ctseg.networks import network_for
from ctseg.recipe import load_recipe
from marks import needs_openvino

TOLD = "rounding has turned 5% of all"


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> list[Model]:
    """The models whose rounding was to be settled, each of which tells that it could not be; on any CPU."""
    models: list[Model] = []

    def settle(_grid: Any, _done: Any, model: Model, _: Any, note: Callable[[str], None], *, fast: bool) -> None:
        if model.exact is not None:
            models.append(model)
            note(TOLD)

    monkeypatch.setattr(predicting, "_settle_rounding", settle)
    monkeypatch.setattr("ctseg.engine.runtime.cpu_has_bfloat16", lambda: True)
    return models


@pytest.fixture
def ct(tmp_path: Path) -> Path:
    path = tmp_path / "ct.nii.gz"
    voxels = np.random.default_rng(0).integers(-200, 300, (20, 20, 20), dtype=np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-5.0, -5.0, 5.0, 1.0])), path)
    return path


INFER = ("infer", "ct.nii.gz", "--output", "masks", "--device", "cpu", "--backend", "torch")


def test_infer_has_the_exact_network_beside_the_rounded_one(
    cli: Callable[..., Any], ct: Path, tiny_model: Path, settled: list[Model]
) -> None:
    result = cli(*INFER, "--model", tiny_model, "--precision", "bfloat16")
    assert result.code == 0
    assert [model.runtime.precision for model in settled] == ["bfloat16"]
    assert result.err.count(f"ct.nii.gz: {TOLD}\n") == 1


def test_what_could_not_be_settled_is_told_to_scripts_too(
    cli: Callable[..., Any], ct: Path, tiny_model: Path, settled: list[Model]
) -> None:
    result = cli(*INFER, "--model", tiny_model, "--precision", "bfloat16", "--json", "--quiet")
    assert json.loads(result.out)[0]["notes"] == [TOLD]


@pytest.mark.parametrize("options", [["--precision", "float32"], []])
def test_infer_in_float32_has_nothing_to_settle(
    cli: Callable[..., Any], ct: Path, tiny_model: Path, settled: list[Model], options: list[str]
) -> None:
    assert cli(*INFER, "--model", tiny_model, *options).code == 0
    assert settled == []


def test_fast_neither_settles_a_unet_nor_compiles_its_exact_network(
    cli: Callable[..., Any], ct: Path, tiny_model: Path, settled: list[Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def load(*arguments: Any, exact: bool, **options: Any) -> Model:
        asked.append(exact)
        return load_model(*arguments, exact=exact, **options)

    monkeypatch.setattr("ctseg.engine.model.load_model", load)
    assert cli(*INFER, "--model", tiny_model, "--fast").code == 0
    assert (settled, asked) == ([], [False])


@pytest.fixture
def segresnet(tmp_path: Path) -> Path:
    """A checkpoint of another network than a UNet, with weights that were never trained."""
    recipe = load_recipe("bone_lesion:small")
    path = tmp_path / "segresnet.pt"
    save_checkpoint(path, {"recipe": recipe.to_dict(), "model": network_for(recipe).state_dict()})
    return path


@needs_openvino
def test_fast_settles_other_networks_than_a_unet(
    cli: Callable[..., Any], ct: Path, segresnet: Path, settled: list[Model]
) -> None:
    result = cli(*INFER[:-1], "openvino", "--model", segresnet, "--fast")
    assert result.code == 0, result.err
    assert [model.runtime.precision for model in settled] == ["bfloat16"]
    assert f"ct.nii.gz: {TOLD}\n" in result.err


def test_fast_leaves_other_networks_than_a_unet_in_float32_on_torch(
    cli: Callable[..., Any], ct: Path, segresnet: Path, settled: list[Model]
) -> None:
    result = cli(*INFER, "--model", segresnet, "--fast")
    assert result.code == 0, result.err
    assert settled == []
    assert "float32, torch, fast" in result.err


@needs_openvino
@pytest.mark.parametrize(
    ("options", "precisions"), [([], []), (["--precision", "bfloat16"], ["bfloat16"])], ids=["chosen", "asked for"]
)
def test_where_torch_is_the_fastest_fast_leaves_other_networks_in_float32_unless_less_is_asked_for(
    cli: Callable[..., Any],
    ct: Path,
    segresnet: Path,
    settled: list[Model],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    precisions: list[str],
) -> None:
    monkeypatch.setattr("ctseg.engine.compiled._fastest", lambda *_: "torch")
    result = cli(*INFER[:-1], "auto", "--model", segresnet, "--fast", *options)
    assert result.code == 0, result.err
    assert [model.runtime.precision for model in settled] == precisions
    assert f"{'bfloat16' if options else 'float32'}, torch, fast" in result.err


@pytest.mark.parametrize(("options", "number"), [(["--precision", "bfloat16"], 1), (["--fast"], 0)])
def test_validate_does_as_infer(
    cli: Callable[..., Any],
    tiny_model: Path,
    tiny_data: Path,
    tiny_manifest: Manifest,
    settled: list[Model],
    options: list[str],
    number: int,
) -> None:
    result = cli(
        "validate", "--model", tiny_model, "--manifest", tiny_data, "--output", "scores", "--device", "cpu", *options
    )
    assert result.code == 0, result.err
    assert len(settled) == number
    assert result.err.count(f": {TOLD}\n") == number


def test_serve_loads_the_exact_network(
    cli: Callable[..., Any], tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def load(*_: Any, exact: bool) -> Model:
        asked.append(exact)
        raise KeyboardInterrupt

    monkeypatch.setattr("ctseg.engine.model.load_model", load)
    for name in ("open_socket", "start_log"):
        monkeypatch.setattr(f"ctseg.server.run.{name}", lambda *_: None)
    (tmp_path / "studies").mkdir()
    cli("serve", "--studies", "studies", "--model", tiny_model, "--port", "0", "--device", "cpu")
    assert asked == [True]
