"""Configurations of MMARs and MONAI bundles as lists of components: class names with plain arguments.

Both are JSON. An MMAR writes `{"name": "UNet", "args": {...}}` (or "path" for own code) and `"{learning_rate}"` for a
value of `environment.json` or of the file's top level; a bundle writes `{"_target_": "UNet", ...}`, `"@id#key"` for
another value and `%` for a copy. These are followed to plain values. Everything else that a program would have to
evaluate (`#...` and `@...` in an MMAR, `$...` in a bundle) becomes an `Expression`, which nothing ever evaluates.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctseg.errors import RecipeError

MAX_CONFIG_BYTES = 4 * 2**20
"""A configuration is text of some kilobytes."""
MAX_DEPTH = 32
MAX_LINKS = 8
"""So many references may lead from one to the next."""
MAX_LIST = 64
"""A list that a reference leads to holds sizes or widths."""
MAX_COMPONENTS = 10_000
MAX_TEXT = 256
"""References, the values put in for names inside a text, and keys in messages: few of them must not fill the memory."""
OWN_CODE = "own code"


@dataclass(frozen=True, repr=False)
class Expression:
    """A value that only a program could give."""

    text: str

    def __str__(self) -> str:
        return self.text[:200]

    def __repr__(self) -> str:
        return f"the expression {str(self)!r}"


@dataclass(frozen=True)
class Component:
    """One object that the original program would have made."""

    name: str
    """Its class, without module."""
    module: str
    """Empty where the grammar leaves it out; `OWN_CODE` is never that of MONAI or PyTorch."""
    args: dict[str, Any]
    file: str
    path: str
    """Keys that lead to it: `train.pre_transforms[3]`."""
    args_key: str = ""
    """The key below `path` that holds the arguments, if they do not stand there themselves."""

    @property
    def where(self) -> str:
        """File and path."""
        return f"{self.file} {self.path}"

    def where_of(self, argument: str) -> str:
        """File and path of one argument."""
        return ".".join(part for part in (self.where, self.args_key, argument) if part)

    @property
    def is_own_code(self) -> bool:
        """True if its class is not of MONAI, PyTorch or ignite."""
        return self.module.partition(".")[0] not in ("", "monai", "torch", "ignite")


@dataclass(frozen=True)
class Config:
    """One file."""

    file: str
    components: tuple[Component, ...]
    values: dict[str, Any]
    """Top-level values that are no components, references followed."""


def read_json(path: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        RecipeError: if it cannot be read, is too large or too deep, gives a key twice, or is no JSON object.
    """
    try:
        if path.stat().st_size > max_bytes:
            raise RecipeError(f"'{path}': larger than {max_bytes >> 20} MiB; expected a configuration")
        text = path.read_text(encoding="utf-8-sig")
        data = json.loads(
            text, parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_without_repeated_keys
        )
    except OSError as error:
        raise RecipeError(f"'{path}': cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"'{path}': cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise RecipeError(f"'{path}': expected a JSON object, got {type(data).__name__}")
    if _deeper_than(data, MAX_DEPTH):
        raise RecipeError(f"'{path}': nested deeper than {MAX_DEPTH} levels; expected a configuration")
    return data


def mmar_config(path: Path, environment: dict[str, Any]) -> Config:
    """The components of one of an MMAR's config files; those with `"disabled": true` are left out.

    Raises:
        RecipeError: if it cannot be read or holds too much.
    """
    data = read_json(path)
    variables = {**environment, **data}

    def follow(text: str) -> Any:
        return _substituted(text, variables, MAX_LINKS)

    plain = _resolved(data, follow)
    found = _limited(path, _mmar_components(plain, path.name, ""))
    return Config(path.name, found, {k: v for k, v in plain.items() if not isinstance(v, dict | list)} | _seed(plain))


def bundle_config(path: Path) -> Config:
    """The components of one of a bundle's config files; those with `"_disabled_": true` are left out.

    Raises:
        RecipeError: if it cannot be read or holds too much.
    """
    data = read_json(path)

    def follow(text: str) -> Any:
        return _referenced(text, data, MAX_LINKS)

    plain = _resolved(data, follow)
    found = _limited(path, _bundle_components(plain, path.name, ""))
    values = {k: v for k, v in plain.items() if not isinstance(v, dict | list)}
    return Config(path.name, found, values | _seed_of_bundle(plain))


def _limited(path: Path, components: Iterator[Component]) -> tuple[Component, ...]:
    found = tuple(itertools.islice(components, MAX_COMPONENTS + 1))
    if len(found) > MAX_COMPONENTS:
        raise RecipeError(f"'{path}': more than {MAX_COMPONENTS} components; expected a configuration")
    return found


def _seed(plain: dict[str, Any]) -> dict[str, Any]:
    determinism = plain.get("determinism")
    return {"determinism.random_seed": determinism.get("random_seed")} if isinstance(determinism, dict) else {}


def _seed_of_bundle(plain: dict[str, Any]) -> dict[str, Any]:
    """The one number that every bundle gives inside an expression, simple enough to be read without running it."""
    lines = plain.get("initialize")
    for line in lines if isinstance(lines, list) else []:
        match = re.fullmatch(r"\$monai\.utils\.set_determinism\(\s*(?:seed\s*=\s*)?(\d{1,9})\s*\)", str(line).strip())
        if match:
            return {"initialize": int(match[1])}
    return {}


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse_constant(text[:80])


def _without_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two values for one key a reader would see the first, and JSON takes the last."""
    data = dict(pairs)
    if len(data) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"key {repeated[:80]!r} stands twice")
    return data


def _deeper_than(data: Any, levels: int) -> bool:
    level = [data]
    for _ in range(levels):
        level = [child for item in level for child in _children(item)]
        if not level:
            return False
    return True


def _children(item: Any) -> list[Any]:
    if isinstance(item, dict):
        return list(item.values())
    return item if isinstance(item, list) else []


def _resolved(item: Any, follow: Callable[[str], Any]) -> Any:
    """The same data with every string followed; what a reference leads to is taken as it is."""
    if isinstance(item, dict):
        return {key: _resolved(value, follow) for key, value in item.items()}
    if isinstance(item, list):
        return [_resolved(value, follow) for value in item]
    return follow(item) if isinstance(item, str) else item


def _substituted(text: str, variables: dict[str, Any], links: int) -> Any:
    """`"{NAME}"` becomes the variable's value, with its type; names inside a longer text become text."""
    if text.startswith(("#", "@")):
        return Expression(text)
    if len(text) > MAX_TEXT:
        return text
    whole = re.fullmatch(r"\{(\w+)\}", text)
    if whole:
        value = variables.get(whole[1])
        if value is None or isinstance(value, dict | list) or links == 0:
            return Expression(text)
        return _substituted(value, variables, links - 1) if isinstance(value, str) else value

    def inside(match: re.Match[str]) -> str:
        value = variables.get(match[1])
        text = str(value) if isinstance(value, str | int | float) else match[0]
        return text if len(text) <= MAX_TEXT else match[0]

    return re.sub(r"\{(\w+)\}", inside, text)


def _referenced(text: str, data: dict[str, Any], links: int) -> Any:
    """`"@id"` and `"%id"` become the plain value they name in the same file."""
    if not text.startswith(("@", "%")):
        return Expression(text) if text.startswith("$") else text
    if len(text) > MAX_TEXT or not re.fullmatch(r"[@%]\w+((#|::)\w+)*", text) or links == 0:
        return Expression(text)
    value: Any = data
    for key in re.split(r"#|::", text[1:]):
        if isinstance(value, list) and key.isdecimal() and int(key) < len(value):
            value = value[int(key)]
        elif isinstance(value, dict) and key in value:
            value = value[key]
        else:
            return Expression(text)
    if isinstance(value, str):
        return _referenced(value, data, links - 1)
    return value if _is_simple(value) else Expression(text)  # what holds objects is read where it is defined


def _is_simple(value: Any) -> bool:
    if isinstance(value, list):
        return len(value) <= MAX_LIST and not any(isinstance(item, dict | list | str) for item in value)
    return not isinstance(value, dict)


def _mmar_components(item: Any, file: str, path: str) -> Iterator[Component]:
    if isinstance(item, dict):
        if item.get("disabled") is True:
            return
        kind, args = item.get("path", item.get("name")), item.get("args", {})
        if isinstance(kind, str) and path and isinstance(args, dict):
            module, _, name = kind.rpartition(".")
            module = module or (OWN_CODE if "path" in item else "")
            data_list = {key: value for key, value in item.items() if key.startswith("data_")}
            yield Component(name, module, {**data_list, **args}, file, path, "args")
    yield from _inside(item, file, path, _mmar_components)


def _bundle_components(item: Any, file: str, path: str) -> Iterator[Component]:
    if isinstance(item, dict):
        if item.get("_disabled_") is True:
            return
        kind = item.get("_target_")
        if isinstance(kind, str):
            module, _, name = kind.rpartition(".")
            args = {key: value for key, value in item.items() if not key.startswith("_")}
            yield Component(name, module, args, file, path)
    yield from _inside(item, file, path, _bundle_components)


def _inside(
    item: Any, file: str, path: str, walk: Callable[[Any, str, str], Iterator[Component]]
) -> Iterator[Component]:
    if isinstance(item, dict):
        for key, value in item.items():
            yield from walk(value, file, f"{path}.{key[:MAX_TEXT]}" if path else key[:MAX_TEXT])
    elif isinstance(item, list):
        for n, value in enumerate(item):
            yield from walk(value, file, f"{path}[{n}]")
