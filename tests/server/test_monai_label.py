"""The released client of MONAI Label, unchanged, against a live server; it parses the multipart answers itself."""

import dataclasses
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK

from ctseg.io.images import read_geometry, read_labels, write_image, write_labels

# The client leaves files open, and its `cgi` goes away with Python 3.13.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def client(connect: Callable[[Any], Any], live: Any) -> Any:
    return connect(live)


def array_of(path: str) -> np.ndarray:
    return np.asarray(nibabel.load(path).dataobj)


def test_info_tells_what_slicer_and_ohif_read(client: Any) -> None:
    info = client.info()
    assert {name: (m["type"], m["dimension"]) for name, m in info["models"].items()} == {
        "deepgrow": ("deepgrow", 3),
        "spleen": ("segmentation", 3),
    }
    assert info["labels"] == ["spleen"]
    assert info["models"]["spleen"]["labels"] == {"spleen": 1}
    assert set(info["strategies"]) == {"random", "first", "least-annotated"}
    assert info["datastore"] == {"total": 3, "completed": 0, "label_tags": {}}
    assert info["trainers"]["spleen"]["config"]["max_epochs"] > 0
    assert not client.auth_enabled()


@pytest.mark.parametrize(("image", "file"), [("one", "one.nii.gz"), ("two", "two.nrrd"), ("three", "three.nii.gz")])
def test_clicks_by_voxel_of_the_images_file(client: Any, studies: Path, image: str, file: str) -> None:
    path, params = client.infer("deepgrow", image, {"foreground": [[12, 9, 20]], "background": [[20, 9, 20]]})
    mask = nibabel.load(path)
    places = np.argwhere(np.asarray(mask.dataobj))
    assert params["label_names"] == {}
    assert np.allclose(mask.affine, read_geometry(studies / file).affine_ras, atol=1e-3)
    assert np.linalg.norm(places.mean(axis=0) - [12, 9, 20]) < 1.5
    without, _ = client.infer("deepgrow", image, {"foreground": [[12, 9, 20]], "background": []})
    assert array_of(without).sum() > array_of(path).sum()


def test_segmentation_and_its_names(client: Any, made: SimpleNamespace) -> None:
    path, params = client.infer("spleen", "two", {})
    assert np.array_equal(array_of(path), made.box_mask())
    assert params["label_names"] == {"spleen": 1}


def test_ohif_gets_a_plain_nrrd_alone(live: Any, made: SimpleNamespace, tmp_path: Path) -> None:
    params = {"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False}
    answer = live.call("POST", "/infer/spleen?image=one&output=image", files={"params": (None, json.dumps(params))})
    assert b"encoding: raw" in answer.content[:400]
    (tmp_path / "mask.nrrd").write_bytes(answer.content)
    image = SimpleITK.ReadImage(str(tmp_path / "mask.nrrd"))
    assert np.array_equal(SimpleITK.GetArrayFromImage(image).T, made.box_mask())
    as_json = live.json("POST", "/infer/spleen?image=one&output=json")
    assert as_json["label_names"] == {"spleen": 1}


def test_session_with_an_image_of_the_clients_own(client: Any, tmp_path: Path, made: SimpleNamespace) -> None:
    file = tmp_path / "own.nii.gz"
    write_image(file, made.ct("RAI", 9))
    created = client.create_session(str(file))
    session_id = created["session_id"]
    assert created["session_info"]["image"] == "upload.nii.gz"
    assert str(tmp_path) not in json.dumps(created)
    path, _ = client.infer("spleen", "", {}, session_id=session_id)
    assert np.array_equal(array_of(path), made.box_mask())
    assert client.get_session(session_id)["name"] == session_id
    client.remove_session(session_id)
    with pytest.raises(Exception, match="Status: 404"):
        client.get_session(session_id)


def test_an_expired_session_goes_with_its_files(
    connect: Callable[[Any], Any], start: Callable[..., Any], tmp_path: Path, made: SimpleNamespace
) -> None:
    live = start(session_seconds=0.5)
    file = tmp_path / "own.nii.gz"
    write_image(file, made.ct())
    session_id = connect(live).create_session(str(file))["session_id"]
    assert len(list(live.service.scratch.iterdir())) == 1
    time.sleep(0.8)
    assert live.refused("GET", f"/session/{session_id}")[0] == 440
    assert not list(live.service.scratch.iterdir())


def test_an_image_sent_along(client: Any, tmp_path: Path, made: SimpleNamespace, studies: Path) -> None:
    file = tmp_path / "own.nii.gz"
    write_image(file, made.ct("SPL", 9))
    path, _ = client.infer("spleen", "", {}, file=str(file))
    assert np.array_equal(array_of(path), made.box_mask())
    assert not list(studies.glob(".ctseg-upload-*"))


def test_next_sample_save_label_and_the_datastore(
    client: Any, studies: Path, tmp_path: Path, made: SimpleNamespace
) -> None:
    first = client.next_sample("first", {})
    assert (first["id"], first["name"]) == ("one", "one.nii.gz")
    assert first["checksum"].startswith("SHA256:")
    assert first["strategy"]["first"]["client_id"] == "tester"
    label = tmp_path / "label.nii.gz"
    write_labels(label, np.asfortranarray(made.box_mask() * 7), read_geometry(studies / "one.nii.gz"))
    params = {"label_info": [{"name": "liver", "idx": 7}]}
    assert client.save_label("one", str(label), params=params) == {"image": "one", "label": "one"}
    assert client.next_sample("first", {})["id"] == "three"
    assert client.next_sample("least-annotated", {})["id"] in ("two", "three")
    assert client.next_sample("random", {})["id"] in ("two", "three")
    assert client.info()["datastore"] == {"total": 3, "completed": 1, "label_tags": {"final": 1}}
    assert client.info()["labels"] == ["spleen", "liver"]
    store = client.datastore()
    assert list(store["objects"]["one"]["labels"]) == ["final"]
    saved = read_labels(studies / "labels/final/one.nii.gz").array
    assert np.array_equal(saved, made.box_mask() * 2)  # liver: the second structure of this folder
    assert np.array_equal(array_of(client.download_label("one", "final")), saved)


def test_tags_original_and_final_are_kept_apart(client: Any, studies: Path, tmp_path: Path, made: SimpleNamespace):
    client.infer("spleen", "one", {"save_label": True, "label_tag": "original"})
    label = tmp_path / "label.nii.gz"
    write_labels(label, np.zeros_like(made.box_mask(), order="F"), read_geometry(studies / "one.nii.gz"))
    client.save_label("one", str(label), tag="final")
    assert np.array_equal(read_labels(studies / "labels/original/one.nii.gz").array, made.box_mask())
    assert not read_labels(studies / "labels/final/one.nii.gz").array.any()


def test_ohif_saves_bare_voxels(live: Any, studies: Path, made: SimpleNamespace) -> None:
    content = made.box_mask().tobytes(order="F")
    form = {"params": (None, "{}"), "label": ("label.bin", content)}
    live.json("PUT", "/datastore/label?image=two", files=form)
    label = read_labels(studies / "labels/final/two.nii.gz")
    assert np.array_equal(label.array, made.box_mask())
    assert label.geometry.agrees_with(read_geometry(studies / "two.nrrd"))
    form["label"] = ("label.bin", content[:-1])
    assert live.refused("PUT", "/datastore/label?image=two", files=form)[0] == 422


def test_upload_image_then_fetch_it(client: Any, live: Any, tmp_path: Path, made: SimpleNamespace) -> None:
    file = tmp_path / "scan.nii.gz"
    write_image(file, made.ct())
    assert client.upload_image(str(file), "patient.nii.gz") == {"image": "patient"}
    assert live.call("GET", "/datastore/image?image=patient").content == file.read_bytes()
    assert live.call("HEAD", "/datastore/image?image=patient").status_code == 200
    assert live.call("HEAD", "/datastore/image?image=nobody").status_code == 404


def test_notes_of_two_clients_are_all_kept(live: Any) -> None:
    def note(index: int) -> None:
        live.json("PUT", "/datastore/image/info?image=one", data={"info": json.dumps({f"key{index}": index})})

    threads = [threading.Thread(target=note, args=(n,)) for n in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert live.json("GET", "/datastore/image/info?image=one") == {f"key{n}": n for n in range(10)}


def test_batch_inference_saves_originals(live: Any, studies: Path, made: SimpleNamespace) -> None:
    assert live.json("POST", "/batch/infer/spleen?images=unlabeled")["status"] == "RUNNING"
    deadline = time.monotonic() + 20
    while live.json("GET", "/batch/infer")["status"] == "RUNNING":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert live.json("GET", "/batch/infer")["result"] == {"total": 3, "failed": 0}
    for name in ("one", "two", "three"):
        assert np.array_equal(read_labels(studies / f"labels/original/{name}.nii.gz").array, made.box_mask())


def test_names_of_originals_are_told_in_the_order_of_their_values(
    start: Callable[..., Any], studies: Path, made: SimpleNamespace
) -> None:
    (studies / "labels").mkdir()
    (studies / "labels/index.json").write_text('{"structures": {"7": "spleen", "1": "liver"}}')
    live = start()
    form = {"params": (None, '{"save_label": true}')}
    assert live.call("POST", "/infer/spleen?image=one", files=form).ok
    noted = live.json("GET", "/datastore/?output=all")["objects"]["one"]["labels"]["original"]["info"]
    assert noted == {"params": {"label_names": {"spleen": 7}}}
    assert np.array_equal(read_labels(studies / "labels/original/one.nii.gz").array, made.box_mask() * 7)


def test_logs_models_and_what_is_not_there(client: Any, live: Any) -> None:
    client.infer("spleen", "one", {})
    lines = live.call("GET", "/logs/?lines=50").text
    assert "POST /infer/{model} 200" in lines
    assert live.refused("GET", "/model/info/spleen")[0] == 404  # this test's model is in no file
    assert not client.train_status(check_if_running=True)
    with pytest.raises(Exception, match="nothing was started yet"):
        client.train_status()
    assert client.train_stop() == {}


def test_the_clients_login_with_the_token(connect: Callable[[Any], Any], start: Callable[..., Any]) -> None:
    client = connect(start(token="0123456789abcdef-token"))
    assert client.auth_enabled()
    with pytest.raises(Exception, match="Status: 401"):
        client.info()
    with pytest.raises(Exception, match="Status: 401"):
        client.auth_token("anyone", "wrong")
    client.update_auth(client.auth_token("anyone", "0123456789abcdef-token"))
    assert client.auth_valid_token()
    assert client.info()["name"] == "ctseg"
    assert client.infer("deepgrow", "one", {"foreground": [[12, 9, 20]]})[0]


def test_training_starts_and_stops_by_the_released_client(
    start: Callable[..., Any],
    connect: Callable[[Any], Any],
    labelled: Path,
    made: SimpleNamespace,
    tmp_path: Path,
    models: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    of_file = dataclasses.replace(made.bright_model(), path=models[0])
    live = start([("spleen", of_file), ("deepgrow", made.clicks_model())])
    client = connect(live)
    begun = client.train_start("spleen", {"max_epochs": 500})
    assert begun["status"] == "RUNNING"
    assert client.train_status(check_if_running=True)
    with pytest.raises(Exception, match="Status: 429"):
        client.train_start("spleen", {})
    assert client.infer("deepgrow", "one", {"foreground": [[12, 9, 20]]})[0]  # answered meanwhile
    assert client.train_stop()["status"] == "STOPPED"
    status = made.wait_for(live.url, lambda status: "end_ts" in status, 60)
    assert status["status"] == "STOPPED"
    assert status["id"] == begun["id"]
    assert not client.train_status(check_if_running=True)
    manifest = json.loads(next(tmp_path.glob("runs/*-data/manifest.json")).read_text())
    assert len(manifest["training"]) == 3
