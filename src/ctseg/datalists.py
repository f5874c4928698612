"""Data lists on disk: a JSON, text or CSV file, or a folder of images and labels, as plain data of one grammar.

The grammar is the one of the Medical Segmentation Decathlon and MONAI, see `manifest`, which turns it into cases.
"""

from __future__ import annotations

import csv
import io
import json
from collections import defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

from ctseg.errors import ManifestError, did_you_mean, list_problems

SPLITS = ("training", "validation", "testing", "test")
IMAGE_SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".mha")
LIST_SUFFIXES = (".json", ".txt", ".csv")
MAX_MANIFEST_BYTES = 64 * 2**20
"""A data list is text; anything larger is not one."""

_COLUMNS = ("image", "label", "split", "patient", "weight")
_FOLDERS = (("imagesTr", "labelsTr"), ("images", "labels"))
_FIRST_CHANNEL = "_0000"
"""nnU-Net ends the name of an image, not that of its label, with the number of the channel."""


def is_image_name(path: Path | PurePosixPath) -> bool:
    """True for names of NIfTI, NRRD and MHA files."""
    return path.name.lower().endswith(IMAGE_SUFFIXES)


def image_stem(path: Path | PurePosixPath) -> str:
    """A file's name without its image suffix: `a/ct.nii.gz` -> `ct`."""
    lower = path.name.lower()
    suffix = next((s for s in IMAGE_SUFFIXES if lower.endswith(s)), path.suffix)
    return path.name[: len(path.name) - len(suffix)] if suffix else path.name


def read_data_list(path: Path) -> Any:
    """The plain data of a list: as it stands in a JSON file, else split -> entries or a list of paths.

    Args:
        path: A `.txt` file (one path a line), a `.csv` file (see `_read_csv`), a folder (see `_read_folder`), or
            anything else, which is read as JSON.

    Raises:
        ManifestError: if it cannot be read, naming every problem at once.
    """
    if path.is_dir():
        return _read_folder(path)
    text = _read_text(path)
    if path.suffix.lower() == ".txt":
        return [line.strip() for line in text.splitlines() if line.strip()]
    if path.suffix.lower() == ".csv":
        return _read_csv(text, path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"manifest '{path}': not valid JSON: {error}") from error


def _read_text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise ManifestError(f"manifest '{path}': larger than {MAX_MANIFEST_BYTES >> 20} MiB, not a data list")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ManifestError(f"manifest '{path}': cannot be read: {error}; save it as UTF-8") from error
    except OSError as error:
        raise ManifestError(f"manifest '{path}': cannot be read: {error.strerror}; check the path") from error


def _read_csv(text: str, path: Path) -> dict[str, list[dict[str, Any]]]:
    """Split -> entries of a table with a header; the separator is whichever of , ; and tab its header has most of.

    A row without `split` belongs to `training` if it has a label, else to `test`.
    """
    header_line = text.partition("\n")[0]
    delimiter = max(",;\t", key=header_line.count)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise ManifestError(f"manifest '{path}': not valid CSV: {error}") from error
    header = [name.strip().lower() for name in rows[0]] if rows else []
    problems = _header_problems(header)
    splits: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for number, row in enumerate([] if problems else rows[1:], start=2):
        cells = [cell.strip() for cell in row]
        if not any(cells):
            continue
        if len(cells) > len(header):
            problems.append(f"row {number}: {len(cells)} cells, but the header has {len(header)}; quote the separator")
            continue
        entry: dict[str, Any] = {name: cell for name, cell in zip(header, cells, strict=False) if cell}
        split = entry.pop("split", "training" if "label" in entry else "test")
        if "image" not in entry:
            problems.append(f"row {number}: image is empty")
        if split not in SPLITS:
            problems.append(f"row {number}: split: expected one of {', '.join(SPLITS)}")
        if "weight" in entry:
            entry["weight"] = _number(entry["weight"])
        splits[split].append(entry)
    if problems:
        raise ManifestError(list_problems(f"manifest '{path}'", problems))
    return dict(splits)


def _header_problems(header: list[str]) -> list[str]:
    problems = []
    for name in header:
        if name not in _COLUMNS:
            hint = did_you_mean(name, _COLUMNS)
            problems.append(f"the first row must be the names of the columns; unknown column '{name:.80}'; {hint}")
        elif header.count(name) > 1:
            problems.append(f"column '{name}' stands {header.count(name)} times")
    if "image" not in header:
        problems.append("no column 'image'; the first row must be the names of the columns")
    return list(dict.fromkeys(problems))


def _number(text: str) -> float | str:
    """A weight as a number; what is none stays text, which the grammar refuses."""
    try:
        return float(text)
    except ValueError:
        return text


def _read_folder(path: Path) -> dict[str, Any]:
    """Split -> entries of a folder that holds `imagesTr` and `labelsTr`, or `images` and `labels`.

    An image and its label have the same name, apart from the suffix and from nnU-Net's `_0000`. All are `training`. Of
    `imagesTs` those with a label in `labelsTs` are `testing`, the others `test`.
    """
    images, labels = next((pair for pair in _FOLDERS if (path / pair[0]).is_dir()), (None, None))
    if images is None or labels is None:
        wanted = " or ".join(f"{i} and {la}" for i, la in _FOLDERS)
        raise ManifestError(f"folder '{path}': expected {wanted} in it, or name a list ({', '.join(LIST_SUFFIXES)})")
    problems: list[str] = []
    training = _pairs(path, images, labels, problems)
    problems += [f"no label for {e['image']}: expected {labels}/NAME" for e in training if "label" not in e]
    if not training:
        problems.append(f"{images} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    others = _pairs(path, "imagesTs", "labelsTs", problems) if images == "imagesTr" else []
    if problems:
        raise ManifestError(list_problems(f"folder '{path}'", problems))
    return {
        "name": path.resolve().name,
        "training": training,
        "testing": [entry for entry in others if "label" in entry],
        "test": [entry for entry in others if "label" not in entry],
    }


def _pairs(path: Path, images: str, labels: str, problems: list[str]) -> list[dict[str, str]]:
    """An entry for each image of a folder, with its label if there is one of its name in the other folder."""
    labels_by_stem: dict[str, str] = {}
    for name in _image_names(path / labels):
        if other := labels_by_stem.get(image_stem(Path(name))):
            problems.append(f"{labels}/{other} and {labels}/{name} are labels of one name, remove one")
        labels_by_stem[image_stem(Path(name))] = name
    entries = []
    used = set()
    for name in _image_names(path / images):
        stem = image_stem(Path(name))
        if stem not in labels_by_stem and stem.endswith(_FIRST_CHANNEL):
            stem = stem.removesuffix(_FIRST_CHANNEL)
        label = labels_by_stem.get(stem)
        if stem in used and label:
            problems.append(f"two images for {labels}/{label}, the second is {images}/{name}; remove one")
        used.add(stem)
        entries.append({"image": f"{images}/{name}", **({"label": f"{labels}/{label}"} if label else {})})
    lonely = [name for stem, name in labels_by_stem.items() if stem not in used]
    problems += [f"no image for {labels}/{name}: expected {images}/NAME" for name in lonely]
    return entries


def _image_names(folder: Path) -> list[str]:
    """Names of the images in a folder, sorted; hidden files, such as the `._ct.nii.gz` of a Mac, do not count."""
    if not folder.is_dir():
        return []
    return sorted(file.name for file in folder.iterdir() if is_image_name(file) and not file.name.startswith("."))
