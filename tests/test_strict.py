"""The strict reader: nothing unknown, nothing converted, every problem at once."""

from dataclasses import dataclass
from typing import Annotated, Literal

import pytest

from ctseg.strict import Range, read_dataclass


@dataclass(frozen=True, kw_only=True)
class Circle:
    kind: Literal["circle"]
    radius_mm: Annotated[float, Range(above=0)]


@dataclass(frozen=True, kw_only=True)
class Box:
    kind: Literal["box"]
    size_mm: tuple[float, float]

    def check(self):
        if self.size_mm[0] > self.size_mm[1]:
            yield "size_mm: must grow"


@dataclass(frozen=True, kw_only=True)
class Drawing:
    shape: Circle | Box
    name: str = "untitled"
    count: Annotated[int, Range(at_least=1, at_most=9)] = 1
    share: Annotated[float, Range(at_least=0, below=1)] = 0.5
    filled: bool = False
    style: Literal["thin", "thick"] = "thin"
    dashes: Literal[1, 2] = 1
    colours: tuple[int, ...] = ()
    names: dict[str, str] | None = None


CIRCLE = {"kind": "circle", "radius_mm": 2.5}
BOX = {"kind": "box", "size_mm": [1.0, 2.0]}


def problems_of(data: object) -> list[str]:
    problems: list[str] = []
    assert read_dataclass(Drawing, data, "", problems) is None
    return problems


def test_a_whole_instance():
    problems: list[str] = []
    data = {"shape": {"kind": "box", "size_mm": [1, 2]}, "colours": [1, 2, 3], "names": {"a": "b"}, "filled": True}
    drawing = read_dataclass(Drawing, data, "", problems)
    assert problems == []
    expected = Box(kind="box", size_mm=(1.0, 2.0))
    assert drawing == Drawing(shape=expected, colours=(1, 2, 3), names={"a": "b"}, filled=True)
    assert all(type(n) is float for n in drawing.shape.size_mm)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"nam": "x"}, "nam: unknown key; did you mean 'name'?"),
        ({"zzz": 1}, "zzz: unknown key; known: shape, name, count, share, filled, style, dashes, colours, names"),
        ({"name": 1}, "name: expected str, got 1"),
        ({"count": 1.0}, "count: expected int, got 1.0"),
        ({"count": True}, "count: expected int, got True"),
        ({"count": "1"}, "count: expected int, got '1'"),
        ({"count": 0}, "count: must be at least 1, got 0"),
        ({"count": 10}, "count: must be at most 9, got 10"),
        ({"count": 10**400}, "count: expected int, got a number beyond 64 bits"),
        ({"share": 10**400}, "share: expected float, got a number beyond 64 bits"),
        ({"share": True}, "share: expected float, got True"),
        ({"share": 1}, "share: must be below 1, got 1.0"),
        ({"share": float("nan")}, "share: expected a finite number, got nan"),
        ({"share": float("inf")}, "share: expected a finite number, got inf"),
        ({"filled": 1}, "filled: expected bool, got 1"),
        ({"style": "bold"}, "style: expected one of thin, thick, got 'bold'"),
        ({"style": ["thin"]}, "style: expected one of thin, thick, got ['thin']"),
        ({"dashes": 2.0}, "dashes: expected one of 1, 2, got 2.0"),
        ({"dashes": True}, "dashes: expected one of 1, 2, got True"),
        ({"colours": 5}, "colours: expected a list, got 5"),
        ({"colours": [1, "red"]}, "colours[1]: expected int, got 'red'"),
        ({"colours": "12"}, "colours: expected a list, got '12'"),
        ({"names": ["a"]}, "names: expected a table, got ['a']"),
        ({"names": {"a": 1}}, "names.a: expected str, got 1"),
        ({"shape": 5}, "shape.kind: expected one of circle, box, got None"),
        ({"shape": {"kind": "ring"}}, "shape.kind: expected one of circle, box, got 'ring'"),
        ({"shape": {"kind": ["box"]}}, "shape.kind: expected one of circle, box, got ['box']"),
        ({"shape": {"kind": "circle"}}, "shape.radius_mm: missing"),
        ({"shape": {**CIRCLE, "radius_mm": 0}}, "shape.radius_mm: must be above 0, got 0.0"),
        ({"shape": {**CIRCLE, "size_mm": 1}}, "shape.size_mm: unknown key; known: kind, radius_mm"),
        ({"shape": {**BOX, "size_mm": [1]}}, "shape.size_mm: expected 2 values, got [1]"),
        ({"shape": {**BOX, "size_mm": [1, float("nan")]}}, "shape.size_mm[1]: expected a finite number, got nan"),
        ({"shape": {**BOX, "size_mm": [2, 1]}}, "shape.size_mm: must grow"),
    ],
)
def test_one_problem(change: dict, expected: str):
    assert problems_of({"shape": CIRCLE, **change}) == [expected]


def test_all_problems_at_once():
    data = {"shape": {"kind": "box", "size_mm": [1], "colour": 3}, "cout": 3, "count": "x", "share": -1}
    assert problems_of(data) == [
        "cout: unknown key; did you mean 'count'?",
        "shape.colour: unknown key; known: kind, size_mm",
        "shape.size_mm: expected 2 values, got [1]",
        "count: expected int, got 'x'",
        "share: must be at least 0, got -1.0",
    ]


@pytest.mark.parametrize("data", [None, [], "text", 3])
def test_not_a_table(data: object):
    assert problems_of(data) == [f"file: expected a table, got {data!r}"]


def test_missing_without_a_default():
    assert problems_of({}) == ["shape: missing"]


def test_earlier_problems_do_not_spoil_a_good_table():
    problems = ["something else"]
    assert read_dataclass(Circle, CIRCLE, "", problems) == Circle(kind="circle", radius_mm=2.5)
    assert problems == ["something else"]
