"""Rules that choose series: what they leave, and where a wrong one is wrong."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ctseg.errors import CtsegError
from ctseg.io.dicom.read import Found, find_series, select_series
from ctseg.io.dicom.rule import choose


@pytest.fixture
def found(tmp_path: Path, series_plan, make_series: Callable[..., Path]) -> Found:
    """#1 thin portal venous, #2 thick portal venous, #3 thin lung; and #4 a localizer."""
    plans = {
        "a": {"spacing_mm": (1, 1, 1.0), "tags": {"SeriesDescription": "Portal venous", "SeriesNumber": 1}},
        "b": {"spacing_mm": (1, 1, 5.0), "tags": {"SeriesDescription": "portal VENOUS 5mm", "SeriesNumber": 2}},
        "c": {
            "size": (9, 7, 8),
            "spacing_mm": (1, 1, 1.0),
            "tags": {"SeriesDescription": "Lung", "SeriesNumber": 3, "ConvolutionKernel": ["B70f", "3"]},
        },
        "d": {"size": (9, 7, 2), "tags": {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "SeriesNumber": 0}},
    }
    for name, values in plans.items():
        make_series(series_plan(**values), f"all/{name}")
    return find_series([tmp_path / "all"])


@pytest.mark.parametrize(
    ("rule", "numbers"),
    [
        (None, [1, 2, 3]),
        ("all", [1, 2, 3]),
        ("#2", [2]),
        ("#4", [4]),
        ("#9", []),
        ("thinnest", [1, 3]),
        ("thickest", [2]),
        ("most-slices", [3]),
        ("SliceThickness<=3", [1, 3]),
        ("SliceThickness <= 3 and not lung", [1]),
        ("portal", [1, 2]),
        ("'portal venous 5'", [2]),
        ("portal, thinnest", [1]),
        ('SeriesDescription~"venous" or ConvolutionKernel=b70F', [1, 2, 3]),
        ("not (portal or lung)", []),
        ("LOCALIZER", []),
        ("ORIGINAL", [1, 2, 3]),
        ("Slices>=8", [3]),
        ("slices != 8", [1, 2]),
        ("SpacingZ=5", [2]),
        ("SpacingZ==5.0 or SpacingZ=1 and Slices=8", [2, 3]),
        ("Modality=CT and KVP>100", [1, 2, 3]),
        ("KVP<100", []),
        ("GantryDetectorTilt>=0", []),
        ("PatientPosition = hfs and SeriesNumber = 3", [3]),
        ("not not lung", [3]),
    ],
)
def test_a_rule_leaves(found: Found, rule: str | None, numbers: list[int]):
    assert [one.number for one in choose(found.series, rule)] == numbers


def test_a_uid_is_a_rule(found: Found):
    assert select_series(found, found.series[1].uid).number == 2
    assert select_series(found, "#3").number == 3


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("", "expected a field, a word, 'not' or ( at character 1"),
        ("SliceThicknes<=3", "unknown field 'SliceThicknes'; did you mean 'SliceThickness'? at character 1"),
        ("PatientName~x", "unknown field 'PatientName'"),
        ("SliceThickness<=thin", "<= compares numbers, got 'thin' at character 17"),
        ("SliceThickness<", "expected a value after < at character 16"),
        ("portal and", "expected a field, a word, 'not' or ( at character 11"),
        ("(portal", "expected ) at character 8"),
        ("portal)", "expected 'and', 'or' or the end at character 7"),
        ("portal lung", "expected 'and', 'or' or the end at character 8"),
        ("portal, best", "expected one of thinnest, thickest, most-slices, all at character 9"),
        ("#two", "expected the number of a series after # at character 2"),
        ("a ! b", "unexpected '!' at character 3"),
        ('a and "b', "unexpected '\"' at character 7"),
        ("not " * 30 + "a", "brackets and 'not' more than 20 deep at character 81"),
        ("(" * 500, "brackets and 'not' more than 20 deep"),
    ],
)
def test_a_wrong_rule_is_told_with_its_place(rule: str, message: str):
    with pytest.raises(CtsegError) as caught:
        choose([], rule)
    assert str(caught.value).startswith(f"--series '{rule[:100]}': {message}")
    assert "\n" not in str(caught.value)


def test_a_rule_is_bounded():
    with pytest.raises(CtsegError, match="a rule has at most 1000 characters, got 1001"):
        choose([], "a" * 1001)


def test_several_or_none_left_lists_them(found: Found):
    with pytest.raises(CtsegError) as caught:
        select_series(found, None)
    lines = str(caught.value).splitlines()
    assert lines[0] == "one CT series is read, there are 3 CT series; choose one, e.g. --series '#1':"
    assert lines[2] == "  series #2 'portal VENOUS 5mm' (CT, 6 slices of 9 x 7, every 5.00 mm)"
    assert len(lines) == 4
    with pytest.raises(CtsegError) as caught:
        select_series(found, "KVP<100")
    assert str(caught.value).splitlines()[0] == "one CT series is read, 'KVP<100' leaves none; there are:"
    with pytest.raises(CtsegError, match="no DICOM image series here"):
        select_series(Found((), (), (), 0), None)
