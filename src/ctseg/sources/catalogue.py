"""From a recipe and the user's options to the cases: shipped manifests, the user's own, and made data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ctseg.manifest import Manifest, check_files, data_folder, locate_manifest, read_manifest
from ctseg.progress import Progress
from ctseg.sources.made import MadeData, write_made
from ctseg.sources.phantom import DEMO_COUNTS, organ_data, phantom_data
from ctseg.sources.phantom_bone import bone_data
from ctseg.sources.phantom_lung import lung_data

MADE: dict[str, Callable[[], MadeData]] = {
    "phantom": phantom_data,
    "phantom_organs": organ_data,
    "phantom_lung": lung_data,
    "phantom_bone": bone_data,
}
MADE_SEED = 0


def is_made(name: str) -> bool:
    """True of the names of made data sets, which need no files."""
    return name in MADE


def find_data(name: str, data: Path | None, progress: Progress) -> Manifest:
    """As `locate_data`, once every file it names is known to exist.

    Raises:
        ManifestError: if the manifest or a file it names is missing or wrong.
    """
    return check_files(locate_data(name, data, progress))


def locate_data(name: str, data: Path | None, progress: Progress) -> Manifest:
    """The manifest called `name`: made data is made on the spot if it is not there yet.

    Args:
        name: The name of a made data set, of a manifest that ships with ctseg, a file or a folder.
        data: The folder of the images, see `locate_manifest`; a made set lies in a folder of its name below it.
        progress: Told of cases being made.

    Raises:
        ManifestError: if the manifest is missing or wrong.
    """
    if not is_made(name):
        return locate_manifest(name, data)
    folder = (data if data is not None else data_folder()) / name
    progress.start("making CT phantoms", sum(DEMO_COUNTS.values()))
    path = write_made(folder, MADE[name](), DEMO_COUNTS, MADE_SEED, progress.advance)
    progress.finish()
    return read_manifest(path)
