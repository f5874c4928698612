"""Images that change while they are annotated, and notes that nobody should have written."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ctseg.errors import CtsegError
from ctseg.io.images import read_image, write_image, write_labels
from ctseg.server.index import Index
from ctseg.server.problems import Invalid
from ctseg.server.run import Tls, check_tls, open_socket
from ctseg.server.settings import check_origin
from ctseg.server.texts import read_json
from ctseg.volume import Geometry, Volume

GRID = Geometry((64, 64, 4), np.eye(4))


def clicked(live: Any) -> str:
    session = live.json("POST", "/api/sessions", json={"image": "one", "model": "deepgrow"})["session"]
    assert live.call("POST", f"/api/sessions/{session}/clicks", json={"position": [12, 10, 8]}).status_code == 200
    return str(session)


@pytest.mark.parametrize(
    ("action", "body"),
    [("clicks", {"position": [12, 10, 8]}), ("undo", None), ("save", {"label": "spleen", "tag": "final"})],
)
def test_clicks_are_not_for_another_ct_in_the_same_file(
    live: Any, studies: Path, action: str, body: dict[str, Any] | None
) -> None:
    """Of the same size, but half as large and turned round: the old mask would lie on it unnoticed."""
    session = clicked(live)
    old = read_image(studies / "one.nii.gz")
    geometry = Geometry.from_parts(old.array.shape, (2.0, 2.0, 2.0), (0.0, 0.0, 0.0), np.diag([-1.0, -1.0, 1.0]))
    write_image(studies / "one.nii.gz", Volume(old.array, geometry))
    status, reason = live.refused("POST", f"/api/sessions/{session}/{action}", json=body)
    assert (status, reason) == (409, "session: the file of its image has changed; begin a new one")
    assert not (studies / "labels" / "final" / "one.nii.gz").exists()


def test_a_ct_that_changes_while_a_request_waits_is_told(
    start: Callable[..., Any], studies: Path, made: SimpleNamespace
) -> None:
    """The grid is looked at when the request comes, the voxels when its turn comes."""
    live = start()
    service, small = live.service, studies / "small.nii.gz"
    volume = read_image(studies / "one.nii.gz")
    write_image(
        small, Volume(np.asfortranarray(volume.array[:20]), Geometry((20, *volume.geometry.size[1:]), np.eye(4)))
    )
    check_size = service.check_size

    def then_replaced(image: Any) -> Geometry:
        geometry: Geometry = check_size(image)
        service.check_size = check_size
        shutil.copyfile(small, studies / "one.nii.gz")
        return geometry

    service.check_size = then_replaced
    status, reason = live.refused("POST", "/api/segment", json={"image": "one", "model": "spleen"})
    assert (status, reason) == (409, "image: its file has changed meanwhile; begin anew")


def test_names_of_values_that_were_not_saved_are_forgotten(tmp_path: Path) -> None:
    """Else a single refused label could take all 255 of a folder."""
    index = Index(tmp_path / "index.json")
    mask = np.array([[[1, 2]]], dtype=np.uint8)
    with pytest.raises(Invalid), index.naming():
        index.renumbered(mask, {1: "liver"})
    assert index.structures == {}
    with index.naming():
        index.renumbered(mask, {1: "liver", 2: "spleen"})
    assert index.structures == {"liver": 1, "spleen": 2}


@pytest.mark.parametrize("time", ["1" + "0" * 400, "-1.7e308", "1e300", "true"])
def test_notes_of_a_client_do_not_stop_the_next_image(live: Any, time: str) -> None:
    for image in ("one", "two"):
        form = {"info": json.dumps({"strategy": {"random": {"ts": 0}}}).replace("0", time)}
        assert live.call("PUT", "/datastore/image/info", params={"image": image}, data=form).status_code in (200, 422)
    for strategy in ("random", "first", "least-annotated"):
        assert live.json("POST", f"/activelearning/{strategy}")["id"] in ("one", "two", "three")


def test_notes_that_are_none_are_set_aside(studies: Path, start: Callable[..., Any]) -> None:
    (studies / "labels").mkdir()
    text = json.dumps({"images": {"one": 5}, "labels": {"final": {"one": 5}}})
    (studies / "labels" / "index.json").write_text(text)
    live = start()
    assert live.call("GET", "/datastore/image/info", params={"image": "one"}).status_code == 200
    assert live.json("POST", "/activelearning/first")["id"] == "one"
    assert (studies / "labels" / "index.json.damaged-1").read_text() == text


@pytest.mark.parametrize("text", ["1e999", "-1e999", "[NaN]", '{"a": Infinity}'])
def test_numbers_without_end_are_refused(text: str) -> None:
    with pytest.raises(Invalid, match="expected JSON"):
        read_json(text, "notes")
    assert read_json("[1.5, 1e300]", "notes") == [1.5, 1e300]


@pytest.mark.parametrize(
    ("given", "origin"),
    [
        ("https://Viewer.Example.org", "https://viewer.example.org"),
        ("https://viewer.example.org:443", "https://viewer.example.org"),
        ("http://viewer.example.org:80", "http://viewer.example.org"),
        ("https://viewer.example.org:8443", "https://viewer.example.org:8443"),
        ("https://[::1", None),
        ("https://u:p@viewer.example.org", None),
        ("https://viewer.example.org:port", None),
        ("ftp://viewer.example.org", None),
    ],
)
def test_origins_are_written_as_browsers_do(given: str, origin: str | None) -> None:
    if origin is not None:
        assert check_origin(given) == origin
        return
    with pytest.raises(CtsegError, match=r"expected an origin such as https://viewer\.example\.org"):
        check_origin(given)


@pytest.mark.parametrize("host", ["a..b", "a" * 64 + ".org"])
def test_a_host_that_cannot_be_one(host: str) -> None:
    with pytest.raises(CtsegError, match=r"--host a.* --port 0: .*; choose another one"):
        open_socket(host, 0)


def test_the_certificate_is_looked_at_before_anything_else(tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text("no certificate")
    with pytest.raises(CtsegError, match=r"--tls-cert .*cert.pem, --tls-key .*none.pem: cannot be used: "):
        check_tls(Tls(tmp_path / "cert.pem", tmp_path / "none.pem"))


def test_outlines_of_noise_are_refused(live: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctseg.server.aiaa.MAX_POINTS", 1000)
    answers = []
    for name, mask in (
        ("box", np.zeros((64, 64, 4), np.uint8)),
        ("noise", np.random.default_rng(0).random((64, 64, 4))),
    ):
        mask[20:40, 20:40] = 1
        write_labels(tmp_path / f"{name}.nii.gz", np.asfortranarray(mask > 0.5).astype(np.uint8), GRID)
        with (tmp_path / f"{name}.nii.gz").open("rb") as file:
            answers.append(live.call("POST", "/v1/mask2polygon", files={"datapoint": file}, data={"params": "{}"}))
    assert [answer.status_code for answer in answers] == [200, 413]
    assert [len(slices) for slices in answers[0].json()] == [1] * 4
    assert "more than 1000 points; smooth or crop the mask" in answers[1].json()["detail"]


def test_uvicorn_tells_nothing_of_its_own(live: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """What it tells are tracebacks, with the names of files."""
    logging.getLogger("uvicorn.error").error("cannot open Muster_Maria_19500101.nii.gz")
    assert capfd.readouterr().err == ""
