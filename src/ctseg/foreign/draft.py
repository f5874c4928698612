"""A recipe in the making: values with the places they came from, and what was not carried over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ctseg.foreign.configs import Component, Expression


@dataclass(frozen=True)
class Left:
    """Something that was not carried over."""

    where: str
    name: str
    reason: str


@dataclass
class Draft:
    """A recipe in the making."""

    values: dict[str, Any] = field(default_factory=dict)
    """By `section.key`."""
    sources: dict[str, str] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    used: set[str] = field(default_factory=set)
    """Places of components that were translated."""
    unknown: dict[str, Any] = field(default_factory=dict)
    """Expressions by `section.key`: unless another place or --set gives the value, the recipe is refused."""
    num_classes: int | None = None
    """Channels that come out of the network."""

    def put(self, key: str, value: Any, source: str) -> None:
        """Sets a value; of two that differ the first stays and the second is listed, as is an expression."""
        if has_expression(value):
            self.unknown[key] = value
            self.leave_expression(value, source, key)
        elif key not in self.values:
            self.values[key], self.sources[key] = value, source
        elif self.values[key] != value:
            self.left.append(Left(source, f"{value!r:.80}", f"differs from {self.sources[key]}, which gave {key}"))

    def put_default(self, key: str, value: Any, reason: str) -> None:
        """Sets a value that nothing gave."""
        if key not in self.values and key not in self.unknown:
            self.put(key, value, f"ours: {reason}")

    def take(self, key: str, component: Component, argument: str, default: Any = None) -> None:
        """Sets a value from a component's argument."""
        self.used.add(component.where)
        value = component.args.get(argument, default)
        if value is not None:
            given = argument in component.args
            self.put(key, value, component.where_of(argument) if given else f"default of MONAI's {component.name}")

    def need(self, component: Component, argument: str, *allowed: Any) -> None:
        """Lists an argument with another value than those that a recipe's pipeline has."""
        value = component.args.get(argument)
        if argument in component.args and value not in allowed:
            known = " or ".join(map(told, allowed))
            reason = "a recipe has it not" if allowed == (None,) else f"ctseg has only {known}"
            self.left.append(Left(component.where_of(argument), f"{component.name} {argument}={told(value)}", reason))

    def leave_expression(self, value: Any, source: str, key: str) -> None:
        """Lists an expression that stands where `key` is told."""
        self.left.append(Left(source, told(value), f"an expression, which is not evaluated; give {key} with --set"))

    def leave(self, component: Component, reason: str) -> None:
        """Lists a component."""
        self.used.add(component.where)
        self.left.append(Left(component.where, component.name, reason))


def has_expression(value: Any) -> bool:
    """True if a program would be needed to know all of the value."""
    if isinstance(value, list):
        return any(has_expression(item) for item in value)
    return isinstance(value, Expression)


def told(value: Any) -> str:
    """The value in a message."""
    return str(value)[:80]
