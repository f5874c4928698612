"""Export to TorchScript, ONNX and MONAI bundles: the recipe inside, and proof that they give the eager model's answer.

The proof runs both on windows of real size cut from a made CT, prepared as the recipe says, and compares logits and
the labels that follow from them. A file that is out of tolerance is not kept.
"""

from __future__ import annotations

import io
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ctseg.arrays import cut_box
from ctseg.clicks import Click, network_input
from ctseg.engine.backends import example_of
from ctseg.engine.backends.onnx import OPSET, to_onnx
from ctseg.engine.bundle import bundle_forward, write_bundle
from ctseg.engine.model import Forward, forward_of, load_model, load_network
from ctseg.engine.runtime import Runtime
from ctseg.engine.windows import window_starts
from ctseg.errors import CtsegError, ModelError
from ctseg.files import atomic_folder, atomic_path, make_folder
from ctseg.preprocess import prepare
from ctseg.recipe import RECIPE_ENTRY, Recipe
from ctseg.sources.phantom import make_phantom
from ctseg.workspace import EXPORT_SUFFIXES

TOLERANCE = 1e-3
"""Largest difference between two logits, relative to the largest logit, that counts as the same answer."""
MIN_AGREEMENT = 0.9999
"""Least share of voxels that get the same label."""


@dataclass(frozen=True)
class ExportReport:
    """What was written and how it compares with the eager model."""

    path: Path
    format: str
    opset: int | None
    input_shape: tuple[int, ...]
    windows: int
    largest_logit: float
    largest_difference: float
    label_agreement: float


def export(checkpoint: Path, file_format: str, output: Path, runtime: Runtime) -> ExportReport:
    """Writes the checkpoint's network to `output` and proves it equal to the eager one.

    Raises:
        CtsegError: if the format is unknown.
        ModelError: if the checkpoint cannot be read or the exported file's answer is out of tolerance.
    """
    if file_format not in EXPORT_SUFFIXES:
        raise CtsegError(f"format '{file_format}': expected one of {', '.join(EXPORT_SUFFIXES)}")
    if output.suffix != EXPORT_SUFFIXES[file_format]:
        raise CtsegError(f"output '{output}': a {file_format} file must end in {EXPORT_SUFFIXES[file_format]}")
    recipe, network = load_network(checkpoint)
    network.eval()
    make_folder(output.parent)
    example = example_of(network, recipe.inference.window_size)
    with atomic_path(output) as temporary:
        staged = temporary.with_suffix(EXPORT_SUFFIXES[file_format])  # readers go by the suffix
        try:
            convert = _to_torchscript if file_format == "torchscript" else _to_onnx
            staged.write_bytes(convert(network, example, json.dumps(recipe.to_dict())))
            exported = load_model(staged, runtime).forward
            report = _compare(forward_of(network, runtime), exported, recipe, runtime, file_format)
            staged.rename(temporary)
        finally:
            staged.unlink(missing_ok=True)
    return ExportReport(path=output, format=file_format, input_shape=tuple(example.shape), **report)


def export_bundle(checkpoint: Path, output: Path, runtime: Runtime) -> ExportReport:
    """Writes the checkpoint's network as the MONAI bundle `output` and proves it equal to the eager one.

    Raises:
        CtsegError: if `output` exists.
        ModelError: if the checkpoint cannot be read, its model takes clicks, or the bundle's answer is out of
            tolerance.
    """
    recipe, network = load_network(checkpoint)
    if recipe.clicks is not None:
        raise ModelError(
            f"model '{checkpoint}': recipe {recipe.name} segments by clicks, of which a MONAI bundle's own chain knows "
            f"nothing; export it as torchscript or onnx"
        )
    network.eval()
    if output.exists():
        raise CtsegError(f"output '{output}': exists; a bundle is a folder of its own, name a new one")
    make_folder(output.parent)
    with atomic_folder(output) as staged:
        write_bundle(staged, recipe, network)
        exported = bundle_forward(staged, recipe, runtime)
        report = _compare(forward_of(network, runtime), exported, recipe, runtime, "bundle")
    shape = (1, 1, *recipe.inference.window_size)
    return ExportReport(path=output, format="bundle", input_shape=shape, **report)


def _to_torchscript(network: nn.Module, example: Tensor, recipe: str) -> bytes:
    buffer = io.BytesIO()
    with torch.inference_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is frozen, not gone; its notice is for developers
        traced = torch.jit.trace(network, example)  # type: ignore[no-untyped-call]
        torch.jit.save(traced, buffer, _extra_files={RECIPE_ENTRY: recipe})
    return buffer.getvalue()


def _to_onnx(network: nn.Module, example: Tensor, recipe: str) -> bytes:
    model = to_onnx(network, example)
    entry = model.metadata_props.add()
    entry.key, entry.value = RECIPE_ENTRY, recipe
    content: bytes = model.SerializeToString()
    return content


def _compare(eager: Forward, exported: Forward, recipe: Recipe, runtime: Runtime, file_format: str) -> dict[str, Any]:
    """The measured fields of an ExportReport."""
    windows = _probe_windows(recipe, runtime)
    largest, difference, agreeing, voxels = 0.0, 0.0, 0, 0
    for window in windows:
        wanted, got = eager(window), exported(window)
        if not bool(torch.isfinite(wanted).all() and torch.isfinite(got).all()):
            raise ModelError(f"export to {file_format}: the network's answer is not a number; the file was not kept")
        largest = max(largest, float(wanted.abs().max()))
        difference = max(difference, float((wanted - got).abs().max()))
        labels = _labels(wanted)
        agreeing += int((labels == _labels(got)).sum())
        voxels += labels.numel()
    agreement = agreeing / voxels
    if not (difference <= TOLERANCE * largest and agreement >= MIN_AGREEMENT):
        raise ModelError(
            f"export to {file_format}: differs from the eager model by {difference:.3g} (largest logit {largest:.3g}, "
            f"tolerance {TOLERANCE:g} of it), labels agree in {agreement:.6f} of voxels (at least {MIN_AGREEMENT}); "
            f"the file was not kept"
        )
    return {
        "opset": OPSET if file_format == "onnx" else None,
        "windows": len(windows),
        "largest_logit": largest,
        "largest_difference": difference,
        "label_agreement": agreement,
    }


def _labels(logits_BCXYZ: Tensor) -> Tensor:
    """A single channel is that of the structure alone."""
    return logits_BCXYZ[:, 0] > 0 if logits_BCXYZ.shape[1] == 1 else logits_BCXYZ.argmax(1)


def _probe_windows(recipe: Recipe, runtime: Runtime) -> list[Tensor]:
    """The network's input for two windows of a made CT: the first of the grid and the one in its middle.

    A recipe with clicks gets a positive one in the middle of the window and a negative one nearer to its beginning.
    """
    image_XYZ = prepare(make_phantom(seed=0, index=0).image, recipe.preprocess, runtime.device).image_XYZ
    size = recipe.inference.window_size
    shape = tuple(int(n) for n in np.maximum(image_XYZ.shape, size))
    starts = list(window_starts((shape[0], shape[1], shape[2]), size, recipe.inference.overlap))
    chosen = [starts[0], starts[len(starts) // 2]]
    windows = [cut_box(image_XYZ, start, size)[None, None] for start in chosen]
    if recipe.clicks is None:
        return windows
    clicks = [Click(_place(size, 2), positive=True), Click(_place(size, 5), positive=False)]
    return [network_input(window, [clicks], recipe.clicks.sigma_voxels) for window in windows]


def _place(size: tuple[int, int, int], share: int) -> tuple[int, int, int]:
    return size[0] // share, size[1] // share, size[2] // share
