"""Reads plain mappings (from TOML or JSON) into frozen dataclasses and reports every problem at once.

Used for recipes and for everything else that comes from a file. Unknown keys are refused with a suggestion; a
number outside its `Range` is named with its bounds. Nothing is converted but int -> float and list -> tuple.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ctseg.errors import did_you_mean

T = TypeVar("T")
LARGEST_INT = 2**63 - 1
"""As in TOML; Python's own integers have no end."""


@dataclass(frozen=True)
class Range:
    """Bounds of a number; `above` excludes its value, `at_least` and `at_most` include theirs."""

    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None

    def problem(self, value: float) -> str | None:
        """What `value` breaks, or None."""
        if self.above is not None and value <= self.above:
            return f"must be above {self.above}, got {value}"
        if self.at_least is not None and value < self.at_least:
            return f"must be at least {self.at_least}, got {value}"
        if self.at_most is not None and value > self.at_most:
            return f"must be at most {self.at_most}, got {value}"
        if self.below is not None and value >= self.below:
            return f"must be below {self.below}, got {value}"
        return None


def read_dataclass(cls: type[T], data: Any, path: str, problems: list[str]) -> T | None:
    """An instance of `cls` from `data`, or None with every problem appended to `problems`.

    `path` names the place for messages ("optimizer"). A dataclass may have a method `check()` that returns
    further problems as "key: text" once all its fields are readable.
    """
    if not isinstance(data, Mapping):
        problems.append(f"{path or 'file'}: expected a table, got {data!r:.200}")
        return None
    hints = get_type_hints(cls, include_extras=True)
    fields = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]  # cls is a dataclass by contract
    before = len(problems)
    if "kind" in fields and data.get("kind") not in get_args(hints["kind"]):
        problems.append(_wrong_kind(get_args(hints["kind"]), data.get("kind"), path))
        return None
    for key in data:
        if key not in fields:
            problems.append(f"{_join(path, str(key))}: unknown key; {did_you_mean(str(key), fields)}")
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name in data:
            values[name] = _read_value(hints[name], data[name], _join(path, name), problems)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            problems.append(f"{_join(path, name)}: missing")
    if len(problems) > before:
        return None
    instance = cls(**values)
    if hasattr(instance, "check"):
        problems.extend(_join(path, text) for text in instance.check())
    return instance if len(problems) == before else None


def _wrong_kind(known: tuple[str, ...], kind: Any, path: str) -> str:
    return f"{_join(path, 'kind')}: expected one of {', '.join(known)}, got {kind!r:.200}"


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _read_value(hint: Any, value: Any, path: str, problems: list[str]) -> Any:
    origin = get_origin(hint)
    if origin is Annotated:
        base, *extras = get_args(hint)
        result = _read_value(base, value, path, problems)
        for extra in extras:
            if isinstance(extra, Range) and isinstance(result, (int, float)):
                text = extra.problem(result)
                if text:
                    problems.append(f"{path}: {text}")
        return result
    if origin in (Union, types.UnionType):
        return _read_union(get_args(hint), value, path, problems)
    if origin is Literal:
        if not any(value == option and type(value) is type(option) for option in get_args(hint)):
            problems.append(f"{path}: expected one of {', '.join(map(str, get_args(hint)))}, got {value!r:.200}")
        return value
    if origin is tuple:
        return _read_tuple(get_args(hint), value, path, problems)
    if origin is dict:
        return _read_dict(get_args(hint), value, path, problems)
    if dataclasses.is_dataclass(hint):
        return read_dataclass(hint, value, path, problems)  # type: ignore[arg-type]  # a class, not an instance
    return _read_scalar(hint, value, path, problems)


def _read_union(options: tuple[Any, ...], value: Any, path: str, problems: list[str]) -> Any:
    if type(None) in options:
        rest = [o for o in options if o is not type(None)]
        return None if value is None else _read_value(Union[tuple(rest)], value, path, problems)  # noqa: UP007  # built at run time
    kinds = {get_args(get_type_hints(option)["kind"])[0]: option for option in options}
    kind = value.get("kind") if isinstance(value, Mapping) else None
    if not isinstance(kind, str) or kind not in kinds:
        problems.append(_wrong_kind(tuple(kinds), kind, path))
        return None
    return read_dataclass(kinds[kind], value, path, problems)


def _read_tuple(args: tuple[Any, ...], value: Any, path: str, problems: list[str]) -> Any:
    any_length = len(args) == 2 and args[1] is Ellipsis
    wanted = "a list" if any_length else f"{len(args)} values"
    if not isinstance(value, (list, tuple)) or not (any_length or len(value) == len(args)):
        problems.append(f"{path}: expected {wanted}, got {value!r:.200}")
        return None
    hints = [args[0]] * len(value) if any_length else list(args)
    return tuple(_read_value(h, v, f"{path}[{n}]", problems) for n, (h, v) in enumerate(zip(hints, value, strict=True)))


def _read_dict(args: tuple[Any, ...], value: Any, path: str, problems: list[str]) -> Any:
    if not isinstance(value, Mapping):
        problems.append(f"{path}: expected a table, got {value!r:.200}")
        return None
    return {str(k): _read_value(args[1], v, _join(path, str(k)), problems) for k, v in value.items()}


def _read_scalar(hint: type, value: Any, path: str, problems: list[str]) -> Any:
    if isinstance(value, int) and not -LARGEST_INT <= value <= LARGEST_INT:
        problems.append(f"{path}: expected {hint.__name__}, got a number beyond 64 bits")
        return None
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        problems.append(f"{path}: expected {hint.__name__}, got {value!r:.200}")
        return None
    if isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{path}: expected a finite number, got {value}")
        return None
    return value
