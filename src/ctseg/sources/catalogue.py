"""From a recipe and the user's options to the cases: shipped manifests, the user's own, and made data."""

from __future__ import annotations

from pathlib import Path

from ctseg.manifest import Manifest, check_files, data_folder, find_manifest, read_manifest
from ctseg.progress import Progress
from ctseg.sources.phantom import DEMO_COUNTS, write_phantoms

PHANTOM = "phantom"
PHANTOM_SEED = 0


def find_data(name: str, data: Path | None, progress: Progress) -> Manifest:
    """The manifest called `name`: `phantom` is made on the spot if it is not there yet, others must exist.

    Args:
        name: "phantom", the name of a manifest that ships with ctseg, or a file.
        data: The folder of the images, see `find_manifest`; the made set lies in `phantom` below it.
        progress: Told of cases being made.

    Raises:
        ManifestError: if the manifest or a file it names is missing or wrong.
    """
    if name != PHANTOM:
        return find_manifest(name, data)
    folder = (data if data is not None else data_folder()) / PHANTOM
    progress.start("making CT phantoms", sum(DEMO_COUNTS.values()))
    path = write_phantoms(folder, DEMO_COUNTS, PHANTOM_SEED, progress.advance)
    progress.finish()
    return check_files(read_manifest(path))
