"""`ctseg recipes`: what can be trained, and with which numbers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from ctseg.commands.common import JsonFlag, Overrides, emit, pairs
from ctseg.errors import CtsegError
from ctseg.files import atomic_path
from ctseg.recipe import Recipe, load_recipe, recipe_names, recipe_path, variant_names
from ctseg.report.tables import render_table


def recipes(
    name: Annotated[str | None, typer.Argument(help="Show one recipe instead of the list.")] = None,
    copy: Annotated[Path | None, typer.Option(help="Copy the recipe's file here, for editing.")] = None,
    overrides: Overrides = None,
    as_json: JsonFlag = False,
) -> None:
    """List the recipes, or show one as a card (--json adds the network's parameter count)."""
    if name is None and (copy or overrides):
        raise CtsegError("--copy and --set need the NAME of a recipe")
    if copy and overrides:
        raise CtsegError("--copy copies the file as it is, --set would be lost; edit the copy instead")
    if name is None:
        _list(as_json)
    elif copy is not None:
        _copy(name, copy, as_json)
    else:
        recipe = load_recipe(name, overrides)
        emit({**recipe.to_dict(), "parameters": _parameters(recipe)} if as_json else None, _card(recipe), as_json)


def _list(as_json: bool) -> None:
    names = [n for base in recipe_names() for n in (base, *(f"{base}:{v}" for v in variant_names(base)))]
    found = [(name, load_recipe(name).title) for name in names]
    text = (
        render_table(("recipe", "title"), found) + "\n\n`ctseg recipes NAME` shows one, `ctseg train NAME` trains it."
    )
    emit([{"name": n, "title": t} for n, t in found], text, as_json)


def _copy(name: str, target: Path, as_json: bool) -> None:
    if target.exists():
        raise CtsegError(f"'{target}' exists; name a new file")
    if target.suffix != ".toml":
        raise CtsegError(f"'{target}': a recipe's file must end in .toml")
    load_recipe(name)  # a copy of a recipe that cannot be trained would help nobody
    with atomic_path(target) as temporary:
        shutil.copyfile(recipe_path(name), temporary)
    variant = name.rpartition(":")[2] if ":" in name else ""
    copied = f"{target}{':' + variant if variant else ''}"
    emit({"file": target, "recipe": copied}, f"copied to {target}; train it with: ctseg train {copied}", as_json)


def _parameters(recipe: Recipe) -> int:
    from ctseg.networks import count_parameters, network_for

    return count_parameters(network_for(recipe))


def _card(recipe: Recipe) -> str:
    sections: dict[str, Any] = recipe.to_dict()
    about = [(key, sections.pop(key)) for key in ("name", "title", "source")]
    rows: list[tuple[str, object]] = [*about, ("", "")]
    for section, values in sections.items():
        if values is None:
            rows.append((section, "off"))
        else:
            rows += [(f"{section}.{key}", _shown(value)) for key, value in values.items()]
    return pairs(rows)


def _shown(value: object) -> str:
    return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, list) else str(value)
