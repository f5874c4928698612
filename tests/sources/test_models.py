"""The index of models: what ships, and a file of the user's own."""

import json
from pathlib import Path

import pytest

from ctseg.errors import DownloadError, ModelError
from ctseg.progress import Silent
from ctseg.sources.models import model_index, read_index, unpack_model, user_index

ENTRY = {
    "title": "mine",
    "licence": "MIT",
    "gigabytes": 1,
    "archive": {"file": "a.zip", "urls": ["https://host/a.zip"]},
}


@pytest.fixture(autouse=True)
def no_index_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CTSEG_MODELS", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def write(path: Path, data: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def test_the_originals_stand_under_the_addresses_that_monai_builds():
    from monai.apps.mmars import MODEL_DESC
    from monai.apps.mmars.mmars import _get_ngc_doc_url, _get_ngc_url

    described = {str(entry["name"]): entry for entry in MODEL_DESC}
    originals = {name: entry for name, entry in model_index().items() if name.startswith("clara_")}
    assert len(originals) == 4
    for name, entry in originals.items():
        version = str(described[name]["version"])
        assert entry.archive.urls == (_get_ngc_url(name, version, model_prefix="nvidia/med/"),)
        assert entry.source == _get_ngc_doc_url(name, model_prefix="nvidia:med:")
        assert entry.archive.digests == {}, "nobody publishes one"


def test_the_bundle_of_the_model_zoo_has_its_checksum():
    archive = model_index()["spleen_ct_segmentation"].archive
    assert archive.digests == {"sha1": "8e99230050906d0d3cec484010598aa138201892"}


def test_a_model_whose_recipe_is_not_there_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert not any(entry.lacks_recipe for entry in model_index().values())
    strange = {**ENTRY, "recipe": "no_such_recipe:small"}
    monkeypatch.setenv("CTSEG_MODELS", str(write(tmp_path / "other.json", {"strange": strange})))
    assert model_index()["strange"].lacks_recipe


def test_the_users_index_adds_and_goes_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shipped = set(model_index())
    assert user_index() == tmp_path / "config" / "ctseg" / "models.json"
    own = user_index()
    assert own is not None
    write(own, {"mine": ENTRY, "spleen_ct_segmentation": ENTRY})
    index = model_index()
    assert set(index) == {*shipped, "mine"}
    assert index["spleen_ct_segmentation"].title == "mine"
    monkeypatch.setenv("CTSEG_MODELS", str(write(tmp_path / "other.json", {"other": ENTRY})))
    assert set(model_index()) == {*shipped, "other"}
    monkeypatch.setenv("CTSEG_MODELS", str(tmp_path / "none.json"))
    with pytest.raises(ModelError, match=r"model index '.*none\.json': no such file"):
        model_index()


def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setattr(Path, "home", unknown)


def test_a_user_without_a_home_has_the_shipped_models(monkeypatch: pytest.MonkeyPatch):
    shipped = set(model_index())
    no_home(monkeypatch)
    assert user_index() is None
    assert set(model_index()) == shipped


def test_an_index_that_may_not_be_read_counts_only_if_it_was_named(monkeypatch: pytest.MonkeyPatch):
    shipped = set(model_index())
    own = user_index()
    assert own is not None
    write(own, {"mine": ENTRY})
    stat = Path.stat

    def refused(path: Path, **how: bool) -> object:
        if path == own:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **how)

    monkeypatch.setattr(Path, "stat", refused)
    monkeypatch.setattr("os.access", lambda path, mode: path != own)
    assert set(model_index()) == shipped
    monkeypatch.setenv("CTSEG_MODELS", str(own))
    with pytest.raises(ModelError, match=r"cannot be read: .*Permission denied"):
        model_index()


def test_every_problem_of_an_index_at_once(tmp_path: Path):
    wrong = {
        "a/b": ENTRY,
        "spleen": ENTRY,
        "msd_spleen": ENTRY,
        "one": {**ENTRY, "titel": "x"},
        "two": {**ENTRY, "gigabytes": -1},
        "three": {**ENTRY, "archive": {"file": "a", "urls": ["file:///etc/passwd"], "digests": {"sha256": "AB"}}},
        "four": 4,
    }
    with pytest.raises(ModelError) as caught:
        read_index(write(tmp_path / "index.json", wrong))
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("index.json': 8 problems")
    for text in (
        "'a/b': expected a plain name that no recipe and no data set has",
        "'spleen': expected a plain name",
        "'msd_spleen': expected a plain name",
        "one.titel: unknown key; did you mean 'title'?",
        "two.gigabytes: must be above 0",
        "three.archive.digests.sha256: expected 64 hexadecimal digits in lower case, got 'AB'",
        "three.archive.urls: expected http or https addresses, got 'file:///etc/passwd'",
        "four: expected a table, got 4",
    ):
        assert any(text in line for line in lines), text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "cannot be read"),
        ("[]", "expected an object of models by name, got list"),
        ("[" * 99999, "cannot be read"),
    ],
)
def test_what_is_no_index(tmp_path: Path, text: str, problem: str):
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ModelError, match=problem):
        read_index(tmp_path / "index.json")
    with pytest.raises(ModelError, match="no such file"):
        read_index(tmp_path / "none.json")


def make_zip(path: Path, *names: str) -> Path:
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, name)
    return path


@pytest.mark.parametrize("top", ["", "bundle/"])
def test_only_configuration_and_weights_are_taken(tmp_path: Path, top: str):
    names = ["config/config_train.json", "configs/inference.json", "models/model.pt", "models/model.ts", "scripts/x.py"]
    (tmp_path / "out").mkdir()
    unpack_model(make_zip(tmp_path / "a.zip", *(top + name for name in names)), tmp_path / "out", 10**6, Silent())
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert found == set(names[:3])


def test_an_archive_of_something_else(tmp_path: Path):
    (tmp_path / "out").mkdir()
    with pytest.raises(DownloadError, match=r"holds no models/model\.pt, so it is neither an MMAR nor a MONAI bundle"):
        unpack_model(make_zip(tmp_path / "a.zip", "readme"), tmp_path / "out", 10**6, Silent())
