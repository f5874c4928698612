"""A folder of another pipeline becomes a recipe, a data list, and a list of what neither can say."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ctseg.datalists import read_data_list
from ctseg.errors import CtsegError, ManifestError, RecipeError
from ctseg.foreign.configs import Component, Config, bundle_config, mmar_config, read_json
from ctseg.foreign.draft import Draft, Left
from ctseg.foreign.translate import translate
from ctseg.manifest import MAX_MANIFEST_BYTES, SPLITS, Manifest, manifest_from_data
from ctseg.recipe import RECIPE_ENTRY, Recipe, recipe_from_dict
from ctseg.workspace import manifest_to_dict

WEIGHTS = Path("models", "model.pt")
SHOWN = 12


@dataclass(frozen=True)
class DataList:
    """Cases under the names of ctseg's splits."""

    content: dict[str, Any]
    cases: int
    absolute: bool
    """False where nobody knows the folder of the images yet; training needs --data then."""


@dataclass(frozen=True)
class Imported:
    """What became of a folder."""

    recipe: Recipe
    sources: dict[str, str]
    left: tuple[Left, ...]
    notes: tuple[str, ...]
    data_list: DataList | None
    weights: Path | None
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a user adds to the folder."""

    folder: Path
    output: Path
    overrides: list[str]
    manifest: Path | None
    """A data list to take instead of the folder's own."""
    data: Path | None
    """The folder of the images."""


def import_mmar(request: Request) -> Imported:
    """The recipe and the data list of a Clara Train MMAR.

    Raises:
        CtsegError: if the folder is no MMAR or a file cannot be read.
        RecipeError: naming every value that no recipe can do without and that is not there.
    """
    configs = request.folder / "config"
    if not (configs / "config_train.json").is_file():
        raise CtsegError(f"'{request.folder}' is not an MMAR: it has no config/config_train.json")
    environment = read_json(configs / "environment.json") if (configs / "environment.json").is_file() else {}
    training, validation, inference = (
        mmar_config(configs / name, environment) if (configs / name).is_file() else Config(name, (), {})
        for name in ("config_train.json", "config_validation.json", "config_inference.json")
    )
    draft = translate(training, [inference, validation])
    data_list = _mmar_data_list(request, draft, training, [("testing", validation), ("test", inference)])
    names = {} if data_list is None else data_list.content["labels"]
    about = {"title": f"{request.folder.resolve().name}, imported from its MMAR", "labels": _labels(draft, names)}
    return _finish(request, draft, about, data_list, "an MMAR")


def import_bundle(request: Request) -> Imported:
    """The recipe of a MONAI bundle; its data list is code, so only `request.manifest` gives one.

    Raises:
        CtsegError: if the folder is no bundle or a file cannot be read.
        RecipeError: naming every value that no recipe can do without and that is not there.
    """
    configs = request.folder / "configs"
    found = {name: configs / f"{name}.json" for name in ("train", "inference", "evaluate")}
    read = {name: bundle_config(path) for name, path in found.items() if path.is_file()}
    if not read.keys() & {"train", "inference"}:
        raise CtsegError(
            f"'{request.folder}' is not a MONAI bundle that can be read: it has neither configs/train.json nor "
            f"configs/inference.json (other formats, YAML for one, are not read)"
        )
    metadata = read_json(configs / "metadata.json") if (configs / "metadata.json").is_file() else {}
    draft = Draft()
    about = _own_recipe(draft, configs / RECIPE_ENTRY)
    translate(read.get("train"), [read[name] for name in ("inference", "evaluate") if name in read], draft)
    data_list = None if request.manifest is None else _data_list(request, draft, request.manifest, {}, request.data)
    title = str(metadata.get("name") or metadata.get("task") or request.folder.resolve().name)
    given = {"title": f"{title[:100]}, imported from its MONAI bundle", "labels": _labels(draft, _channels(metadata))}
    return _finish(request, draft, {**given, **about}, data_list, "a MONAI bundle")


def network_values(path: Path) -> dict[str, Any]:
    """The recipe's table `network` for the network that a bundle's configuration defines, as far as one can say it."""
    draft = translate(None, [bundle_config(path)])
    return {key.removeprefix("network."): v for key, v in draft.values.items() if key.startswith("network.")}


def _own_recipe(draft: Draft, path: Path) -> dict[str, Any]:
    """Puts the values of a recipe that the bundle carries; returns those at its top level."""
    if not path.is_file():
        return {}
    plain = recipe_from_dict(read_json(path), f"recipe inside '{path}'").to_dict()
    for section, values in plain.items():
        if isinstance(values, dict) and section not in ("labels", "data"):
            for key, value in values.items():
                if value is not None:
                    draft.put(f"{section}.{key}", value, f"{RECIPE_ENTRY} {section}.{key}")
    return {key: plain[key] for key in ("name", "title", "source", "labels")}


def _finish(request: Request, draft: Draft, about: dict[str, Any], data_list: DataList | None, kind: str) -> Imported:
    folder = request.folder
    manifest = str((request.output / "manifest.json").absolute())
    plain: dict[str, Any] = {
        "name": re.sub(r"[^A-Za-z0-9_.-]+", "_", folder.resolve().name).lstrip("_.-")[:80] or "imported",
        "source": f"{kind}: the configuration files of '{folder.resolve().name}'",
        **about,
        "data": {"manifest": manifest},
    }
    for key, value in {**draft.unknown, **draft.values}.items():
        section, _, name = key.partition(".")
        plain.setdefault(section, {})[name] = value
    recipe = _read(plain, f"'{folder}'", request.overrides, draft)
    if data_list is None:
        draft.notes.append("no data list was carried over: name yours with --manifest when you train")
    elif not data_list.absolute:
        draft.notes.append("the folder of the images is not known here: name it with --data DIR when you train")
    weights = folder / WEIGHTS if (folder / WEIGHTS).is_file() else None
    if weights is None:
        draft.notes.append(f"no {WEIGHTS} in the folder: there are no weights to start from")
    kept = {key: text for key, text in draft.sources.items() if _value(recipe, key) == _as_read(draft.values[key])}
    sources = {"data.manifest": "written by the import", **kept}
    return Imported(recipe, sources, tuple(draft.left), tuple(draft.notes), data_list, weights, folder)


def _read(plain: dict[str, Any], subject: str, overrides: list[str], draft: Draft) -> Recipe:
    try:
        return recipe_from_dict(plain, f"{subject} does not say all that a recipe needs; give it with --set", overrides)
    except RecipeError as error:
        lines = [f"not carried over: {left.where}: {left.name}: {left.reason}" for left in draft.left]
        more = [f"... and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        raise RecipeError("\n  ".join([str(error), *lines[:SHOWN], *more])) from error


def _value(recipe: Recipe, key: str) -> Any:
    section, _, name = key.partition(".")
    part = recipe.to_dict().get(section)
    return part.get(name) if isinstance(part, dict) else None


def _as_read(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _labels(draft: Draft, names: Mapping[str, str]) -> dict[str, str]:
    """A name for each channel but the background; those that nobody named are numbered."""
    known = {str(key): _clean(value) for key, value in names.items() if str(key) != "0"}
    count = len(known) if draft.num_classes is None else draft.num_classes - 1
    shown = min(count, 256)  # one more than a recipe may have
    labels = {str(n): known.get(str(n)) or f"structure_{n}" for n in range(1, shown + 1)}
    return labels if len(set(labels.values())) == len(labels) else {n: f"structure_{n}" for n in labels}


def _clean(name: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in str(name)).strip()[:60]


def _channels(metadata: dict[str, Any]) -> dict[str, str]:
    """Names of the channels as a bundle's metadata gives them: network_data_format.outputs.pred.channel_def."""
    part: Any = metadata
    for key in ("network_data_format", "outputs", "pred", "channel_def"):
        part = part.get(key) if isinstance(part, dict) else None
    return {str(key): str(value) for key, value in part.items()} if isinstance(part, dict) else {}


def _mmar_data_list(
    request: Request, draft: Draft, training: Config, scoring: list[tuple[str, Config]]
) -> DataList | None:
    found = {
        split: component
        for config, at, split in [
            (training, "train.dataset", "training"),
            (training, "validate.dataset", "validation"),
            *[(config, "dataset", split) for split, config in scoring],
        ]
        for component in config.components
        if component.path == at
    }
    keys = {split: str(component.args.get("data_list_key", split)) for split, component in found.items()}
    first = found.get("training")
    if request.manifest is not None:
        return _data_list(request, draft, request.manifest, keys, request.data)
    if first is None:
        return None
    file = _confined(request.folder, first.args.get("data_list_file_path"))
    if file is None:
        where, name = first.where_of("data_list_file_path"), str(first.args.get("data_list_file_path"))[:120]
        draft.left.append(Left(where, name, "no such file inside the folder; name the data list with --manifest"))
        return None
    return _data_list(request, draft, file, keys, request.data or _image_folder(first))


def _image_folder(component: Component) -> Path | None:
    """The original's DATA_ROOT, where it is there."""
    text = component.args.get("data_file_base_dir")
    try:
        return Path(text) if isinstance(text, str) and Path(text).is_absolute() and Path(text).is_dir() else None
    except OSError:  # a name that is too long, or a folder of others
        return None


def _confined(folder: Path, text: Any) -> Path | None:
    """The file that `text` names inside `folder`, if there is one; neither '..' nor a link may lead out of it."""
    if not isinstance(text, str) or Path(text).is_absolute() or ".." in PurePosixPath(text).parts:
        return None
    path = folder / text
    try:
        return path if path.is_file() and path.resolve().is_relative_to(folder.resolve()) else None
    except OSError:
        return None


def _data_list(request: Request, draft: Draft, file: Path, keys: dict[str, str], root: Path | None) -> DataList | None:
    """The cases in `file`, checked as any data list is; None, with the reason listed, where they break a rule.

    Relative paths in a list of the user's own are taken from its folder, unless `root` is given.
    """
    source = f"data list of '{request.folder.resolve().name}'"
    try:
        if request.manifest is None:
            data = read_json(file, MAX_MANIFEST_BYTES)
        else:
            given = read_data_list(file)
            data = {"test": given} if isinstance(given, list) else given
            root = root or (file if file.is_dir() else file.parent)
        if not isinstance(data, dict):
            raise ManifestError(f"manifest '{file}': expected a JSON object or list, got {type(data).__name__}")
        about: dict[str, Any] = {key: data[key] for key in ("name", "labels", "licence") if key in data}
        content = {"source": source, **about, **_splits(data, keys)}
        manifest = manifest_from_data(content, file, Path() if root is None else root)
    except (ManifestError, RecipeError) as error:
        if request.manifest is not None:
            raise
        draft.left.append(Left(file.name, "data list", str(error).replace("\n", " ")[:300]))
        return None
    plain = manifest_to_dict(manifest) if root is not None else _relative(manifest)
    return DataList(plain, len(manifest.cases), root is not None)


def _splits(data: dict[str, Any], keys: dict[str, str]) -> dict[str, Any]:
    """The lists under ctseg's names; one that two splits share goes to the first of them."""
    wanted = {split: keys.get(split, split) for split in SPLITS}
    taken: set[str] = set()
    splits = {}
    for split, key in wanted.items():
        if key not in taken and key in data:
            taken.add(key)
            splits[split] = data[key]
    for split in SPLITS:  # a list under a name of ctseg's that no configuration uses
        if split not in splits and split in data and split not in taken:
            splits[split] = data[split]
    return splits


def _relative(manifest: Manifest) -> dict[str, Any]:
    plain = manifest_to_dict(manifest)
    for split in SPLITS:
        plain[split] = [
            {"image": str(case.image), **({} if case.label is None else {"label": str(case.label)})}
            for case in manifest.cases
            if case.split == split
        ]
    return plain


def report(imported: Imported, recipe: Path, manifest: Path | None) -> dict[str, Any]:
    """What was made and what was not, as plain data."""
    return {
        "recipe": str(recipe),
        "manifest": None if manifest is None else str(manifest),
        "cases": 0 if imported.data_list is None else imported.data_list.cases,
        "weights": None if imported.weights is None else str(imported.weights),
        "carried_over": imported.sources,
        "not_carried_over": [dataclasses.asdict(left) for left in imported.left],
        "notes": list(imported.notes),
    }
