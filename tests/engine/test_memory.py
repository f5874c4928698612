"""How much memory there is and how much is taken: what can be shown without a GPU, and what needs one."""

import dataclasses

import pytest
import torch

from ctseg.engine import memory
from ctseg.engine.determinism import set_determinism, undeterministic_parts
from ctseg.engine.memory import fit_into_memory, largest_that_fits, limit_gpu
from ctseg.engine.process import peak_memory_bytes
from ctseg.engine.runtime import Runtime
from ctseg.engine.trainer import Trainer
from ctseg.errors import DeviceError, NotEnoughMemory
from ctseg.progress import Silent
from ctseg.recipe import load_recipe


@pytest.mark.parametrize(("room", "found"), [(100, 16), (16, 16), (15, 8), (8, 8), (3, 2), (1, 1), (0, 0)])
def test_patches_are_halved_until_they_fit(room: int, found: int) -> None:
    asked: list[int] = []
    assert largest_that_fits(16, lambda patches: asked.append(patches) or patches <= room) == found
    assert asked == sorted(asked, reverse=True)


def test_peak_memory_is_that_of_this_process() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    held = torch.ones(100 + before // 4)  # more than all of it until now
    assert peak_memory_bytes(torch.device("cpu")) > before
    assert 50e6 < before < 100e9
    assert held.sum() > 0


def test_a_cpu_is_refused(cpu: Runtime) -> None:
    with pytest.raises(DeviceError, match="training runs on the CPU"):
        limit_gpu(cpu, 2**30)


class Gpu:
    """What the limit needs to know of one with 16 GB, on which so many patches fit."""

    def __init__(self, monkeypatch, room: int) -> None:
        self.fraction = 0.0
        properties = type("Properties", (), {"total_memory": 16 * 10**9})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _device: properties)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _device: None)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self.limit)
        monkeypatch.setattr(memory, "_fits", lambda _recipe, _runtime, patches: patches <= room)

    def limit(self, fraction: float, _device: torch.device) -> None:
        self.fraction = fraction


@pytest.mark.parametrize(("room", "passes"), [(100, 16), (9, 8), (1, 1)])
def test_a_step_is_split_as_the_memory_demands(monkeypatch, cpu: Runtime, room: int, passes: int) -> None:
    gpu, recipe = Gpu(monkeypatch, room), load_recipe("spleen")
    trainer = Trainer.fresh(recipe, cpu)
    trainer.runtime = dataclasses.replace(cpu, device=torch.device("cuda", 0))
    limit_gpu(trainer.runtime, 12 * 10**9)
    assert fit_into_memory(trainer, 12 * 10**9, Silent()) == passes
    assert gpu.fraction == pytest.approx(0.75)
    trainer.step, trainer.patches_per_pass = 1, 2  # a resumed one keeps its number
    assert fit_into_memory(trainer, 12 * 10**9, Silent()) == 2


def test_no_room_for_one_patch_is_an_error(monkeypatch, cpu: Runtime) -> None:
    Gpu(monkeypatch, 0)
    trainer = Trainer.fresh(load_recipe("spleen"), cpu)
    trainer.runtime = dataclasses.replace(cpu, device=torch.device("cuda", 0))
    with pytest.raises(NotEnoughMemory, match=r"one patch of 96x96x96 does not fit into 1.0 GB on cuda:0"):
        fit_into_memory(trainer, 10**9, Silent())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_spleen_recipe_fits_into_its_cards_memory() -> None:
    """12 GB with AMP, at most half the patches at once."""
    runtime = Runtime(torch.device("cuda", 0), "float16")
    limit_gpu(runtime, 12 * 10**9)
    try:
        found = fit_into_memory(Trainer.fresh(load_recipe("spleen"), runtime), 12 * 10**9, Silent())
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, runtime.device)
    assert found >= 8
    assert peak_memory_bytes(runtime.device) <= 12 * 10**9


def test_what_cannot_be_deterministic_is_told(changed) -> None:
    spleen, lung = load_recipe("spleen"), load_recipe("lung")
    assert undeterministic_parts(spleen) == ""
    assert "trilinear upsampling is not deterministic on CUDA" in undeterministic_parts(lung)
    assert undeterministic_parts(changed(lung, network={"upsample_mode": "transpose"})) == ""
    assert "SegResNet" in undeterministic_parts(load_recipe("bone_lesion"))
    assert set_determinism(changed(lung, training={"deterministic": True}), torch.device("cpu")) == ""
