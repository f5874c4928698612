"""`ctseg annotate`: the mask of what is clicked on."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ctseg.commands.common import (
    BackendOption,
    DeviceOption,
    JsonFlag,
    ModelOption,
    PrecisionOption,
    QuietFlag,
    emit,
    pairs,
    rounded,
)
from ctseg.errors import ClickError, CtsegError
from ctseg.manifest import is_image_name
from ctseg.progress import make_progress
from ctseg.workspace import resolve_model

if TYPE_CHECKING:
    from ctseg.engine.annotate import Annotation

MAX_CLICKS = 1000
NUMBER = r"[+-]?\d+(?:\.\d+)?"


def annotate(
    image: Annotated[Path, typer.Argument(help="A CT: NIfTI, NRRD or MHA file.")],
    clicks: Annotated[
        list[str],
        typer.Option(
            "--click", metavar="X,Y,Z[+|-]", help="Where the structure is (+) or is not (-); may be repeated."
        ),
    ],
    output: Annotated[Path, typer.Option(help="The mask's file (.nii.gz, .nii, .nrrd, .mha).")],
    model: ModelOption = None,
    coordinates: Annotated[
        Literal["voxel", "lps", "ras"],
        typer.Option(help="Of the clicks: voxels counted from 0 along the file's axes, or patient mm in LPS or RAS."),
    ] = "voxel",
    largest_component: Annotated[
        bool, typer.Option("--largest-component", help="Keep only the largest part that holds a positive click.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a mask that is already there.")] = False,
    device: DeviceOption = "auto",
    precision: PrecisionOption = "auto",
    backend: BackendOption = "auto",
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Segment what is clicked on, with an annotation model such as deepgrow_3d: a mask on the image's own grid."""
    wanted = parse_clicks(clicks)
    _check_output(image, output, overwrite=overwrite)
    path = resolve_model(model)
    from ctseg.engine.annotate import annotate as run
    from ctseg.engine.model import load_model
    from ctseg.engine.runtime import running

    with make_progress(quiet) as progress, running(device, precision, amp=True, alone=True) as runtime:
        loaded = load_model(path, runtime, backend, progress.note)
        progress.note(f"model {path} on {runtime.describe()}, {loaded.backend}")
        result = run(loaded, image, wanted, output, coordinates=coordinates, largest_component=largest_component)
    emit(dataclasses.asdict(result), _text(result, path), as_json)


def parse_clicks(texts: list[str]) -> list[tuple[tuple[float, float, float], bool]]:
    """Place and sign of each click; without a sign it is positive.

    Raises:
        ClickError: naming the first that cannot be read, or if none is positive.
    """
    if len(texts) > MAX_CLICKS:
        raise ClickError(f"--click: at most {MAX_CLICKS} clicks, got {len(texts)}")
    clicks = []
    for text in texts:
        match = re.fullmatch(rf"\s*({NUMBER})\s*,\s*({NUMBER})\s*,\s*({NUMBER})\s*([+-]?)\s*", text)
        if match is None:
            raise ClickError(
                f"--click {text[:80]}: expected x,y,z with + or - after it, such as 120,85,40 or 120,85,40-"
            )
        clicks.append(((float(match[1]), float(match[2]), float(match[3])), match[4] != "-"))
    if not any(positive for _, positive in clicks):
        raise ClickError("--click: none is positive, so there is nothing to segment; add one inside the structure")
    return clicks


def _check_output(image: Path, output: Path, *, overwrite: bool) -> None:
    if not is_image_name(output):
        raise CtsegError(f"--output {output}: a mask's name must end in .nii.gz, .nii, .nrrd or .mha")
    if output.is_dir():
        raise CtsegError(f"--output {output}: is a folder; name the mask's file")
    if output.exists() and image.exists() and output.samefile(image):
        raise CtsegError(f"--output {output}: is the image itself; name another file")
    if output.exists() and not overwrite:
        raise CtsegError(f"--output {output}: exists; name another file, or --overwrite to replace it")


def _text(result: Annotation, model: Path) -> str:
    rows: list[tuple[str, object]] = [
        ("model", model),
        (
            "clicks",
            ", ".join(f"{c.point[0]},{c.point[1]},{c.point[2]}{'+' if c.positive else '-'}" for c in result.clicks),
        ),
        ("volume", f"{rounded(result.volume_ml)} ml"),
        ("mask", result.mask),
    ]
    return pairs(rows)
