"""A recipe: every number of one pipeline, as frozen dataclasses read from one TOML file.

Recipes are data: no class paths, no expressions, no lists of transforms. The order of steps is code. A recipe is
named `spleen`, one of its variants `spleen:small`, a file by its path. Order of spatial numbers is x, y, z.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctseg.errors import RecipeError, list_problems
from ctseg.specs import (
    Augmentation,
    BasicUNetSpec,
    ClicksSpec,
    CodeSpec,
    Data,
    DiceCESpec,
    DiceSpec,
    Inference,
    LesionSpec,
    NetworkSpec,
    OptimizerSpec,
    Preprocess,
    Sampling,
    ScheduleSpec,
    Training,
)
from ctseg.strict import read_dataclass

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_TOML_CHARACTERS, MAX_DOTS = 2**20, 200
"""Of a recipe's file, and in one of its lines: a key of many parts takes memory by the square of their number."""
RECIPE_FOLDER = Path(__file__).parent / "recipes"
RECIPE_ENTRY = "ctseg_recipe.json"
"""Name under which an exported model, a bundle too, carries its recipe."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that defines a pipeline; read from TOML by `load_recipe`, carried inside every checkpoint and export."""

    name: str
    title: str
    source: str
    labels: dict[str, str]
    """Label value (as a string, "1" upwards without gaps) -> name of the structure."""
    data: Data
    preprocess: Preprocess
    network: NetworkSpec
    sampling: Sampling
    augmentation: Augmentation
    objective: DiceSpec | DiceCESpec
    optimizer: OptimizerSpec
    schedule: ScheduleSpec
    training: Training
    inference: Inference
    lesions: LesionSpec | None = None
    """Where given, `validate` also scores every lesion."""
    clicks: ClicksSpec | None = None
    """Where given, the network is told by clicks what to segment, and any organ is the one structure."""
    codes: dict[str, CodeSpec] | None = None
    """Name of a structure -> what it is, for DICOM outputs; a label of another name is told by its name only."""

    def check(self) -> Iterator[str]:
        """Problems beyond those of single values, as "key: text"."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.:-]*", self.name):
            yield f"name: expected letters, digits, '_', '-' and '.', as it names folders, got {self.name!r}"
        if list(self.labels) != [str(n + 1) for n in range(len(self.labels))] or not self.labels:
            yield f'labels: expected "1", "2", ... without gaps, got {", ".join(self.labels) or "none"}'
        if len(set(self.labels.values())) < len(self.labels):
            yield f"labels: every structure must have its own name, got {', '.join(self.labels.values())}"
        if len(self.labels) > 255:
            yield f"labels: at most 255 fit a uint8 mask, got {len(self.labels)}"
        if self.preprocess.binarize_labels and len(self.labels) != 1:
            yield f"preprocess.binarize_labels: needs exactly one structure, got {len(self.labels)}; set it to false"
        for key, on in (("clip", not self.preprocess.clip), ("keep_slice_spacing", self.preprocess.keep_slice_spacing)):
            if on and self.clicks is None:
                yield f"preprocess.{key}: only recipes with [clicks] may set it; leave it out"
        patience, interval = self.training.early_stop_epochs, self.training.validation_interval_epochs
        if patience is not None and patience < interval:
            yield f"training.early_stop_epochs: must hold a validation, which comes every {interval}, got {patience}"
        for key, size in (
            ("sampling.patch_size", self.sampling.patch_size),
            ("inference.window_size", self.inference.window_size),
        ):
            yield from self._check_size(key, size)
        if self.clicks is not None:
            yield from self._check_clicks()
        size = self.sampling.patch_size
        if self.augmentation.rotate90_probability and size[0] != size[1]:
            yield f"sampling.patch_size: quarter turns need x = y, got {list(size)}; or set rotate90_probability = 0"

    def _check_size(self, key: str, size: tuple[int, int, int]) -> Iterator[str]:
        multiple = self.network.size_multiple
        if self.is_2d and size[2] != 1:
            yield f"{key}: a network with 2 dimensions takes one slice, so the third size must be 1, got {list(size)}"
        if any(n % multiple for n in (size[:2] if self.is_2d else size)):
            yield f"{key}: every size must be a multiple of {multiple} (the network's strides), got {list(size)}"
        elif isinstance(self.network, BasicUNetSpec) and max(size) == multiple:
            yield f"{key}: one size must be {2 * multiple} or more, to normalise the deepest level, got {list(size)}"

    def _check_clicks(self) -> Iterator[str]:
        """What a recipe with clicks must have, and must not."""
        if len(self.labels) != 1:
            yield f"labels: a recipe with clicks has one structure, whatever is clicked on, got {len(self.labels)}"
        if self.objective.include_background:
            yield "objective.include_background: clicks have one score, the foreground's; set it to false"
        if self.sampling.positive_fraction != 1:
            got = self.sampling.positive_fraction
            yield f"sampling.positive_fraction: clicks need 1, as something is clicked on, got {got:g}"
        if self.sampling.patch_size != self.inference.window_size:
            yield "inference.window_size: must be sampling.patch_size, as clicks are trained on what is seen"
        for key, unwanted in (
            ("preprocess.binarize_labels", self.preprocess.binarize_labels),
            ("preprocess.crop_foreground", self.preprocess.crop_foreground),
        ):
            if unwanted:
                yield f"{key}: not in a recipe with clicks, which takes organs one by one; set it to false"
        if self.lesions is not None:
            yield "lesions: not in a recipe with clicks; remove the table"

    @property
    def is_2d(self) -> bool:
        """True of a network that sees single slices."""
        return isinstance(self.network, BasicUNetSpec) and self.network.dimensions == 2

    @property
    def num_classes(self) -> int:
        """Labels and background."""
        return len(self.labels) + 1

    @property
    def input_channels(self) -> int:
        """The CT, and with clicks the maps of positive and of negative ones."""
        return 1 if self.clicks is None else 3

    @property
    def output_channels(self) -> int:
        """A score for each class; with clicks only the foreground's."""
        return self.num_classes if self.clicks is None else 1

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `recipe_from_dict` reads back."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def flat(self) -> dict[str, Any]:
        """The same as "section.key" -> value, as `--set` names them."""
        return {
            f"{section}.{key}" if key else section: value
            for section, part in self.to_dict().items()
            for key, value in (part.items() if isinstance(part, dict) else [("", part)])
        }

    @property
    def slug(self) -> str:
        """The name as it stands in folder names."""
        return self.name.replace(":", "-")


def recipe_names() -> list[str]:
    """Names of the recipes that ship with ctseg, sorted: one for each file in `recipes/`."""
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.toml"))


def variant_names(name: str) -> list[str]:
    """Names of a shipped recipe's variants, in the file's order."""
    return list(_read_toml(RECIPE_FOLDER / f"{name}.toml").get("variants", {}))


def recipe_path(name: str) -> Path:
    """The file behind a recipe's name or path.

    Raises:
        RecipeError: if there is no such recipe or file.
    """
    base = name.rpartition(":")[0] or name
    if base in recipe_names():
        return RECIPE_FOLDER / f"{base}.toml"
    for path in (Path(name), Path(base)):
        if path.suffix in (".toml", ".json") and path.is_file():
            return path
    raise RecipeError(
        f"recipe '{name}': no such recipe; known: {', '.join(recipe_names())}, or the path of a .toml or .json file"
    )


def load_recipe(name: str, overrides: list[str] | None = None) -> Recipe:
    """The recipe called `name` (`spleen`, `spleen:small`, `my.toml`) with `section.key=value` overrides applied.

    Raises:
        RecipeError: naming every problem of the file and of the overrides at once.
    """
    path = recipe_path(name)
    data = _read_json(path) if path.suffix == ".json" else _read_toml(path)
    variants = data.pop("variants", {})
    if ":" in name and not Path(name).is_file():
        variant = name.rpartition(":")[2]
        known = variants if isinstance(variants, Mapping) else {}
        if not isinstance(known.get(variant), Mapping):
            raise RecipeError(f"recipe '{name}': no variant '{variant}'; known: {', '.join(known) or 'none'}")
        data = _merge(data, known[variant])
        data["name"] = f"{data.get('name')}:{variant}"
    return recipe_from_dict(data, f"recipe '{name}'", overrides)


def recipe_from_dict(data: Any, subject: str, overrides: list[str] | None = None) -> Recipe:
    """The recipe in plain data, as a checkpoint or an export carries it, with `section.key=value` overrides applied.

    Raises:
        RecipeError: naming every problem at once, after `subject`.
    """
    problems: list[str] = []
    for override in overrides or []:
        data = _merge(data, _parse_override(override, problems))
    recipe = read_dataclass(Recipe, data, "", problems)
    if recipe is None or problems:
        raise RecipeError(list_problems(subject, problems))
    return recipe


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if len(text) > MAX_TOML_CHARACTERS or any(line.count(".") > MAX_DOTS for line in text.splitlines()):
            raise ValueError(f"more than {MAX_TOML_CHARACTERS} characters, or {MAX_DOTS} dots in a line")
        data: dict[str, Any] = tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"recipe '{path}': cannot be read as TOML: {error}") from error
    return data


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise RecipeError(f"recipe '{path}': cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"recipe '{path}': expected a JSON object, got {type(data).__name__}")
    return data


def _merge(base: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `changes` on top, table by table; a table whose `kind` changes is replaced as a whole."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and value.get("kind") in (None, old.get("kind")):
            value = _merge(dict(old), value)
        merged[key] = value
    return merged


def _parse_override(text: str, problems: list[str]) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip() or "\n" in text:
        problems.append(f"--set {text}: expected section.key=value")
        return {}
    try:
        parsed: Any = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        parsed = value.strip()  # a bare word is a string, so that no quotes are needed in a shell
    nested: dict[str, Any] = {}
    table = nested
    *parents, last = key.strip().split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
    table[last] = parsed
    return nested
