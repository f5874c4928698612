"""Malformed and hostile requests: a 4xx with a reason, and the server stays up and leaks nothing."""

import gzip
import json
import socket
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import requests

from ctseg.io.images import write_image
from ctseg.server import guard
from ctseg.server.run import LOG_LINES

TOKEN = "0123456789abcdef-token"


def opened(live: Any) -> str:
    return live.json("POST", "/api/sessions", json={"image": "one", "model": "deepgrow"})["session"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"position": [40, 0, 0]}, "outside the image, which has 40 x 36 x 32 voxels"),
        ({"position": [-1, 0, 0]}, "outside the image"),
        ({"position": [1e308, 0, 0]}, "position.0: "),
        ({"position": [1, 2]}, "position: "),
        ({"position": [1, 2, 3, 4]}, "position: "),
        ({"position": ["a", 2, 3]}, "position.0: "),
        ({"position": [None, 2, 3]}, "position.0: "),
        ({}, "position: Field required"),
        ({"position": [1, 2, 3], "coordinates": "mni"}, "coordinates: "),
        ({"position": [1, 2, 3], "positive": "perhaps"}, "positive: "),
        ({"position": [1, 2, 3], "radius": 3}, "radius: "),
    ],
)
def test_wrong_clicks(live: Any, body: dict[str, Any], reason: str) -> None:
    status, told = live.refused("POST", f"/api/sessions/{opened(live)}/clicks", json=body)
    assert status == 422
    assert reason in told


@pytest.mark.parametrize("content", ['{"position": [NaN, 0, 0]}', '{"position": [Infinity, 0, 0]}', "{", "[" * 100_000])
def test_bodies_that_are_no_json(live: Any, content: str) -> None:
    headers = {"content-type": "application/json"}
    path = f"/api/sessions/{opened(live)}/clicks"
    assert live.refused("POST", path, data=content, headers=headers)[0] in (400, 422)


@pytest.mark.parametrize(
    "image",
    ["../one", "..%2fone", "/etc/passwd", "studies/../one", "one.nii.gz", "\x00", "labels/final/one", "a" * 5000],
)
def test_ids_that_lead_elsewhere(live: Any, image: str) -> None:
    assert live.refused("POST", "/api/sessions", json={"image": image, "model": "deepgrow"})[0] == 404
    assert live.refused("GET", "/datastore/image", params={"image": image})[0] == 404
    assert live.refused("POST", "/infer/spleen", params={"image": image})[0] == 404
    assert live.refused("GET", "/datastore/label", params={"label": image, "tag": "final"})[0] == 404
    assert live.refused("GET", "/datastore/label", params={"label": "one", "tag": image})[0] == 404


@pytest.mark.parametrize(
    "path", ["/../pyproject.toml", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd", "/api/images/%2e%2e/file"]
)
def test_paths_that_lead_elsewhere(live: Any, path: str) -> None:
    with socket.create_connection(live.socket.getsockname()) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 404")
    assert b"root:" not in answer


def test_links_out_of_the_folder_are_not_served(
    live: Any, studies: Path, tmp_path: Path, made: SimpleNamespace
) -> None:
    write_image(tmp_path / "secret.nii.gz", made.ct())
    (studies / "stolen.nii.gz").symlink_to(tmp_path / "secret.nii.gz")
    (studies / "inside.nii.gz").symlink_to(studies / "one.nii.gz")
    ids = [image["id"] for image in live.json("GET", "/api/images")["images"]]
    assert ids == ["inside", "one", "three", "two"]
    assert live.refused("GET", "/api/images/stolen/file")[0] == 404


@pytest.mark.parametrize("tag", ["../final", "a/b", "", "replaced", "x" * 65, ".hidden"])
def test_tags_that_lead_elsewhere(live: Any, studies: Path, tag: str) -> None:
    session = opened(live)
    live.call("POST", f"/api/sessions/{session}/clicks", json={"position": [12, 9, 20]})
    status, _ = live.refused("POST", f"/api/sessions/{session}/save", json={"label": "liver", "tag": tag})
    assert status == 422
    assert not list(studies.parent.rglob("one*.nii.gz"))[1:]


@pytest.mark.parametrize("name", ["scan.zip", "scan.tar.gz", "scan.nii.gz.exe", "scan", "scan.dcm", "../../x.tgz"])
def test_archives_and_other_files_are_not_taken(live: Any, studies: Path, tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("../evil.nii", "x")
    content = (tmp_path / "a.zip").read_bytes()
    before = sorted(studies.rglob("*"))
    assert live.refused("POST", "/api/images", files={"file": (name, content)})[0] == 415
    assert live.refused("PUT", "/datastore/?image=x", files={"file": (name, content)})[0] == 415
    assert live.refused("PUT", "/session/", files={"files": (name, content)})[0] == 415
    assert live.refused("POST", "/infer/spleen", files={"file": (name, content)})[0] == 415
    assert live.refused("PUT", "/session/?uncompress=true", files={"files": ("a.nii.gz", content)})[0] == 415
    assert sorted(studies.rglob("*")) == before


def test_uploads_that_are_no_ct(live: Any, studies: Path, made: SimpleNamespace, tmp_path: Path) -> None:
    write_image(tmp_path / "ok.nii.gz", made.ct())
    whole = (tmp_path / "ok.nii.gz").read_bytes()
    plain = bytearray(gzip.decompress(whole))
    plain[42:48] = np.array([32767] * 3, "<i2").tobytes()  # dim: promises terabytes
    nan = made.ct()
    write_image(tmp_path / "nan.nii.gz", type(nan)(np.full(nan.array.shape, np.nan, np.float32, "F"), nan.geometry))
    bad = {
        "cut": whole[:-500],
        "text": b"dear reader",
        "empty": b"",
        "huge": gzip.compress(bytes(plain)),
        "nan": (tmp_path / "nan.nii.gz").read_bytes(),
        "bomb": gzip.compress(bytes(30_000_000)),
    }
    for name, content in bad.items():
        status, reason = live.refused("POST", "/api/images", files={"file": (f"{name}.nii.gz", content)})
        assert status in (400, 413, 422), name
        assert str(studies) not in reason
    assert sorted(path.name for path in studies.iterdir()) == ["labels", "one.nii.gz", "three.nii.gz", "two.nrrd"]


@pytest.mark.parametrize("name", ["..nii.gz", ".hidden.nii.gz", "a\nb.nii.gz", "-x\x7f.nii", "é" * 300 + ".nii.gz"])
def test_names_that_no_file_should_have(live: Any, tmp_path: Path, made: SimpleNamespace, name: str) -> None:
    write_image(tmp_path / "ok.nii.gz", made.ct())
    content = (tmp_path / "ok.nii.gz").read_bytes()
    form = {"file": ("ok.nii.gz", content), "id": (None, name.removesuffix(".gz").removesuffix(".nii"))}
    assert live.refused("POST", "/api/images", files=form)[0] == 422


def test_images_larger_than_allowed(start: Callable[..., Any], tmp_path: Path, made: SimpleNamespace) -> None:
    live = start(max_voxels=1000)
    assert live.refused("POST", "/api/sessions", json={"image": "one", "model": "deepgrow"})[0] == 413
    assert live.refused("POST", "/infer/spleen?image=one")[0] == 413
    write_image(tmp_path / "ok.nii.gz", made.ct())
    with (tmp_path / "ok.nii.gz").open("rb") as file:
        assert live.refused("POST", "/api/images", files={"file": file})[0] == 413


def test_uploads_larger_than_allowed_with_and_without_a_length(start: Callable[..., Any]) -> None:
    live = start(max_upload_bytes=100_000)
    assert live.refused("POST", "/api/images", files={"file": ("a.nii.gz", bytes(200_000))})[0] == 413
    host, port = live.socket.getsockname()
    with socket.create_connection((host, port), timeout=10) as connection:
        connection.sendall(
            b"POST /api/images HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n"
            b"Content-Type: multipart/form-data; boundary=x\r\n\r\n"
        )
        connection.sendall(b'3c\r\n--x\r\nContent-Disposition: form-data; name="file"; filename="\r\n')
        try:
            for _ in range(50):
                connection.sendall(b"2710\r\n" + bytes(10_000) + b"\r\n")
        except ConnectionError:
            pass
        assert connection.recv(100).startswith((b"HTTP/1.1 413", b"HTTP/1.1 400"))
    assert live.json("GET", "/api/models")


@pytest.mark.parametrize(
    "form",
    [
        {"params": (None, "no json")},
        {"params": (None, "[1]")},
        {"params": (None, '{"foreground": [[NaN, 1, 1]]}')},
        {"params": (None, '{"foreground": "abc"}')},
        {"params": (None, '{"foreground": [[1, 2]]}')},
        {"params": (None, '{"foreground": [["a", 1, 1]]}')},
        {"params": (None, '{"foreground": [[1, 2, 1e300]]}')},
        {"params": (None, '{"foreground": [[400, 1, 1]]}')},
        {"params": (None, json.dumps({"foreground": [[1, 1, 1]] * 1000}))},
        {"params": (None, '{"result_extension": "/../../x"}')},
        {"params": (None, '{"result_extension": ".exe"}')},
        {"params": (None, '{"result_extension": ["a"]}')},
        {"params": (None, "{" * 2000)},
    ],
)
def test_wrong_parameters(live: Any, form: dict[str, Any]) -> None:
    assert live.refused("POST", "/infer/deepgrow?image=one", files=form)[0] == 422


def test_what_is_not_there(live: Any) -> None:
    assert live.refused("POST", "/infer/nothing?image=one")[0] == 404
    assert live.refused("POST", "/infer/spleen")[0] == 422
    assert live.refused("POST", "/infer/spleen?session_id=nothing")[0] == 404
    assert live.refused("POST", "/activelearning/best")[0] == 404
    assert live.refused("POST", "/train/deepgrow")[0] == 409  # nothing is labelled
    assert live.refused("POST", "/train/spleen", json={"max_epochs": -1})[0] == 422
    assert live.refused("POST", "/api/segment", json={"image": "one", "model": "deepgrow"})[0] == 422
    assert live.refused("POST", "/api/sessions", json={"image": "one", "model": "spleen"})[0] == 422
    assert live.refused("GET", "/nothing")[0] == 404
    assert live.refused("DELETE", "/api/models")[0] == 405


def test_broken_multipart(live: Any) -> None:
    for content_type, body in (
        ("multipart/form-data", b"--x\r\n"),
        ("multipart/form-data; boundary=x", b"--y\r\nnothing"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\nabc\r\n--x--\r\n"),
        ("multipart/form-data; boundary=" + "x" * 5000, b"--x"),
        ("text/plain", b"hello"),
    ):
        status, _ = live.refused("POST", "/api/images", data=body, headers={"content-type": content_type})
        assert status in (400, 415, 422), content_type


def test_a_body_that_comes_too_slowly(live: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "SILENCE_SECONDS", 0.3)
    with socket.create_connection(live.socket.getsockname(), timeout=10) as connection:
        connection.sendall(
            b"POST /api/segment HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            b"Content-Type: application/json\r\nContent-Length: 99\r\n\r\n{"
        )
        assert connection.recv(4096).startswith(b"HTTP/1.1 408")
    assert live.json("GET", "/api/models")


def test_clients_that_hang_up_in_the_middle(live: Any) -> None:
    for part in (b"POST /api/segm", b"POST /api/segment HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 99\r\n\r\n{"):
        with socket.create_connection(live.socket.getsockname()) as connection:
            connection.sendall(part)
    assert live.json("GET", "/api/models")


def test_a_client_that_left_before_its_turn_costs_no_work(start: Callable[..., Any], made: SimpleNamespace) -> None:
    calls: list[float] = []
    release = threading.Event()

    def slow(image: Any) -> Any:
        calls.append(time.monotonic())
        release.wait(20)
        return made.clicked(image)

    live = start([("deepgrow", made.clicks_model(slow))])
    sessions = [opened(live) for _ in range(3)]
    path, body = "/api/sessions/{}/clicks", {"position": [12, 9, 20]}
    answers: list[int] = []
    first = threading.Thread(
        target=lambda: answers.append(live.call("POST", path.format(sessions[0]), json=body).status_code)
    )
    first.start()
    while not calls:
        time.sleep(0.01)
    with pytest.raises(requests.exceptions.ReadTimeout):
        requests.post(live.url + path.format(sessions[1]), json=body, timeout=0.3)
    time.sleep(0.6)  # the server looks now and then whether they are still there
    release.set()
    first.join()
    assert answers == [200]
    assert live.call("POST", path.format(sessions[2]), json=body).status_code == 200
    assert len(calls) == 2
    assert live.json("GET", f"/api/sessions/{sessions[1]}")["clicks"] == []


def test_a_queue_that_is_full(start: Callable[..., Any], made: SimpleNamespace) -> None:
    release = threading.Event()

    def slow(image: Any) -> Any:
        release.wait(20)
        return made.clicked(image)

    live = start([("deepgrow", made.clicks_model(slow))], max_waiting=1)
    codes: list[int] = []

    def click() -> None:
        session = opened(live)
        path = f"/api/sessions/{session}/clicks"
        codes.append(live.call("POST", path, json={"position": [12, 9, 20]}).status_code)

    threads = [threading.Thread(target=click) for _ in range(5)]
    for thread in threads:
        thread.start()
    while len(codes) < 3:
        time.sleep(0.02)
    release.set()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [200, 200, 503, 503, 503]


def test_a_bug_is_told_by_its_number_only(start: Callable[..., Any], made: SimpleNamespace) -> None:
    name = " ".join(["patient", "Jane", "Doe"])

    def broken(image: Any) -> Any:
        raise ZeroDivisionError(name)

    live = start([("deepgrow", made.clicks_model(broken))])
    path = f"/api/sessions/{opened(live)}/clicks"
    response = live.call("POST", path, json={"position": [12, 9, 20]})
    assert response.status_code == 500
    assert "Jane" not in response.text
    assert response.headers["x-request-id"] in response.json()["detail"]
    assert live.json("GET", "/api/models")


def test_the_log_holds_ids_of_requests_and_nothing_of_patients(start: Callable[..., Any], studies: Path) -> None:
    (studies / "one.nii.gz").rename(studies / "Doe_Jane_1970.nii.gz")
    live = start()
    answer = live.call("GET", "/api/images/Doe_Jane_1970/file")
    live.call("GET", "/datastore/image?image=Doe_Jane_1970")
    live.call("GET", "/api/images/Doe_Jane_1971/file")
    live.call("GET", "/Doe_Jane_1970")
    log = "\n".join(LOG_LINES)
    assert f"request {answer.headers['x-request-id']}: GET /api/images/{{image_id}}/file 200" in log
    assert "Jane" not in log


def test_no_token_no_answer(start: Callable[..., Any]) -> None:
    live = start(token=TOKEN)
    right = {"Authorization": f"Bearer {TOKEN}"}
    paths = ("/api/models", "/api/docs", "/api/openapi.json", "/info/", "/logs/", "/api/images/one/file", "/v1/models")
    for path in paths:
        assert live.call("GET", path).status_code == 401, path
        assert live.call("GET", path, headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert live.call("GET", path, headers={"Authorization": TOKEN}).status_code == 401
        assert live.call("GET", path, headers={"Authorization": "Bearer " + "ü"}).status_code == 401
        assert live.call("GET", path, headers=right).status_code in (200, 404), path
    assert live.call("GET", "/").status_code == 200
    assert live.call("GET", "/datastore/image?image=x.js").status_code == 401
    assert live.call("GET", "/api/images/a.js/labels/x.js").status_code == 401


def test_pages_of_other_servers_are_kept_out_unless_allowed(start: Callable[..., Any]) -> None:
    live = start(cors_origins=("https://viewer.example.org",))
    assert live.call("GET", "/info/", headers={"Origin": "https://evil.example.org"}).status_code == 403
    assert live.call("GET", "/info/", headers={"Origin": "null"}).status_code == 403
    assert live.call("GET", "/info/", headers={"Origin": live.url}).status_code == 200
    allowed = live.call("GET", "/info/", headers={"Origin": "https://viewer.example.org"})
    assert allowed.headers["access-control-allow-origin"] == "https://viewer.example.org"
    asked = {"Origin": "https://viewer.example.org", "Access-Control-Request-Method": "PUT"}
    assert live.call("OPTIONS", "/datastore/label", headers=asked).status_code == 200
    # A name that an attacker points at 127.0.0.1 is not this server's name.
    assert live.call("GET", "/info/", headers={"Host": "evil.example.org"}).status_code == 400
    assert live.call("GET", "/info/", headers={"Host": "localhost:1"}).status_code == 200
