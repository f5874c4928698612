"""The annotation server under load: clients that click at once, and what a click costs beside the network itself.

python benchmarks/serve.py [--clients 8] [--volumes 4] [--requests 500] [--size 256 256 80] [--recipe deepgrow_3d]

Starts `ctseg serve` with an untrained `deepgrow_3d:small` (or --recipe, or --model) on made CTs, on the CPU. Prints the
time of each click as clients see it, errors, the server's memory; for one client, after its first click, the time that
it waits over that which the model takes; and without a server, the time from click to mask over that of the network
alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import re
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import requests
import torch

from ctseg.clicks import Click
from ctseg.engine.checkpoint import save_checkpoint
from ctseg.engine.model import load_model
from ctseg.engine.runtime import start_runtime
from ctseg.engine.session import prepare_for_clicks, segment_prepared
from ctseg.io.images import read_geometry, read_image, write_image
from ctseg.networks import network_for
from ctseg.recipe import load_recipe
from ctseg.volume import Geometry, Volume
from timing import machine, ratios, spread

SPACING_MM = (1.5, 1.5, 3.0)


@dataclass
class Answers:
    """What all clients saw."""

    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--volumes", type=int, default=4)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--size", type=int, nargs=3, default=(256, 256, 80))
    parser.add_argument("--recipe", default="deepgrow_3d:small")
    parser.add_argument("--model", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        studies = Path(folder) / "studies"
        studies.mkdir()
        for number in range(options.volumes):
            write_image(studies / f"ct_{number}.nii.gz", made_ct(tuple(options.size), number))
        model = options.model or untrained(options.recipe, Path(folder) / "deepgrow.pt")
        process, url = start_server(studies, model)
        try:
            print(machine())
            alone(url, model, studies / "ct_0.nii.gz")
            answers = together(url, options, psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait(30)
    tell(options, answers)


def made_ct(size: tuple[int, int, int], seed: int) -> Volume:
    """Noise: an untrained network does not care."""
    array = np.random.default_rng(seed).integers(-1000, 400, size, dtype=np.int16)
    geometry = Geometry.from_parts(size, SPACING_MM, (0.0, 0.0, 0.0), np.eye(3))
    return Volume(np.asfortranarray(array), geometry)


def untrained(name: str, path: Path) -> Path:
    """A checkpoint of random weights."""
    torch.manual_seed(0)
    recipe = load_recipe(name)
    save_checkpoint(path, {"recipe": recipe.to_dict(), "model": network_for(recipe).state_dict()})
    return path


def start_server(studies: Path, model: Path) -> tuple[subprocess.Popen[str], str]:
    """The process and its address."""
    command = [sys.executable, "-m", "ctseg", "serve", "--studies", str(studies), "--model", str(model)]
    process = subprocess.Popen(
        [*command, "--port", "0", "--device", "cpu", "--quiet"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    match = re.search(r"http://\S+(?=/\n)", process.stdout.readline())
    assert match, "the server did not start"
    return process, match[0]


def alone(url: str, model: Path, image: Path, clicks: int = 15) -> None:
    """One client's clicks after its first one: what it waits for, over what the model takes of it."""
    session, name = requests.Session(), requests.get(f"{url}/api/models", timeout=60).json()[0]["name"]
    opened = {"image": image.name.removesuffix(".nii.gz"), "model": name}
    middle = [n // 2 for n in read_geometry(image).size]
    path = f"{url}/api/sessions/{session.post(f'{url}/api/sessions', json=opened, timeout=60).json()['session']}"
    waited, worked = [], []
    for _ in range(clicks + 1):
        session.post(f"{path}/reset", timeout=600).raise_for_status()
        started = time.perf_counter()
        answer = session.post(f"{path}/clicks", json={"position": middle}, timeout=600)
        waited.append(time.perf_counter() - started)
        worked.append(float(answer.headers["Server-Timing"].rpartition("=")[2]) / 1000)
    print(f"first click (reads and prepares the CT)   {waited[0]:.2f} s")
    print(f"later clicks, as the client sees them     {spread(waited[1:], 3)} s")
    print(f"of that the model, from click to mask     {spread(worked[1:], 3)} s")
    print(f"ratio of the two                          {spread(ratios(waited[1:], worked[1:]))}")
    mask_over_network(model, image)


def mask_over_network(model: Path, image: Path, repetitions: int = 7) -> None:
    """From click to mask, over the network's own time, in this process and without a server."""
    loaded, own = load_model(model, start_runtime("cpu", alone=True)), []

    def timed(input_BCXYZ: torch.Tensor) -> torch.Tensor:
        started = time.perf_counter()
        logits: torch.Tensor = loaded.forward(input_BCXYZ)
        own.append(time.perf_counter() - started)
        return logits

    volume, whole = read_image(image), []
    observed = dataclasses.replace(loaded, forward=timed)
    prepared = prepare_for_clicks(observed, volume)
    x, y, z = (n // 2 for n in volume.geometry.size)
    for _ in range(repetitions + 1):
        started = time.perf_counter()
        segment_prepared(observed, prepared, [Click((x, y, z))])
        whole.append(time.perf_counter() - started)
    print(f"without a server: click to mask / network {spread(ratios(whole[1:], own[1:]))}")


def together(url: str, options: argparse.Namespace, server: psutil.Process) -> Answers:
    """`clients` sessions on `volumes` images, clicking at random until `requests` clicks are made."""
    answers, left, lock = Answers(), [options.requests], threading.Lock()
    name = requests.get(f"{url}/api/models", timeout=60).json()[0]["name"]

    def click(client: int) -> None:
        choose, session = random.Random(client), requests.Session()
        opened = {"image": f"ct_{client % options.volumes}", "model": name}
        key = session.post(f"{url}/api/sessions", json=opened, timeout=600).json()["session"]
        number = 0
        while True:
            with lock:
                if left[0] == 0:
                    return
                left[0] -= 1
            if number % 15 == 0 and number:
                session.post(f"{url}/api/sessions/{key}/reset", timeout=600)
            body = {"position": [choose.randrange(n) for n in options.size], "positive": number % 3 != 2}
            started = time.perf_counter()
            response = session.post(f"{url}/api/sessions/{key}/clicks", json=body, timeout=600)
            with lock:
                answers.seconds.append(time.perf_counter() - started)
                answers.memory_mb.append(server.memory_info().rss / 2**20)
                if response.status_code != 200:
                    answers.errors.append(f"{response.status_code} {json.dumps(response.json())}")
            number += 1

    threads = [threading.Thread(target=click, args=(n,)) for n in range(options.clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def tell(options: argparse.Namespace, answers: Answers) -> None:
    """The figures of `together`."""
    p50, p95 = np.percentile(answers.seconds, [50, 95])
    fifth = max(len(answers.memory_mb) // 5, 1)
    parts = [max(answers.memory_mb[n * fifth : (n + 1) * fifth]) for n in range(5)]
    print(f"{options.clients} clients on {options.volumes} CTs of {'x'.join(map(str, options.size))}")
    print(f"{len(answers.seconds)} clicks, {len(answers.errors)} errors {answers.errors[:1] or ''}")
    print(f"per click: p50 {p50:.2f} s, p95 {p95:.2f} s")
    print(f"server's memory, each fifth of the clicks: {', '.join(f'{part:.0f}' for part in parts)} MB")


if __name__ == "__main__":
    main()
