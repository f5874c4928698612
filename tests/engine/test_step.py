"""One optimisation step: how patches are dealt out, and that processes and passes give the step of the whole batch."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing, nn

from ctseg.engine.bank import bank_folder, open_bank
from ctseg.engine.parallel import GlobalBatchNorm, GlobalDropout, begin_pass, globalise
from ctseg.engine.runtime import Runtime, leave_group
from ctseg.engine.step import Stepper, passes
from ctseg.engine.trainer import Trainer
from ctseg.errors import CtsegError
from ctseg.manifest import Manifest
from ctseg.recipe import Recipe, recipe_from_dict
from ctseg.sampling import CaseArrays, Draw

SEGRESNET = {"kind": "segresnet", "init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1], "dropout_prob": 0.4}
BATCH_NORM = {"kind": "unet", "channels": [4, 8], "strides": [2], "num_res_units": 1, "norm": "batch"}


@pytest.fixture(scope="module")
def cases(tiny_result, tiny_recipe: Recipe, tiny_manifest: Manifest, tiny_prepared: Path) -> list[CaseArrays]:
    """The tiny data, prepared."""
    folder = bank_folder(tiny_prepared, tiny_recipe)
    return open_bank(tiny_manifest.split("training"), folder, torch.device("cpu"))


def trained(recipe: Recipe, runtime: Runtime, cases: list[CaseArrays], steps: int = 1) -> tuple[Trainer, list[float]]:
    """A trainer after some steps on all cases at once, with the last step's gradients, and the losses."""
    trainer = Trainer.fresh(recipe, runtime)
    stepper, losses = Stepper(trainer, cases), []
    stepper.begin_epoch()
    for _ in range(steps):
        losses.append(float(stepper.step(list(range(len(cases))), 1)))
        trainer.step += 1
    return trainer, losses


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in trainer.network.named_parameters() if p.grad is not None}


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """Within a tolerance of the largest value of all: a bias before a normalisation has nothing but noise."""
    assert one.keys() == other.keys()
    largest = max(float(value.abs().max()) for value in one.values())
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=0, atol=tolerance * largest, msg=name)


@pytest.mark.parametrize("num_draws", [1, 2, 5, 16])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("patches_per_pass", [None, 1, 2, 100])
def test_passes_hold_every_patch_once_and_leave_no_process_out(
    num_draws: int, world_size: int, patches_per_pass: int | None
) -> None:
    if world_size > num_draws:
        return  # refused before training, see below
    draws = [Draw(case=n, start=(0, 0, 0)) for n in range(num_draws)]
    parts = passes(draws, Runtime(torch.device("cpu"), "float32", 0, world_size), patches_per_pass)
    assert [d for part in parts for d in part.draws] == draws
    assert sum(part.share for part in parts) == pytest.approx(1)
    assert [part.last for part in parts] == [False] * (len(parts) - 1) + [True]
    for part in parts:
        mine = [part.draws[rank::world_size] for rank in range(world_size)]
        assert all(mine)
        if num_draws % world_size == 0:
            assert max(map(len, mine)) <= (patches_per_pass or num_draws)


def test_more_processes_than_the_last_step_has_patches_are_refused_before_training(
    tiny_recipe: Recipe, cases: list[CaseArrays], cpu: Runtime
) -> None:
    """3 cases, 2 a step, 2 patches each: the last step has one case, so 2 patches for 3 processes."""
    trainer = Trainer.fresh(tiny_recipe, cpu)
    Stepper(trainer, cases)
    trainer.runtime = Runtime(cpu.device, "float32", 0, 3)
    with pytest.raises(CtsegError, match="3 processes, but the smallest step of an epoch has only 2 patches"):
        Stepper(trainer, cases)


def _one_of_two(rank: int, store: str, data: dict, cases: list[CaseArrays], results: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    _train_as_one_of_two(rank, data, cases, results)
    leave_group()  # with no network left: one would keep the group's threads, and the process would end by abort


def _train_as_one_of_two(rank: int, data: dict, cases: list[CaseArrays], results: str) -> None:
    runtime = Runtime(torch.device("cpu"), "float32", rank, 2)
    trainer, losses = trained(recipe_from_dict(data, "test"), runtime, cases, data["training"]["epochs"])
    if rank == 0:
        content = {"losses": losses, "gradients": gradients(trainer), "buffers": dict(trainer.network.named_buffers())}
        torch.save(content, results)


@pytest.mark.parametrize("patches_per_pass", [None, 2])
@pytest.mark.parametrize("network", [BATCH_NORM, SEGRESNET], ids=lambda n: n["kind"])
def test_two_processes_make_the_step_of_one(
    tiny_recipe: Recipe, cases: list[CaseArrays], tmp_path: Path, changed, network: dict, patches_per_pass, cpu: Runtime
) -> None:
    """Batch statistics, Dice sums and dropped channels are those of all patches: loss and gradients are equal.

    Three patches a case and three cases: the processes hold five and four, or, in passes, unequal shares of each.
    """
    data = changed(tiny_recipe, sampling={"patches_per_case": 3}, training={"batch_cases": 3, "epochs": 1}).to_dict()
    data["network"] = network
    both = {**data["training"], "patches_per_pass": patches_per_pass and 2 * patches_per_pass}
    alone, losses = trained(recipe_from_dict({**data, "training": both}, "test"), cpu, cases)
    each = {**data, "training": {**data["training"], "patches_per_pass": patches_per_pass}}
    arguments = (str(tmp_path / "store"), each, cases, str(tmp_path / "results.pt"))
    multiprocessing.spawn(_one_of_two, arguments, nprocs=2)
    two = torch.load(tmp_path / "results.pt", weights_only=True)
    assert two["losses"] == pytest.approx(losses, rel=1e-5)
    assert_close(gradients(alone), two["gradients"])
    statistics = {n: b for n, b in alone.network.named_buffers() if b.is_floating_point()}
    if statistics:
        assert_close(statistics, {n: two["buffers"][n] for n in statistics})


@pytest.mark.parametrize("patches_per_pass", [1, 2, 3])
def test_accumulated_gradients_are_those_of_the_whole_step(
    tiny_recipe: Recipe, cases: list[CaseArrays], cpu: Runtime, changed, patches_per_pass: int
) -> None:
    """Exactly so where nothing runs over patches: instance normalisation, Dice of each patch alone."""
    recipe = changed(tiny_recipe, network={"norm": "instance"}, objective={"batch": False}, training={"batch_cases": 3})
    whole, losses = trained(recipe, cpu, cases)
    parts, same = trained(changed(recipe, training={"patches_per_pass": patches_per_pass}), cpu, cases)
    assert same == pytest.approx(losses, rel=1e-5)
    assert_close(gradients(whole), gradients(parts))


def test_gradients_are_clipped_to_the_recipes_norm(tiny_recipe, cases, cpu, changed) -> None:
    def norm(trainer: Trainer) -> float:
        return float(torch.stack([g.square().sum() for g in gradients(trainer).values()]).sum().sqrt())

    free, _ = trained(tiny_recipe, cpu, cases)
    assert norm(free) > 0.02
    clipped, _ = trained(changed(tiny_recipe, training={"gradient_clip_norm": 0.01}), cpu, cases)
    assert norm(clipped) == pytest.approx(0.01, rel=1e-3)
    loose, _ = trained(changed(tiny_recipe, training={"gradient_clip_norm": 100.0}), cpu, cases)
    assert_close(gradients(free), gradients(loose), 1e-6)


def test_the_average_follows_its_formula(tiny_recipe, cases, cpu, changed) -> None:
    """The first step's weights, then decay * average + (1 - decay) * weights; it is the model that is kept."""
    recipe = changed(tiny_recipe, training={"ema_decay": 0.9})
    seen = [trained(tiny_recipe, cpu, cases, steps)[0].network.state_dict() for steps in (1, 2, 3)]
    trainer, _ = trained(recipe, cpu, cases, 3)
    for name, value in trainer.model.state_dict().items():
        if value.is_floating_point():
            expected = seen[0][name]
            for weights in seen[1:]:
                expected = 0.9 * expected + 0.1 * weights[name]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(a, b) for a, b in zip(trainer.model.parameters(), seen[2].values(), strict=False))


def test_frozen_weights_and_statistics_stay(tiny_recipe, cases, cpu, changed, assert_same) -> None:
    recipe = changed(tiny_recipe, training={"freeze": ["model.0"]})
    before = Trainer.fresh(recipe, cpu).network.state_dict()
    after = trained(recipe, cpu, cases, 2)[0].network.state_dict()
    still = {n for n in before if n.startswith("model.0")}
    assert {n for n in before if torch.equal(before[n], after[n])} >= still
    moved = {n for n in before if n not in still and n.endswith("weight")}
    assert moved
    assert not any(torch.equal(before[n], after[n]) for n in moved)


def test_float16_scales_the_loss_and_skips_a_step_that_overflows(tiny_recipe, cases) -> None:
    """On a CPU, which has slow float16 but the same scaler: gradients near float32's, no step after an overflow."""
    half = Runtime(torch.device("cpu"), "float16")
    exact, losses = trained(tiny_recipe, Runtime(torch.device("cpu")), cases)
    trainer, same = trained(tiny_recipe, half, cases)
    assert same == pytest.approx(losses, rel=5e-3)
    scale = 2.0**16  # the scaler's first; gradients are left scaled where nothing clips them
    ours = torch.cat([g.flatten() for g in gradients(trainer).values()]) / scale
    theirs = torch.cat([g.flatten() for g in gradients(exact).values()])
    assert nn.functional.cosine_similarity(ours, theirs, dim=0) > 0.999
    weights = [p.clone() for p in trainer.network.parameters()]
    trainer.scaler.update(2.0**60)
    stepper = Stepper(trainer, cases)
    stepper.begin_epoch()
    stepper.step([0, 1, 2], 1)
    assert all(torch.equal(a, b) for a, b in zip(weights, trainer.network.parameters(), strict=True))
    assert trainer.scaler.get_scale() == 2.0**59


def test_bfloat16_comes_near_float32(tiny_recipe, cases) -> None:
    _, losses = trained(tiny_recipe, Runtime(torch.device("cpu")), cases, 3)
    _, near = trained(tiny_recipe, Runtime(torch.device("cpu"), "bfloat16"), cases, 3)
    assert near == pytest.approx(losses, rel=2e-2)


def test_global_dropout_drops_channels_and_keeps_the_mean(cpu: Runtime) -> None:
    network = globalise(nn.Sequential(nn.Dropout3d(0.25)), cpu)
    assert type(network[0]) is GlobalDropout
    image = torch.ones(200, 50, 2, 2, 2)
    torch.manual_seed(0)
    begin_pass(network, 200, slice(None))
    dropped = network.train()(image)
    values = dropped[:, :, 0, 0, 0]
    assert torch.equal(dropped, values[:, :, None, None, None].expand_as(dropped))
    assert values.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert float((values == 0).float().mean()) == pytest.approx(0.25, abs=0.02)  # four deviations of 10 000 draws
    torch.manual_seed(0)
    begin_pass(network, 200, slice(1, None, 2))
    assert torch.equal(network(image[1::2]), dropped[1::2])
    assert torch.equal(network.eval()(image), image)


def test_one_process_keeps_pytorchs_batch_normalisation(cpu: Runtime) -> None:
    network = globalise(nn.Sequential(nn.BatchNorm3d(2)), cpu)
    assert type(network[0]) is nn.BatchNorm3d
    assert type(globalise(network, dataclasses.replace(cpu, world_size=2))[0]) is GlobalBatchNorm
