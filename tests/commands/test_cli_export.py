"""`ctseg export`: the exported file gives `infer` the same masks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctseg.io.images import read_labels
from ctseg.manifest import Manifest


@pytest.mark.parametrize(("file_format", "name"), [("torchscript", "model.ts"), ("onnx", "model.onnx")])
def test_exported_model_gives_the_same_mask(
    cli: Callable[..., Any], tiny_model: Path, tiny_manifest: Manifest, tmp_path: Path, file_format: str, name: str
):
    shutil.copytree(tiny_model.parent, tmp_path / "runs" / "r")
    result = cli("export", "--format", file_format, "--json")
    assert (result.code, result.err) == (0, "")
    report = json.loads(result.out)
    assert (report["path"], report["format"]) == (f"runs/r/{name}", file_format)
    assert report["input_shape"] == [1, 1, 16, 16, 16]
    assert report["largest_difference"] <= 1e-3 * report["largest_logit"]
    image = tiny_manifest.split("test")[0].image
    for model in ("best.pt", name):
        cli("infer", image, "--output", f"masks-{model}", "--model", f"runs/r/{model}")
    eager, exported = (
        read_labels(tmp_path / f"masks-{model}" / "case_5_seg.nii.gz").array for model in ("best.pt", name)
    )
    assert np.mean(eager == exported) >= 0.9999
    assert len(np.unique(eager)) == 2, "a mask of one value would agree with anything"


def test_a_bundle_is_a_folder_beside_the_model(cli: Callable[..., Any], tiny_model: Path, tmp_path: Path):
    shutil.copytree(tiny_model.parent, tmp_path / "runs" / "r")
    result = cli("export", "--format", "bundle", "--json")
    assert (result.code, result.err) == (0, "")
    report = json.loads(result.out)
    assert (report["path"], report["format"], report["largest_difference"]) == ("runs/r/bundle", "bundle", 0.0)
    assert (tmp_path / "runs/r/bundle/configs/inference.json").is_file()
    again = cli("export", "--format", "bundle")
    assert again.code == 2
    assert again.message.startswith("--output runs/r/bundle: exists; a bundle is a folder of its own")


def test_report_for_people_and_a_folder_of_ones_own(cli: Callable[..., Any], tiny_model: Path, tmp_path: Path):
    result = cli("export", "--model", tiny_model, "--output", "new/spleen.ts")
    assert result.code == 0
    assert result.out.splitlines()[0].split(maxsplit=1) == ["wrote", "new/spleen.ts (torchscript)"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["spleen.ts"]
