"""Choosing series by a rule such as "SliceThickness<=3 and not LOCALIZER, thinnest".

    rule       = [condition] ["," choice] | choice | uid
    condition  = part {"or" part}           part = factor {"and" factor}
    factor     = "not" factor | "(" condition ")" | comparison | "#" number | word
    comparison = FIELD (< | <= | > | >= | = | == | != | ~) value
    choice     = thinnest | thickest | most-slices | all

`~` means "contains", in any case. A word alone asks whether it is in ImageType or SeriesDescription. Nothing of a rule
is evaluated as code or as a regular expression.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ctseg.errors import CtsegError, did_you_mean
from ctseg.io.dicom.frames import texts
from ctseg.io.dicom.series import Series

MAX_LENGTH = 1000
MAX_DEPTH = 20
"""Of brackets and `not` within each other."""
FIELDS = (
    "AcquisitionNumber", "BodyPartExamined", "Columns", "ContrastBolusAgent", "ConvolutionKernel", "FilterType",
    "GantryDetectorTilt", "ImageType", "KVP", "Manufacturer", "ManufacturerModelName", "Modality", "PatientPosition",
    "ProtocolName", "Rows", "ScanOptions", "SeriesDate", "SeriesDescription", "SeriesInstanceUID", "SeriesNumber",
    "SliceThickness", "StudyDate", "StudyDescription", "StudyInstanceUID",
)  # fmt: skip
"""The DICOM keywords that a rule may name, besides Slices and SpacingZ, which are measured."""

Test = Callable[[Series], bool]

_CHOICES = ("thinnest", "thickest", "most-slices", "all")
_ORDERS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_TOKEN = re.compile(
    r"\s*(?:(?P<quoted>\"[^\"]*\"|'[^']*')|(?P<sign><=|>=|==|!=|[<>=~(),#])|(?P<word>[^\s<>=!~(),#\"']+))"
)
_UID = re.compile(r"[0-9.]{1,64}")


@dataclass(frozen=True)
class _Token:
    text: str
    kind: str
    position: int


def choose(series: Sequence[Series], rule: str | None) -> list[Series]:
    """The CT series that a rule leaves; without a rule, every CT series. A number or UID alone may name any series.

    Raises:
        CtsegError: if the rule is wrong; the message says where.
    """
    cts = [one for one in series if one.is_ct]
    if rule is None:
        return cts
    if _UID.fullmatch(rule.strip()) and "." in rule:
        return [one for one in series if one.uid == rule.strip()]
    test, choice = _Parser(rule).rule()
    numbered = re.fullmatch(r"\s*#\s*\d+\s*", rule) is not None
    return _chosen([one for one in (series if numbered else cts) if test(one)], choice)


def _chosen(series: list[Series], choice: str) -> list[Series]:
    measures: dict[str, Callable[[Series], float]] = {
        "thinnest": lambda one: one.spacing_mm[2] or float("inf"),
        "thickest": lambda one: -(one.spacing_mm[2] or 0.0),
        "most-slices": lambda one: -len(one),
        "all": lambda _: 0.0,
    }
    measured = [round(measures[choice](one), 3) for one in series]
    return [one for one, value in zip(series, measured, strict=True) if value == min(measured)]


class _Parser:
    """Recursive descent over the tokens of one rule."""

    def __init__(self, rule: str) -> None:
        self._rule = rule
        if len(rule) > MAX_LENGTH:
            raise CtsegError(f"--series: a rule has at most {MAX_LENGTH} characters, got {len(rule)}")
        self._tokens = self._split()
        self._next = 0
        self._depth = 0

    def rule(self) -> tuple[Test, str]:
        """The test of a whole rule, and what to choose of those that pass."""
        if self._peek().text.lower() in _CHOICES and self._peek().kind == "word":
            test: Test = _always
        else:
            test = self._condition()
            if not self._take(","):
                self._end()
                return test, "all"
        choice = self._advance()
        if choice.text.lower() not in _CHOICES:
            raise self._error(choice, f"expected one of {', '.join(_CHOICES)}")
        self._end()
        return test, choice.text.lower()

    def _condition(self) -> Test:
        tests = [self._part()]
        while self._take("or"):
            tests.append(self._part())
        return tests[0] if len(tests) == 1 else lambda one: any(test(one) for test in tests)

    def _part(self) -> Test:
        tests = [self._factor()]
        while self._take("and"):
            tests.append(self._factor())
        return tests[0] if len(tests) == 1 else lambda one: all(test(one) for test in tests)

    def _factor(self) -> Test:
        token = self._peek()
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._error(token, f"brackets and 'not' more than {MAX_DEPTH} deep")
        try:
            if self._take("not"):
                inner = self._factor()
                return lambda one: not inner(one)
            if self._take("("):
                test = self._condition()
                if not self._take(")"):
                    raise self._error(self._peek(), "expected )")
                return test
            return self._comparison()
        finally:
            self._depth -= 1

    def _comparison(self) -> Test:
        token = self._advance()
        if token.text == "#" and token.kind == "sign":
            number = self._advance()
            if not number.text.isdecimal():
                raise self._error(number, "expected the number of a series after #")
            return lambda one: one.number == int(number.text)
        if token.kind == "sign" or token.kind == "end":
            raise self._error(token, "expected a field, a word, 'not' or (")
        sign = self._peek()
        if sign.kind != "sign" or sign.text in "(),#":
            return lambda one: any(
                token.text.lower() in text.lower()
                for keyword in ("ImageType", "SeriesDescription")
                for text in texts(one.value(keyword))
            )
        self._advance()
        return _compare(self._field(token), sign.text, self._value(sign))

    def _field(self, token: _Token) -> str:
        known = {field.lower(): field for field in (*FIELDS, "Slices", "SpacingZ")}
        if token.text.lower() not in known:
            hint = did_you_mean(token.text, known.values())
            raise self._error(token, f"unknown field '{token.text}'; {hint}")
        return known[token.text.lower()]

    def _value(self, sign: _Token) -> str:
        value = self._advance()
        if value.kind not in ("word", "quoted"):
            raise self._error(value, f"expected a value after {sign.text}")
        if sign.text in _ORDERS and _number(value.text) is None:
            raise self._error(value, f"{sign.text} compares numbers, got '{value.text}'")
        return value.text

    def _split(self) -> list[_Token]:
        tokens, position = [], 0
        rule = self._rule.rstrip()
        while position < len(rule):
            match = _TOKEN.match(rule, position)
            if match is None or match.lastgroup is None:
                place = len(rule[:position]) + len(rule[position:]) - len(rule[position:].lstrip())
                raise self._error(_Token("", "", place), f"unexpected {rule[place]!r}")
            kind = match.lastgroup
            text = match[kind]
            tokens.append(_Token(text[1:-1] if kind == "quoted" else text, kind, match.start(kind)))
            position = match.end()
        return [*tokens, _Token("", "end", len(rule))]

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _advance(self) -> _Token:
        token = self._peek()
        self._next += token.kind != "end"
        return token

    def _take(self, text: str) -> bool:
        token = self._peek()
        taken = token.kind in ("word", "sign") and token.text.lower() == text
        self._next += taken
        return taken

    def _end(self) -> None:
        if self._peek().kind != "end":
            raise self._error(self._peek(), "expected 'and', 'or' or the end")

    def _error(self, token: _Token, reason: str) -> CtsegError:
        return CtsegError(f"--series '{self._rule[:100]}': {reason} at character {token.position + 1}")


def _always(_: Series) -> bool:
    return True


def _compare(field: str, sign: str, value: str) -> Test:
    def test(one: Series) -> bool:
        found = _values(one, field)
        if sign == "~":
            return any(value.lower() in text.lower() for text in found)
        if sign in _ORDERS:
            known = [number for number in map(_number, found) if number is not None]
            return any(_ORDERS[sign](number, _number(value) or 0.0) for number in known)
        equal = any(_equal(text, value) for text in found)
        return equal if sign in ("=", "==") else not equal

    return test


def _values(one: Series, field: str) -> list[str]:
    if field == "Slices":
        return [str(len(one))]
    if field == "SpacingZ":
        return [] if one.spacing_mm[2] is None else [str(round(one.spacing_mm[2], 3))]
    return texts(one.value(field))


def _equal(text: str, value: str) -> bool:
    numbers = _number(text), _number(value)
    return text.strip().lower() == value.lower() or (numbers[0] is not None and numbers[0] == numbers[1])


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
