"""`ctseg export`: a checkpoint becomes a file that runs without ctseg's code."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ctseg.commands.common import DeviceOption, JsonFlag, ModelOption, emit, pairs
from ctseg.errors import CtsegError, ModelError
from ctseg.files import make_folder
from ctseg.workspace import EXPORT_SUFFIXES, resolve_model

if TYPE_CHECKING:
    from ctseg.engine.export import ExportReport


def export(
    file_format: Annotated[
        Literal["torchscript", "onnx", "bundle"], typer.Option("--format", help="Kind of file; a bundle is a folder.")
    ] = "torchscript",
    model: ModelOption = None,
    output: Annotated[
        Path | None, typer.Option(help="Default: model.ts, model.onnx or bundle beside the model.")
    ] = None,
    device: DeviceOption = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Export a checkpoint to TorchScript, ONNX or a MONAI bundle, recipe inside, compared with the eager model."""
    path = resolve_model(model)
    if path.suffix != ".pt":
        raise ModelError(f"model '{path}': already exported; name a checkpoint (.pt) or a run")
    target = output or path.with_name("bundle" if file_format == "bundle" else f"model{EXPORT_SUFFIXES[file_format]}")
    _check_target(target, file_format)
    make_folder(target.parent)
    from ctseg.engine.export import export as run
    from ctseg.engine.export import export_bundle
    from ctseg.engine.runtime import running

    with running(device, "float32") as runtime:
        bundle = file_format == "bundle"
        report = export_bundle(path, target, runtime) if bundle else run(path, file_format, target, runtime)
    emit(dataclasses.asdict(report), _text(report), as_json)


def _check_target(target: Path, file_format: str) -> None:
    if file_format == "bundle" and target.exists():
        raise CtsegError(f"--output {target}: exists; a bundle is a folder of its own, name a new one")
    suffix = EXPORT_SUFFIXES.get(file_format)
    if suffix is not None and target.suffix != suffix:
        raise CtsegError(f"--output {target}: a {file_format} file must end in {suffix}")


def _text(report: ExportReport) -> str:
    opset = f", opset {report.opset}" if report.opset else ""
    return pairs(
        [
            ("wrote", f"{report.path} ({report.format}{opset})"),
            ("input", f"{list(report.input_shape)}, batch free"),
            ("compared on", f"{report.windows} windows of a made CT"),
            ("largest difference", f"{report.largest_difference:.2e} (largest logit {report.largest_logit:.2f})"),
            ("label agreement", f"{report.label_agreement:.6f} of voxels"),
        ]
    )
