"""The losses against their formulas in NumPy, the optimizers' settings, and five golden steps of training."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ctseg.networks import network_for
from ctseg.objectives import build_loss, build_optimizer
from ctseg.recipe import load_recipe

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
    loss = build_loss(load_recipe("spleen").objective)(*tensors(logits, labels))
    assert float(loss) == pytest.approx(dice_loss(logits, labels) + cross_entropy(logits, labels), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("scale", [1.0, 80.0], ids=["random", "extreme"])
def test_dice_alone_is_its_formula(scale: float) -> None:
    logits, labels = made_batch(2, scale)
    loss = build_loss(load_recipe("spleen:v1").objective)(*tensors(logits, labels))
    assert float(loss) == pytest.approx(dice_loss(logits, labels), abs=1e-5)


def test_loss_of_a_sure_and_right_answer_is_zero() -> None:
    _, labels = made_batch(2, 1.0)
    logits = 200 * (one_hot(labels, 2) - 0.5)
    assert float(build_loss(load_recipe("spleen").objective)(*tensors(logits, labels))) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "option", ["objective.squared_pred=false", "objective.batch=false", "objective.include_background=false"]
)
def test_every_option_reaches_the_loss(option: str) -> None:
    pair = tensors(*made_batch(2, 1.0))
    plain, changed = (build_loss(load_recipe("spleen", o).objective)(*pair) for o in ([], [option]))
    assert abs(float(plain) - float(changed)) > 1e-3


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
    torch.manual_seed(0)
    network = network_for(recipe)
    step, loss_of = build_optimizer(recipe.optimizer, network.parameters()), build_loss(recipe.objective)
    grid = np.stack(np.meshgrid(*[np.arange(n) for n in (24, 16, 16)], indexing="ij"))
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
    assert losses == pytest.approx(golden, rel=1e-4)
