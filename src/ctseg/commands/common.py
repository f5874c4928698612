"""What several commands share: options declared once, and how results reach stdout."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ctseg.errors import CasesFailed, CtsegError, ModelError, OutputError
from ctseg.recipe import Recipe
from ctseg.report.tables import render_table

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="Change one value of the recipe; may be repeated."),
]
ManifestOption = Annotated[
    str | None,
    typer.Option("--manifest", help="Data list: a file, a folder, or a shipped name. Default: the recipe's."),
]
DataOption = Annotated[
    Path | None, typer.Option("--data", help="Folder of the images. Default: $CTSEG_DATA, else ./data.")
]
PreparedOption = Annotated[Path, typer.Option("--prepared", help="Folder for prepared cases.")]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Run folder, checkpoint, exported file, downloaded model, or recipe. Default: the newest run here.",
    ),
]


def _check_device(name: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        raise typer.BadParameter(f"expected auto, cpu, cuda or cuda:N, got '{name}'")
    return name


DeviceOption = Annotated[str, typer.Option("--device", callback=_check_device, help="auto, cpu, cuda or cuda:N.")]
PrecisionOption = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"],
    typer.Option("--precision", help="auto: float16 AMP on CUDA, else float32."),
]
BackendOption = Annotated[
    Literal["auto", "torch", "onnxruntime", "openvino"],
    typer.Option("--backend", help="What runs the network; auto: the fastest one here that gives torch's answer."),
]
FastFlag = Annotated[
    bool,
    typer.Option(
        "--fast",
        help="Leave out windows that hardly change the mask; bfloat16 on a CPU that has it (on torch for UNets only).",
    ),
]
SeriesOption = Annotated[
    str | None,
    typer.Option(
        "--series", metavar="RULE", help="Which series: '#2', a UID, 'SliceThickness<=3 and not LUNG, most-slices'."
    ),
]
KeepIdentifiersFlag = Annotated[
    bool, typer.Option("--keep-identifiers", help="Show and use patient and UID as they are, not as pseudonyms.")
]
GapsOption = Annotated[
    Literal["error", "fill", "ignore"], typer.Option("--gaps", help="DICOM: what to do about missing slices.")
]
TiltOption = Annotated[
    Literal["error", "shear"], typer.Option("--tilt", help="DICOM: what to do about a tilted gantry.")
]
MaxMemoryOption = Annotated[
    str | None,
    typer.Option("--max-memory", metavar="SIZE", help="Such as 4G: kept, with scratch on disk where it must be."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr.")]


def parse_bytes(text: str, option: str) -> int:
    """Bytes of a size such as 12G, 1.5G or 800M, in powers of 1024 as Slurm counts.

    Raises:
        CtsegError: naming `option`.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if size == 0:
        raise CtsegError(f"{option}: expected a size such as 12G or 800M, got '{text}'")
    return size


def emit(data: Any, text: str, as_json: bool) -> None:
    """Prints a result on stdout: for people, or as JSON for scripts."""
    say(json.dumps(data, indent=1, default=str) if as_json else text)


def check_no_clicks(recipe: Recipe, model: Path) -> None:
    """Raises ModelError for a model that has to be told by clicks what to segment."""
    if recipe.clicks is not None:
        raise ModelError(f"model '{model}': recipe {recipe.name} segments what is clicked on; use `ctseg annotate`")


def check_none_failed(errors: Sequence[str], number: int, what: str) -> None:
    """Raises CasesFailed with every reason if there is any, e.g. "2 of 9 CTs failed:"; `what` is "CTs" there."""
    if errors:
        reasons = "".join(f"\n  {error}" for error in errors)
        raise CasesFailed(f"{len(errors)} of {number} {what}:{reasons}")


def say(text: str) -> None:
    """Prints on stdout. A reader that has left, as in `ctseg recipes | head`, is no error.

    Raises:
        OutputError: if stdout is a file on a full disk.
    """
    try:
        typer.echo(text)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in Python's buffer
        if not isinstance(error, BrokenPipeError):
            raise OutputError(f"cannot write the result to stdout: {error.strerror}; free space") from error


def pairs(rows: Sequence[tuple[str, object]]) -> str:
    """Two columns without a header."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def score_table(evaluation: Any) -> str:
    """Per-case scores and summaries of an `Evaluation`, with failed cases and their reasons."""
    rows = [
        (s.case, s.structure, s.dice, rounded(s.label_ml), rounded(s.mask_ml), rounded(s.seconds))
        for s in evaluation.scores
    ]
    cases = render_table(("case", "structure", "dice", "label_ml", "mask_ml", "seconds"), rows)
    lines = [cases, ""]
    for s in evaluation.summaries:
        lines.append(
            f"{s.structure}: mean Dice {_number(s.mean_dice)}, sd {_number(s.sd_dice)}, "
            f"range {_number(s.min_dice)} to {_number(s.max_dice)}, {s.cases} cases"
            + (f", {s.undefined} with an empty label (left out)" if s.undefined else "")
            + (f", {s.failed} failed" if s.failed else "")
        )
    lines += [f"failed: {s.case}: {s.error}" for s in evaluation.failed]
    return "\n".join(lines)


def rounded(value: float | None) -> str | None:
    """One decimal, for millilitres and seconds."""
    return None if value is None else f"{value:.1f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
