"""How much memory a training takes, and how many patches at once fit into what it may have."""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Callable

import torch

from ctseg.engine.runtime import Runtime, lacks_memory
from ctseg.engine.trainer import Trainer
from ctseg.errors import DeviceError, NotEnoughMemory
from ctseg.objectives import SegmentationLoss
from ctseg.progress import Progress
from ctseg.recipe import Recipe


def limit_gpu(runtime: Runtime, max_bytes: int) -> None:
    """Limits what this process may take of its GPU; raises DeviceError on a CPU."""
    if runtime.device.type != "cuda":
        raise DeviceError("--max-gpu-memory: training runs on the CPU; leave it out or choose --device cuda")
    total = int(torch.cuda.get_device_properties(runtime.device).total_memory)
    torch.cuda.set_per_process_memory_fraction(min(max_bytes / total, 1.0), runtime.device)


def fit_into_memory(trainer: Trainer, max_bytes: int, progress: Progress) -> int:
    """How many patches at once fit into `max_bytes` of the GPU, which `limit_gpu` has set; tried out in real steps.

    A resumed training keeps its number: another one would change its result.

    Raises:
        NotEnoughMemory: if not even one patch fits.
    """
    recipe, runtime = trainer.recipe, trainer.runtime
    step = math.ceil(recipe.training.batch_cases * recipe.sampling.patches_per_case / runtime.world_size)
    most = min(trainer.patches_per_pass or step, step)
    if trainer.epoch or trainer.step:
        return int(most)
    alone = dataclasses.replace(runtime, rank=0, world_size=1)
    found: int = min(runtime.gather(largest_that_fits(most, lambda patches: _fits(recipe, alone, patches))))
    torch.cuda.reset_peak_memory_stats(runtime.device)
    if found == 0:
        raise NotEnoughMemory(
            f"training {recipe.name}: one patch of {'x'.join(map(str, recipe.sampling.patch_size))} does not fit into "
            f"{max_bytes / 1e9:.1f} GB on {runtime.device}; allow more, or lower sampling.patch_size"
        )
    if found < step:
        progress.note(f"{found} of {step} patches at once fit into {max_bytes / 1e9:.1f} GB: gradients are accumulated")
    return found


def largest_that_fits(most: int, fits: Callable[[int], bool]) -> int:
    """The first of `most`, its half, a quarter, ... that fits; 0 if not even 1 does."""
    while most and not fits(most):
        most //= 2
        gc.collect()  # a network that did not fit may be a cycle
        torch.cuda.empty_cache()
    torch.cuda.empty_cache()
    return most


def _fits(recipe: Recipe, runtime: Runtime, patches: int) -> bool:
    """Whether a training step of so many patches stays within the limit; leaves nothing behind."""
    try:
        trainer = Trainer.fresh(recipe, runtime)
        for _ in range(2):  # the second has the optimizer's state in memory from the start
            image = torch.rand(patches, recipe.input_channels, *recipe.sampling.patch_size, device=runtime.device)
            label = torch.zeros((patches, 1, *recipe.sampling.patch_size), dtype=torch.uint8, device=runtime.device)
            with runtime.autocast():
                scores = trainer.network(image.contiguous(memory_format=torch.channels_last_3d))
            trainer.scaler.scale(SegmentationLoss(recipe.objective)(scores, label)).backward()  # type: ignore[no-untyped-call]
            trainer.scaler.step(trainer.optimizer)
            trainer.scaler.update()
    except RuntimeError as error:
        if not lacks_memory(error):
            raise
        return False
    return True
