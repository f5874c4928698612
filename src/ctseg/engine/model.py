"""A model ready to predict: its recipe and its network, whichever kind of file they came from."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctseg.engine.checkpoint import file_sha256, read_checkpoint
from ctseg.engine.runtime import Runtime
from ctseg.errors import ModelError
from ctseg.networks import fold_for_inference, network_for
from ctseg.recipe import RECIPE_ENTRY, Recipe, recipe_from_dict

Forward = Callable[[Tensor], Tensor]
"""image_BCXYZ float32 -> logits_BCXYZ float32, without gradients."""


@dataclass(frozen=True, eq=False)
class Model:
    """A network that maps windows to scores, and the recipe it was made for."""

    recipe: Recipe
    forward: Forward
    runtime: Runtime
    path: Path
    sha256: str


def load_model(path: Path, runtime: Runtime) -> Model:
    """The model in a checkpoint (`.pt`), a TorchScript file (`.ts`) or an ONNX file (`.onnx`).

    Raises:
        ModelError: if the file cannot be read, is not from ctseg, or does not fit its own recipe.
    """
    readers = {".pt": _from_checkpoint, ".ts": _from_torchscript, ".onnx": _from_onnx}
    reader = readers.get(path.suffix)
    if reader is None:
        raise ModelError(f"model '{path}': unknown kind of file; known: {', '.join(readers)}")
    sha256 = file_sha256(path)
    recipe, forward = reader(path, runtime)
    return Model(recipe, forward, runtime, path, sha256)


def forward_of(network: nn.Module, runtime: Runtime) -> Forward:
    """The network in evaluation mode, channels last, in the runtime's precision."""
    network.eval().to(runtime.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]  # stubs lack it

    def forward(image_BCXYZ: Tensor) -> Tensor:
        with torch.inference_mode(), runtime.autocast():
            logits: Tensor = network(image_BCXYZ.contiguous(memory_format=torch.channels_last_3d))
        return logits.float()

    return forward


def load_network(path: Path) -> tuple[Recipe, nn.Module]:
    """The recipe and the network with weights of a checkpoint, their moving average if it has one, on the CPU.

    Raises:
        ModelError: if the checkpoint is damaged or its weights do not fit its recipe.
    """
    content = read_checkpoint(path)
    recipe = recipe_from_dict(content.get("recipe"), f"recipe inside '{path}'")
    try:
        network = network_for(recipe)
        network.load_state_dict(content.get("average") or content["model"])
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise ModelError(f"checkpoint '{path}': its weights do not fit its recipe's network") from error
    return recipe, network


def _from_checkpoint(path: Path, runtime: Runtime) -> tuple[Recipe, Forward]:
    recipe, network = load_network(path)
    return recipe, forward_of(fold_for_inference(network), runtime)


def _from_torchscript(path: Path, runtime: Runtime) -> tuple[Recipe, Forward]:
    extra: dict[str, Any] = {RECIPE_ENTRY: ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is frozen, not gone
            network = torch.jit.load(str(path), map_location=runtime.device, _extra_files=extra)  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, OSError) as error:
        raise ModelError(f"model '{path}': not a readable TorchScript file") from error
    recipe = _recipe_entry(extra[RECIPE_ENTRY], path)
    return recipe, forward_of(network, runtime)


def _from_onnx(path: Path, runtime: Runtime) -> tuple[Recipe, Forward]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    cuda = runtime.device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    on_gpu = ("CUDAExecutionProvider", {"device_id": runtime.device.index or 0})
    providers = [on_gpu] if cuda else ["CPUExecutionProvider"]
    try:
        # From bytes, not from the path: a model of a stranger cannot name further files then.
        session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=providers)
    except Exception as error:  # onnxruntime raises its own classes, derived from Exception alone
        raise ModelError(f"model '{path}': not a readable ONNX file") from error
    recipe = _recipe_entry(session.get_modelmeta().custom_metadata_map.get(RECIPE_ENTRY, ""), path)
    name = session.get_inputs()[0].name

    def forward(image_BCXYZ: Tensor) -> Tensor:
        (logits,) = session.run(None, {name: image_BCXYZ.cpu().contiguous().numpy()})
        return torch.from_numpy(logits).to(runtime.device)

    return recipe, forward


def _recipe_entry(text: str | bytes, path: Path) -> Recipe:
    if not text:
        raise ModelError(f"model '{path}': carries no ctseg recipe; export it with `ctseg export`")
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ModelError(f"model '{path}': the recipe inside is not valid JSON") from error
    return recipe_from_dict(data, f"recipe inside '{path}'")
