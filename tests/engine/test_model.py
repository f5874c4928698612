"""A model is loaded from a checkpoint or an export with its recipe, or refused in one line."""

import hashlib
from pathlib import Path

import onnx
import pytest
import torch

from ctseg.engine.checkpoint import save_checkpoint
from ctseg.engine.export import export
from ctseg.engine.model import forward_of, load_model, load_network
from ctseg.engine.runtime import Runtime
from ctseg.errors import DeviceError, ModelError, RecipeError
from ctseg.networks import network_for
from ctseg.recipe import Recipe, load_recipe


def refusal(path: Path, runtime: Runtime) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(path, runtime)
    assert f"'{path}'" in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def saved(tmp_path: Path, tiny_recipe: Recipe) -> Path:
    """A checkpoint of the tiny recipe with weights from seed 3."""
    torch.manual_seed(3)
    path = tmp_path / "best.pt"
    save_checkpoint(path, {"recipe": tiny_recipe.to_dict(), "model": network_for(tiny_recipe).state_dict()})
    return path


def identity_onnx(path: Path) -> None:
    shape = [1, 1, 16, 16, 16]
    ports = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", ports[:1], ports[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save_model(model, str(path))


def test_a_checkpoint_gives_its_recipe_and_its_network(saved: Path, tiny_recipe: Recipe, cpu: Runtime) -> None:
    model = load_model(saved, cpu)
    assert model.recipe == tiny_recipe
    assert model.sha256 == hashlib.sha256(saved.read_bytes()).hexdigest()
    torch.manual_seed(3)
    network = network_for(tiny_recipe).eval()
    image = torch.randn(2, 1, 16, 16, 16)
    with torch.inference_mode():
        logits = network(image)
        torch.testing.assert_close(model.forward(image), logits[:, 1:] - logits[:, :1], rtol=1e-4, atol=1e-5)


def test_forward_takes_no_gradient_and_keeps_batch_statistics(tiny_recipe: Recipe, cpu: Runtime) -> None:
    network = network_for(tiny_recipe).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    logits = forward_of(network, cpu)(torch.randn(1, 1, 16, 16, 16))
    assert not logits.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_forward_gives_float32_in_mixed_precision(tiny_recipe: Recipe, cpu: Runtime) -> None:
    network, image = network_for(tiny_recipe), torch.randn(1, 1, 16, 16, 16)
    plain = forward_of(network, cpu)(image)
    mixed = forward_of(network, Runtime(torch.device("cpu"), "bfloat16"))(image)
    assert mixed.dtype == torch.float32
    assert 0 < (mixed - plain).abs().max() < 0.1 * plain.abs().max()


@pytest.mark.parametrize("name", ["model.pth", "model.nii.gz", "model"])
def test_an_unknown_kind_of_file_is_refused(tmp_path: Path, cpu: Runtime, name: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    assert "unknown kind of file; known: .pt, .ts, .onnx" in refusal(tmp_path / name, cpu)


@pytest.mark.parametrize("suffix", [".pt", ".ts", ".onnx"])
def test_a_missing_or_damaged_file_is_refused(tmp_path: Path, cpu: Runtime, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    refusal(path, cpu)
    path.write_bytes(b"not a model" * 10)
    refusal(path, cpu)


def test_foreign_torchscript_without_a_recipe_is_refused(tmp_path: Path, cpu: Runtime) -> None:
    path = tmp_path / "model.ts"
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.zeros(1)), str(path))
    assert "carries no ctseg recipe; export it with `ctseg export`" in refusal(path, cpu)


def test_onnx_is_refused_a_precision_that_it_has_not(tmp_path: Path) -> None:
    identity_onnx(tmp_path / "model.onnx")
    runtime = Runtime(torch.device("cpu"), "bfloat16")
    with pytest.raises(DeviceError, match=r"precision 'bfloat16': a .onnx file is in float32; name its checkpoint"):
        load_model(tmp_path / "model.onnx", runtime)


def test_onnx_says_that_it_runs_on_the_cpu(tiny_checkpoint: Path, cpu: Runtime, tmp_path: Path, monkeypatch) -> None:
    """On a GPU, where onnxruntime was built without it."""
    export(tiny_checkpoint, "onnx", tmp_path / "model.onnx", cpu)
    monkeypatch.setattr("ctseg.engine.model.has_cuda", lambda: False)
    notes: list[str] = []
    model = load_model(tmp_path / "model.onnx", Runtime(torch.device("cuda", 0), "float16"), note=notes.append)
    assert (model.runtime.device.type, model.runtime.precision) == ("cpu", "float32")
    assert notes == ["onnxruntime here is a build without CUDA: the model runs on the CPU"]


def test_foreign_onnx_without_a_recipe_is_refused(tmp_path: Path, cpu: Runtime) -> None:
    identity_onnx(tmp_path / "model.onnx")
    assert "carries no ctseg recipe" in refusal(tmp_path / "model.onnx", cpu)


@pytest.mark.parametrize(("entry", "error"), [("{", ModelError), ('{"name": "x"}', RecipeError)])
def test_onnx_with_a_wrong_recipe_is_refused(tmp_path: Path, cpu: Runtime, entry: str, error: type) -> None:
    path = tmp_path / "model.onnx"
    identity_onnx(path)
    model = onnx.load(str(path))
    onnx.helper.set_model_props(model, {"ctseg_recipe.json": entry})
    onnx.save_model(model, str(path))
    with pytest.raises(error, match="recipe inside"):
        load_model(path, cpu)


def test_onnx_that_names_another_file_is_refused(tmp_path: Path, cpu: Runtime) -> None:
    """A stranger's model must not make us read files beside it."""
    path = tmp_path / "model.onnx"
    weight = onnx.numpy_helper.from_array(torch.zeros(4096).numpy(), "w")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["w"], ["y"])],
        "g",
        [],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4096])],
        [weight],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save_model(model, str(path), save_as_external_data=True, location="secret.bin")
    assert (tmp_path / "secret.bin").exists()
    assert "not a readable ONNX file" in refusal(path, cpu)


@pytest.mark.parametrize("damage", ["missing weights", "other shape", "extra weights", "no weights", "a list"])
def test_weights_that_do_not_fit_are_refused(saved: Path, tiny_recipe: Recipe, cpu: Runtime, damage: str) -> None:
    weights = dict(network_for(tiny_recipe).state_dict())
    name = next(iter(weights))
    if damage == "missing weights":
        del weights[name]
    elif damage == "other shape":
        weights[name] = torch.zeros(3)
    elif damage == "extra weights":
        weights["another.weight"] = torch.zeros(3)
    content = {"no weights": {}, "a list": {"model": [1.0]}}.get(damage, {"model": weights})
    save_checkpoint(saved, {"recipe": tiny_recipe.to_dict(), **content})
    assert "weights do not fit" in refusal(saved, cpu)


def test_another_recipes_weights_are_refused(saved: Path, cpu: Runtime) -> None:
    other = load_recipe("spleen:small")
    weights = torch.load(saved, weights_only=True)["model"]
    save_checkpoint(saved, {"recipe": other.to_dict(), "model": weights})
    assert "weights do not fit" in refusal(saved, cpu)


def test_a_checkpoint_with_a_wrong_recipe_is_refused(saved: Path, tiny_recipe: Recipe) -> None:
    recipe = tiny_recipe.to_dict()
    recipe["network"]["kind"] = "unett"
    save_checkpoint(saved, {"recipe": recipe, "model": {}})
    with pytest.raises(RecipeError, match=r"recipe inside .*network.kind: expected"):
        load_network(saved)
    save_checkpoint(saved, {"model": {}})
    with pytest.raises(RecipeError, match="expected a table"):
        load_network(saved)


def test_models_are_told_apart_by_content_not_by_name(saved: Path, tmp_path: Path, cpu: Runtime) -> None:
    first = load_model(saved, cpu)
    copy = tmp_path / "copy.pt"
    copy.write_bytes(saved.read_bytes())
    assert load_model(copy, cpu).sha256 == first.sha256
    content = torch.load(saved, weights_only=True)
    save_checkpoint(saved, {**content, "epoch": 1})
    assert load_model(saved, cpu).sha256 != first.sha256
