"""Exports carry their recipe, answer as the checkpoint does, and are not kept if they do not."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from ctseg.clicks import Click
from ctseg.engine import export as engine
from ctseg.engine.export import ExportReport, export
from ctseg.engine.model import Forward, Model, forward_of, load_model, load_network
from ctseg.engine.predict import predict
from ctseg.engine.runtime import Runtime
from ctseg.engine.session import segment_clicks
from ctseg.errors import CtsegError, ModelError, OutputError
from ctseg.recipe import Recipe, load_recipe
from ctseg.sources.phantom import centered_grid, make_phantom
from ctseg.volume import Volume
from ctseg.workspace import EXPORT_SUFFIXES

FORMATS = {"torchscript": ".ts", "onnx": ".onnx"}


@pytest.fixture(scope="module")
def phantom() -> Volume:
    """A CT that no training has seen, with odd sizes and flipped axes."""
    return make_phantom(99, 0, grid=centered_grid((47, 41, 31), (5.0, 5.0, 5.0), "SRA")).image


@pytest.fixture(scope="module", params=FORMATS)
def exported(request, tiny_checkpoint: Path, cpu: Runtime, tmp_path_factory) -> ExportReport:
    """The tiny model in each format."""
    output = tmp_path_factory.mktemp("export") / f"model{FORMATS[request.param]}"
    return export(tiny_checkpoint, request.param, output, cpu)


@pytest.fixture(scope="module")
def eager(tiny_checkpoint: Path, cpu: Runtime) -> Forward:
    """The checkpoint's network as PyTorch runs it."""
    return forward_of(load_network(tiny_checkpoint)[1], cpu)


def agreement(checkpoint: Path, file: Path, volume: Volume, runtime: Runtime) -> tuple[float, float]:
    """Share of voxels in which the masks of both agree, and of those that the checkpoint labels."""
    expected, got = (predict(load_model(path, runtime), volume) for path in (checkpoint, file))
    return float((expected == got).mean()), float(expected.mean())


def test_masks_are_those_of_the_checkpoint(
    exported: ExportReport, tiny_checkpoint: Path, phantom: Volume, cpu: Runtime
) -> None:
    agreed, labelled = agreement(tiny_checkpoint, exported.path, phantom, cpu)
    assert agreed >= 0.9999
    assert 0.001 < labelled < 0.5


def test_recipe_is_inside(exported: ExportReport, tiny_model: Model, cpu: Runtime) -> None:
    assert load_model(exported.path, cpu).recipe == tiny_model.recipe


def test_report_says_what_is_in_the_file(exported: ExportReport, tiny_recipe: Recipe) -> None:
    assert exported.path.is_file()
    assert exported.input_shape == (1, 1, *tiny_recipe.inference.window_size)
    assert exported.windows == 2
    if exported.format == "torchscript":
        assert exported.opset is None
        return
    model = onnx.load(str(exported.path))
    onnx.checker.check_model(model, full_check=True)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", exported.opset)]
    assert not any(tensor.external_data for tensor in model.graph.initializer)


def test_report_measures_what_the_files_differ_by(
    exported: ExportReport, tiny_model: Model, eager: Forward, cpu: Runtime
) -> None:
    """The same differences, found without its code, on the first window of the CT that it takes."""
    windows = engine._probe_windows(tiny_model.recipe, cpu)
    other = load_model(exported.path, cpu)
    logits = [(eager(w), other.forward(w)) for w in windows]
    assert exported.largest_logit == pytest.approx(max(float(a.abs().max()) for a, _ in logits), rel=1e-5)
    difference = max(float((a - b).abs().max()) for a, b in logits)
    assert exported.largest_difference == pytest.approx(difference, abs=1e-5)
    assert difference < 1e-3 * exported.largest_logit
    assert exported.label_agreement >= 0.9999


def test_any_number_of_windows_at_once(exported: ExportReport, eager: Forward, cpu: Runtime) -> None:
    model = load_model(exported.path, cpu)
    windows = torch.rand(3, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.forward(windows), eager(windows), rtol=1e-3, atol=1e-3)


def test_files_run_without_ctseg(exported: ExportReport, tiny_model: Model, eager: Forward) -> None:
    window = torch.rand(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1))
    expected = eager(window).numpy()
    if exported.format == "onnx":
        session = onnxruntime.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])
        assert [port.name for port in session.get_inputs()] == ["image"]
        (got,) = session.run(["logits"], {"image": window.numpy()})
        recipe = session.get_modelmeta().custom_metadata_map["ctseg_recipe.json"]
    else:
        extra = {"ctseg_recipe.json": ""}
        with pytest.warns(DeprecationWarning, match="torch.jit.load"):
            network = torch.jit.load(str(exported.path), _extra_files=extra)
        got, recipe = network(window).detach().numpy(), extra["ctseg_recipe.json"]
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
    assert json.loads(recipe) == tiny_model.recipe.to_dict()


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("reason", ["tolerance", "labels"])
def test_a_file_out_of_tolerance_is_not_kept(
    tiny_checkpoint: Path, cpu: Runtime, tmp_path: Path, monkeypatch, file_format: str, reason: str
) -> None:
    """An older file of the name stays as it was."""
    output = tmp_path / f"model{FORMATS[file_format]}"
    output.write_bytes(b"older")
    monkeypatch.setattr(engine, *(("TOLERANCE", -1.0) if reason == "tolerance" else ("MIN_AGREEMENT", 1.1)))
    with pytest.raises(ModelError, match=rf"export to {file_format}: differs .*; the file was not kept"):
        export(tiny_checkpoint, file_format, output, cpu)
    assert output.read_bytes() == b"older"
    assert list(tmp_path.iterdir()) == [output]


def test_a_wrong_export_is_found(tiny_checkpoint: Path, cpu: Runtime, tmp_path: Path, monkeypatch) -> None:
    """Batch normalisation in training mode is what exports get wrong most easily."""
    trace = torch.jit.trace
    monkeypatch.setattr(torch.jit, "trace", lambda network, example: trace(network.train(), example))
    monkeypatch.setattr(engine, "forward_of", lambda *_: forward_of(load_network(tiny_checkpoint)[1], cpu))
    with pytest.raises(ModelError, match="differs from the eager model"):
        export(tiny_checkpoint, "torchscript", tmp_path / "model.ts", cpu)


def test_wrong_names_are_refused_before_any_work(tmp_path: Path, cpu: Runtime) -> None:
    with pytest.raises(CtsegError, match="format 'tensorrt': expected one of torchscript, onnx"):
        export(tmp_path / "none.pt", "tensorrt", tmp_path / "model.trt", cpu)
    with pytest.raises(CtsegError, match=r"a onnx file must end in .onnx"):
        export(tmp_path / "none.pt", "onnx", tmp_path / "model.ts", cpu)
    with pytest.raises(ModelError, match="no such file"):
        export(tmp_path / "none.pt", "onnx", tmp_path / "model.onnx", cpu)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("name", ["spleen:small", pytest.param("spleen", marks=pytest.mark.slow)])
def test_shipped_recipes_export(
    made_checkpoint, tmp_path: Path, cpu: Runtime, phantom: Volume, name: str, file_format: str
) -> None:
    recipe = load_recipe(name)
    checkpoint, output = made_checkpoint(recipe, tmp_path / "best.pt"), tmp_path / f"model{FORMATS[file_format]}"
    report = export(checkpoint, file_format, output, cpu)
    assert report.input_shape == (1, 1, *recipe.inference.window_size)
    agreed, labelled = agreement(checkpoint, output, phantom, cpu)
    assert agreed >= 0.9999
    assert 0 < labelled < 1


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize(
    "name", ["deepgrow_3d:small", "deepgrow_2d:small", pytest.param("deepgrow_3d", marks=pytest.mark.slow)]
)
def test_click_models_export_and_answer_clicks_as_the_checkpoint_does(
    made_checkpoint, tmp_path: Path, cpu: Runtime, phantom: Volume, name: str, file_format: str
) -> None:
    recipe = load_recipe(name)
    checkpoint, output = made_checkpoint(recipe, tmp_path / "best.pt"), tmp_path / f"model{FORMATS[file_format]}"
    report = export(checkpoint, file_format, output, cpu)
    assert report.input_shape == (1, 3, *recipe.inference.window_size)
    assert report.largest_difference < 1e-3 * report.largest_logit
    own, other = load_model(checkpoint, cpu), load_model(output, cpu)
    assert other.recipe == recipe
    clicks = [
        Click((20, 20, 15), positive=True),
        Click((30, 11, 15), positive=False),
        Click((25, 30, 9), positive=True),
    ]
    masks = [[segment_clicks(model, phantom, clicks[:n]) for model in (own, other)] for n in (1, 2, 3)]
    for one, two in masks:
        assert (one == two).mean() >= 0.9999
    assert masks[0][1].any()
    assert (masks[0][1] != masks[2][1]).any()


def test_what_the_proof_of_a_click_model_runs_on_has_clicks(cpu: Runtime) -> None:
    recipe = load_recipe("deepgrow_3d:small")
    windows = engine._probe_windows(recipe, cpu)
    assert {tuple(window.shape) for window in windows} == {(1, 3, *recipe.inference.window_size)}
    for window in windows:
        assert window[0, 0].std() > 0
        assert float(window[0, 1].max()) == float(window[0, 2].max()) == 1.0
        assert window[0, 1].argmax() != window[0, 2].argmax()


def test_an_export_of_a_click_model_that_answers_otherwise_is_not_kept(
    made_checkpoint, tmp_path: Path, cpu: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that forgets the negative clicks."""
    checkpoint = made_checkpoint(load_recipe("deepgrow_3d:small"), tmp_path / "best.pt")
    convert = engine._to_torchscript

    def forgetful(network: torch.nn.Module, example: torch.Tensor, recipe: str) -> bytes:
        first = next(parameter for parameter in network.parameters() if parameter.ndim == 5)
        kept = first.detach().clone()
        with torch.no_grad():
            first[:, 2] = 0
        content = convert(network, example, recipe)
        with torch.no_grad():
            first.copy_(kept)
        return content

    monkeypatch.setattr(engine, "_to_torchscript", forgetful)
    with pytest.raises(ModelError, match="the file was not kept"):
        export(checkpoint, "torchscript", tmp_path / "model.ts", cpu)
    assert not (tmp_path / "model.ts").exists()


def test_a_bundle_knows_no_clicks(made_checkpoint, tmp_path: Path, cpu: Runtime) -> None:
    checkpoint = made_checkpoint(load_recipe("deepgrow_3d:small"), tmp_path / "best.pt")
    with pytest.raises(ModelError, match="a MONAI bundle's own chain knows nothing; export it as torchscript or onnx"):
        engine.export_bundle(checkpoint, tmp_path / "bundle", cpu)
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize("file_format", ["torchscript", "onnx"])
def test_a_full_disk_leaves_no_file(
    tiny_checkpoint: Path, mount: Callable[[str], Path], cpu: Runtime, file_format: str
) -> None:
    folder = mount("size=4k")
    with pytest.raises(OutputError, match="No space left on device"):
        export(tiny_checkpoint, file_format, folder / f"model{EXPORT_SUFFIXES[file_format]}", cpu)
    assert not list(folder.iterdir())
