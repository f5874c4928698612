"""A bundle runs with MONAI alone and gives ctseg's masks; ctseg reads it back."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

from ctseg.engine import export as engine
from ctseg.engine.bundle import network_definition, write_bundle
from ctseg.engine.export import export_bundle
from ctseg.engine.model import load_model, load_network
from ctseg.engine.predict import predict
from ctseg.engine.runtime import Runtime
from ctseg.engine.weights import start_weights
from ctseg.errors import CtsegError, ModelError, OutputError
from ctseg.foreign.importing import Request, import_bundle
from ctseg.io.images import read_image, read_labels
from ctseg.networks import network_for
from ctseg.recipe import Recipe, load_recipe, recipe_from_dict
from ctseg.sources.phantom import centered_grid, make_phantom
from ctseg.specs import NetworkSpec

NETWORKS = {
    "unet": {"kind": "unet", "channels": [4, 8], "strides": [2], "num_res_units": 2, "norm": "batch"},
    "plain_unet": {"kind": "unet", "channels": [4, 8, 8], "strides": [2, 2], "num_res_units": 0, "norm": "instance"},
    "segresnet": {"kind": "segresnet", "init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1], "dropout_prob": 0.1},
    "ahnet": {"kind": "ahnet", "layers": [1, 1, 1, 1], "psp_block_num": 1, "upsample_mode": "trilinear"},
}


def with_network(recipe: Recipe, kind: str, classes: int = 2) -> Recipe:
    plain = recipe.to_dict()
    plain["sampling"]["patch_size"] = plain["inference"]["window_size"] = [32, 32, 32]
    labels = {str(n): f"organ {n}" for n in range(1, classes)}
    return recipe_from_dict({**plain, "network": NETWORKS[kind], "labels": labels}, "test")


MONAI_ALONE = """
import sys, torch
torch.set_num_threads(1)
sys.modules["ctseg"] = None  # an attempt to import it would fail
from monai.bundle import run
bundle, images, masks = sys.argv[1:]
run(config_file=bundle + "/configs/inference.json", bundle_root=bundle, dataset_dir=images, output_dir=masks)
"""
"""What `python -m monai.bundle run --config_file configs/inference.json ...` does, which wants a parser of its own."""


def run_with_monai(bundle: Path, images: Path, masks: Path) -> None:
    arguments = [sys.executable, "-W", "ignore", "-c", MONAI_ALONE, str(bundle), str(images), str(masks)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("kind", "classes"), [("unet", 2), ("plain_unet", 4), ("segresnet", 2), ("ahnet", 2)])
def test_monai_gives_the_same_masks(
    tiny_recipe: Recipe,
    cpu: Runtime,
    write_ct: Callable[..., None],
    made_checkpoint,
    tmp_path: Path,
    kind: str,
    classes: int,
) -> None:
    checkpoint = made_checkpoint(with_network(tiny_recipe, kind, classes), tmp_path / "best.pt")
    report = export_bundle(checkpoint, tmp_path / "bundle", cpu)
    assert report.largest_difference == 0.0
    (tmp_path / "images").mkdir()
    for index, codes in enumerate(("SRA", "LPS")):  # odd sizes, smaller and larger than the window
        grid = centered_grid((47, 41, 31), (5.0, 6.0, 7.0), codes)
        write_ct(tmp_path / "images" / f"ct_{index}.nii.gz", make_phantom(99, index, grid=grid).image)
    run_with_monai(tmp_path / "bundle", tmp_path / "images", tmp_path / "masks")
    model = load_model(checkpoint, cpu)
    for index in range(2):
        image = read_image(tmp_path / "images" / f"ct_{index}.nii.gz")
        monai = read_labels(tmp_path / "masks" / f"ct_{index}_seg.nii.gz")
        ours = predict(model, image)
        np.testing.assert_allclose(monai.geometry.affine, image.geometry.affine, atol=1e-5)
        assert len(np.unique(ours)) > 1, "a mask of one value would agree with anything"
        differing = int((ours != monai.array).sum())
        print(f"{kind} {index}: {differing} of {ours.size} voxels differ")
        assert differing <= 1e-4 * ours.size, "more than ties"


@pytest.mark.parametrize("kind", NETWORKS)
def test_monais_parser_builds_the_recipes_network(tiny_recipe: Recipe, kind: str) -> None:
    recipe = with_network(tiny_recipe, kind)
    torch.manual_seed(0)
    network = ConfigParser({"net": network_definition(recipe.network, 2)}).get_parsed_content("net")
    torch.manual_seed(0)
    wanted = network_for(recipe)
    assert type(network) is type(wanted)
    network.load_state_dict(wanted.state_dict())
    window = torch.rand(1, 1, 32, 32, 32)
    with torch.inference_mode():
        assert torch.equal(network.eval()(window), wanted.eval()(window))


@pytest.mark.parametrize("name", ["spleen", "spleen:small"])
def test_the_recipe_comes_back_exactly(cpu: Runtime, tmp_path: Path, name: str) -> None:
    recipe = load_recipe(name)
    write_bundle(tmp_path / "bundle", recipe, network_for(recipe))
    request = Request(folder=tmp_path / "bundle", output=tmp_path / "new", overrides=[], manifest=None, data=None)
    imported = import_bundle(request)
    assert replace(imported.recipe, data=recipe.data) == recipe
    assert imported.left == ()
    assert imported.weights == tmp_path / "bundle" / "models" / "model.pt"


def test_training_goes_on_from_its_weights(tiny_checkpoint: Path, tiny_recipe: Recipe, cpu: Runtime, tmp_path: Path):
    export_bundle(tiny_checkpoint, tmp_path / "bundle", cpu)
    state, report = start_weights(tiny_recipe, tmp_path / "bundle" / "models" / "model.pt", new_head=False)
    _, network = load_network(tiny_checkpoint)
    assert report.kind == "state dict"
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_what_the_folder_holds(tiny_checkpoint: Path, tiny_recipe: Recipe, cpu: Runtime, tmp_path: Path) -> None:
    bundle = tmp_path / "new" / "bundle"
    report = export_bundle(tiny_checkpoint, bundle, cpu)
    assert (report.path, report.format, report.opset) == (bundle, "bundle", None)
    assert report.input_shape == (1, 1, *tiny_recipe.inference.window_size)
    files = {str(path.relative_to(bundle)) for path in bundle.rglob("*") if path.is_file()}
    assert files == {
        "LICENSE",
        "configs/ctseg_recipe.json",
        "configs/inference.json",
        "configs/metadata.json",
        "docs/README.md",
        "models/model.pt",
    }
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert metadata["network_data_format"]["outputs"]["pred"]["channel_def"] == {"0": "background", "1": "spleen"}
    content = torch.load(bundle / "models" / "model.pt", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in content.values())
    assert list((tmp_path / "new").iterdir()) == [bundle]


def test_names_of_a_recipe_never_become_code(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """MONAI's parser evaluates texts that begin with $, and follows those that begin with @ or %."""
    evil = replace(tiny_recipe, title="$__import__('os').getcwd()", source="@run", labels={"1": "$1 + 1"})
    write_bundle(tmp_path / "bundle", evil, network_for(evil))
    metadata = json.loads((tmp_path / "bundle" / "configs" / "metadata.json").read_text())
    channels = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    texts = [metadata["description"], metadata["data_source"], channels["1"]]
    assert texts == ["__import__('os').getcwd()", "run", "1 + 1"]


def test_a_bundle_out_of_tolerance_is_not_kept(
    tiny_checkpoint: Path, cpu: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "TOLERANCE", -1.0)
    with pytest.raises(ModelError, match=r"export to bundle: differs from the eager model .*; the file was not kept"):
        export_bundle(tiny_checkpoint, tmp_path / "bundle", cpu)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_definition_is_found(
    tiny_checkpoint: Path, cpu: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(spec: NetworkSpec, classes: int) -> dict[str, Any]:
        return {**network_definition(spec, classes), "norm": "instance"}

    monkeypatch.setattr("ctseg.engine.bundle.network_definition", other)
    with pytest.raises(ModelError, match="its weights do not fit its network_def"):
        export_bundle(tiny_checkpoint, tmp_path / "bundle", cpu)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_never_replaced(tiny_checkpoint: Path, cpu: Runtime, tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "precious").write_text("")
    with pytest.raises(CtsegError, match="exists; a bundle is a folder of its own"):
        export_bundle(tiny_checkpoint, tmp_path / "bundle", cpu)
    assert [path.name for path in tmp_path.rglob("*")] == ["bundle", "precious"]


def test_a_full_disk_leaves_nothing(tiny_checkpoint: Path, mount: Callable[[str], Path], cpu: Runtime) -> None:
    folder = mount("size=16k")
    with pytest.raises(OutputError, match="No space left on device"):
        export_bundle(tiny_checkpoint, folder / "bundle", cpu)
    assert not list(folder.iterdir())
