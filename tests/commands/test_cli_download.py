"""`ctseg download`: what it says, and that what it fetched is usable at once."""

import hashlib
import json
import os
import pickle
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cli_import import mmar_40, write_files

from ctseg.engine.checkpoint import save_checkpoint
from ctseg.io.images import read_labels
from ctseg.manifest import shipped_manifest
from ctseg.networks import network_for
from ctseg.recipe import load_recipe
from ctseg.sources.public import data_sets, read_data_set
from ctseg.volume import Geometry, Volume
from file_server import FileServer, running_server

COARSE = ["--set", "preprocess.spacing_mm=[8,8,8]", "--set", "inference.window_size=[16,16,16]"]


@pytest.fixture(scope="module")
def one_server() -> Iterator[FileServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def server(one_server: FileServer, monkeypatch: pytest.MonkeyPatch) -> FileServer:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "CTSEG_DATA"):
        monkeypatch.delenv(name, raising=False)
    one_server.files.clear()
    one_server.requests.clear()
    return one_server


@pytest.fixture(autouse=True)
def no_index_of_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CTSEG_MODELS", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def zipped(folder: Path) -> bytes:
    path = folder.with_suffix(".made.zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))
    return path.read_bytes()


def index_of(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, url: str, **more: Any) -> Path:
    """The user's own index with one model."""
    digests = more.pop("digests", {})
    archive = {"file": more.pop("file", f"{name}.zip"), "urls": [url], "digests": digests}
    entry = {"title": "a test", "licence": "CC0", "gigabytes": 0.1, "archive": archive, **more}
    (folder / "index.json").write_text(json.dumps({name: entry}))
    monkeypatch.setenv("CTSEG_MODELS", str(folder / "index.json"))
    return folder / "index.json"


def masks_of(folder: Path) -> dict[str, Any]:
    return {path.name: read_labels(path).array for path in sorted(folder.glob("*_seg.nii.gz"))}


def assert_same_masks(cli: Callable[..., Any], tiny_data: Path, tmp_path: Path, *models: object) -> None:
    images = [tiny_data.parent / f"case_{n}.nii.gz" for n in (4, 5)]
    masks = []
    for number, model in enumerate(models):
        result = cli("infer", *images, "--model", model, "--output", f"masks{number}", "--quiet", "--device", "cpu")
        assert result.code == 0, result.err
        masks.append(masks_of(tmp_path / f"masks{number}"))
    first, second = masks
    assert list(first) == list(second)
    assert len(first) == 2
    assert any(len(np.unique(mask)) > 1 for mask in first.values()), "masks of one value would agree with anything"
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_without_a_name_everything_is_listed(cli: Callable[..., Any], tmp_path: Path):
    result = cli("download")
    assert (result.code, result.err) == (0, "")
    for word in ("msd_spleen", "btcv", "CC-BY-SA 4.0", "28.9", "spleen_ct_segmentation", "needs a login"):
        assert word in result.out
    rows = {row["name"]: row for row in json.loads(cli("download", "--json").out)}
    assert rows["msd_spleen"]["here"] == "no"
    assert rows["clara_pt_spleen_ct_segmentation"]["kind"] == "model"
    folder = tmp_path / "data" / "Task09_Spleen"
    folder.mkdir(parents=True)
    rows = {row["name"]: row for row in json.loads(cli("download", "--json").out)}
    assert rows["msd_spleen"]["here"] == "lacks 102 files"
    for file in data_sets()["msd_spleen"].files:
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).touch()
    rows = {row["name"]: row for row in json.loads(cli("download", "--json").out)}
    assert rows["msd_spleen"]["here"] == "yes"


def small_spleen_tar(folder: Path, write_ct: Callable[[Path, Volume], None]) -> Path:
    """Task09 with its names and tiny CTs."""
    rng = np.random.default_rng(0)
    grid = Geometry.from_parts((20, 20, 20), (8.0, 8.0, 8.0), (0.0, 0.0, 0.0), np.eye(3))
    root = folder / "Task09_Spleen"
    for file in data_sets()["msd_spleen"].files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        array = rng.integers(-100, 200, (20, 20, 20)).astype(np.int16)
        if file.parts[0] == "labelsTr":
            array = np.zeros((20, 20, 20), np.int16)
            array[5:15, 5:15, 5:15] = 1
        write_ct(root / file, Volume(array, grid))
    with tarfile.open(folder / "Task09_Spleen.tar", "w") as archive:
        archive.add(root, "Task09_Spleen")
    return folder / "Task09_Spleen.tar"


def test_a_data_set_is_ready_for_its_recipe(
    cli: Callable[..., Any],
    server: FileServer,
    tmp_path: Path,
    write_ct: Callable[[Path, Volume], None],
    monkeypatch: pytest.MonkeyPatch,
):
    (tmp_path / "made").mkdir()
    tar = small_spleen_tar(tmp_path / "made", write_ct)
    content = json.loads(shipped_manifest("msd_spleen").read_text())
    archive = content["download"]["archives"][0]
    archive["urls"] = [server.serve("/Task09_Spleen.tar", tar.read_bytes(), drops=[100_000])]
    archive["digests"] = {"md5": hashlib.md5(tar.read_bytes()).hexdigest()}
    (tmp_path / "msd_spleen.json").write_text(json.dumps(content))
    served = read_data_set(tmp_path / "msd_spleen.json", content)
    monkeypatch.setattr("ctseg.commands.download.data_sets", lambda: {"msd_spleen": served})
    monkeypatch.setattr("ctseg.sources.fetch.time.sleep", lambda _: None)
    result = cli("download", "msd_spleen")
    assert result.code == 0, result.err
    assert "msd_spleen: 1.6 GB, licence: CC-BY-SA 4.0" in result.err
    assert "fetching Task09_Spleen.tar" in result.err
    assert "trying again" in result.err
    lines = {line.split("  ")[0].strip(): line for line in result.out.splitlines()}
    assert "CC-BY-SA 4.0" in lines["licence"]
    assert lines["archive"].endswith("as published")
    assert lines["next"].endswith("ctseg prepare-dataset spleen")
    prepared = cli("prepare-dataset", "spleen", "--set", "preprocess.spacing_mm=[8,8,8]", "--quiet")
    assert prepared.code == 0, prepared.err
    assert "35 cases prepared" in prepared.out
    again = json.loads(cli("download", "msd_spleen", "--json").out)
    assert again["was_there"] is True
    assert again["archives"][0]["verified"] is True
    assert again["next"] == "ctseg prepare-dataset spleen"


def test_where_there_is_no_network_it_says_what_to_do(cli: Callable[..., Any], monkeypatch: pytest.MonkeyPatch):
    import socket

    def unknown(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    result = cli("download", "msd_spleen", "--quiet")
    assert (result.code, result.out) == (2, "")
    assert "no network here: its name cannot be resolved" in result.message
    assert result.message.endswith(
        "fetch https://msd-for-monai.s3-us-west-2.amazonaws.com/Task09_Spleen.tar on another machine, then "
        "`ctseg download msd_spleen --from Task09_Spleen.tar` here"
    )


def test_a_bundle_gives_the_masks_of_the_model_it_was_made_from(
    cli: Callable[..., Any],
    server: FileServer,
    tiny_model: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    assert cli("export", "--model", tiny_model, "--format", "bundle", "--output", "bundle").code == 0
    content = zipped(tmp_path / "bundle")
    url = server.serve("/a.zip", content, drops=[1000])
    monkeypatch.setattr("ctseg.sources.fetch.time.sleep", lambda _: None)
    index_of(tmp_path, monkeypatch, "mine", url)
    result = cli("download", "mine")
    assert result.code == 0, result.err
    assert "recorded as seen: nobody published a checksum of it" in result.out
    assert hashlib.sha256(content).hexdigest() in result.out
    assert "ctseg infer CT --model mine --output masks" in result.out
    folder = tmp_path / "models" / "mine"
    assert sorted(path.name for path in folder.iterdir()) == [
        "best.pt", "ctseg_source.json", "import.json", "recipe.json",
    ]  # fmt: skip
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["mine"]
    source = json.loads((folder / "ctseg_source.json").read_text())
    assert source["archives"][0]["verified"] is False
    assert source["weights"]["kind"] == "state dict"
    assert_same_masks(cli, tiny_data, tmp_path, tiny_model, "mine")
    assert cli("validate", "--model", "mine", "--manifest", tiny_data, "--quiet").code == 0
    assert cli("export", "--model", "mine", "--format", "torchscript", "--output", "mine.ts").code == 0


@pytest.mark.parametrize("given", ["network", "archive", "folder"])
def test_an_mmar_gives_the_masks_of_its_weights(
    cli: Callable[..., Any],
    server: FileServer,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    given: str,
):
    folder = tmp_path / "clara"
    write_files(folder, mmar_40())
    assert cli("import-mmar", "clara", "--output", "new", *COARSE).code == 0
    recipe = load_recipe(str(tmp_path / "new" / "recipe.toml"))
    torch.manual_seed(0)
    network = network_for(recipe)
    (folder / "models").mkdir()
    torch.save({"model": network.state_dict(), "train_conf": {"a": [1]}}, folder / "models" / "model.pt")
    save_checkpoint(tmp_path / "direct.pt", {"recipe": recipe.to_dict(), "model": network.state_dict()})
    content = zipped(folder)
    url = server.serve("/a.zip", content) if given == "network" else "https://host.invalid/a.zip"
    digests = {"sha256": hashlib.sha256(content).hexdigest()}
    index_of(tmp_path, monkeypatch, "mmar", url, digests=digests)
    source = {"network": [], "archive": ["--from", "clara.made.zip"], "folder": ["--from", "clara"]}[given]
    result = cli("download", "mmar", *source, *COARSE, "--json", "--quiet")
    assert (result.code, result.err) == (0, "")
    assert [archive["verified"] for archive in json.loads(result.out)["archives"]] == [True] * (given != "folder")
    assert_same_masks(cli, tiny_data, tmp_path, "direct.pt", "mmar")
    manifest = json.loads((tmp_path / "models" / "mmar" / "manifest.json").read_text())
    assert manifest["training"][0]["image"] == "tr/a.nii.gz"


def test_weights_alone_need_a_recipe_in_the_index(
    cli: Callable[..., Any],
    server: FileServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    torch.manual_seed(0)
    state = network_for(load_recipe("spleen:small")).state_dict()
    torch.save(state, tmp_path / "a.pt")
    url = server.serve("/a.pt", (tmp_path / "a.pt").read_bytes())
    index_of(tmp_path, monkeypatch, "bare", url, file="a.pt")
    result = cli("download", "bare", "--quiet")
    assert result.code == 2
    assert "weights alone do not say which network they fit" in result.message
    index_of(tmp_path, monkeypatch, "bare", url, file="a.pt", recipe="spleen:small")
    result = cli("download", "bare", "--quiet")
    assert (result.code, result.err) == (0, "")
    assert load_recipe(str(tmp_path / "models" / "bare" / "recipe.json")) == load_recipe("spleen:small")


@pytest.mark.parametrize(("recipe", "command"), [("spleen:small", "infer"), ("deepgrow_3d:small", "annotate")])
def test_it_says_what_uses_the_model(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recipe: str, command: str
):
    torch.save(network_for(load_recipe(recipe)).state_dict(), tmp_path / "a.pt")
    index_of(tmp_path, monkeypatch, "mine", "https://host.invalid/a.pt", file="a.pt", recipe=recipe)
    result = cli("download", "mine", "--from", "a.pt", "--quiet")
    assert (result.code, result.err) == (0, "")
    assert f"next     ctseg {command} CT --model mine " in result.out


class Evil:
    """What a pickle may do to those who load it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_weights_that_hold_code_are_refused(
    cli: Callable[..., Any], server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    folder = tmp_path / "clara"
    write_files(folder, mmar_40())
    (folder / "models").mkdir()
    content = {"model": Evil(tmp_path / "owned")}
    if kind == "torch":
        torch.save(content, folder / "models" / "model.pt")
    else:
        (folder / "models" / "model.pt").write_bytes(pickle.dumps(content, protocol=2))
    index_of(tmp_path, monkeypatch, "evil", server.serve("/a.zip", zipped(folder)))
    result = cli("download", "evil", "--quiet")
    assert result.code == 2
    assert "holds more than plain data" in result.message
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "models" / "evil").exists()
    assert "model 'evil'" not in cli("infer", "x", "--output", "y", "--model", "evil").out


def test_a_configuration_with_a_gap_can_be_completed_without_fetching_again(
    cli: Callable[..., Any], server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    files = mmar_40()
    transforms = files["config_train.json"]["train"]["pre_transforms"]
    files["config_train.json"]["train"]["pre_transforms"] = [t for t in transforms if t["name"] != "Spacingd"]
    folder = write_files(tmp_path / "clara", files)
    state = network_for(load_recipe("spleen:small", ["network.channels=[4,8]", "network.strides=[2]"])).state_dict()
    (folder / "models").mkdir()
    torch.save(state, folder / "models" / "model.pt")
    index_of(tmp_path, monkeypatch, "gap", server.serve("/a.zip", zipped(folder)))
    result = cli("download", "gap", "--quiet")
    assert result.code == 2
    assert "preprocess.spacing_mm: missing" in result.message
    server.files.clear()
    assert cli("download", "gap", "--set", "preprocess.spacing_mm=[1.5,1.5,2]", "--quiet").code == 0


def test_a_model_that_is_there_is_left_alone(cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    for name in ("recipe.json", "best.pt", "precious"):
        (folder / name).touch()
    index_of(tmp_path, monkeypatch, "mine", "https://host.invalid/a.zip")
    result = cli("download", "mine")
    assert (result.code, result.err) == (0, "")
    assert "(was there already)" in result.out
    assert (folder / "precious").exists()
    result = cli("download", "mine", *COARSE)
    assert result.code == 0
    assert "so --from, --set and --keep-archive do nothing; delete it to make it anew" in result.err


@pytest.mark.parametrize("name", ["precious", "recipe.json", "best.pt"])
def test_a_folder_that_is_no_model_is_not_taken_for_one(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    folder = tmp_path / "models" / "mine"
    folder.mkdir(parents=True)
    (folder / name).touch()
    index_of(tmp_path, monkeypatch, "mine", "https://host.invalid/a.zip")
    result = cli("download", "mine")
    assert (result.code, result.out) == (2, "")
    assert "'models/mine' is there but is no model of ctseg; move it away and run again" in result.message
    rows = {row["name"]: row for row in json.loads(cli("download", "--json").out)}
    assert rows["mine"]["here"] == "another folder"
    assert [path.name for path in folder.iterdir()] == [name]


@pytest.mark.parametrize("file", ["mine.zip", "mine.pt"])
def test_a_page_that_came_instead_of_the_model_is_removed(
    cli: Callable[..., Any], server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
):
    page = b"<html>please log in</html>"
    index_of(tmp_path, monkeypatch, "mine", server.serve("/a", page), file=file, recipe="spleen:small")
    for requests in (1, 2):
        result = cli("download", "mine", "--quiet")
        assert result.code == 2
        assert result.message.endswith("; it was removed, run again to fetch it, or use --from")
        assert len(server.requests) == requests
    assert not (tmp_path / "models" / ".mine.download").exists()


def test_an_index_of_models_that_is_wrong_keeps_nobody_from_a_data_set(
    cli: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "index.json").write_text("{")
    monkeypatch.setenv("CTSEG_MODELS", str(tmp_path / "index.json"))
    assert "model index" in cli("download").message
    assert "cannot be fetched without a login" in cli("download", "btcv").message


def test_a_model_killed_while_it_is_made_ends_complete(
    cli: Callable[..., Any],
    server: FileServer,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    assert cli("export", "--model", tiny_model, "--format", "bundle", "--output", "bundle").code == 0
    content = zipped(tmp_path / "bundle")
    index_of(tmp_path, monkeypatch, "mine", server.serve("/a.zip", content))
    work = tmp_path / "models" / ".mine.download"
    process = subprocess.Popen([sys.executable, "-m", "ctseg", "download", "mine", "--quiet"], cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (work / "unpacked").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.wait()
    requests = len(server.requests)
    assert cli("download", "mine", "--quiet").code == 0
    assert len(server.requests) == requests == 1, "the archive had arrived"
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["mine"]
    assert (tmp_path / "models" / "mine" / "best.pt").is_file()
