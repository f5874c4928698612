"""Downloaded weights become a checkpoint that every command takes."""

import json
from pathlib import Path

import pytest
import torch

from ctseg.engine.install import download_model, install_model
from ctseg.engine.model import load_network
from ctseg.errors import ModelError
from ctseg.networks import network_for
from ctseg.progress import Silent
from ctseg.recipe import load_recipe
from ctseg.sources.archives import Archive
from ctseg.sources.models import ModelEntry
from ctseg.workspace import resolve_model

SMALL = ["network.channels=[4,8]", "network.strides=[2]"]


def entry(recipe: str | None = "spleen:small") -> ModelEntry:
    archive = Archive(file="a.pt", urls=("https://host.invalid/a.pt",))
    return ModelEntry(title="a", licence="CC0", gigabytes=0.1, archive=archive, recipe=recipe, overrides=tuple(SMALL))


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(3)
    torch.save(network_for(load_recipe("spleen:small", SMALL)).state_dict(), tmp_path / "w.pt")
    return tmp_path / "w.pt"


def test_the_weights_arrive_unchanged(weights: Path):
    folder = download_model("mine", entry(), weights, [], False, Silent())
    assert resolve_model("mine") == folder / "best.pt"
    recipe, network = load_network(resolve_model("mine"))
    assert recipe == load_recipe("spleen:small", SMALL)
    wanted = torch.load(weights, weights_only=True)
    found = network.state_dict()
    assert list(found) == list(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert json.loads((folder / "ctseg_source.json").read_text())["archives"][0]["file"] == "w.pt"
    assert weights.is_file()


def test_settings_of_the_user_go_after_those_of_the_index(weights: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    install_model(weights, tmp_path / "out", tmp_path / "out", entry(), ["preprocess.spacing_mm=[3,3,3]"])
    assert load_recipe(str(tmp_path / "out" / "recipe.json")).preprocess.spacing_mm == (3, 3, 3)


def test_weights_of_another_network_are_refused_and_nothing_stays(weights: Path, tmp_path: Path):
    torch.save({"a": torch.zeros(1)}, weights)
    with pytest.raises(ModelError, match="do not fit the recipe's network"):
        download_model("mine", entry(), weights, [], False, Silent())
    assert not list((tmp_path / "models").iterdir())


def test_a_model_whose_recipe_is_not_there_is_refused_before_it_is_fetched(weights: Path, tmp_path: Path):
    with pytest.raises(ModelError, match="model 'mine': needs recipe 'none', which this ctseg does not have"):
        download_model("mine", entry("none"), None, [], False, Silent())
    assert not (tmp_path / "models").exists()
