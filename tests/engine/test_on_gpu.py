"""On a CUDA GPU: logits and masks are the CPU's, from the CT's voxels to the mask, and with too little memory, too."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ctseg.engine.model import Model, forward_of
from ctseg.engine.predict import predict, window_logits
from ctseg.engine.runtime import Runtime
from ctseg.metrics import dice
from ctseg.networks import fold_for_inference, network_for
from ctseg.recipe import Recipe, load_recipe
from ctseg.sources.phantom import centered_grid, make_phantom
from ctseg.volume import Volume

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")


@pytest.fixture
def ct() -> Volume:
    return make_phantom(7, 0, grid=centered_grid((160, 150, 90), (2.5, 2.5, 4.0), "LPS")).image


def model_of(recipe: Recipe, device: torch.device, precision: str = "float32") -> Model:
    """With weights that were never trained, the same on every device."""
    torch.manual_seed(0)
    network = fold_for_inference(network_for(recipe).eval())
    runtime = Runtime(device, precision)
    return Model(recipe, forward_of(network, runtime), runtime, Path("model.pt"), "")


@pytest.mark.parametrize(
    ("name", "precision", "tolerance"),
    [
        *((name, "float32", 1e-4) for name in ("spleen", "lung:small", "bone_lesion:small")),
        *((name, "bfloat16", 0.15) for name in ("spleen", "lung:small", "bone_lesion:small")),
        *((name, "float16", 0.02) for name in ("spleen", "bone_lesion:small")),  # an untrained AHNet's overflow
    ],
)
def test_logits_are_the_cpus(monkeypatch: pytest.MonkeyPatch, name: str, precision: str, tolerance: float) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", precision != "float32")
    recipe = load_recipe(name)
    inference = replace(recipe.inference, window_size=(64, 64, 32), overlap=0.25)
    image_XYZ = torch.rand(96, 80, 48, generator=torch.Generator().manual_seed(1))
    wanted = window_logits(model_of(recipe, CPU), image_XYZ, inference)
    got = window_logits(model_of(recipe, GPU, precision), image_XYZ.to(GPU), inference)
    assert got.device == GPU
    assert got.dtype == torch.float32
    assert (got.cpu() - wanted).abs().max() <= tolerance * wanted.abs().max()


def bones(image_BCXYZ: Tensor) -> Tensor:
    """What is brighter than soft tissue."""
    return torch.cat([0.7 - image_BCXYZ, image_BCXYZ - 0.7], dim=1)


def bones_model(device: torch.device, on_cpu: Model | None = None) -> Model:
    recipe = load_recipe("spleen:small")
    found = Model(recipe, bones, Runtime(device), Path("model.pt"), "")
    return found if on_cpu is None else replace(found, on_cpu=lambda: on_cpu)


def test_a_mask_is_the_cpus(ct: Volume) -> None:
    """All but voxels at a tie, which another order of sums turns."""
    wanted = predict(bones_model(CPU), ct)
    got = predict(bones_model(GPU), ct)
    assert wanted.any()
    assert np.count_nonzero(got != wanted) <= 1e-4 * np.count_nonzero(wanted)


def test_a_gpu_without_memory_gives_the_same_mask_and_tells(ct: Volume) -> None:
    """The GPU lends so little that not even the CT's grid fits; nothing of it is left in use afterwards."""
    wanted = predict(bones_model(CPU), ct)
    notes: list[str] = []
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(GPU)
    try:
        torch.cuda.set_per_process_memory_fraction(2**20 / total, GPU)
        got = predict(bones_model(GPU, bones_model(CPU)), ct, note=notes.append)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, GPU)
    assert notes, "it must be told"
    assert all(note.startswith("not enough memory on cuda:0: ") for note in notes)
    assert (dice(got, wanted) or 0) >= 0.9999
    assert torch.cuda.memory_allocated(GPU) == before
