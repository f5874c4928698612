"""The losses against their formulas in NumPy, the optimizers' settings, and five golden steps of training."""

import dataclasses
import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from monai.losses.dice import DiceCELoss, DiceLoss
from numpy.typing import NDArray

from ctseg.networks import network_for
from ctseg.objectives import SegmentationLoss, build_optimizer, learning_rate
from ctseg.recipe import Recipe, load_recipe, recipe_from_dict
from ctseg.specs import CosineSpec, DiceCESpec, DiceSpec

SMOOTH = 1e-5
"""MONAI's `smooth_nr` and `smooth_dr`."""


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine the threads of a tiny network wait for each other."""
    number = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(number)


def softmax(logits_BCXYZ: NDArray[np.float64]) -> NDArray[np.float64]:
    powers = np.exp(logits_BCXYZ - logits_BCXYZ.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def one_hot(labels_BXYZ: NDArray[np.int64], num_classes: int) -> NDArray[np.float64]:
    return np.moveaxis(np.eye(num_classes)[labels_BXYZ], -1, 1)


def dice_loss(logits_BCXYZ: NDArray[np.float64], labels_BXYZ: NDArray[np.int64]) -> float:
    """1 - Dice with squared denominator, sums over the whole batch, mean over all classes with the background."""
    scores, truth = softmax(logits_BCXYZ), one_hot(labels_BXYZ, logits_BCXYZ.shape[1])
    over = (0, 2, 3, 4)
    overlap = (scores * truth).sum(axis=over)
    total = (scores**2).sum(axis=over) + (truth**2).sum(axis=over)
    return float(np.mean(1 - (2 * overlap + SMOOTH) / (total + SMOOTH)))


def cross_entropy(logits_BCXYZ: NDArray[np.float64], labels_BXYZ: NDArray[np.int64]) -> float:
    """Mean over voxels of -log softmax at the true class, in a form that does not overflow."""
    shifted = logits_BCXYZ - logits_BCXYZ.max(axis=1, keepdims=True)
    log_scores = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return float(-(log_scores * one_hot(labels_BXYZ, logits_BCXYZ.shape[1])).sum(axis=1).mean())


def made_batch(num_classes: int, scale: float, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    shape = (3, 7, 6, 5)
    logits = scale * rng.standard_normal((3, num_classes, 7, 6, 5))
    labels = rng.integers(num_classes, size=shape)
    labels[0] = 0  # a patch without foreground
    return logits, labels


def tensors(logits: NDArray[np.float64], labels: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(logits).float(), torch.from_numpy(labels)[:, None].to(torch.uint8)


@pytest.mark.parametrize("num_classes", [2, 4])
@pytest.mark.parametrize("scale", [1.0, 80.0], ids=["random", "extreme"])
def test_dice_ce_is_its_formula(num_classes: int, scale: float) -> None:
    logits, labels = made_batch(num_classes, scale)
    loss = SegmentationLoss(load_recipe("spleen").objective)(*tensors(logits, labels))
    assert float(loss) == pytest.approx(dice_loss(logits, labels) + cross_entropy(logits, labels), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("scale", [1.0, 80.0], ids=["random", "extreme"])
def test_dice_alone_is_its_formula(scale: float) -> None:
    logits, labels = made_batch(2, scale)
    loss = SegmentationLoss(load_recipe("spleen:v1").objective)(*tensors(logits, labels))
    assert float(loss) == pytest.approx(dice_loss(logits, labels), abs=1e-5)


def test_loss_of_a_sure_and_right_answer_is_zero() -> None:
    _, labels = made_batch(2, 1.0)
    logits = 200 * (one_hot(labels, 2) - 0.5)
    assert float(SegmentationLoss(load_recipe("spleen").objective)(*tensors(logits, labels))) == pytest.approx(
        0, abs=1e-6
    )


@pytest.mark.parametrize(
    "option", ["objective.squared_pred=false", "objective.batch=false", "objective.include_background=false"]
)
def test_every_option_reaches_the_loss(option: str) -> None:
    pair = tensors(*made_batch(2, 1.0))
    plain, changed = (SegmentationLoss(load_recipe("spleen", o).objective)(*pair) for o in ([], [option]))
    assert abs(float(plain) - float(changed)) > 1e-3


OPTIONS = list(itertools.product((False, True), repeat=3))


@pytest.mark.parametrize("kind", ["dice", "dice_ce"])
@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("scale", [1.0, 80.0], ids=["random", "extreme"])
@pytest.mark.parametrize(("squared_pred", "batch", "include_background"), OPTIONS)
def test_value_and_gradient_are_those_of_monai(
    kind: str, num_classes: int, scale: float, squared_pred: bool, batch: bool, include_background: bool
) -> None:
    """MONAI's own loss in float64 is the judge: its float32 sums are less precise than ours."""
    options = {"squared_pred": squared_pred, "batch": batch, "include_background": include_background}
    recipe = load_recipe("spleen", [f"objective.{k}={str(v).lower()}" for k, v in options.items()])
    spec = (DiceSpec if kind == "dice" else DiceCESpec)(**{**dataclasses.asdict(recipe.objective), "kind": kind})
    judge = (DiceLoss if kind == "dice" else DiceCELoss)(to_onehot_y=True, softmax=True, **options)
    logits, labels = made_batch(num_classes, scale, seed=1)
    ours, theirs = (torch.from_numpy(logits).to(t).requires_grad_() for t in (torch.float32, torch.float64))
    label = torch.from_numpy(labels)[:, None]
    value, expected = SegmentationLoss(spec)(ours, label.to(torch.uint8)), judge(theirs, label)
    value.backward()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-5)
    np.testing.assert_allclose(
        ours.grad.numpy(), theirs.grad.numpy(), atol=1e-5 * theirs.grad.abs().max().item() + 1e-9
    )


def test_sums_over_large_patches_do_not_drift() -> None:
    """A whole step of the spleen recipe: in plain float32 the sums were off by 4e-4."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 2, 96, 96, 96, generator=generator)
    labels = (torch.rand(4, 1, 96, 96, 96, generator=generator) > 0.9).to(torch.uint8)
    judge = DiceCELoss(to_onehot_y=True, softmax=True, squared_pred=True, batch=True)
    expected = judge(logits.double(), labels).item()
    assert SegmentationLoss(load_recipe("spleen").objective)(logits, labels).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("num_classes", [2, 3])
@pytest.mark.parametrize("batch", [False, True])
def test_shares_of_a_batch_give_its_loss_and_its_gradient(num_classes: int, batch: bool) -> None:
    """Two processes with two patches and one: each sees the whole loss, their gradients are parts of its gradient."""
    spec = load_recipe("spleen", [f"objective.batch={str(batch).lower()}"]).objective
    logits, labels = tensors(*made_batch(num_classes, 1.0))
    loss_of, shares, sums = SegmentationLoss(spec), [slice(0, 2), slice(2, 3)], []
    whole = logits.clone().requires_grad_()
    expected = loss_of(whole, labels)
    expected.backward()
    for share in shares:
        loss_of(logits[share], labels[share], lambda own: sums.append(own) or own)
    for n, share in enumerate(shares):
        mine, rest = logits[share].clone().requires_grad_(), sums[1 - n]
        value = loss_of(mine, labels[share], lambda own, rest=rest: own + rest)
        value.backward()
        assert value.item() == pytest.approx(expected.item(), abs=1e-6)
        torch.testing.assert_close(mine.grad, whole.grad[share], rtol=1e-5, atol=1e-9)


def test_novograd_and_adam_have_default_betas_and_the_recipe_rate() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    novograd = build_optimizer(load_recipe("spleen").optimizer, [parameter])
    assert type(novograd).__name__ == "Novograd"
    assert novograd.defaults["betas"] == (0.9, 0.98)
    assert novograd.defaults["weight_decay"] == 0
    assert novograd.param_groups[0]["lr"] == 2e-3
    adam = build_optimizer(load_recipe("spleen:v1", ["optimizer.lr=5e-4"]).optimizer, [parameter])
    assert type(adam) is torch.optim.Adam
    assert adam.defaults["betas"] == (0.9, 0.999)
    assert adam.param_groups[0]["lr"] == 5e-4


def test_novograd_takes_the_step_of_its_paper() -> None:
    """Ginsburg et al. 2019: the second moment is one number for each layer, the squared norm of its gradient."""
    lr, (beta1, beta2), eps = 2e-3, (0.9, 0.98), 1e-8
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
    optimizer = build_optimizer(load_recipe("spleen").optimizer, [weight])
    expected, momentum, second = weight.detach().double().numpy().copy(), np.zeros(3), None
    for gradient in ([3.0, 0.0, 4.0], [-1.0, 2.0, 2.0]):
        g = np.array(gradient)
        second = (g**2).sum() if second is None else beta2 * second + (1 - beta2) * (g**2).sum()
        momentum = beta1 * momentum + g / (np.sqrt(second) + eps)
        expected -= lr * momentum
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-6)


GOLDEN_ADAM = [1.343168, 1.172566, 1.050120, 0.955566, 0.882070]
GOLDEN_NOVOGRAD = [1.343168, 1.328626, 1.302186, 1.266660, 1.225306]


@pytest.mark.parametrize(("optimizer", "golden"), [("adam", GOLDEN_ADAM), ("novograd", GOLDEN_NOVOGRAD)])
def test_golden_losses_of_five_steps(optimizer: str, golden: list[float]) -> None:
    """Losses of spleen:small's first five steps on one made batch: two bright balls in noise, weights from seed 0.

    The numbers are this code's own, written down once with torch 2.13 and MONAI 1.6 on a CPU (one thread or two, with
    or without oneDNN, they agree to 1e-6). They do not say what is right, but no change of the network, the loss, the
    optimizer or their defaults passes unseen.
    """
    recipe = load_recipe("spleen:small", [f"optimizer.kind={optimizer}", "optimizer.lr=2e-3"])
    assert five_losses(recipe, (24, 16, 16)) == pytest.approx(golden, rel=1e-4)


GOLDEN = {
    "spleen": [1.724787, 1.711975, 1.688778, 1.657641, 1.62038],
    "spleen:v1": [0.644737, 0.636774, 0.630697, 0.625578, 0.620941],
    "lung": [0.52213, 0.515313, 0.49875, 0.474068, 0.439659],
    "lung_soft_dice": [0.532327, 0.524762, 0.509121, 0.488835, 0.465859],
    "bone_lesion": [0.613114, 0.503423, 0.486129, 0.473935, 0.465556],
    "bone_lesion:mmar": [1.45982, 0.903084, 0.83153, 0.797164, 0.778793],
}


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_losses_of_every_card(name: str) -> None:
    """The same with each card's own network, loss and optimizer.

    Rounding errors grow from step to step, in AHNet to 0.6 % between one thread and two.
    """
    recipe = load_recipe(name)
    size = (64, 64, 32) if recipe.network.kind == "ahnet" else (32, 32, 32)  # its deepest layer needs some voxels
    losses = five_losses(recipe, size)
    assert losses[0] == pytest.approx(GOLDEN[name][0], rel=1e-4)
    assert losses == pytest.approx(GOLDEN[name], rel=2e-2)


def five_losses(recipe: Recipe, size: tuple[int, int, int]) -> list[float]:
    """Of the first five steps on one made batch: two bright balls in noise, weights from seed 0."""
    torch.manual_seed(0)
    network = network_for(recipe)
    step, loss_of = build_optimizer(recipe.optimizer, network.parameters()), SegmentationLoss(recipe.objective)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij"))
    labels = np.stack([((grid - c) ** 2).sum(axis=0) < 25 for c in (8, 10)])[:, None]
    noise = np.random.default_rng(0).uniform(0, 0.5, labels.shape)
    image, label = torch.from_numpy(noise + 0.4 * labels).float(), torch.from_numpy(labels.astype(np.uint8))
    losses = []
    for _ in range(5):
        loss = loss_of(network(image), label)
        step.zero_grad()
        loss.backward()
        step.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"kind": "constant"}, [1, 1, 1, 1, 1, 1, 1, 1]),
        ({"kind": "constant", "warmup_epochs": 2}, [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        ({"kind": "step", "step_epochs": 2, "gamma": 0.1}, [1, 1, 1, 1, 0.1, 0.1, 0.1, 0.1]),
        (
            {"kind": "step", "step_epochs": 1, "gamma": 0.5, "warmup_epochs": 1},
            [0.5, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125],
        ),
        ({"kind": "cosine"}, [(1 + math.cos(math.pi * n / 8)) / 2 for n in range(8)]),
        (
            {"kind": "cosine", "warmup_epochs": 2, "final_fraction": 0.2},
            [0.25, 0.5, 0.75, 1, *(0.2 + 0.4 * (1 + math.cos(math.pi * n / 4)) for n in range(4))],
        ),
    ],
    ids=lambda v: "-".join(map(str, v.values())) if isinstance(v, dict) else None,
)
def test_learning_rate_of_every_step(schedule: dict, expected: list[float]) -> None:
    """Four epochs of two steps."""
    spec = recipe_from_dict({**load_recipe("spleen").to_dict(), "schedule": schedule}, "test").schedule
    assert [learning_rate(spec, 3.0, n, 2, 4) / 3 for n in range(8)] == pytest.approx(expected)


@pytest.mark.parametrize(("warmup", "final"), [(0, 0.0), (0, 0.1)])
def test_cosine_is_that_of_pytorch(warmup: int, final: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    judge = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10, eta_min=2.0 * final)
    spec = CosineSpec(kind="cosine", warmup_epochs=warmup, final_fraction=final)
    for n in range(10):
        assert learning_rate(spec, 2.0, n, 1, 10) == pytest.approx(judge.get_last_lr()[0])
        optimizer.step()
        judge.step()


@pytest.mark.parametrize("batch", [False, True])
def test_one_score_is_dice_on_its_sigmoid(batch: bool) -> None:
    """As MONAI's DiceLoss with sigmoid, in value and gradient."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(3, 1, 9, 8, 7, generator=generator) > 0.7).to(torch.uint8)
    logits = [torch.randn(3, 1, 9, 8, 7, generator=generator, dtype=torch.float64).requires_grad_()]
    logits.append(logits[0].detach().float().requires_grad_())
    stock = DiceLoss(sigmoid=True, squared_pred=True, batch=batch)(logits[0], labels.double())
    spec = DiceSpec(kind="dice", squared_pred=True, batch=batch, include_background=False)
    ours = SegmentationLoss(spec)(logits[1], labels)
    stock.backward()
    ours.backward()
    torch.testing.assert_close(ours.double(), stock, rtol=0, atol=1e-6)
    torch.testing.assert_close(logits[1].grad.double(), logits[0].grad, rtol=0, atol=1e-7)
