"""Results that were made differently never mix in a folder."""

import json
from pathlib import Path

import pytest

from ctseg.errors import CtsegError
from ctseg.provenance import differences, merged_entries, own_manifest, read_object

STRICT = {"gaps": "error"}


@pytest.mark.parametrize(
    ("before", "now", "expected"),
    [
        ({"gaps": "fill"}, {"gaps": "fill"}, []),
        ({"gaps": "error"}, {"gaps": "fill"}, []),
        ({}, {"gaps": "fill"}, []),
        ({"gaps": "fill"}, {"gaps": "ignore"}, ["gaps fill"]),
        ({"gaps": "fill"}, {"gaps": "error"}, ["gaps fill"]),
        ({"choices": ["1=a", "2=b"]}, {"choices": ["1=a"]}, ["choices 1=a, 2=b"]),
        ({"keep_identifiers": False}, {"keep_identifiers": True}, ["keep_identifiers False"]),
        ({}, {"seg_type": "binary"}, []),
    ],
)
def test_what_was_made_strictly_is_the_same_under_any_policy(before: dict, now: dict, expected: list[str]) -> None:
    assert differences(before, now, STRICT) == expected


@pytest.mark.parametrize("text", ["", "{", "[1]", "[" * 100_000, "\xff"])
def test_a_damaged_record_is_an_empty_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="latin-1")
    assert read_object(tmp_path / "a.json") == {}
    assert read_object(tmp_path / "none.json") is None
    with pytest.raises(CtsegError, match="was not written by `me`"):
        own_manifest(tmp_path / "a.json", "me")


def test_entries_are_kept_while_their_files_are_there(tmp_path: Path) -> None:
    for name in ("a", "b", "l"):
        (tmp_path / name).touch()
    old = [{"image": "a", "label": "l"}, {"image": "b", "label": "gone"}, {"image": "gone", "label": "l"}, 7, {}]
    new = [{"image": "a", "label": "l", "patient": "p"}, {"image": "c", "label": "l"}]
    made = merged_entries(json.loads(json.dumps({"training": old})), "training", ("image", "label"), tmp_path, new)
    assert made == new
    assert merged_entries({"training": old}, "training", ("image", "label"), tmp_path, []) == old[:1]
    assert merged_entries({"training": "x"}, "training", ("image",), tmp_path, new[:1]) == new[:1]
