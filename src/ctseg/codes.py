"""What the structures of a mask are, in words that other systems understand: coded terms for DICOM."""

from __future__ import annotations

from dataclasses import dataclass

from ctseg.recipe import Recipe

OWN_SCHEME = "99CTSEG"
"""Designator of codes that are in no public scheme, as DICOM asks of private ones."""


@dataclass(frozen=True, kw_only=True)
class Code:
    """A coded term: a value, unique in its scheme, and what it means in English."""

    value: str
    meaning: str
    scheme: str = "SCT"


ANATOMY = Code(value="91723000", meaning="Anatomical Structure")
TISSUE = Code(value="85756007", meaning="Tissue")


@dataclass(frozen=True, kw_only=True)
class Structure:
    """One label of a mask.

    Attributes:
        value: In the mask, 1..255.
        name: For people.
        category: Anatomy, tissue or something abnormal.
        type: What it is.
        region: Where it is, if its type does not say.
    """

    value: int
    name: str
    category: Code
    type: Code
    region: Code | None = None

    @property
    def is_public(self) -> bool:
        """Whether its type is a code that others know."""
        return self.type.scheme != OWN_SCHEME


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """What made a mask.

    Attributes:
        name: E.g. of the recipe.
        version: Of ctseg.
        model: Tells models of one recipe apart: the beginning of the checkpoint's SHA-256.
    """

    name: str
    version: str
    model: str


def uncoded(value: int, name: str) -> Structure:
    """A structure that has a name only: some tissue, with a code of our own."""
    code = Code(value=name[:16].upper().strip() or f"LABEL {value}", meaning=name[:64], scheme=OWN_SCHEME)
    return Structure(value=value, name=name, category=TISSUE, type=code)


def structures_of(recipe: Recipe) -> tuple[Structure, ...]:
    """The structures of a recipe's masks in the order of their labels, coded where the recipe has codes."""
    return tuple(_structure(recipe, key, name) for key, name in recipe.labels.items())


def _structure(recipe: Recipe, key: str, name: str) -> Structure:
    spec = (recipe.codes or {}).get(name)
    if spec is None:
        return uncoded(int(key), name)
    region = None if spec.region is None else _code(spec.region)
    return Structure(value=int(key), name=name, category=_code(spec.category), type=_code(spec.type), region=region)


def _code(pair: tuple[str, str]) -> Code:
    return Code(value=pair[0], meaning=pair[1])
