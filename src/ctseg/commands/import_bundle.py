"""`ctseg import-bundle`: the numbers of a MONAI bundle become a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctseg.commands.common import JsonFlag, Overrides
from ctseg.commands.import_mmar import ImportData, ImportManifest, ImportOutput, run_import
from ctseg.foreign.importing import Request, import_bundle


def import_bundle_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The bundle: the folder that holds configs/.")],
    output: ImportOutput,
    manifest: ImportManifest = None,
    data: ImportData = None,
    overrides: Overrides = None,
    as_json: JsonFlag = False,
) -> None:
    """Make a recipe of a MONAI bundle; nothing in it is run, and what is not carried over is listed."""
    request = Request(folder=folder, output=output, overrides=overrides or [], manifest=manifest, data=data)
    run_import(import_bundle, request, as_json)
