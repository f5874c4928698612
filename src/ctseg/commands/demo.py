"""`ctseg demo`: the whole journey on made data, in minutes, on a CPU."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ctseg.commands.common import DeviceOption, JsonFlag, QuietFlag, emit, score_table
from ctseg.errors import LearningError
from ctseg.files import make_folder
from ctseg.progress import make_progress
from ctseg.recipe import load_recipe

if TYPE_CHECKING:
    from ctseg.engine.demo import DemoResult

RECIPE = "spleen:small"
TARGET_DICE = 0.90


def demo(
    output: Annotated[Path, typer.Option(help="Folder for everything the demo makes.")] = Path("demo"),
    device: DeviceOption = "auto",
    as_json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Make CT phantoms, then prepare, train, validate, infer and export: the whole journey."""
    recipe = load_recipe(RECIPE)
    make_folder(output)
    from ctseg.engine.demo import run_demo
    from ctseg.engine.runtime import running

    with running(device) as runtime, make_progress(quiet) as progress:
        result = run_demo(recipe, output, runtime, progress)
    emit(result.to_dict(), _text(result), as_json)
    if result.mean_dice is None or result.mean_dice < TARGET_DICE:
        raise LearningError(f"mean Dice on the testing split is {result.mean_dice}, below {TARGET_DICE}")


def _text(result: DemoResult) -> str:
    exports = [
        f"{e.path}: largest difference {e.largest_difference:.1e}, labels agree in {e.label_agreement:.6f} of voxels"
        for e in result.exports
    ]
    lines = [
        score_table(result.evaluation),
        "",
        *exports,
        "",
        f"all of it in {result.folder} after {result.seconds:.0f} s:",
        *(f"  {name}" for name in result.contents),
    ]
    return "\n".join(lines)
