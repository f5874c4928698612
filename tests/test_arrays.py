"""NumPy's arrays and torch's give the same results, and NumPy alone needs no torch."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ctseg import arrays
from ctseg.arrays import HOST, Array, as_asked, cut_box, device_of, release_array, strides_of, through_torch, to_device
from ctseg.engine.fast import windows_to_refine
from ctseg.engine.model import Model
from ctseg.engine.predict import scores_from_logits, window_logits
from ctseg.engine.runtime import Runtime
from ctseg.engine.windows import average
from ctseg.preprocess import prepare, restore, slabs_of
from ctseg.recipe import Recipe
from ctseg.scratch import new_array
from ctseg.sources.phantom import centered_grid, make_phantom
from ctseg.specs import Preprocess

CPU = torch.device("cpu")
SPEC = Preprocess(spacing_mm=(3.0, 3.0, 4.0), hu_window=(-57.0, 164.0), crop_foreground=False)


class OnTorch:
    """What the code sees of a GPU, on the CPU: tensors that are not taken for NumPy's."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in ("ctseg.preprocess", "ctseg.engine.predict", "ctseg.engine.fast", "ctseg.engine.windows"):
            monkeypatch.setattr(f"{module}.to_work_on", lambda values: values)
        for module in ("ctseg.preprocess", "ctseg.engine.predict"):
            monkeypatch.setattr(f"{module}.zeros", lambda shape, *_: torch.zeros(shape))
        monkeypatch.setattr("ctseg.preprocess.to_device", lambda values, _: torch.from_numpy(values.copy()))


@pytest.fixture
def image():
    """A small CT in an order of axes that is not the network's."""
    return make_phantom(7, 0, grid=centered_grid((40, 30, 48), (5.0, 5.0, 5.0), "SPL")).image


@pytest.mark.parametrize("channels", [1, 3])
def test_tensors_and_arrays_give_the_same_input_and_the_same_mask(image, channels: int, monkeypatch) -> None:
    ours = prepare(image, SPEC, HOST)
    assert type(ours.image_XYZ) is np.ndarray
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(channels, *ours.image_XYZ.shape)).astype(np.float32)
    mask = restore(scores_from_logits(logits.copy()), ours)
    assert 0.1 < np.count_nonzero(mask) / mask.size < 0.9
    OnTorch(monkeypatch)
    theirs = prepare(image, SPEC, CPU)
    assert isinstance(theirs.image_XYZ, torch.Tensor)
    assert np.abs(theirs.image_XYZ.numpy() - ours.image_XYZ).max() < 1e-6
    other = restore(scores_from_logits(torch.from_numpy(logits.copy())), theirs)
    assert np.count_nonzero(other != mask) <= 1e-5 * mask.size


@pytest.mark.parametrize("channels", [1, 3])
def test_the_same_windows_are_refined(channels: int, monkeypatch) -> None:
    total = np.random.default_rng(1).normal(scale=6, size=(channels, 24, 16, 16)).astype(np.float32)
    total[:, 8:] = -50
    total[0, 8:] = 50 if channels > 1 else -50
    done, others = [(x, 0, 0) for x in (0, 8, 16)], [(4, 0, 0), (12, 0, 0)]
    ours = windows_to_refine(total, done, others, (8, 16, 16))
    averaged = total.copy()
    average(averaged, [*done, *others], (8, 16, 16))
    assert ours == [(4, 0, 0)]
    OnTorch(monkeypatch)
    tensor = torch.from_numpy(total)
    assert windows_to_refine(tensor, done, others, (8, 16, 16)) == ours
    average(tensor, [*done, *others], (8, 16, 16))
    np.testing.assert_allclose(tensor.numpy(), averaged, rtol=1e-6)


@pytest.mark.parametrize("fast", [False, True])
def test_the_network_is_given_the_arrays_that_it_was_made_for(tiny_recipe: Recipe, fast: bool, monkeypatch) -> None:
    """Tensors on a GPU and in a process with torch, NumPy's arrays without."""
    image = np.random.default_rng(2).random((30, 20, 18), dtype=np.float32)
    seen: list[type] = []

    def forward(image_BCXYZ: Array) -> Array:
        seen.append(type(image_BCXYZ))
        return image_BCXYZ * 8 - 4

    model = Model(tiny_recipe, forward, Runtime(HOST), Path("model.pt"), "")
    ours = window_logits(model, image, tiny_recipe.inference, fast=fast)
    theirs = window_logits(model, torch.from_numpy(image), tiny_recipe.inference, fast=fast)
    OnTorch(monkeypatch)
    on_gpu = window_logits(model, torch.from_numpy(image), tiny_recipe.inference, fast=fast)
    assert set(map(type, (theirs, on_gpu))) == {torch.Tensor}
    np.testing.assert_allclose(theirs.numpy(), ours, rtol=1e-6)
    np.testing.assert_allclose(on_gpu.numpy(), ours, rtol=1e-6)
    calls = len(seen) // 3
    assert seen == [np.ndarray] * calls + [torch.Tensor] * 2 * calls


def test_scores_of_several_classes_are_their_softmax() -> None:
    logits = torch.randn((4, 5, 6, 7), generator=torch.Generator().manual_seed(0)) * 30
    wanted = torch.softmax(logits, dim=0)
    assert scores_from_logits(logits) is logits
    torch.testing.assert_close(logits, wanted)


def test_memory_is_shared_between_the_libraries() -> None:
    array = np.zeros((2, 3), np.float32)
    tensor = as_asked(array, CPU)
    tensor[0, 0] = 7
    assert array[0, 0] == 7
    assert as_asked(array, HOST) is array
    assert as_asked(tensor, HOST) is tensor
    arrays.to_work_on(tensor)[0, 1] = 8
    assert array[0, 1] == 8
    assert (device_of(array), device_of(tensor)) == (HOST, CPU)
    assert through_torch(lambda values: values * 2)(array)[0, 0] == 14


@pytest.mark.parametrize("dtype", [np.uint16, ">i2", np.uint32, np.int16])
def test_what_torch_cannot_hold_is_converted_on_the_way_to_a_gpu(dtype) -> None:
    values = np.array([0, 5, 30000], dtype)
    meta = to_device(values, torch.device("meta"))
    assert tuple(meta.shape) == (3,)
    assert to_device(values, HOST) is values


@pytest.mark.parametrize("like", [np.asarray, torch.from_numpy])
def test_a_box_larger_than_the_array_is_padded_half_before_and_half_after(like) -> None:
    values = like(np.arange(24, dtype=np.int16).reshape(2, 3, 4))
    box = np.asarray(cut_box(values, (0, 1, 1), (5, 2, 3)))
    assert box.dtype == np.int16
    np.testing.assert_array_equal(box[1:3], np.asarray(values)[:, 1:, 1:])
    assert not box[[0, 3, 4]].any()
    assert strides_of(values)[0] > strides_of(values)[2]


def test_slabs_of_a_tensor_on_disk_leave_memory(tmp_path: Path) -> None:
    array = new_array((1, 6, 64, 64), np.float32, tmp_path)
    tensor = torch.from_numpy(array)
    boxes = list(slabs_of(tensor))
    for box in boxes:
        tensor[box] = 1
    assert (array == 1).all()
    release_array(tensor)
    assert (array == 1).all()


def test_neither_torch_nor_monai_is_imported_by_the_engine_of_inference() -> None:
    program = """
import sys
import ctseg.commands.infer, ctseg.engine.infer, ctseg.engine.plan, ctseg.engine.model
found = {"torch", "monai", "SimpleITK", "pydicom", "matplotlib", "array_api_compat.torch"} & set(sys.modules)
assert not found, found
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
