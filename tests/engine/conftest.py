"""A runtime, prepared cases and a short training that the tests of the engine share."""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ctseg.engine.checkpoint import save_checkpoint
from ctseg.engine.model import Model, load_model
from ctseg.engine.runtime import Runtime
from ctseg.engine.train import TrainResult, train
from ctseg.manifest import Manifest
from ctseg.networks import network_for
from ctseg.progress import Silent
from ctseg.recipe import Recipe, recipe_from_dict


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Tiny networks gain nothing from threads, and rounding depends on their number, so every test begins with one."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cpu() -> Runtime:
    """One process on the CPU in float32."""
    return Runtime(torch.device("cpu"))


@pytest.fixture(scope="session")
def tiny_prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of prepared cases that all short trainings share."""
    return tmp_path_factory.mktemp("prepared")


@pytest.fixture(scope="session")
def tiny_result(
    tiny_recipe: Recipe, train_tiny: Callable[..., TrainResult], changed: Callable[..., Recipe], tmp_path_factory
) -> TrainResult:
    """The tiny recipe trained until it finds some spleen (25 epochs), for reading only."""
    return train_tiny(changed(tiny_recipe, training={"epochs": 25}), tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_result: TrainResult) -> Path:
    """The checkpoint of the tiny training."""
    return tiny_result.checkpoint


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Path, cpu: Runtime) -> Model:
    """The model of the tiny training."""
    return load_model(tiny_checkpoint, cpu)


@pytest.fixture(scope="session")
def made_checkpoint() -> Callable[[Recipe, Path], Path]:
    """A function that writes a checkpoint of made weights; their batch statistics are not a fresh network's."""

    def make(recipe: Recipe, path: Path) -> Path:
        torch.manual_seed(2)
        network = network_for(recipe).train()
        with torch.no_grad():
            for _ in range(3):
                network(torch.rand(2, recipe.input_channels, 32, 32, 1 if recipe.is_2d else 32))
        save_checkpoint(path, {"recipe": recipe.to_dict(), "model": network.state_dict()})
        return path

    return make


@pytest.fixture(scope="session")
def changed() -> Callable[..., Recipe]:
    """A function that changes a recipe: `changed(recipe, training={"epochs": 3})`."""

    def change(recipe: Recipe, **tables: dict[str, Any]) -> Recipe:
        data = recipe.to_dict()
        for name, values in tables.items():
            data[name] = {**data[name], **values}
        return recipe_from_dict(data, "test")

    return change


@pytest.fixture(scope="session")
def train_tiny(tiny_manifest: Manifest, tiny_prepared: Path, cpu: Runtime) -> Callable[..., TrainResult]:
    """A function that trains on the tiny data: `train_tiny(recipe, run, stop_after=3)`; an existing run is resumed."""

    def start(recipe: Recipe, run: Path, stop_after: int | None = None, manifest=tiny_manifest) -> TrainResult:
        calls = itertools.count(1)
        find = None if (run / "recipe.json").exists() else lambda _: manifest
        return train(recipe, run, find, cpu, Silent(), tiny_prepared, lambda: next(calls) == stop_after)

    return start


@pytest.fixture(scope="session")
def assert_same() -> Callable[[Any, Any], None]:
    """A function that compares nested plain data and tensors bit for bit, the contents of two checkpoints say."""

    def compare(a: Any, b: Any) -> None:
        assert type(a) is type(b)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a, b)
        elif isinstance(a, dict):
            assert list(a) == list(b)
            for key in a:
                compare(a[key], b[key])
        elif isinstance(a, list):
            assert len(a) == len(b)
            for one, other in zip(a, b, strict=True):
                compare(one, other)
        else:
            assert a == b

    return compare


@pytest.fixture(scope="session")
def read_events() -> Callable[[Path], dict[str, list[tuple[int, float]]]]:
    """A function that gives what TensorBoard shows of a run: tag -> (step, value) in order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(run: Path) -> dict[str, list[tuple[int, float]]]:
        events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    return read


@pytest.fixture
def ctseg_train(tiny_data: Path, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A function that starts `ctseg train` of a recipe in a process of its own, resuming what lies in `run`.

    Preparation goes to a folder of the test's own, as it may be killed too.
    """
    started: list[subprocess.Popen[str]] = []

    def start(recipe: Recipe, run: Path, *options: str, manifest: Path = tiny_data) -> subprocess.Popen[str]:
        file = tmp_path / "recipe.json"
        file.write_text(json.dumps(recipe.to_dict()))
        source = ["--resume"] if (run / "recipe.json").exists() else ["--manifest", str(manifest)]
        arguments = ["train", str(file), "--output", str(run), "--device", "cpu", "--quiet", *source, *options]
        process = subprocess.Popen(
            [sys.executable, "-m", "ctseg", *arguments],
            cwd=tmp_path,
            env={**os.environ, "SLURM_CPUS_PER_TASK": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
