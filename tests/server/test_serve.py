"""`ctseg serve` as a process of its own: it starts, trains beside answering, and ends when told to."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import requests
import torch
from fastapi import FastAPI

from ctseg.engine.export import export
from ctseg.engine.runtime import Runtime
from ctseg.errors import CtsegError
from ctseg.server.run import Tls, open_socket, run


@pytest.fixture
def serve(tmp_path: Path, models: list[Path]) -> Iterator[Callable[..., tuple[subprocess.Popen[str], str]]]:
    """A function that starts `ctseg serve STUDIES OPTIONS`: the process and its address."""
    started: list[subprocess.Popen[str]] = []

    def start(studies: Path, *options: str) -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-m", "ctseg", "serve", "--studies", str(studies), "--port", "0", "--device", "cpu"]
        with (tmp_path / "log.txt").open("w") as log:  # a pipe that nobody reads would stop it
            process = subprocess.Popen(
                [*command, *(word for path in models for word in ("--model", str(path))), *options],
                cwd=tmp_path,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        started.append(process)
        assert process.stdout is not None
        line = process.stdout.readline()
        match = re.search(r"https?://\S+(?=/\n)", line)
        assert match, (line, (tmp_path / "log.txt").read_text())
        return process, match[0]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def test_it_serves_and_ends_in_order(serve: Callable[..., Any], studies: Path, tmp_path: Path) -> None:
    process, url = serve(studies)
    info = requests.get(f"{url}/info/", timeout=30).json()
    assert [model["type"] for model in info["models"].values()] == ["segmentation", "deepgrow"]
    segmented = requests.post(f"{url}/infer/spleen-small?image=one&output=image", timeout=60)
    assert segmented.status_code == 200, segmented.text
    form = {"params": (None, json.dumps({"foreground": [[12, 9, 20]]}))}
    clicked = requests.post(f"{url}/infer/deepgrow_3d-small?image=two&output=image", files=form, timeout=60)
    assert clicked.status_code == 200, clicked.text
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    log = (tmp_path / "log.txt").read_text()
    assert "POST /infer/{model} 200" in log
    assert "Traceback" not in log


def test_an_exported_click_model_under_another_name_of_the_server(
    serve: Callable[..., Any], studies: Path, models: list[Path], tmp_path: Path
) -> None:
    exported = export(models[1], "torchscript", tmp_path / "clicks.ts", Runtime(torch.device("cpu"))).path
    _, url = serve(studies, "--model", str(exported), "--allow-host", "ct.hospital.example")
    assert requests.get(f"{url}/info/", headers={"Host": "ct.hospital.example"}, timeout=30).status_code == 200
    assert requests.get(f"{url}/info/", headers={"Host": "ct.stranger.example"}, timeout=30).status_code == 400
    params = {"foreground": [[12, 9, 20]], "result_extension": ".nrrd", "result_compress": False}
    answers = []
    for name in ("deepgrow_3d-small", "deepgrow_3d-small-2"):
        form = {"params": (None, json.dumps(params))}
        answer = requests.post(f"{url}/infer/{name}?image=one&output=image", files=form, timeout=60)
        assert answer.status_code == 200, answer.text
        answers.append(np.frombuffer(answer.content.partition(b"\n\n")[2], np.uint8))
    assert answers[0].any()
    assert (answers[0] == answers[1]).mean() >= 0.9999
    refused = requests.post(f"{url}/train/deepgrow_3d-small-2", timeout=30)
    assert "an exported model cannot be trained" in refused.json()["detail"]


def test_a_folder_is_served_by_one_process(studies: Path, start: Callable[..., Any]) -> None:
    start()
    with pytest.raises(Exception, match="another `ctseg serve` has this folder"):
        start()


def test_a_port_that_is_taken(start: Callable[..., Any]) -> None:
    live = start()
    assert live.socket.proto == socket.IPPROTO_TCP  # else every answer waits 40 ms for an acknowledgement
    host, port = live.socket.getsockname()
    with pytest.raises(CtsegError, match=f"--host {host} --port {port}: Address already in use; choose another one"):
        open_socket(host, port)


@pytest.mark.filterwarnings("ignore::urllib3.exceptions.InsecureRequestWarning")
def test_https_with_a_certificate(start: Callable[..., Any], tmp_path: Path) -> None:
    tls = Tls(tmp_path / "cert.pem", tmp_path / "key.pem")
    subject = ["-subj", "/CN=localhost", "-days", "2", "-nodes"]
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-keyout", str(tls.key), "-out", str(tls.certificate)]
    if subprocess.run([*command, *subject], capture_output=True, check=False).returncode != 0:
        pytest.skip("no openssl to make a certificate with")
    live = start(tls=tls)
    assert live.url.startswith("https://")
    assert live.call("GET", "/info/").status_code == 200
    tls.key.write_text("no key")
    with pytest.raises(CtsegError, match="--tls-cert, --tls-key: cannot be used"):
        run(FastAPI(), open_socket("127.0.0.1", 0), tls, lambda: True)


@pytest.mark.slow
def test_fine_tuning_on_final_labels_makes_a_run(
    serve: Callable[..., Any], labelled: Path, tmp_path: Path, made: SimpleNamespace
) -> None:
    _, url = serve(labelled)
    for model in ("spleen-small", "deepgrow_3d-small"):
        body = {"max_epochs": 1}
        assert requests.post(f"{url}/train/{model}", json=body, timeout=30).json()["status"] == "RUNNING"
        status = made.wait_for(url, lambda status: "end_ts" in status, 300)
        assert status["status"] == "DONE", status["details"]
        assert (tmp_path / "runs" / status["result"]["run"] / "last.pt").is_file()
        assert any("epoch" in line for line in status["details"])
    body = {"max_epochs": 5000}
    run = requests.post(f"{url}/train/spleen-small", json=body, timeout=30).json()["result"]["run"]
    made.wait_for(url, lambda _: (tmp_path / "runs" / run / "last.pt").is_file(), 120)
    requests.delete(f"{url}/train/", timeout=30)
    status = made.wait_for(url, lambda status: "end_ts" in status, 60)
    assert (status["status"], status["result"]["exit_code"]) == ("STOPPED", 75)
