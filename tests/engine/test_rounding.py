"""Reduced precision: windows whose rounding may have turned voxels run again exactly, no more of them than needed."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ctseg.engine.model import Model
from ctseg.engine.predict import window_logits
from ctseg.engine.rounding import LEAST_VOXELS, MOST_SHARE, TURNED, TURNED_FAST, Rounding
from ctseg.engine.runtime import Runtime
from ctseg.recipe import Recipe

WINDOW = (16, 16, 16)
ERROR = 0.05
"""By how much the made rounding moves a logit."""
SHAPE = (320, 32, 32)


class Network:
    """Takes the image for the lead of every structure, `error` more or less."""

    def __init__(self, error: float = 0.0, structures: int = 1) -> None:
        self.error, self.structures = error, structures
        self.windows = 0

    def __call__(self, image_BCXYZ: Tensor) -> Tensor:
        self.windows += len(image_BCXYZ)
        signs = [(-1.0) ** number for number in range(self.structures)]
        return torch.cat([0 * image_BCXYZ, *(sign * image_BCXYZ - 1.0 + self.error for sign in signs)], dim=1)


def ball(centre_x: float, radius: float, slope: float = 0.5) -> Tensor:
    """From 5 in the middle to 0 outside; `slope` per voxel, and 1 on the surface."""
    axes = np.meshgrid(*(np.arange(n) - c for n, c in zip(SHAPE, (centre_x, 16.2, 15.7), strict=True)), indexing="ij")
    distance = np.sqrt(sum(axis**2 for axis in axes))
    return torch.from_numpy(np.clip((radius - distance) * slope + 1, 0, 5).astype(np.float32))


def logits(
    recipe: Recipe,
    image_XYZ: Tensor,
    rounded: Network,
    exact: Network | None = None,
    notes: list[str] | None = None,
    *,
    fast: bool = False,
) -> Tensor:
    recipe = replace(recipe, labels={str(n): f"organ {n}" for n in range(1, rounded.structures + 1)})
    inference = replace(recipe.inference, window_size=WINDOW, overlap=0.5)
    model = Model(recipe, rounded, Runtime(torch.device("cpu")), Path("model.pt"), "", exact=exact)
    told = [] if notes is None else notes
    result: Tensor = window_logits(model, image_XYZ, inference, fast=fast, note=told.append)
    return result


@pytest.mark.parametrize("error", [ERROR, -ERROR])
@pytest.mark.parametrize("radius", [11.0, 7.0, 4.0])
def test_the_mask_is_all_but_that_of_the_exact_network(tiny_recipe: Recipe, radius: float, error: float) -> None:
    image_XYZ, notes = ball(120, radius), list[str]()
    rounded, exact, everywhere = Network(error), Network(), Network()
    wanted = logits(tiny_recipe, image_XYZ, everywhere) > 0
    alone = logits(tiny_recipe, image_XYZ, Network(error)) > 0
    ours = logits(tiny_recipe, image_XYZ, rounded, exact, notes) > 0
    may_turn = TURNED * max(int(wanted.sum()), LEAST_VOXELS)
    assert (alone ^ wanted).sum() > 8 * may_turn, "rounding must matter"
    assert (ours ^ wanted).sum() <= 2 * may_turn
    assert 0 < exact.windows <= MOST_SHARE * everywhere.windows
    assert rounded.windows == everywhere.windows + exact.windows
    assert notes == []


def test_windows_that_ran_again_have_exact_scores(tiny_recipe: Recipe) -> None:
    """Near the surface at most one of a voxel's eight windows did not."""
    image_XYZ = ball(120, 3.0)
    ours = logits(tiny_recipe, image_XYZ, Network(ERROR), Network())
    wanted = logits(tiny_recipe, image_XYZ, Network())
    surface = (wanted > -0.2) & (wanted < 0.2)
    torch.testing.assert_close(ours[surface], wanted[surface], atol=ERROR / 8 + 1e-4, rtol=0)
    assert torch.allclose(ours[..., 200:, :, :], wanted[..., 200:, :, :] + ERROR), "the others keep theirs"


def test_each_of_several_structures_is_settled(tiny_recipe: Recipe) -> None:
    """A large one that rounding hardly turns, and a small one with a soft surface."""
    image_XYZ = ball(90, 12.0, slope=40.0) - ball(250, 6.0, slope=0.3)
    exact = Network(structures=2)
    wanted = logits(tiny_recipe, image_XYZ, Network(structures=2)).argmax(dim=0)
    alone = logits(tiny_recipe, image_XYZ, Network(ERROR, structures=2)).argmax(dim=0)
    ours = logits(tiny_recipe, image_XYZ, Network(ERROR, structures=2), exact).argmax(dim=0)
    small = int((wanted == 2).sum())
    assert ((alone == 2) ^ (wanted == 2)).sum() > 0.02 * small
    assert ((ours == 2) ^ (wanted == 2)).sum() <= 2 * TURNED * max(small, LEAST_VOXELS)
    assert exact.windows > 0


class TwoErrors(Network):
    """Rounding moves one structure ten times as far as the other."""

    def __init__(self, *errors: float) -> None:
        super().__init__(structures=2)
        self.errors = errors

    def __call__(self, image_BCXYZ: Tensor) -> Tensor:
        logits_BCXYZ = super().__call__(image_BCXYZ)
        logits_BCXYZ[:, 1] += self.errors[0]
        logits_BCXYZ[:, 2] += self.errors[1]
        return logits_BCXYZ


@pytest.mark.parametrize("turned_round", [False, True])
def test_each_structure_has_its_own_error(tiny_recipe: Recipe, turned_round: bool) -> None:
    """One has ten times as many voxels near a tie, and would show an error far too small for the other."""
    image_XYZ = ball(90, 9.0, slope=0.2) - ball(250, 9.0, slope=2.0)
    sign, errors = (-1, (ERROR, ERROR / 10)) if turned_round else (1, (ERROR / 10, ERROR))
    wanted = logits(tiny_recipe, sign * image_XYZ, Network(structures=2)).argmax(dim=0)
    alone = logits(tiny_recipe, sign * image_XYZ, TwoErrors(*errors)).argmax(dim=0)
    notes: list[str] = []
    ours = logits(tiny_recipe, sign * image_XYZ, TwoErrors(*errors), Network(structures=2), notes).argmax(dim=0)
    assert notes == []
    for value in (1, 2):
        may_turn = TURNED * max(int((wanted == value).sum()), LEAST_VOXELS)
        assert ((alone == value) ^ (wanted == value)).sum() > 4 * may_turn
        assert ((ours == value) ^ (wanted == value)).sum() <= 2 * may_turn


def test_nothing_runs_again_where_no_voxel_is_near_a_tie(tiny_recipe: Recipe) -> None:
    image_XYZ = (ball(120, 9.0, slope=40.0) > 1).float() * 5
    exact = Network()
    ours = logits(tiny_recipe, image_XYZ, Network(ERROR), exact)
    assert exact.windows == 0
    assert (ours > 0).sum() == (image_XYZ > 1).sum()


def test_where_too_many_windows_would_have_to_run_again_one_does_and_the_log_says_so(tiny_recipe: Recipe) -> None:
    """Ties everywhere, as of a network that was hardly trained."""
    image_XYZ = 1 + torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    notes: list[str] = []
    rounded, exact = Network(ERROR), Network()
    wanted = logits(tiny_recipe, image_XYZ, Network()) > 0
    ours = logits(tiny_recipe, image_XYZ, rounded, exact, notes) > 0
    (note,) = notes
    told, of = map(int, re.findall(r"\d+", note)[:2])
    assert "--precision float32" in note
    assert told == pytest.approx(int((ours ^ wanted).sum()), rel=0.05)
    assert of == pytest.approx(int(wanted.sum()), rel=0.05)
    assert exact.windows == 1


@pytest.mark.parametrize(("length", "runs"), [(32, 0), (40, 1)])
def test_a_ct_of_fewer_than_four_windows_is_left_as_it_is(tiny_recipe: Recipe, length: int, runs: int) -> None:
    """To run one of three again would take longer than float32 from the start."""
    exact = Network()
    logits(tiny_recipe, ball(120, 11.0)[106 : 106 + length, :16, :16].contiguous(), Network(ERROR), exact)
    assert exact.windows == runs


RAMP = torch.linspace(-1, 1, 2001).view(1, -1, 1, 1).expand(1, 2001, 16, 16).contiguous()
"""As many voxels per logit everywhere: what rounding turns is known without approximation."""
ALONG_RAMP = [(min(x, 2001 - 16), 0, 0) for x in range(0, 1992, 8)]


def summed(logits_CXYZ: Tensor) -> Tensor:
    total_CXYZ = torch.zeros_like(logits_CXYZ)
    for x, _, _ in ALONG_RAMP:
        total_CXYZ[:, x : x + 16] += logits_CXYZ[:, x : x + 16]
    return total_CXYZ


def test_how_much_is_turned_is_told_before_windows_run() -> None:
    rounding = Rounding(summed(RAMP), ALONG_RAMP, WINDOW)
    assert rounding.needed() == 1, "which shows what rounding does"
    window = rounding.windows[0]
    exact = RAMP[:, window[0] : window[0] + 16]
    rounding.learn(window, exact + 0.01, exact)
    note = rounding.describe(0, ("spleen",))
    turned, found = map(int, re.findall(r"\d+", note)[:2])
    assert "of spleen" in note
    assert turned == pytest.approx(10 * 16 * 16, rel=0.02)  # 0.01 of a logit, at 0.001 a plane
    assert found == pytest.approx(1000 * 16 * 16, rel=0.002)
    near = [x for x, _, _ in rounding.windows[: rounding.needed()]]
    assert all(abs(x + 8 - 1000) < 200 + 16 for x in near)
    assert len(near) == pytest.approx(400 / 8 * (1 - 256 / 2560), abs=3)  # all but a tenth of what is near


def test_the_error_is_that_of_voxels_which_the_average_has_near_a_tie() -> None:
    """Windows that disagree by far have a tie between them, where rounding moves each by as far as it is large."""
    signs = {window: 6.0 if number % 2 else -6.0 for number, window in enumerate(ALONG_RAMP)}
    total_CXYZ = torch.zeros_like(RAMP)
    for (x, _, _), sign in signs.items():
        total_CXYZ[:, x : x + 16] += RAMP[:, x : x + 16] + sign
    rounding = Rounding(total_CXYZ, ALONG_RAMP, WINDOW)
    window = rounding.windows[0]
    exact = RAMP[:, window[0] : window[0] + 16] + signs[window]
    rounding.learn(window, exact * 1.002, exact)
    turned = int(re.findall(r"\d+", rounding.describe(0, ("spleen",)))[0])
    assert turned == pytest.approx(0.012 / 0.001 * 256, rel=0.1)


def test_a_structure_is_not_taken_for_another() -> None:
    """Of two ramps, one after the other, each has a window that runs whatever the first one shows."""
    first, second = RAMP.clone(), RAMP.flip(1)
    first[:, :300], first[:, 700:], second[:, :1300], second[:, 1700:] = -1.0, -1.0, -1.0, -1.0
    first[:, 300:700] = RAMP[:, 800:1200]
    second[:, 1300:1700] = RAMP.flip(1)[:, 800:1200]
    total_CXYZ = summed(torch.cat([torch.zeros_like(RAMP), first, second]))
    rounding = Rounding(total_CXYZ, ALONG_RAMP, WINDOW)
    places = sorted(x + 8 for x, _, _ in rounding.windows[:2])
    assert places == [pytest.approx(500, abs=216), pytest.approx(1500, abs=216)]
    for window, error in zip(rounding.windows[:2], (0.0, 0.1), strict=True):
        assert rounding.needed() == 2
        exact = total_CXYZ[:, window[0] : window[0] + 16] / 2
        rounding.learn(window, exact + error * torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1, 1), exact)
    assert rounding.needed() > 10


def test_progress_counts_windows_that_run_again(tiny_recipe: Recipe) -> None:
    calls: list[tuple[int, int]] = []
    exact = Network()
    model = Model(tiny_recipe, Network(ERROR), Runtime(torch.device("cpu")), Path("model.pt"), "", exact=exact)
    inference = replace(tiny_recipe.inference, window_size=WINDOW, overlap=0.5)
    window_logits(model, ball(120, 7.0), inference, lambda done, of: calls.append((done, of)))
    assert [done for done, _ in calls] == list(range(1, len(calls) + 1))
    assert calls[-1][0] == calls[-1][1]
    assert len(calls) == calls[0][1] + exact.windows


def test_progress_ends_where_too_many_windows_would_have_to_run_again(tiny_recipe: Recipe) -> None:
    calls: list[tuple[int, int]] = []
    model = Model(tiny_recipe, Network(ERROR), Runtime(torch.device("cpu")), Path("model.pt"), "", exact=Network())
    inference = replace(tiny_recipe.inference, window_size=WINDOW, overlap=0.5)
    noise = 1 + torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    window_logits(model, noise, inference, lambda done, of: calls.append((done, of)))
    assert calls[-1] == (len(calls), len(calls))
    assert len(calls) == calls[0][1] + 1


@pytest.mark.parametrize("radius", [11.0, 7.0])
def test_fast_settles_what_it_must(tiny_recipe: Recipe, radius: float) -> None:
    """Fewer windows run again than without, and voxels turn that then would not, but no more than may."""
    image_XYZ = ball(120, radius)
    wanted = logits(tiny_recipe, image_XYZ, Network()) > 0
    exact, exact_fast = Network(), Network()
    ours = logits(tiny_recipe, image_XYZ, Network(ERROR), exact) > 0
    fast = logits(tiny_recipe, image_XYZ, Network(ERROR), exact_fast, fast=True) > 0
    unsettled = logits(tiny_recipe, image_XYZ, Network(ERROR), fast=True) > 0
    may_turn = TURNED_FAST * max(int(wanted.sum()), LEAST_VOXELS)
    assert (unsettled ^ wanted).sum() > 2 * may_turn, "rounding must matter"
    assert (ours ^ wanted).sum() < (fast ^ wanted).sum() <= 2 * may_turn
    assert 0 < exact_fast.windows < exact.windows


@pytest.mark.parametrize("on_disk", [True, False])
def test_with_fast_all_windows_run_again_where_too_many_would_have_to(
    tiny_recipe: Recipe, tmp_path: Path, on_disk: bool
) -> None:
    calls: list[tuple[int, int]] = []
    notes: list[str] = []
    noise = 1 + torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    inference = replace(tiny_recipe.inference, window_size=WINDOW, overlap=0.5)
    rounded, exact, everywhere = Network(ERROR), Network(), Network()
    model = Model(tiny_recipe, rounded, Runtime(torch.device("cpu")), Path("model.pt"), "", exact=exact)
    got = window_logits(
        model,
        noise,
        inference,
        lambda done, of: calls.append((done, of)),
        tmp_path if on_disk else None,
        fast=True,
        note=notes.append,
    )
    torch.testing.assert_close(got, logits(tiny_recipe, noise, everywhere), atol=1e-5, rtol=1e-5)
    assert exact.windows == everywhere.windows + 1 == rounded.windows, "one had shown what rounding does"
    assert notes == [
        "rounding would have turned too much of the mask: every window ran again; --precision float32 is faster here"
    ]
    assert [done for done, _ in calls] == list(range(1, len(calls) + 1))
    assert calls[-1] == (2 * everywhere.windows + 1, 2 * everywhere.windows + 1)


@pytest.mark.parametrize("fast", [True, False])
def test_a_ct_of_one_window_is_settled_with_fast_alone(tiny_recipe: Recipe, fast: bool) -> None:
    image_XYZ, exact = ball(8, 5.0)[:16, 8:24, 8:24], Network()
    assert image_XYZ.shape == WINDOW
    got = logits(tiny_recipe, image_XYZ, Network(ERROR), exact, fast=fast)
    assert exact.windows == int(fast)
    wanted = logits(tiny_recipe, image_XYZ, Network(0.0 if fast else ERROR))
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_of_a_small_structure_fast_may_turn_one_voxel_too(tiny_recipe: Recipe) -> None:
    """One voxel of a structure of 200, as without; of one of 2000, three in a thousand."""
    for voxels, turned in ((200, 1.0), (2000, 6.0)):
        total_CXYZ = torch.full((1, 64, 16, 16), -1.0)
        total_CXYZ.view(-1)[:voxels] = 1.0
        rounding = Rounding(total_CXYZ, [(n, 0, 0) for n in range(0, 64, 16)], WINDOW, fast=True)
        assert rounding._may_turn_S.tolist() == [pytest.approx(turned)]


def test_scores_on_a_disk_are_settled_alike(tiny_recipe: Recipe, tmp_path: Path) -> None:
    exact = Network()
    model = Model(tiny_recipe, Network(ERROR), Runtime(torch.device("cpu")), Path("model.pt"), "", exact=exact)
    inference = replace(tiny_recipe.inference, window_size=WINDOW, overlap=0.5)
    in_memory = window_logits(model, ball(120, 7.0), inference)
    assert exact.windows > 0
    assert torch.equal(in_memory, window_logits(model, ball(120, 7.0), inference, scratch=tmp_path))
