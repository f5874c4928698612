"""Which segments of a SEG and which ROIs of an RTSTRUCT become which label."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass

import pydicom

from ctseg.errors import CtsegError, ImageError
from ctseg.progress import printable

MAX_NAME_LENGTH = 256
"""Names come from strangers; only so much of one is matched and shown. DICOM allows 64 characters."""
MAX_SHOWN = 30
"""Regions that a message names."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """A segment of a SEG or a ROI of an RTSTRUCT.

    Attributes:
        number: Its number in the object.
        name: Its name, as its author wrote it.
        codes: What it is, as "SCHEME:VALUE", such as "SCT:78961009"; a ROI seldom has any.
        kind: "segment" or "ROI".
    """

    number: int
    name: str
    codes: tuple[str, ...] = ()
    kind: str = "segment"

    def __str__(self) -> str:
        return f"#{self.number} '{self.name}'"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One `--label VALUE=PATTERN`: regions that match become voxels of the value.

    Attributes:
        value: 1..255.
        pattern: A name, "#NUMBER", "code:SCHEME:VALUE", or "/regular expression/"; capitals make no difference.
    """

    value: int
    pattern: str

    def matches(self, region: Region) -> bool:
        """True if the region is meant."""
        if self.pattern.startswith("#"):
            return self.pattern[1:] == str(region.number)
        if self.pattern.startswith("code:"):
            return self.pattern[5:].casefold() in (code.casefold() for code in region.codes)
        if self.is_expression:
            return re.search(self.pattern[1:-1], region.name, re.IGNORECASE) is not None
        return self.pattern.casefold() == region.name.strip().casefold()

    @property
    def is_expression(self) -> bool:
        """True for "/.../"."""
        return len(self.pattern) > 1 and self.pattern[0] == self.pattern[-1] == "/"

    def __str__(self) -> str:
        return f"{self.value}={self.pattern}"


def parse_choice(text: str) -> Choice:
    """The choice in "VALUE=PATTERN".

    Raises:
        CtsegError: if it is none; the message has examples.
    """
    value, equals, pattern = text.partition("=")
    pattern = pattern.strip()
    if not equals or not re.fullmatch(r"\d{1,3}", value.strip()) or not 1 <= int(value) <= 255 or not pattern:
        raise CtsegError(
            f"--label {text}: expected VALUE=PATTERN with a value in 1..255, such as 1=liver, 2=#3, "
            f"3=code:SCT:10200004 or 4=/lung.*left/"
        )
    choice = Choice(value=int(value), pattern=pattern)
    if pattern.startswith("#") and not re.fullmatch(r"#\d{1,5}", pattern):
        raise CtsegError(f"--label {text}: expected a number after '#', such as 1=#3; a name goes between slashes")
    if pattern.startswith("code:") and not re.fullmatch(r"code:[^:]+:[^:]+", pattern):
        raise CtsegError(f"--label {text}: expected code:SCHEME:VALUE, such as 1=code:SCT:10200004")
    if choice.is_expression:
        try:
            re.compile(pattern[1:-1])
        except re.error as error:
            raise CtsegError(f"--label {text}: not a regular expression: {error}") from error
    return choice


def choose_regions(regions: Iterable[Region], choices: Sequence[Choice]) -> dict[int, int]:
    """Number of a region -> label value, for every region that is chosen.

    Several choices of one value are alternatives, or parts of one structure.

    Raises:
        ImageError: if a region is chosen for two values.
    """
    values: dict[int, int] = {}
    for region in regions:
        wanted = sorted({choice.value for choice in choices if choice.matches(region)})
        if len(wanted) > 1:
            raise ImageError(f"{region.kind} {region} matches labels {wanted}; make the patterns differ")
        if wanted:
            values[region.number] = wanted[0]
    return values


def check_found(
    values: Container[int], known: Sequence[Region], choices: Sequence[Choice], *, allow_missing: bool
) -> None:
    """Passes if there is a region for every value that is asked for, or for any if some may be missing.

    Raises:
        ImageError: naming the choices that nothing matches, and what there is.
    """
    missing = [str(choice) for choice in choices if choice.value not in values]
    if missing and not (allow_missing and len(missing) < len(choices)):
        there = ", ".join(map(str, known[:MAX_SHOWN])) + (", ..." if len(known) > MAX_SHOWN else "")
        raise ImageError(f"nothing matches {', '.join(missing)}; it has {there or 'nothing'}")


def shown_name(text: object) -> str:
    """A stranger's name for a region: cut to MAX_NAME_LENGTH, without control characters."""
    return printable(str(text or "").strip()[:MAX_NAME_LENGTH])


def codes_in(item: pydicom.Dataset, keyword: str) -> tuple[str, ...]:
    """The codes in a sequence of an item, as "SCHEME:VALUE"."""
    return tuple(shown_name(f"{code.get('CodingSchemeDesignator')}:{_value(code)}") for code in item.get(keyword) or [])


def _value(code: pydicom.Dataset) -> object:
    return code.get("CodeValue") or code.get("LongCodeValue") or code.get("URNCodeValue")
