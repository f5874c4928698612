"""What an output folder holds already, and how it was made: results that were made differently must not mix."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ctseg.errors import CtsegError


def read_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file; an empty one if the file holds something else, None if there is no file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return {}
    return data if isinstance(data, dict) else {}


def differences(before: Mapping[str, Any], now: Mapping[str, Any], strict: Mapping[str, Any]) -> list[str]:
    """What of `before` makes other results than `now`, as "name value".

    Args:
        before: Options that results were made with; one that is not recorded counts as its strict value.
        now: Options that are asked for.
        strict: For options that refuse a case unless it is allowed, the value that refuses: what was made under it is
            the same under any.
    """
    different = []
    for name, wanted in now.items():
        value = before.get(name, strict.get(name))
        if value not in (wanted, strict.get(name)):
            different.append(f"{name} {', '.join(map(str, value)) if isinstance(value, list) else value}")
    return different


def own_manifest(path: Path, maker: str) -> dict[str, Any]:
    """The manifest that `maker` wrote before, by its key `source`; an empty one if there is none.

    Raises:
        CtsegError: if another program or a person wrote it.
    """
    manifest = read_object(path)
    if manifest is not None and manifest.get("source") != maker:
        raise CtsegError(f"'{path}' was not written by `{maker}` and would be replaced; choose another folder")
    return manifest or {}


def merged_entries(
    manifest: Mapping[str, Any], split: str, files: Sequence[str], folder: Path, new: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The entries of a split whose `files` are still there, with `new` ones in the place of those of the same image."""
    listed = manifest.get(split)
    before = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    kept = [
        one for one in before if all(isinstance(one.get(key), str) and (folder / one[key]).exists() for key in files)
    ]
    return list({one["image"]: one for one in (*kept, *new)}.values())
