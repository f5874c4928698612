"""A live server on a free port, with a network whose masks can be told in advance."""

import importlib
import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import requests
import torch

from ctseg.engine.checkpoint import save_checkpoint
from ctseg.engine.model import Model
from ctseg.engine.runtime import Runtime
from ctseg.io.images import read_geometry, write_image, write_labels
from ctseg.networks import network_for
from ctseg.recipe import Recipe, load_recipe
from ctseg.server.app import make_app
from ctseg.server.run import Tls, open_socket, run, start_log, url_of
from ctseg.server.service import open_service
from ctseg.server.settings import Settings
from ctseg.sources.phantom import centered_grid
from ctseg.volume import Volume

CLIENTS = Path(sys.prefix) / "monailabel"
"""Where `make` puts MONAI Label's clients: the package would bring another MONAI and pydicom along."""

CPU = Runtime(torch.device("cpu"))
SIZE = (40, 36, 32)
SPACING_MM = 5.0
BRIGHT_HU = 100


def clicked(input_BCXYZ: torch.Tensor) -> torch.Tensor:
    """Foreground where the map of positive clicks is above that of negative ones by a tenth of its peak."""
    return (input_BCXYZ[:, 1:2] - input_BCXYZ[:, 2:3] - 0.1) * 50


def bright(input_BCXYZ: torch.Tensor) -> torch.Tensor:
    """Foreground where the image is in the upper half of its window: two channels of scores."""
    logits = (input_BCXYZ - 0.5) * 50
    return torch.cat([-logits, logits], dim=1)


def clicks_model(forward: Callable[[torch.Tensor], torch.Tensor] = clicked) -> Model:
    window = ["inference.window_size=[48,48,48]", "sampling.patch_size=[48,48,48]"]
    recipe = load_recipe("deepgrow_3d:small", ["preprocess.spacing_mm=[5,5,5]", *window])
    return Model(recipe, forward, CPU, Path("deepgrow.pt"), "0" * 64)


def bright_model(forward: Callable[[torch.Tensor], torch.Tensor] = bright) -> Model:
    recipe = load_recipe("spleen:small", ["preprocess.spacing_mm=[5,5,5]", "inference.window_size=[32,32,32]"])
    return Model(recipe, forward, CPU, Path("spleen.pt"), "1" * 64)


def make_ct(codes: str = "LPS", seed: int = 0) -> Volume:
    """Noise with a bright box, on the grid of the recipes, in any orientation."""
    array = np.random.default_rng(seed).integers(-200, -100, SIZE, dtype=np.int16)
    array[10:20, 8:18, 6:16] = BRIGHT_HU
    return Volume(np.asfortranarray(array), centered_grid(SIZE, (SPACING_MM,) * 3, codes))


def box_mask() -> np.ndarray:
    mask = np.zeros(SIZE, dtype=np.uint8)
    mask[10:20, 8:18, 6:16] = 1
    return mask


TINY_CLICKS = ["network.features=[4,4,4,4,4,4]", "preprocess.spacing_mm=[8,8,8]"]


def save_model(recipe: Recipe, path: Path) -> Path:
    torch.manual_seed(0)
    save_checkpoint(path, {"recipe": recipe.to_dict(), "model": network_for(recipe).state_dict()})
    return path


def wait_for(url: str, wanted: Callable[[dict[str, Any]], bool], seconds: float) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while not wanted(status := requests.get(f"{url}/train/", timeout=30).json()):
        assert time.monotonic() < deadline, status
        time.sleep(0.1)
    return status


class Live:
    """A running server and how to talk to it."""

    def __init__(self, settings: Settings, models: list[tuple[str, Model]], tls: Tls | None) -> None:
        self.service = open_service(settings, models)
        self.socket = open_socket(settings.host, 0)
        self.url = url_of(self.socket, tls).rstrip("/")
        self.stop = threading.Event()
        app = make_app(self.service)
        self.thread = threading.Thread(target=run, args=(app, self.socket, tls, self.stop.is_set))
        self.thread.start()
        headers = {"Authorization": f"Bearer {settings.token}"} if settings.token else {}
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                requests.get(f"{self.url}/api/models", headers=headers, timeout=5, verify=False)
                return
            except requests.ConnectionError:
                time.sleep(0.05)
        raise TimeoutError("the server did not start")

    def call(self, method: str, path: str, **options: Any) -> requests.Response:
        return requests.request(method, self.url + path, timeout=30, verify=False, **options)

    def json(self, method: str, path: str, **options: Any) -> Any:
        response = self.call(method, path, **options)
        assert response.ok, response.text
        return response.json()

    def refused(self, method: str, path: str, **options: Any) -> tuple[int, str]:
        """Status and reason of a request that must be refused; the server is there afterwards."""
        response = self.call(method, path, **options)
        assert 400 <= response.status_code < 500, (response.status_code, response.text)
        assert self.call("GET", "/auth/").status_code == 200 or self.call("GET", "/api/docs").status_code == 200
        return response.status_code, response.json()["detail"]

    def close(self) -> None:
        self.stop.set()
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture(scope="session", autouse=True)
def log() -> None:
    """The server's log, kept as `ctseg serve` keeps it."""
    start_log(quiet=True)


@pytest.fixture
def studies(tmp_path: Path) -> Path:
    """Three CTs: `one.nii.gz` (LPS), `two.nrrd` (RAS), `three.nii.gz` (SPL)."""
    folder = tmp_path / "studies"
    folder.mkdir()
    for name, codes, seed in (("one.nii.gz", "LPS", 0), ("two.nrrd", "RAS", 1), ("three.nii.gz", "SPL", 2)):
        write_image(folder / name, make_ct(codes, seed))
    return folder


@pytest.fixture
def start(studies: Path) -> Iterator[Callable[..., Live]]:
    """A function that starts a server of `studies`: `start(token="...", models=[...])`."""
    started: list[Live] = []

    def serve(models: list[tuple[str, Model]] | None = None, tls: Tls | None = None, **settings: Any) -> Live:
        chosen = [("deepgrow", clicks_model()), ("spleen", bright_model())] if models is None else models
        started.append(Live(Settings(studies=studies, **settings), chosen, tls))
        return started[-1]

    yield serve
    for live in started:
        live.close()


@pytest.fixture
def live(start: Callable[..., Live]) -> Live:
    """A server as it is by default."""
    return start()


@pytest.fixture(scope="session")
def steady(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server of one CT, `one.nii.gz`, that tests share: for requests that change nothing."""
    folder = tmp_path_factory.mktemp("steady")
    write_image(folder / "one.nii.gz", make_ct())
    settings = Settings(studies=folder, max_sessions=1000)
    live = Live(settings, [("deepgrow", clicks_model()), ("spleen", bright_model())], None)
    yield live
    live.close()


@pytest.fixture
def made() -> SimpleNamespace:
    """What tests compare with: `make_ct`, `box_mask`, `clicks_model`, `bright_model`, `ball`."""
    return SimpleNamespace(
        ct=make_ct,
        box_mask=box_mask,
        clicks_model=clicks_model,
        bright_model=bright_model,
        clicked=clicked,
        bright=bright,
        wait_for=wait_for,
    )


@pytest.fixture(scope="session", params=["client", "slicer"])
def library(request: pytest.FixtureRequest) -> Any:
    """MONAI Label's client as its Python package has it, and as its module for 3D Slicer does."""
    sys.path += [str(path) for path in CLIENTS.glob("lib/python*/site-packages") if str(path) not in sys.path]
    try:
        package = importlib.import_module("monailabel.client.client")
    except ImportError:
        pytest.skip(f"no client: pip install --no-deps --ignore-installed --prefix {CLIENTS} monailabel==0.8.5")
    if request.param == "client":
        return package
    path = Path(package.__file__).parents[5] / "monailabel/plugins/slicer/MONAILabel/MONAILabelLib/client.py"
    spec = importlib.util.spec_from_file_location("slicer_client", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def connect(library: Any, tmp_path: Path) -> Callable[[Any], Any]:
    folder = tmp_path / "client"
    folder.mkdir()
    return lambda live: library.MONAILabelClient(live.url, tmpdir=str(folder), client_id="tester")


@pytest.fixture
def models(tmp_path: Path, tiny_recipe: Recipe) -> list[Path]:
    """Checkpoints of random weights: one that segments, one for clicks."""
    clicks = load_recipe("deepgrow_3d:small", TINY_CLICKS)
    return [save_model(tiny_recipe, tmp_path / "spleen.pt"), save_model(clicks, tmp_path / "clicks.pt")]


@pytest.fixture
def labelled(studies: Path, made: SimpleNamespace) -> Path:
    """`studies`, with final labels of every image."""
    for name in ("one.nii.gz", "two.nrrd", "three.nii.gz"):
        target = studies / "labels" / "final" / f"{name.partition('.')[0]}.nii.gz"
        target.parent.mkdir(parents=True, exist_ok=True)
        write_labels(target, np.asfortranarray(made.box_mask()), read_geometry(studies / name))
    return studies
