"""Data lists: which cases exist, where their files are, and which split each belongs to.

The grammar is the one of the Medical Segmentation Decathlon and MONAI: a JSON object whose `training`, `validation`
and `testing` keys hold `{"image": ..., "label": ...}` entries and whose `test` key holds images without labels. An
entry may have a `patient` and, in `training`, a `weight`, see `Case`. A bare JSON list of paths, or a text file with
one path a line, is a manifest too: all its images are in split `test`. So are a CSV file and a folder of images and
labels, see `datalists`.
"""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ctseg.datalists import (
    IMAGE_SUFFIXES,
    LIST_SUFFIXES,
    MAX_MANIFEST_BYTES,
    SPLITS,
    image_stem,
    is_image_name,
    read_data_list,
)
from ctseg.errors import ManifestError, list_problems

MAX_WEIGHT = 1e6
"""Of a case."""
__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_MANIFEST_BYTES",
    "SPLITS",
    "Case",
    "Manifest",
    "check_files",
    "data_folder",
    "find_manifest",
    "first_cases",
    "image_stem",
    "is_image_name",
    "locate_manifest",
    "manifest_from_data",
    "read_manifest",
    "shipped_manifest",
]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One CT and, where known, its label."""

    name: str
    """Unique in the manifest; names result files and table rows."""
    split: str
    image: Path
    label: Path | None
    weight: float = 1.0
    """How often training draws the case, in relation to the others."""
    patient: str | None = None
    """The user's own word for whom the CT shows; CTs of one patient belong in one split. Not for logs."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A data set: its cases and where they came from."""

    name: str
    cases: tuple[Case, ...]
    labels: dict[str, str]
    licence: str
    source: str

    def split(self, name: str) -> tuple[Case, ...]:
        """The cases of one split.

        Raises:
            ManifestError: if the split is unknown or empty.
        """
        cases = tuple(case for case in self.cases if case.split == name)
        if not cases:
            sizes = ", ".join(f"{s} {n}" for s, n in Counter(c.split for c in self.cases).items())
            raise ManifestError(f"manifest '{self.name}': split '{name}' has no cases; it has {sizes or 'none at all'}")
        return cases

    @property
    def validation(self) -> tuple[Case, ...]:
        """The cases scored during training; there may be none."""
        return tuple(case for case in self.cases if case.split == "validation")

    @property
    def to_prepare(self) -> tuple[Case, ...]:
        """The cases that training reads.

        Raises:
            ManifestError: if there are none to train on.
        """
        return self.split("training") + self.validation


def shipped_manifest(name: str) -> Path:
    """The path of a manifest that ships with ctseg, whether installed or run from its checkout.

    Raises:
        ManifestError: if there is none of that name.
    """
    path = _shipped_path(name)
    if path is None:
        known = sorted({path.stem for folder in _shipped_folders() for path in folder.glob("*.json")})
        raise ManifestError(
            f"manifest '{name}': not shipped with ctseg; known: {', '.join(known)}, or name a file or folder"
        )
    return path


def _shipped_path(name: str) -> Path | None:
    paths = (folder / f"{name}.json" for folder in _shipped_folders())
    return next((path for path in paths if path.is_file()), None)


def _shipped_folders() -> tuple[Path, Path]:
    package = Path(__file__).parent
    return package / "manifests", package.parents[1] / "data" / "manifests"


def data_folder() -> Path:
    """Where data sets live: `$CTSEG_DATA`, else `data` in the current folder."""
    return Path(os.environ.get("CTSEG_DATA") or "data")


def read_manifest(path: Path, root: Path | None = None) -> Manifest:
    """The manifest in a `.json`, `.txt` or `.csv` file or a folder of images and labels.

    Args:
        path: The file or folder.
        root: What relative paths are taken from, default the file's folder.

    Raises:
        ManifestError: naming every problem at once; a relative path may not leave `root`.
    """
    folder = path if path.is_dir() else path.parent
    return manifest_from_data(read_data_list(path), path, folder if root is None else root)


def manifest_from_data(data: Any, path: Path, root: Path) -> Manifest:
    """The manifest in plain data that stood in `path`; relative paths are taken from `root`.

    Raises:
        ManifestError: naming every problem at once; a relative path may not leave `root`.
    """
    if isinstance(data, list):
        data = {"test": data}
    if not isinstance(data, Mapping):
        raise ManifestError(f"manifest '{path}': expected a JSON object or list, got {type(data).__name__}")
    problems: list[str] = []
    entries = [(split, n, entry) for split in SPLITS for n, entry in enumerate(_as_list(data, split, problems))]
    found = [_read_entry(f"{split}[{n}]", split, entry, root, problems) for split, n, entry in entries]
    cases = _with_unique_names([case for case in found if case is not None], root)
    problems.extend(_repeated(cases) or _same_names(cases))
    if not entries and not problems:
        hint = "; name the folder of its images and labels instead" if "numTraining" in data else ""
        problems.append(f"no cases; expected at least one of the keys {', '.join(SPLITS)}{hint}")
    if problems:
        raise ManifestError(list_problems(f"manifest '{path}'", problems))
    labels = data.get("labels", {})
    return Manifest(
        name=str(data.get("name", path.stem)),
        cases=tuple(cases),
        labels={str(k): str(v) for k, v in labels.items()} if isinstance(labels, Mapping) else {},
        licence=str(data.get("licence", "unknown")),
        source=str(data.get("source", "unknown")),
    )


def find_manifest(name: str, data: Path | None) -> Manifest:
    """As `locate_manifest`, once every file it names is known to exist.

    Raises:
        ManifestError: if the manifest is unknown or wrong, or an image or label is not there.
    """
    return check_files(locate_manifest(name, data))


def locate_manifest(name: str, data: Path | None) -> Manifest:
    """The manifest called `name` (shipped name, file or folder), its images below `data`.

    A shipped manifest's images lie in the folder it names (`Task09_Spleen`) below `data`, or in `data` itself;
    `data` defaults to `data_folder()`. A file's own relative paths start at `data`, default the file's folder. A
    folder that is called like a shipped manifest is named with a slash: `./msd_spleen`.

    Raises:
        ManifestError: if the manifest is unknown or wrong, or none of a shipped one's images is there.
    """
    if name.lower().endswith(LIST_SUFFIXES):
        return read_manifest(Path(name), data)
    if Path(name).is_dir() and ("/" in name or _shipped_path(name) is None):
        if data is not None:
            raise ManifestError(f"folder '{name}': its images lie in it, so --data cannot be given")
        return read_manifest(Path(name))
    path = shipped_manifest(name)
    content = read_data_list(path)
    if not any(split in content for split in SPLITS):  # a template: it says what the original data was
        raise ManifestError(
            f"data set '{name}': the original data is not public, so ctseg has no list of it; give your own list with "
            f"--manifest FILE (its grammar stands in docs/recipes/{name}.md)"
        )
    folder = str(content.get("folder", name))
    base = data if data is not None else data_folder()
    root = base / folder if (base / folder).is_dir() else base
    manifest = read_manifest(path, root)
    if not any(case.image.is_file() for case in manifest.cases):
        raise ManifestError(
            f"data set '{name}': no image found below '{base / folder}'; fetch it with `ctseg download {name}"
            f"{'' if data is None else f' --data {data}'}`, or name its folder with --data DIR, or your own list with "
            f"--manifest FILE"
        )
    return manifest


def first_cases(manifest: Manifest, number: int) -> Manifest:
    """The data set with only the first `number` cases of each split."""
    cases = [case for split in SPLITS for case in [c for c in manifest.cases if c.split == split][:number]]
    return dataclasses.replace(manifest, cases=tuple(cases))


def check_files(manifest: Manifest) -> Manifest:
    """The manifest itself, once every file it names is known to exist.

    Raises:
        ManifestError: listing every missing file.
    """
    files = [f for case in manifest.cases for f in (case.image, case.label) if f is not None]
    missing = [f"file not found: {f}" for f in files if not f.is_file()]
    if missing:
        raise ManifestError(list_problems(f"manifest '{manifest.name}'", missing))
    return manifest


def _as_list(data: Mapping[str, Any], split: str, problems: list[str]) -> list[Any]:
    entries = data.get(split, [])
    if not isinstance(entries, list):
        problems.append(f"{split}: expected a list, got {type(entries).__name__}")
        return []
    return entries


def _read_entry(where: str, split: str, entry: Any, root: Path, problems: list[str]) -> Case | None:
    if isinstance(entry, str):
        entry = {"image": entry}
    if not isinstance(entry, Mapping) or not isinstance(entry.get("image"), str):
        got = f"the keys {', '.join(map(str, entry))}"[:80] if isinstance(entry, Mapping) else type(entry).__name__
        problems.append(f'{where}: expected a path or {{"image": path, "label": path}}, got {got}')
        return None
    label = entry.get("label")
    if label is not None and not isinstance(label, str):
        problems.append(f"{where}.label: expected a path, got {label!r:.80}")
        return None
    paths = []
    for text in (entry["image"], label):
        if text is not None and not _is_path(text):
            problems.append(f"{where}: a path holds characters that no file name has; correct the list")
            return None
        if text is not None and not Path(text).is_absolute() and ".." in PurePosixPath(text).parts:
            problems.append(f"{where}: relative paths may not contain '..', got '{text}'")
            return None
        paths.append(None if text is None else root / text)
    image, label_path = paths
    assert image is not None
    name = image_stem(image)
    if not name.strip("."):
        problems.append(f"{where}: an image needs a name before its suffix, got '{entry['image']}'")
        return None
    weight = entry.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight <= MAX_WEIGHT:
        most = f" and at most {MAX_WEIGHT:g}" if isinstance(weight, int | float) and weight > MAX_WEIGHT else ""
        problems.append(f"{where}.weight: expected a number above 0{most}, got {weight!r:.80}")
        return None
    patient = entry.get("patient")
    if patient is not None and not (isinstance(patient, str) and patient.strip()):
        problems.append(f"{where}.patient: expected text, got {_kind(patient)}; put it in quotes or leave it out")
        return None
    patient = None if patient is None else patient.strip()
    return Case(name=name, split=split, image=image, label=label_path, weight=float(weight), patient=patient)


def _is_path(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False


def _kind(value: Any) -> str:
    return "an empty one" if isinstance(value, str) else type(value).__name__


def _with_unique_names(cases: list[Case], root: Path) -> list[Case]:
    """Cases that share a file name are named by their path below `root`, parts joined by '_'.

    Those outside of it by their path below the folder that holds them all: names, and splits by chance that follow from
    them, are the same wherever the files lie.
    """
    shared = {name for name, n in Counter(case.name for case in cases).items() if n > 1}
    alike = [case.image for case in cases if case.name in shared]
    outside = [image.absolute().parent for image in alike if not image.is_relative_to(root)]
    common = Path(os.path.commonpath(outside)) if outside else root

    def rename(case: Case) -> Case:
        if case.name not in shared:
            return case
        if case.image.is_relative_to(root):
            parts = case.image.relative_to(root).parent.parts
        else:
            parts = case.image.absolute().relative_to(common).parent.parts or (common.name,)
        return dataclasses.replace(case, name="_".join([*parts, case.name]))

    return [rename(case) for case in cases]


def _repeated(cases: Iterable[Case]) -> list[str]:
    """A line for each image that stands more than once, in one split or across splits."""
    where: dict[Path, list[str]] = {}
    for case in cases:
        where.setdefault(case.image.absolute(), []).append(case.split)
    return [f"image listed {len(s)} times ({', '.join(s)}): {p}" for p, s in where.items() if len(s) > 1]


def _same_names(cases: Iterable[Case]) -> list[str]:
    """A line for each name that cases still share: `a/b/ct` and `a_b/ct`, `ct.nii` and `ct.mha`."""
    images: dict[str, list[str]] = {}
    for case in cases:
        images.setdefault(case.name, []).append(str(case.image))
    return [f"cases share the name '{n}', rename one: {', '.join(p)}" for n, p in images.items() if len(p) > 1]
