"""Limits on bodies, text, connections and memory: one answer to each request, and none of them 500."""

import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import requests

from ctseg.io.images import read_image, read_labels
from ctseg.server import batch, run
from ctseg.server.problems import Busy
from ctseg.server.run import LOG_LINES

TOKEN = "0123456789abcdef-token"
HALF = '"\\ud800"'
"""Half of a character, as JSON can hold it."""


def answers(live: Any, request: bytes) -> bytes:
    """All that comes back until the server closes the connection."""
    answer = b""
    with socket.create_connection(live.socket.getsockname(), timeout=10) as connection, suppress(ConnectionError):
        connection.sendall(request)
        while part := connection.recv(65536):
            answer += part
    return answer


def chunked(head: bytes, num_bytes: int) -> bytes:
    chunk = b"2000\r\n" + bytes(0x2000) + b"\r\n"
    return head + b"\r\nTransfer-Encoding: chunked\r\n\r\n" + chunk * (num_bytes // 0x2000) + b"0\r\n\r\n"


@pytest.mark.parametrize(
    ("method", "path", "content"),
    [
        ("POST", "/api/segment", f'{{"image": {HALF}, "model": "spleen"}}'),
        ("POST", "/api/segment", f'{{"image": "one", "model": "spleen", {HALF}: 1}}'),
        ("POST", "/activelearning/first", f'{{"client_id": {HALF}}}'),
        ("POST", "/activelearning/first", '{"a": ' + "[" * 20 + "]" * 20 + "}"),
        ("POST", "/batch/infer/spleen", f'{{"label_tag": {HALF}}}'),
    ],
)
def test_json_that_cannot_be_written_again(live: Any, method: str, path: str, content: str) -> None:
    for headers in ({"content-type": "application/json"}, {}):
        assert live.refused(method, path, data=content, headers=headers)[0] == 422
    assert live.json("GET", "/datastore/?output=all")


def test_fields_of_forms_that_cannot_be_written_again(live: Any, made: SimpleNamespace) -> None:
    info = {"info": json.dumps({"a": "\ud800"})}
    assert live.refused("PUT", "/datastore/image/info?image=one", data=info)[0] == 422
    deep = {"info": '{"a": ' + "[" * 20 + "]" * 20 + "}"}
    assert live.refused("PUT", "/datastore/image/info?image=one", data=deep)[0] == 422
    form = {"label": ("label.bin", made.box_mask().tobytes(order="F"))}
    for name in ("\ud800", "a" * 65):
        form["params"] = (None, json.dumps({"label_info": [{"name": name, "idx": 1}]}))
        assert live.refused("PUT", "/datastore/label?image=two", files=form)[0] == 422
    assert live.json("GET", "/api/images")["structures"] == {"spleen": 1}
    assert live.json("GET", "/datastore/?output=all")["objects"]["one"]["image"]["info"] == {}


def test_json_larger_than_a_mebibyte(live: Any) -> None:
    headers, content = {"content-type": "application/json"}, b" " * (2**20 + 1)
    status, reason = live.refused("POST", "/activelearning/first", data=content, headers=headers)
    assert (status, "larger than 1048576 bytes" in reason) == (413, True)
    assert live.call("POST", "/activelearning/first", data=b'{"a": 1}' + b" " * 2**19, headers=headers).ok


def test_strangers_send_little(start: Callable[..., Any]) -> None:
    live = start(token=TOKEN)
    form = {"password": "x" * 2**13}
    assert live.call("POST", "/auth/token", data=form).status_code == 413
    head = b"POST /auth/token HTTP/1.1\r\nHost: a\r\nContent-Type: application/x-www-form-urlencoded"
    assert answers(live, chunked(head, 0x4000)).startswith(b"HTTP/1.1 413")
    for head in (b"POST /infer/spleen HTTP/1.1\r\nHost: a", b"PUT /datastore/ HTTP/1.1\r\nHost: a"):
        answer = answers(
            live, head + b"\r\nContent-Length: 99999\r\n\r\n"
        )  # returns once it is closed: none is awaited
        assert answer.startswith(b"HTTP/1.1 401")
    with requests.Session() as kept:  # little is read, and the connection goes on
        assert [kept.get(f"{live.url}/info/", timeout=9).status_code for _ in range(2)] == [401, 401]


def test_a_body_refused_on_its_way_has_one_answer(live: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        before = len(LOG_LINES)
        for path, kind in (
            (b"/api/segment", b"application/json"),
            (b"/auth/token", b"multipart/form-data; boundary=x"),
        ):
            head = b"POST " + path + b" HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: " + kind
            answer = answers(live, chunked(head, 2**21))
            assert answer.count(b"HTTP/1.1") == 1
            assert answer.startswith(b"HTTP/1.1 413")
            assert answer.endswith(b'the most that is taken"}')
    told = "\n".join([*list(LOG_LINES)[before:], caplog.text])
    assert "Traceback" not in told
    assert "failed" not in told


def test_only_methods_that_exist_are_in_the_log(live: Any) -> None:
    answers(live, b"DOEJANE /info/ HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    live.call("GET", "/info/")
    log = "\n".join(LOG_LINES)
    assert ": - " in log
    assert "DOEJANE" not in log


def test_pages_of_other_servers_read_why_they_were_refused(start: Callable[..., Any]) -> None:
    live = start(token=TOKEN, cors_origins=("https://viewer.example.org",))
    refused = live.call("GET", "/info/", headers={"Origin": "https://viewer.example.org"})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://viewer.example.org"
    asked = {"Origin": "https://evil.example.org", "Access-Control-Request-Method": "PUT"}
    assert live.call("OPTIONS", "/datastore/label", headers=asked).status_code == 400


@pytest.mark.parametrize("part", [b"", b"GET /info/ HT", b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET / H"])
def test_connections_that_say_nothing_are_closed(
    start: Callable[..., Any], part: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "HEADER_SECONDS", 0.3)
    live = start()
    started = time.monotonic()
    answers(live, part)
    assert time.monotonic() - started < 4  # the keep-alive of uvicorn alone: 5 s


def test_who_waits_for_the_model_holds_no_image(
    start: Callable[..., Any], made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, reads = threading.Event(), []

    def slow(image: Any) -> Any:
        release.wait(20)
        return made.bright(image)

    def counted(path: Path) -> Any:
        reads.append(path.name)
        return read_image(path)

    monkeypatch.setattr("ctseg.server.images.read_image", counted)
    live = start([("spleen", made.bright_model(slow))], max_waiting=1)
    codes: list[int] = []

    def segment(image: str) -> None:
        codes.append(live.call("POST", f"/infer/spleen?image={image}").status_code)

    threads = [threading.Thread(target=segment, args=(image,)) for image in ("one", "two", "three")]
    for thread in threads:
        thread.start()
    while not codes:
        time.sleep(0.02)
    time.sleep(0.3)
    assert len(reads) == 1
    release.set()
    for thread in threads:
        thread.join()
    assert sorted(codes) == [200, 200, 503]
    assert len(reads) == 2


def test_a_file_that_vanished_is_not_there(live: Any, studies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = live.json("POST", "/api/sessions", json={"image": "one", "model": "deepgrow"})["session"]
    (studies / "one.nii.gz").unlink()
    assert live.refused("POST", f"/api/sessions/{session}/clicks", json={"position": [12, 9, 20]})[0] == 404
    known = live.service.datastore.images()
    (studies / "two.nrrd").unlink()
    monkeypatch.setattr(live.service.datastore, "images", lambda: known)  # as if it went between two looks
    for path in ("/api/images/two/file", "/datastore/image?image=two"):
        assert live.refused("GET", path)[0] == 404
    assert live.refused("POST", "/infer/spleen?image=two")[0] == 404


def test_many_images_go_on_after_a_failure_and_wait_for_their_turn(
    live: Any, studies: Path, made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "BUSY_SECONDS", 0.01)
    segment, calls = live.service.segment, []

    async def sometimes(request: Any, served: Any, path: Path) -> Any:
        calls.append(path.name)
        if path.name.startswith("one"):
            raise ZeroDivisionError("Doe Jane")
        if path.name.startswith("two") and calls.count(path.name) < 3:
            raise Busy("later")
        return await segment(request, served, path)

    monkeypatch.setattr(live.service, "segment", sometimes)
    live.json("POST", "/batch/infer/spleen")
    deadline = time.monotonic() + 20
    while live.json("GET", "/batch/infer")["status"] == "RUNNING":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert live.json("GET", "/batch/infer")["result"] == {"total": 3, "failed": 1}
    assert np.array_equal(read_labels(studies / "labels/original/two.nii.gz").array, made.box_mask())
    log = "\n".join(LOG_LINES)
    assert "one failed: ZeroDivisionError" in log
    assert "Jane" not in log
