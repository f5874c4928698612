"""A recipe as a TOML file that says for every number where it came from."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from ctseg.recipe import Recipe


def render_recipe(recipe: Recipe, sources: Mapping[str, str], head: list[str]) -> str:
    """The recipe's file: every value with its source as a comment; values that are off by default are left out.

    Args:
        recipe: What `load_recipe` will read back from it.
        sources: By `section.key`, or by the key alone at the top level.
        head: Lines of the comment at the top.
    """
    plain = recipe.to_dict()
    top = [_line(key, value, sources.get(key)) for key, value in plain.items() if isinstance(value, str)]
    blocks = ["\n".join([*(f"# {_one_line(line)}" for line in head), "", *top])]
    for section, values in plain.items():
        if isinstance(values, dict):
            blocks.append("\n".join([f"[{section}]", *_table(section, values, getattr(recipe, section), sources)]))
    return "\n\n".join(blocks) + "\n"


def _table(section: str, values: dict[str, Any], part: Any, sources: Mapping[str, str]) -> list[str]:
    defaults = {f.name: f.default for f in dataclasses.fields(part)} if dataclasses.is_dataclass(part) else {}
    return [
        _line(key, value, sources.get(f"{section}.{key}"))
        for key, value in values.items()
        if f"{section}.{key}" in sources or (value is not None and getattr(part, key, value) != defaults.get(key))
    ]


def _line(key: str, value: Any, source: str | None) -> str:
    text = f"{_key(key)} = {_value(value)}"
    return f"{text.ljust(37)} # {_one_line(source)}" if source else text


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _string(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(key)} = {_value(one)}" for key, one in value.items() if one is not None) + " }"
    return _string(value) if isinstance(value, str) else repr(value)


def _string(text: str) -> str:
    return '"' + "".join(_escaped(character) for character in text) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return "\\" + character
    if character.isprintable():
        return character
    return "?" if 0xD800 <= ord(character) < 0xE000 else f"\\U{ord(character):08X}"


def _one_line(text: str) -> str:
    """Comments may hold what stood in a stranger's file: no line break may end them."""
    return "".join(c if c.isprintable() else "?" for c in text)[:300]
