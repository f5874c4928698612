"""The JSON API against a live server: masks on the image's own grid, clicks, undo, labels that nobody loses."""

import gzip
import io
import itertools
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

from ctseg.io.images import read_geometry, read_image, read_labels, write_image, write_labels
from ctseg.volume import Volume


def mask_of(content: bytes) -> nibabel.Nifti1Image:
    return nibabel.Nifti1Image.from_bytes(gzip.decompress(content))


def opened(live: Any, image: str = "one") -> str:
    return live.json("POST", "/api/sessions", json={"image": image, "model": "deepgrow"})["session"]


def click(live: Any, session: str, position: list[float], **more: Any) -> np.ndarray:
    response = live.call("POST", f"/api/sessions/{session}/clicks", json={"position": position, **more})
    assert response.status_code == 200, response.text
    return np.asarray(mask_of(response.content).dataobj)


def test_lists_models_and_images(live: Any) -> None:
    models = live.json("GET", "/api/models")
    assert [(m["name"], m["kind"], m["labels"]) for m in models] == [
        ("deepgrow", "clicks", {}),
        ("spleen", "automatic", {"spleen": 1}),
    ]
    answer = live.json("GET", "/api/images")
    assert [image["id"] for image in answer["images"]] == ["one", "three", "two"]
    assert answer["structures"] == {"spleen": 1}


def test_no_model_takes_anothers_name(start: Callable[..., Any], made: SimpleNamespace) -> None:
    model = made.bright_model()
    live = start([("a-2", model), ("a", model), ("a", made.clicks_model()), ("a", model)])
    models = live.json("GET", "/api/models")
    assert [(m["name"], m["kind"]) for m in models] == [
        ("a-2", "automatic"),
        ("a", "automatic"),
        ("a-3", "clicks"),
        ("a-4", "automatic"),
    ]


@pytest.mark.parametrize(("image", "file"), [("one", "one.nii.gz"), ("two", "two.nrrd"), ("three", "three.nii.gz")])
def test_a_click_marks_its_voxel_on_the_images_own_grid(live: Any, studies: Path, image: str, file: str) -> None:
    session = opened(live, image)
    content = live.call("POST", f"/api/sessions/{session}/clicks", json={"position": [12, 9, 20]}).content
    mask = mask_of(content)
    array = np.asarray(mask.dataobj)
    assert np.allclose(mask.affine, read_geometry(studies / file).affine_ras, atol=1e-3)
    places = np.argwhere(array)
    assert np.allclose(places.mean(axis=0), [12, 9, 20], atol=0.1)  # a ball, centred on the click
    assert 27 < len(places) < 2000


@pytest.mark.parametrize("coordinates", ["lps", "ras"])
def test_clicks_in_patient_coordinates_mean_the_same_voxel(live: Any, studies: Path, coordinates: str) -> None:
    geometry = read_geometry(studies / "three.nii.gz")
    affine = geometry.affine if coordinates == "lps" else geometry.affine_ras
    position = (affine @ [12, 9, 20, 1])[:3].tolist()
    by_mm = click(live, opened(live, "three"), position, coordinates=coordinates)
    by_voxel = click(live, opened(live, "three"), [12, 9, 20])
    assert by_mm.any()
    assert np.array_equal(by_mm, by_voxel)


def test_negative_click_undo_and_reset(live: Any) -> None:
    session = opened(live)
    first = click(live, session, [20, 18, 16])
    second = click(live, session, [22, 18, 16], positive=False)
    assert second.sum() < first.sum()
    assert not second[22, 18, 16]
    undone = mask_of(live.call("POST", f"/api/sessions/{session}/undo").content)
    assert np.array_equal(np.asarray(undone.dataobj), first)
    assert live.json("GET", f"/api/sessions/{session}")["clicks"] == [{"position": [20, 18, 16], "positive": True}]
    empty = mask_of(live.call("POST", f"/api/sessions/{session}/reset").content)
    assert not np.asarray(empty.dataobj).any()
    assert live.json("GET", f"/api/sessions/{session}")["clicks"] == []


def test_segment_gives_the_box_and_saves_nothing(live: Any, made: SimpleNamespace, studies: Path) -> None:
    answer = live.call("POST", "/api/segment", json={"image": "two", "model": "spleen"})
    assert np.array_equal(np.asarray(mask_of(answer.content).dataobj), made.box_mask())
    assert not list(studies.glob("labels/*/*.nii.gz"))


def test_saved_structures_of_one_image_do_not_disturb_each_other(live: Any, studies: Path) -> None:
    masks = {}
    for name, place in (("liver", [10, 10, 10]), ("kidney left", [30, 28, 24]), ("liver", [12, 10, 10])):
        session = opened(live)
        masks[name] = click(live, session, place)
        saved = live.json("POST", f"/api/sessions/{session}/save", json={"label": name, "tag": "final"})
        assert saved["label"] == name
    structures = live.json("GET", "/api/images")["structures"]
    assert structures == {"spleen": 1, "liver": 2, "kidney left": 3}
    label = read_labels(studies / "labels/final/one.nii.gz").array
    assert np.array_equal(label == 2, masks["liver"] > 0)  # the second liver in place of the first
    assert np.array_equal(label == 3, masks["kidney left"] > 0)
    assert len(list((studies / "labels/final/replaced").glob("one-*.nii.gz"))) == 2
    by_http = live.call("GET", "/api/images/one/labels/final").content
    assert np.array_equal(np.asarray(mask_of(by_http).dataobj), label)
    (one,) = [image for image in live.json("GET", "/api/images")["images"] if image["id"] == "one"]
    assert one["labels"] == [{"tag": "final"}]


def test_two_people_at_once_lose_nothing(live: Any, studies: Path) -> None:
    names = [f"organ {n}" for n in range(8)]
    places = list(itertools.product((8, 30), (8, 28), (8, 24)))
    failures: list[str] = []

    def annotate(index: int) -> None:
        try:
            session = opened(live)
            click(live, session, list(places[index]))
            live.json("POST", f"/api/sessions/{session}/save", json={"label": names[index]})
        except AssertionError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=annotate, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    label = read_labels(studies / "labels/final/one.nii.gz").array
    structures = live.json("GET", "/api/images")["structures"]
    for place, name in zip(places, names, strict=True):
        assert label[place] == structures[name]


def test_clicks_of_one_session_count_one_after_the_other(live: Any) -> None:
    session = opened(live)
    threads = [threading.Thread(target=click, args=(live, session, [4 + 4 * n, 18, 16])) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    clicks = live.json("GET", f"/api/sessions/{session}")["clicks"]
    assert sorted(one["position"][0] for one in clicks) == [4 + 4 * n for n in range(8)]
    mask = np.asarray(mask_of(live.call("GET", f"/api/sessions/{session}/mask").content).dataobj)
    assert all(mask[tuple(one["position"])] for one in clicks)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_an_uploaded_image_is_one_of_the_studies(
    live: Any, studies: Path, tmp_path: Path, made: SimpleNamespace, suffix: str
) -> None:
    volume = made.ct("RAI", 5)
    write_image(tmp_path / f"new{suffix}", volume)
    with (tmp_path / f"new{suffix}").open("rb") as file:
        assert live.json("POST", "/api/images", files={"file": file}) == {"id": "new"}
    assert np.array_equal(read_image(studies / f"new{suffix}").array, volume.array)
    sent = mask_of(live.call("GET", "/api/images/new/file").content)
    assert np.array_equal(np.asarray(sent.dataobj), volume.array)
    assert np.allclose(sent.affine, volume.geometry.affine_ras, atol=1e-3)
    with (tmp_path / f"new{suffix}").open("rb") as file:
        status, reason = live.refused("POST", "/api/images", files={"file": file})
    assert (status, reason) == (409, "image 'new': is there already; choose another id")
    assert not list(studies.glob(".ctseg-upload-*"))


def test_a_models_mask_is_saved_under_the_names_of_its_values(
    start: Callable[..., Any], studies: Path, tmp_path: Path, made: SimpleNamespace
) -> None:
    (studies / "labels").mkdir()
    (studies / "labels/index.json").write_text('{"structures": {"1": "kidney"}}')  # where the model has the spleen
    live = start()
    write_labels(tmp_path / "mask.nii.gz", np.asfortranarray(made.box_mask()), read_geometry(studies / "one.nii.gz"))
    content = {"file": ("mask.nii.gz", (tmp_path / "mask.nii.gz").read_bytes())}
    answer = live.json("PUT", "/api/images/one/labels/final?model=spleen", files=content)
    assert answer["structures"] == {"kidney": 1, "spleen": 2}
    assert np.array_equal(read_labels(studies / "labels/final/one.nii.gz").array, made.box_mask() * 2)
    assert live.refused("PUT", "/api/images/one/labels/final?model=none", files=content)[0] == 404
    assert live.refused("PUT", "/api/images/one/labels/final?model=deepgrow", files=content)[0] == 422


def test_a_whole_label_map_is_saved_and_read_back_by_another_reader(
    live: Any, studies: Path, tmp_path: Path, made: SimpleNamespace
) -> None:
    geometry = read_geometry(studies / "two.nrrd")
    label = np.random.default_rng(0).integers(0, 4, geometry.size).astype(np.uint8)
    write_labels(tmp_path / "label.nrrd", np.asfortranarray(label), geometry)
    with (tmp_path / "label.nrrd").open("rb") as file:
        assert live.refused("PUT", "/api/images/two/labels/final", files={"file": file})[0] == 422  # what is 2?
    store = live.service.datastore
    for name in ("liver", "kidney"):  # the folder knows values 2 and 3 from here on
        store.save_structure("one", "final", name, made.box_mask(), read_geometry(studies / "one.nii.gz"))
    with (tmp_path / "label.nrrd").open("rb") as file:
        answer = live.json("PUT", "/api/images/two/labels/final", files={"file": file})
    assert answer["structures"] == {"spleen": 1, "liver": 2, "kidney": 3}
    image = SimpleITK.ReadImage(str(studies / "labels/final/two.nii.gz"))
    assert np.array_equal(SimpleITK.GetArrayFromImage(image).T, label)
    assert np.allclose(image.GetOrigin(), geometry.origin_mm, atol=1e-3)


def test_an_expired_session_is_told_from_one_that_never_was(start: Callable[..., Any]) -> None:
    live = start(session_seconds=0.5)
    session = opened(live)
    time.sleep(0.8)
    assert live.refused("GET", f"/api/sessions/{session}") == (440, "session: it has expired; open a new one")
    assert live.refused("GET", "/api/sessions/never")[0] == 404
    kept = opened(live)
    live.json("DELETE", f"/api/sessions/{kept}")
    assert live.refused("POST", f"/api/sessions/{kept}/undo")[0] == 404
    assert len(live.service.click_sessions) == 0


def test_no_more_sessions_than_allowed(start: Callable[..., Any]) -> None:
    live = start(max_sessions=2)
    opened(live)
    opened(live)
    assert live.refused("POST", "/api/sessions", json={"image": "one", "model": "deepgrow"})[0] == 429


def test_prepared_images_stay_within_the_cache(start: Callable[..., Any], made: SimpleNamespace, studies: Path) -> None:
    volume = made.ct()
    assert volume.array.nbytes > 60_000
    for n in range(6):
        write_image(studies / f"more_{n}.nii.gz", Volume(volume.array, volume.geometry))
    live = start(cache_bytes=200_000)
    for n in range(6):
        assert click(live, opened(live, f"more_{n}"), [12, 9, 20]).any()
        assert 0 < live.service.cache.num_bytes <= 200_000


def test_docs_and_openapi_need_no_other_server(live: Any) -> None:
    page = live.call("GET", "/api/docs").text
    assert "/api/sessions/{session}/clicks" in page
    assert "http://" not in page.replace(live.url, "")
    assert "https://" not in page
    document = live.json("GET", "/api/openapi.json")
    assert document["components"]["schemas"]["Problem"]["required"] == ["detail"]


def test_the_page_is_served(live: Any) -> None:
    response = live.call("GET", "/")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    assert io.StringIO(response.text).readline().lower().startswith("<!doctype html>")
