"""The index of models that can be downloaded: what ships with ctseg, and a file of the user's own."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from ctseg.errors import DownloadError, ModelError, list_problems
from ctseg.privacy import configuration_folder
from ctseg.progress import Progress
from ctseg.recipe import recipe_names
from ctseg.sources.archives import NAME, Archive
from ctseg.sources.public import data_sets, find_root
from ctseg.sources.unpack import opened, unpack
from ctseg.strict import Range, read_dataclass

INDEX_VARIABLE = "CTSEG_MODELS"
MAX_INDEX_BYTES = 4 * 2**20
SPARE = 2
WEIGHTS = PurePosixPath("models/model.pt")
"""Where MMARs and MONAI bundles have their weights."""
WEIGHTS_SUFFIXES = (".pt", ".pth", ".ckpt")
CONFIG_FOLDERS = ("config", "configs")


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """A model of the index."""

    title: str
    licence: str
    gigabytes: Annotated[float, Range(above=0, at_most=100)]
    """Of the archive, about."""
    archive: Archive
    """A tar or zip of an MMAR or a MONAI bundle, or a file of weights."""
    source: str = ""
    """Its page."""
    recipe: str | None = None
    """The recipe whose network the weights fit; without, the archive's own configuration says all."""
    overrides: tuple[str, ...] = ()
    """As with --set: what the configuration leaves open."""

    @property
    def max_bytes(self) -> int:
        """An archive larger than this is another one."""
        return int(self.gigabytes * SPARE * 1e9)

    @property
    def lacks_recipe(self) -> bool:
        """True if this ctseg does not have the recipe that the model needs."""
        return self.recipe is not None and not self.recipe.endswith(".toml") and self._base not in recipe_names()

    @property
    def _base(self) -> str:
        return (self.recipe or "").partition(":")[0]


def user_index() -> Path | None:
    """The user's own index: `$CTSEG_MODELS`, else `models.json` in the folder of configurations, if there is one."""
    given = os.environ.get(INDEX_VARIABLE)
    if given:
        return Path(given)
    folder = configuration_folder()
    return None if folder is None else folder / "models.json"


def model_index() -> dict[str, ModelEntry]:
    """Every model that can be downloaded, by name; an entry of the user's goes before a shipped one.

    An index that nobody asked for is left out where it cannot be read: jobs may run as users without a home.

    Raises:
        ModelError: naming every problem of an index at once.
    """
    index = read_index(Path(__file__).with_name("models.json"))
    own = user_index()
    asked = bool(os.environ.get(INDEX_VARIABLE))
    if own is not None and (asked or os.access(own, os.R_OK)):
        index |= read_index(own)
    return index


def read_index(path: Path) -> dict[str, ModelEntry]:
    """The models in an index: a JSON object of entries by name.

    Raises:
        ModelError: naming every problem at once.
    """
    try:
        if path.stat().st_size > MAX_INDEX_BYTES:
            raise ModelError(f"model index '{path}': larger than {MAX_INDEX_BYTES >> 20} MiB, not an index")
        data: Any = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ModelError(f"model index '{path}': no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"model index '{path}': cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise ModelError(f"model index '{path}': expected an object of models by name, got {type(data).__name__}")
    problems: list[str] = []
    index = {}
    taken = {*recipe_names(), *data_sets()}
    for name, content in data.items():
        if not NAME.fullmatch(name) or name in taken:
            problems.append(f"{name!r:.80}: expected a plain name that no recipe and no data set has")
        entry = read_dataclass(ModelEntry, content, name, problems)
        if entry is not None:
            index[name] = entry
    if problems:
        raise ModelError(list_problems(f"model index '{path}'", problems))
    return index


def is_model_folder(path: Path) -> bool:
    """True of the folder of an MMAR or a MONAI bundle."""
    return any((path / name).is_dir() for name in CONFIG_FOLDERS)


def unpack_model(archive: Path, folder: Path, max_bytes: int, progress: Progress) -> None:
    """Writes the configuration and the weights of an MMAR or a bundle to `folder`, and nothing else of the archive.

    Raises:
        DownloadError: if the archive must not be unpacked or holds no models/model.pt.
    """
    with opened(archive, max_bytes) as members:
        root, missing = find_root(members, [WEIGHTS])
        if missing:
            raise DownloadError(f"archive '{archive}': holds no {WEIGHTS}, so it is neither an MMAR nor a MONAI bundle")
        wanted = []
        for member in members:
            inside = member.path.relative_to(root) if member.path.is_relative_to(root) else PurePosixPath()
            if inside == WEIGHTS or inside.parts[:1] in {(name,) for name in CONFIG_FOLDERS}:
                wanted.append((member, inside))
        unpack(wanted, folder, progress, f"unpacking {archive.name}")
