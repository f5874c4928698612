"""Whether two runs of one training give the same bits, and what stands in the way."""

from __future__ import annotations

import os

import torch

from ctseg.recipe import Recipe
from ctseg.specs import AHNetSpec, SegResNetSpec


def set_determinism(recipe: Recipe, device: torch.device) -> str:
    """Chooses between a GPU's fastest and its deterministic kernels; returns what stays undeterministic, or "".

    A CPU's kernels are deterministic for a fixed number of threads.
    """
    if device.type != "cuda":
        return ""
    deterministic = recipe.training.deterministic
    torch.backends.cudnn.benchmark = not deterministic
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    return undeterministic_parts(recipe) if deterministic else ""


def undeterministic_parts(recipe: Recipe) -> str:
    """What PyTorch has no deterministic kernel for on CUDA in this recipe's network, and the way out; or ""."""
    network = recipe.network
    if isinstance(network, AHNetSpec) and network.upsample_mode == "trilinear":
        return (
            "training.deterministic: the gradient of trilinear upsampling is not deterministic on CUDA, so two runs "
            "may differ in rounding; network.upsample_mode=transpose is"
        )
    if isinstance(network, SegResNetSpec):
        return (
            "training.deterministic: the gradient of SegResNet's trilinear upsampling is not deterministic on CUDA, "
            "so two runs may differ in rounding"
        )
    return ""
