"""Fewer windows: those that run are the recipe's own, and where they matter all of them run."""

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ctseg.engine import fast as engine
from ctseg.engine import model as loading
from ctseg.engine import predict as predict_module
from ctseg.engine.checkpoint import save_checkpoint
from ctseg.engine.fast import covering, windows_to_refine
from ctseg.engine.model import Model, fast_in_bfloat16, settles_rounding
from ctseg.engine.predict import predict, window_logits
from ctseg.engine.runtime import Runtime, start_runtime
from ctseg.engine.windows import window_starts
from ctseg.recipe import Recipe, load_recipe
from ctseg.volume import Geometry, Volume

CPU = Runtime(torch.device("cpu"))
GPU = Runtime(torch.device("cuda"))
"""Only for its batches of windows: tensors and networks stay on the CPU here."""
WINDOW = (16, 16, 16)
BOUND = 0.004
"""So many differing voxels, as a share of the mask, lower Dice by half of it."""


class Counted:
    """A network that keeps what it was shown."""

    def __init__(self, network: Callable[[Tensor], Tensor]) -> None:
        self.network = network
        self.windows: list[Tensor] = []

    def __call__(self, image_BCXYZ: Tensor) -> Tensor:
        self.windows += list(image_BCXYZ)
        return self.network(image_BCXYZ)


def slanted(image_BCXYZ: Tensor) -> Tensor:
    """Finds what is brighter than half; a slope along the window makes it matter which windows are averaged."""
    slope_X = torch.linspace(-1.5, 1.5, image_BCXYZ.shape[2]).view(1, 1, -1, 1, 1)
    return torch.cat([torch.zeros_like(image_BCXYZ), (image_BCXYZ - 0.5) * 12 + slope_X], dim=1)


def model_of(recipe: Recipe, network: Callable[[Tensor], Tensor], runtime: Runtime = CPU) -> Model:
    return Model(recipe, network, runtime, Path("model.pt"), "")


def ball(shape: tuple[int, int, int], centre: tuple[float, float, float], radius: float) -> Tensor:
    """1 inside, 0 outside, falling over four voxels at the surface."""
    axes = np.meshgrid(*(np.arange(n) - c for n, c in zip(shape, centre, strict=True)), indexing="ij")
    distance = np.sqrt(sum(axis**2 for axis in axes))
    return torch.from_numpy(np.clip((radius + 2 - distance) / 4, 0, 1).astype(np.float32))


SHAPE = (72, 64, 40)
ONE = ball(SHAPE, (16, 20, 19), 7)
TWO = torch.maximum(ONE, ball(SHAPE, (58, 50, 12), 6))


@pytest.mark.parametrize("image_XYZ", [ONE, TWO], ids=["one", "two"])
def test_scores_near_the_organ_are_those_of_all_windows(
    tiny_recipe: Recipe, image_XYZ: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "LEFT_OUT", 0.0)
    inference = replace(tiny_recipe.inference, window_size=WINDOW, overlap=0.5)
    few, all_of_them = Counted(slanted), Counted(slanted)
    exact = window_logits(model_of(tiny_recipe, all_of_them), image_XYZ, inference)
    ours = window_logits(model_of(tiny_recipe, few), image_XYZ, inference, fast=True)
    near = (image_XYZ > 0.4) & (image_XYZ < 0.6)
    assert near.any()
    torch.testing.assert_close(ours[0][near], exact[0][near], rtol=0, atol=1e-5)
    assert torch.equal(ours > 0, exact > 0)
    assert not torch.allclose(ours, exact, atol=0.1), "it must matter which windows are averaged"
    assert len(few.windows) < 0.7 * len(all_of_them.windows)


def test_what_is_left_out_changes_next_to_nothing(tiny_recipe: Recipe) -> None:
    inference = replace(tiny_recipe.inference, window_size=WINDOW, overlap=0.6)
    few, all_of_them = Counted(slanted), Counted(slanted)
    exact = window_logits(model_of(tiny_recipe, all_of_them), TWO, inference) > 0
    ours = window_logits(model_of(tiny_recipe, few), TWO, inference, fast=True) > 0
    assert (ours ^ exact).sum() <= BOUND * exact.sum()
    assert len(few.windows) < len(all_of_them.windows)


FIRST, OTHERS = [(x, 0, 0) for x in (0, 16, 32, 48)], [(x, 0, 0) for x in (8, 24, 40)]


def denied(classes: int) -> Tensor:
    """Summed logits of the first windows where nothing is anywhere."""
    total_CXYZ = torch.full((classes, 64, 16, 16), -9.0)
    if classes > 1:
        total_CXYZ[0] = 0.0
    return total_CXYZ


def test_each_structure_has_its_own_windows() -> None:
    """One that holds the large structure, and one with the only undecided voxel of the small one."""
    total_CXYZ = denied(3)
    assert windows_to_refine(total_CXYZ, FIRST, OTHERS, WINDOW) == []
    total_CXYZ[1, :12] = 9.0
    assert windows_to_refine(total_CXYZ, FIRST, OTHERS, WINDOW) == [(8, 0, 0)]
    total_CXYZ[2, 44, 3, 5] = -0.5
    assert windows_to_refine(total_CXYZ, FIRST, OTHERS, WINDOW) == [(8, 0, 0), (40, 0, 0)]


@pytest.mark.parametrize(("found", "needed"), [(0, []), (2, []), (3, [(40, 0, 0)])])
def test_a_window_that_holds_more_than_a_thousandth_of_a_structure_runs(found: int, needed: list) -> None:
    """Of 2048 voxels that are firmly found elsewhere, and as many as these in the window."""
    total_CXYZ = denied(1)
    total_CXYZ[0, :8] = 9.0
    total_CXYZ[0, 42].view(-1)[:found] = 9.0
    assert windows_to_refine(total_CXYZ, FIRST, OTHERS, WINDOW) == needed


@pytest.mark.parametrize(("undecided", "needed"), [(0, 0), (200, 0), (206, 1), (412, 2)])
def test_what_is_left_out_together_holds_a_tenth_of_the_structure(undecided: int, needed: int) -> None:
    """Two windows that share the undecided voxels; the structure has 2048, in neither of them."""
    total_CXYZ = denied(1)
    total_CXYZ[0, :8] = 9.0
    total_CXYZ[0, 20].view(-1)[: undecided // 2] = -0.9
    total_CXYZ[0, 45].view(-1)[: undecided - undecided // 2] = -0.9
    assert len(windows_to_refine(total_CXYZ, FIRST, [(10, 0, 0), (40, 0, 0)], WINDOW)) == needed


def test_undecided_is_the_average_of_the_windows_at_a_voxel() -> None:
    total_CXYZ = denied(1)
    total_CXYZ[0, 20:23] = -1.9  # two windows there: -0.95 each
    assert windows_to_refine(total_CXYZ, [*FIRST, (8, 0, 0)], [(24, 0, 0), (20, 0, 0)], WINDOW) == [(20, 0, 0)]
    assert windows_to_refine(total_CXYZ, FIRST, [(24, 0, 0), (20, 0, 0)], WINDOW) == []


def test_what_more_windows_find_is_asked_for_again(tiny_recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar that every window sees only the half of that lies in its lower half: found bit by bit along its length."""

    def lower_half(image_BCXYZ: Tensor) -> Tensor:
        seen = image_BCXYZ * 20 - 10
        seen[:, :, 10:] = seen[:, :, 10:].clamp(max=-4)
        return torch.cat([torch.zeros_like(seen), seen], dim=1)

    image_XYZ = torch.zeros(SHAPE)
    image_XYZ[30:50, 20:28, 10:18] = 1
    asked: list[int] = []

    def counted(*arguments: Any) -> list[tuple[int, int, int]]:
        needed = windows_to_refine(*arguments)
        asked.append(len(needed))
        return needed

    monkeypatch.setattr(predict_module, "windows_to_refine", counted)
    inference = replace(tiny_recipe.inference, window_size=WINDOW, overlap=0.75)
    few, all_of_them = Counted(lower_half), Counted(lower_half)
    exact = window_logits(model_of(tiny_recipe, all_of_them), image_XYZ, inference)
    ours = window_logits(model_of(tiny_recipe, few), image_XYZ, inference, fast=True)
    assert torch.equal(ours > 0, exact > 0)
    assert len(asked) > 2
    assert asked[1] > 0
    assert len(few.windows) < len(all_of_them.windows)


def test_several_structures_find_their_voxels(tiny_recipe: Recipe) -> None:
    recipe = replace(tiny_recipe, labels={"1": "positive", "2": "negative"})

    def both(image_BCXYZ: Tensor) -> Tensor:
        background, positive = slanted(image_BCXYZ).split(1, dim=1)
        return torch.cat([background, positive, slanted(-image_BCXYZ)[:, 1:]], dim=1)

    image_XYZ = ONE - ball(SHAPE, (58, 50, 12), 6)
    inference = replace(recipe.inference, window_size=WINDOW, overlap=0.5)
    few, all_of_them = Counted(both), Counted(both)
    exact = window_logits(model_of(recipe, all_of_them), image_XYZ, inference).argmax(dim=0)
    ours = window_logits(model_of(recipe, few), image_XYZ, inference, fast=True).argmax(dim=0)
    for value in (1, 2):
        assert ((ours == value) ^ (exact == value)).sum() <= BOUND * (exact == value).sum()
    assert len(few.windows) < 0.7 * len(all_of_them.windows)


def test_nothing_found_takes_no_second_look(tiny_recipe: Recipe) -> None:
    """And air gives an empty mask."""
    network = Counted(slanted)
    inference = replace(tiny_recipe.inference, window_size=WINDOW, overlap=0.5)
    logits = window_logits(model_of(tiny_recipe, network), torch.zeros(SHAPE), inference, fast=True)
    assert (logits < 0).all()
    assert len(network.windows) == 5 * 4 * 3  # 72, 64 and 40 in windows of 16


def unsure(image_BCXYZ: Tensor) -> Tensor:
    """Undecided everywhere."""
    return torch.cat([image_BCXYZ * 0, image_BCXYZ - 0.5], dim=1)


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("shape", [(33, 25, 21), (16, 16, 16), (9, 40, 16), (5, 7, 1)])
def test_where_all_is_undecided_the_scores_are_the_same(
    tiny_recipe: Recipe, shape: tuple[int, int, int], overlap: float
) -> None:
    """An organ that fills the CT costs what it costs without `--fast`: every window once."""
    image_XYZ = torch.rand(shape, generator=torch.Generator().manual_seed(2))
    inference = replace(tiny_recipe.inference, window_size=(16, 12, 16), overlap=overlap)
    few, all_of_them = Counted(unsure), Counted(unsure)
    exact = window_logits(model_of(tiny_recipe, all_of_them), image_XYZ, inference)
    ours = window_logits(model_of(tiny_recipe, few), image_XYZ, inference, fast=True)
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-6)
    assert len(few.windows) == len(all_of_them.windows)


@pytest.mark.parametrize("seed", range(8))
def test_every_window_is_one_of_the_recipes_and_runs_once(tiny_recipe: Recipe, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(10, 60, 3))
    image_XYZ = ball(shape, tuple(rng.uniform(0, 1, 3) * shape), float(rng.uniform(2, 25)))
    image_XYZ += torch.arange(image_XYZ.numel()).view(shape) * 1e-7  # no two windows are alike
    inference = replace(tiny_recipe.inference, window_size=WINDOW, overlap=float(rng.choice([0.25, 0.5, 0.7])))
    few, all_of_them = Counted(slanted), Counted(slanted)
    window_logits(model_of(tiny_recipe, all_of_them), image_XYZ, inference)
    ours = window_logits(model_of(tiny_recipe, few), image_XYZ, inference, fast=True)
    known = {window.numpy().tobytes() for window in all_of_them.windows}
    ran = [window.numpy().tobytes() for window in few.windows]
    assert len(set(ran)) == len(ran)
    assert set(ran) <= known
    assert torch.isfinite(ours).all()


@pytest.mark.parametrize("runtime", [CPU, GPU], ids=["cpu", "batches"])
def test_progress_tells_of_further_windows_once_they_are_known(tiny_recipe: Recipe, runtime: Runtime) -> None:
    inference = replace(tiny_recipe.inference, window_size=WINDOW, overlap=0.5, batch_windows=4)
    network = Counted(slanted)
    calls: list[tuple[int, int]] = []
    window_logits(model_of(tiny_recipe, network, runtime), ONE, inference, lambda *told: calls.append(told), fast=True)
    batch = 4 if runtime is GPU else 1
    first, further = -(-60 // batch), -(-(len(network.windows) - 60) // batch)
    assert further > 0
    totals = [first] * first + [first + further] * further
    assert calls == list(zip(range(1, first + further + 1), totals, strict=True))


@pytest.mark.parametrize(("shape", "overlap"), [((72, 64, 40), 0.5), ((47, 16, 100), 0.625), ((16, 17, 33), 0.9)])
def test_no_fewer_windows_of_the_grid_cover_the_ct(shape: tuple[int, int, int], overlap: float) -> None:
    starts = list(window_starts(shape, WINDOW, overlap))
    chosen = covering(starts, WINDOW)
    covered = np.zeros(shape, dtype=bool)
    for x, y, z in chosen:
        covered[x : x + 16, y : y + 16, z : z + 16] = True
    assert covered.all()
    assert chosen == [start for start in starts if start in set(chosen)]
    for axis, length in enumerate(shape):
        own, all_of_them = ({start[axis] for start in group} for group in (chosen, starts))
        for fewer in itertools.combinations(all_of_them, len(own) - 1):
            assert len({n for start in fewer for n in range(start, start + 16)}) < length


def test_masks_of_a_ct_on_its_own_grid(tiny_recipe: Recipe) -> None:
    grid = Geometry.from_parts(SHAPE, (4.0, 5.0, 6.0), (0.0, 0.0, 0.0), np.diag([-1.0, -1.0, 1.0]))
    volume = Volume((TWO.numpy() * 221 - 57).astype(np.int16), grid)
    model = model_of(tiny_recipe, slanted)
    exact, ours = predict(model, volume), predict(model, volume, fast=True)
    assert exact.any()
    assert np.count_nonzero(exact != ours) <= BOUND * np.count_nonzero(exact)


@pytest.mark.parametrize(
    ("precision", "fast", "has", "expected"),
    [
        ("auto", True, True, "bfloat16"),
        ("auto", True, False, "float32"),
        ("auto", False, True, "float32"),
        ("float32", True, True, "float32"),
    ],
)
def test_only_fast_reduces_precision_by_itself_and_only_where_the_cpu_has_it(
    monkeypatch: pytest.MonkeyPatch, precision: str, fast: bool, has: bool, expected: str
) -> None:
    monkeypatch.setattr("ctseg.engine.runtime.cpu_has_bfloat16", lambda: has)
    assert start_runtime("cpu", precision, amp=True, fast=fast).precision == expected


@pytest.fixture
def unet_and_ahnet(tiny_recipe: Recipe, tmp_path: Path) -> tuple[Path, Path]:
    """Checkpoints without weights."""
    unet, ahnet = tmp_path / "unet.pt", tmp_path / "ahnet.pt"
    save_checkpoint(unet, {"recipe": tiny_recipe.to_dict(), "model": {}})
    save_checkpoint(ahnet, {"recipe": load_recipe("lung").to_dict(), "model": {}})
    return unet, ahnet


@pytest.mark.parametrize("has_openvino", [True, False])
def test_fast_is_in_bfloat16_where_that_is_faster(
    unet_and_ahnet: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, has_openvino: bool
) -> None:
    monkeypatch.setattr(loading, "is_installed", lambda name: name == "openvino" and has_openvino)
    unet, ahnet = unet_and_ahnet
    backends = ("auto", "openvino", "torch", None, "onnxruntime")
    assert [fast_in_bfloat16(unet, backend) for backend in backends] == [True, True, True, True, False]
    assert [fast_in_bfloat16(ahnet, backend) for backend in backends] == [has_openvino] * 2 + [False] * 3
    assert not any(fast_in_bfloat16(unet.with_name("gone.onnx"), backend) for backend in backends)


def test_all_but_a_fast_unet_are_settled(unet_and_ahnet: tuple[Path, Path]) -> None:
    """An exported file has the precision that it has, and is not looked into."""
    unet, ahnet = unet_and_ahnet
    for path in (unet, ahnet, unet.with_name("gone.onnx")):
        assert settles_rounding(path, fast=False)
        assert settles_rounding(path, fast=True) == (path != unet)
