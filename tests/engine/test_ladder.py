"""A GPU without enough memory: each step is told, and the mask is the same. Tensors of the made GPU lie on the CPU."""

import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ctseg.arrays import HOST, Array
from ctseg.engine import ladder
from ctseg.engine.ladder import halving
from ctseg.engine.model import Model
from ctseg.engine.predict import predict, predict_taken
from ctseg.engine.runtime import Runtime
from ctseg.errors import NotEnoughMemory
from ctseg.recipe import Recipe
from ctseg.sources.phantom import centered_grid, make_phantom
from ctseg.volume import Volume

GPU = torch.device("cuda", 0)


class MadeGPU:
    """A network on a GPU that has room for so many windows at once, and perhaps none for a whole grid."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.calls: list[int] = []

    def __call__(self, image_BCXYZ: Tensor) -> Tensor:
        assert isinstance(image_BCXYZ, Tensor)
        self.calls.append(len(image_BCXYZ))
        if len(image_BCXYZ) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.cat([0.5 - image_BCXYZ, image_BCXYZ - 0.5], dim=1)


@pytest.fixture
def ct() -> Volume:
    return make_phantom(7, 0, grid=centered_grid((48, 40, 30), (5.0, 5.0, 5.0), "LPS")).image


@pytest.fixture(autouse=True)
def no_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would move arrays to a GPU leaves them here."""
    monkeypatch.setattr(ladder, "to_device", lambda values, _: torch.from_numpy(np.ascontiguousarray(values)))
    monkeypatch.setattr("ctseg.engine.clock._wait_for", lambda _: None)


def models(recipe: Recipe, room: int) -> tuple[Model, Model]:
    """One on the made GPU, and the same on the CPU."""
    recipe = replace(recipe, inference=replace(recipe.inference, batch_windows=8))
    cpu = Model(recipe, MadeGPU(room=8), Runtime(torch.device("cpu")), Path("model.pt"), "")
    return replace(cpu, forward=MadeGPU(room), runtime=Runtime(GPU), on_cpu=lambda: cpu), cpu


@pytest.fixture
def on_made_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid that was asked for on the GPU is a tensor."""
    real = ladder.prepare

    def prepare(volume: Volume, spec: object, device: torch.device, scratch: Path | None) -> object:
        return real(volume, spec, torch.device("cpu") if device.type == "cuda" else device, scratch)

    monkeypatch.setattr(ladder, "prepare", prepare)


def told(model: Model, ct: Volume) -> tuple[np.ndarray, list[str]]:
    notes: list[str] = []
    return predict_taken(model, lambda: ct, note=notes.append), notes


@pytest.mark.usefixtures("on_made_gpu")
def test_windows_are_halved_until_they_fit_and_stay_so(tiny_recipe: Recipe, ct: Volume) -> None:
    gpu, cpu = models(tiny_recipe, room=3)
    mask, notes = told(gpu, ct)
    np.testing.assert_array_equal(mask, predict(cpu, ct))
    assert 0.05 < mask.mean() < 0.95
    assert notes == [
        "not enough memory on cuda:0: 4 windows at once instead of 8",
        "not enough memory on cuda:0: 2 windows at once instead of 4",
    ]
    assert gpu.forward.calls[:4] == [8, 4, 2, 2]
    assert max(gpu.forward.calls[3:]) == 2


@pytest.mark.usefixtures("on_made_gpu")
def test_a_gpu_without_room_for_one_window_leaves_the_ct_to_the_cpu(tiny_recipe: Recipe, ct: Volume) -> None:
    gpu, cpu = models(tiny_recipe, room=0)
    mask, notes = told(gpu, ct)
    np.testing.assert_array_equal(mask, predict(cpu, ct))
    assert [note.removeprefix("not enough memory on cuda:0: ") for note in notes] == [
        "4 windows at once instead of 8",
        "2 windows at once instead of 4",
        "windows one by one",
        "its grids are kept in the host's memory",
        "one window is too much; this CT is done on the CPU",
    ]
    with pytest.raises(NotEnoughMemory, match="not enough memory on cuda:0; try --device cpu"):
        told(replace(gpu, on_cpu=None), ct)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA out of memory. Tried to allocate 2.00 GiB",
        "GET was unable to find an engine to execute this computation",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    ],
)
def test_a_lack_of_memory_is_known_by_whatever_tells_it(text: str) -> None:
    """cuDNN tells it in words of its own, which torch hands on as a RuntimeError."""

    def run(image_BCXYZ: Tensor) -> Tensor:
        if len(image_BCXYZ) > 2:
            raise RuntimeError(text)
        return image_BCXYZ

    notes: list[str] = []
    assert torch.equal(halving(run, GPU, notes.append)(torch.arange(8.0)), torch.arange(8.0))
    assert len(notes) == 2
    with pytest.raises(RuntimeError, match="a bug"):
        halving(broken, GPU, notes.append)(torch.arange(8.0))


def broken(_image_BCXYZ: Tensor) -> Tensor:
    raise RuntimeError("a bug")


def test_the_grid_leaves_the_gpu_once_the_host_has_it(tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "to_numpy", lambda values: values.numpy().copy())
    gpu, _ = models(tiny_recipe, room=8)
    image = [torch.zeros(4, 4, 4)]
    on_gpu = weakref.ref(image[0])

    def logits(_model: Model, image_XYZ: Array) -> Array:
        if isinstance(image_XYZ, Tensor):
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert on_gpu() is None
        return image_XYZ + 1

    notes: list[str] = []
    moved = ladder.logits_within_memory(gpu, image.pop, logits, notes.append)
    assert moved.sum() == 64
    assert notes == ["not enough memory on cuda:0: its grids are kept in the host's memory"]


def test_grids_that_do_not_fit_lie_on_the_host(tiny_recipe: Recipe, ct: Volume, monkeypatch) -> None:
    real = ladder.prepare

    def prepare(volume: Volume, spec: object, device: torch.device, scratch: Path | None) -> object:
        if device is not HOST:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(volume, spec, device, scratch)

    monkeypatch.setattr(ladder, "prepare", prepare)
    gpu, cpu = models(tiny_recipe, room=8)
    mask, notes = told(gpu, ct)
    assert notes == ["not enough memory on cuda:0: the CT is prepared on the host"]
    monkeypatch.undo()
    np.testing.assert_array_equal(mask, predict(cpu, ct))


def test_other_errors_pass(tiny_recipe: Recipe) -> None:
    def broken(_: Tensor) -> Tensor:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        halving(broken, GPU, pytest.fail)(torch.zeros(2, 1, 4, 4, 4))
