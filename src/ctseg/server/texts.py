"""What text and JSON of clients may be: text that can be written as UTF-8, JSON that is not nested deeply."""

from __future__ import annotations

import json
import math
from typing import Any

from ctseg.server.problems import Invalid

MAX_DEPTH = 20
"""Of lists and objects within one another."""


def is_text(text: str) -> bool:
    """True if it can be written as UTF-8: file names and JSON may hold halves of characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable_text(text: str) -> str:
    """The text with halves of characters written out, so that it can be sent."""
    return text.encode(errors="backslashreplace").decode()


def check_json(data: Any, what: str) -> None:
    """Passes if all text in `data` can be written and it is not nested deeply.

    Raises:
        Invalid: if not.
    """
    level, depth = [data], 0
    while level:
        if not all(is_text(text) for text in level if isinstance(text, str)):
            raise Invalid(f"{what}: expected text in UTF-8, got half of a character")
        depth += any(isinstance(whole, dict | list) for whole in level)
        if depth > MAX_DEPTH:
            raise Invalid(f"{what}: expected at most {MAX_DEPTH} lists and objects within one another")
        level = [part for whole in level for part in _parts(whole)]


def read_json(text: str | bytes, what: str) -> Any:
    """The JSON in `text`; NaN and infinity are refused.

    Raises:
        Invalid: if it is none, or `check_json` refuses it.
    """
    try:
        data = json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise Invalid(f"{what}: expected JSON, got something that is not valid JSON") from error
    check_json(data, what)
    return data


def _parts(whole: Any) -> list[Any]:
    if isinstance(whole, dict):
        return [*whole.keys(), *whole.values()]
    return whole if isinstance(whole, list) else []


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def _finite(text: str) -> float:
    number = float(text)  # 1e999 is infinity
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def shown(text: str) -> str:
    """The beginning of what a client sent, in quotes, for an answer."""
    return repr(text[:80])
