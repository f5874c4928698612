"""`ctseg recipes`: the list, the card, the copy that can be trained."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ctseg.recipe import load_recipe, recipe_names, recipe_path, variant_names


def test_list_has_every_recipe_and_variant(cli: Callable[..., Any]):
    names = {name for base in recipe_names() for name in (base, *(f"{base}:{v}" for v in variant_names(base)))}
    listed = json.loads(cli("recipes", "--json").out)
    assert {entry["name"] for entry in listed} == names
    assert {entry["name"]: entry["title"] for entry in listed} == {n: load_recipe(n).title for n in names}
    text = cli("recipes").out
    assert names <= {line.split()[0] for line in text.splitlines() if line}


def test_card_shows_every_value_with_its_override(cli: Callable[..., Any]):
    text = cli("recipes", "spleen", "--set", "training.epochs=77").out
    lines = dict(line.split(maxsplit=1) for line in text.splitlines() if line.strip())
    assert lines["training.epochs"] == "77"
    assert lines["preprocess.spacing_mm"] == "[1.5, 1.5, 2.0]"
    assert lines["labels.1"] == "spleen"
    assert lines["lesions"] == "off"
    sections = [part for part in load_recipe("spleen").to_dict().values() if isinstance(part, dict)]
    assert lines["clicks"] == "off"
    assert len(lines) == 3 + sum(map(len, sections)) + 2


def test_card_shows_an_optional_section(cli: Callable[..., Any]):
    lines = dict(line.split(maxsplit=1) for line in cli("recipes", "bone_lesion").out.splitlines() if line.strip())
    assert lines["lesions.volume_limits_ml"] == "[0.5, 2.0, 10.0]"
    assert lines["lesions.min_overlap"] == "0.1"
    assert lines["preprocess.binarize_labels"] == "True"
    assert "lesions" not in lines


@pytest.mark.parametrize(
    ("name", "parameters"), [("spleen", 4_808_917), ("lung", 27_086_072), ("bone_lesion", 18_796_002)]
)
def test_json_has_the_recipe_and_its_parameters(cli: Callable[..., Any], name: str, parameters: int):
    answer = json.loads(cli("recipes", name, "--json", "--set", "optimizer.lr=1").out)
    assert answer.pop("parameters") == parameters
    assert answer == json.loads(json.dumps(load_recipe(name, ["optimizer.lr=1"]).to_dict()))


def test_copy_can_be_named_as_the_message_says(cli: Callable[..., Any], tmp_path: Path):
    result = cli("recipes", "spleen:small", "--copy", "mine.toml")
    assert (result.code, result.err) == (0, "")
    assert result.out == "copied to mine.toml; train it with: ctseg train mine.toml:small\n"
    assert (tmp_path / "mine.toml").read_bytes() == recipe_path("spleen").read_bytes()
    assert load_recipe(f"{tmp_path}/mine.toml:small") == load_recipe("spleen:small")
    result = cli("recipes", "mine.toml", "--copy", "again.toml")
    assert result.out == "copied to again.toml; train it with: ctseg train again.toml\n"
