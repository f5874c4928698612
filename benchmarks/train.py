"""`ctseg` against MONAI's stock training: the patches alone, and the whole step, each in a fresh process.

    python benchmarks/train.py [--recipe spleen] [--cases 4] [--repetitions 5] [--device cpu] [--patches 8]
    python benchmarks/train.py --agreement 5      # float32 against bfloat16: the same training from several seeds

Data pipeline, one thread: the recipe's random patches with their augmentation, from cases of 512 x 512 made CT that
were prepared before. "stock" is CacheDataset with RandCropByPosNegLabeld in a ThreadDataLoader, as MONAI's bundles have
it; "stock, indices" keeps the indices of foreground and background in the cache; "stock, N workers" is a DataLoader
with N processes; "no cache" is a plain Dataset and DataLoader, which prepares a case each time it is drawn.

Whole step: patches, forward, loss, backward, optimizer, on all CPUs or the GPU. Printed: medians with their spread,
peak memory of all processes together, seconds until the first batch or step, ratios pair by pair.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from timing import Run, in_turn, machine, ratios, spread

BATCHES, STEPS = 40, 3
PIPELINES = ("stock", "stock, indices", "stock, 2 workers", "stock, 4 workers", "no cache", "ours")
SHORT = ("training.epochs=12", "schedule.step_epochs=9")
STEP_KINDS = ("stock, float32", "ours, float32", "ours, bfloat16")
Batch = tuple[Any, Any]


class Memory:
    """The most that this process and its children held at once, without what they share, in MB."""

    def __init__(self) -> None:
        self.peak_mb = 0.0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        import psutil

        process = psutil.Process()
        while not self._done.wait(0.2):
            try:
                family = [process, *process.children(recursive=True)]
                self.peak_mb = max(self.peak_mb, sum(p.memory_full_info().pss for p in family) / 2**20)
            except psutil.Error:  # a child has just ended
                continue

    def stop(self) -> float:
        """Ends the watching and returns the peak."""
        self._done.set()
        self._thread.join()
        return self.peak_mb


def stock_batches(options: argparse.Namespace, kind: str) -> Iterator[Batch]:
    """MONAI's patches, `--patches` at a time, without end."""
    import monai.transforms as mt
    from monai.data.dataloader import DataLoader
    from monai.data.dataset import CacheDataset, Dataset
    from monai.data.thread_buffer import ThreadDataLoader

    from ctseg.manifest import read_manifest

    spec = options.spec
    keys, both = ["image", "label"], {"keys": ["image", "label"]}
    low, high = spec.preprocess.hu_window
    fixed: list[Any] = [
        mt.LoadImaged(**both),
        mt.EnsureChannelFirstd(**both),
        mt.Orientationd(**both, axcodes="RAS"),
        mt.Spacingd(**both, pixdim=spec.preprocess.spacing_mm, mode=("bilinear", "nearest")),
        mt.ScaleIntensityRanged("image", low, high, 0.0, 1.0, clip=True),
        mt.CropForegroundd(**both, source_key="image"),
        mt.SpatialPadd(**both, spatial_size=spec.sampling.patch_size),
        mt.EnsureTyped(keys),
    ]
    where: dict[str, Any] = {"image_key": "image", "image_threshold": 0}
    if kind == "stock, indices":
        fixed.append(mt.FgBgToIndicesd("label", image_key="image"))
        where = {"fg_indices_key": "label_fg_indices", "bg_indices_key": "label_bg_indices"}
    augment, positive = spec.augmentation, spec.sampling.positive_fraction
    crop = mt.RandCropByPosNegLabeld(
        **both,
        label_key="label",
        spatial_size=spec.sampling.patch_size,
        pos=positive,
        neg=1 - positive,
        num_samples=spec.sampling.patches_per_case,
        **where,
    )
    turns = [mt.RandFlipd(**both, prob=augment.flip_probability, spatial_axis=axis) for axis in range(3)]
    turns.append(mt.RandRotate90d(**both, prob=augment.rotate90_probability))
    turns = turns if augment.flip_probability or augment.rotate90_probability else []
    random = [crop, *turns, mt.RandShiftIntensityd("image", augment.shift_offset, prob=augment.shift_probability)]
    files = [{"image": str(c.image), "label": str(c.label)} for c in read_manifest(options.manifest).split("training")]
    every = mt.Compose([*fixed, *random])
    cached = None if kind == "no cache" else CacheDataset(files, every, num_workers=1, progress=False)
    data = Dataset(files, every) if cached is None else cached
    batch_cases = max(1, options.patches // spec.sampling.patches_per_case)
    if "workers" in kind:
        workers = int(kind.split()[1])
        loader: Any = DataLoader(data, batch_size=batch_cases, num_workers=workers, persistent_workers=True)
    elif kind == "no cache":
        loader = DataLoader(data, batch_size=batch_cases)
    else:
        loader = ThreadDataLoader(data, batch_size=batch_cases, num_workers=0)
    while True:
        for batch in loader:
            yield batch["image"].as_tensor(), batch["label"].as_tensor()


def ctseg_batches(options: argparse.Namespace) -> Iterator[Batch]:
    """ctseg's patches, `--patches` at a time, without end."""
    import torch

    from ctseg.sampling import cut_batch, draw_step, epoch_batches

    spec, cases = options.spec, _open_bank(options)
    batch_cases, epoch = max(1, options.patches // spec.sampling.patches_per_case), 0
    while True:
        for step, batch in enumerate(epoch_batches([1.0] * len(cases), batch_cases, 0, epoch)):
            draws = draw_step(cases, batch, spec.sampling, spec.augmentation, 0, (epoch, step))
            yield cut_batch(cases, draws, spec.sampling, torch.device(options.device))
        epoch += 1


def _open_bank(options: argparse.Namespace) -> Any:
    """The prepared cases; those that are missing are prepared."""
    import torch

    from ctseg.engine.bank import bank_folder, open_bank, prepare_bank
    from ctseg.manifest import read_manifest
    from ctseg.progress import Silent

    cases = read_manifest(options.manifest).split("training")
    prepare_bank(cases, options.spec, options.bank, Silent())
    return open_bank(cases, bank_folder(options.bank, options.spec), torch.device(options.device))


def time_pipeline(options: argparse.Namespace, kind: str) -> dict[str, float]:
    """Milliseconds for each patch of a warm pipeline, with one thread."""
    import torch

    from ctseg.engine.process import tune_allocator

    torch.set_num_threads(1)
    memory, started = Memory(), time.perf_counter()
    if kind == "ours":
        tune_allocator()  # as every ctseg command does
    batches = ctseg_batches(options) if kind == "ours" else stock_batches(options, kind)
    next(batches)
    first_seconds = time.perf_counter() - started
    for _ in range(3):
        next(batches)
    number = BATCHES // 10 if kind == "no cache" else BATCHES
    started, patches = time.perf_counter(), 0
    for _ in range(number):
        patches += len(next(batches)[0])
    seconds = time.perf_counter() - started
    return {"ms": 1e3 * seconds / patches, "first_seconds": first_seconds, "memory_mb": memory.stop()}


def time_steps(options: argparse.Namespace, kind: str) -> dict[str, float]:
    """Milliseconds for each patch of a whole optimisation step."""
    import torch

    memory, started = Memory(), time.perf_counter()
    step = _stock_step(options) if kind.startswith("stock") else _ctseg_step(options, kind.split()[1])
    step()
    first_seconds = time.perf_counter() - started
    started, patches = time.perf_counter(), 0
    for _ in range(STEPS):
        patches += step()
    if options.device != "cpu":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    peak = memory.stop() if options.device == "cpu" else torch.cuda.max_memory_reserved() / 2**20
    return {"ms": 1e3 * seconds / patches, "first_seconds": first_seconds, "memory_mb": peak}


def _stock_step(options: argparse.Namespace) -> Callable[[], int]:
    """MONAI's network, loss and optimizer as its trainers call them: float32 on a CPU, AMP on a GPU."""
    import torch
    from monai.losses.dice import DiceCELoss, DiceLoss

    from ctseg.networks import network_for
    from ctseg.objectives import build_optimizer

    spec, device = options.spec, torch.device(options.device)
    network = network_for(spec).to(device).train()
    loss_class = DiceCELoss if spec.objective.kind == "dice_ce" else DiceLoss
    flags = {k: getattr(spec.objective, k) for k in ("squared_pred", "batch", "include_background")}
    loss_of = loss_class(to_onehot_y=True, softmax=True, **flags)
    optimizer = build_optimizer(spec.optimizer, network.parameters())
    scaler, batches = torch.amp.GradScaler(device.type, enabled=device.type == "cuda"), stock_batches(options, "stock")

    def step() -> int:
        image, label = (part.to(device) for part in next(batches))
        optimizer.zero_grad()
        with torch.autocast(device.type, enabled=device.type == "cuda"):
            loss = loss_of(network(image), label)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        loss.item()  # as its handlers do at every step
        return len(image)

    return step


def _ctseg_step(options: argparse.Namespace, precision: str) -> Callable[[], int]:
    """The step of `ctseg train`."""
    from ctseg.engine.runtime import start_runtime
    from ctseg.engine.step import Stepper
    from ctseg.engine.trainer import Trainer

    spec = options.spec
    runtime = start_runtime(
        options.device, "float16" if options.device != "cpu" and precision != "float32" else precision
    )
    trainer = Trainer.fresh(spec, runtime)
    cases = _open_bank(options)
    stepper = Stepper(trainer, cases)
    stepper.begin_epoch()
    batch_cases = max(1, options.patches // spec.sampling.patches_per_case)

    def step() -> int:
        batch = [(trainer.step * batch_cases + n) % len(cases) for n in range(batch_cases)]
        stepper.step(batch, 1000)
        trainer.step += 1
        return int(len(batch) * spec.sampling.patches_per_case)

    return step


def print_table(title: str, results: dict[str, list[Run]], against: str) -> None:
    """A line for each kind; the ratio says how many times as long as `against` it takes."""
    print(f"\n{title}")
    print(f"{'':18}{'ms a patch':>28}{'first after, s':>26}{'peak memory, MB':>24}   ratio")
    for name, runs in results.items():
        values = [[r.printed[key] for r in runs] for key in ("ms", "first_seconds", "memory_mb")]
        ratio = statistics.median(ratios(values[0], [r.printed["ms"] for r in results[against]]))
        shown = (spread(values[0], 2), spread(values[1], 1), spread(values[2], 0))
        print(f"{name:18}{shown[0]:>28}{shown[1]:>26}{shown[2]:>24}   {ratio:.2f}x")


def agreement(seeds: int, folder: Path) -> None:
    """Trains spleen:small for 12 epochs in float32 and bfloat16 from several seeds; prints last losses and Dice."""
    from functools import partial

    from ctseg.engine.runtime import start_runtime
    from ctseg.engine.train import train
    from ctseg.progress import Silent
    from ctseg.recipe import load_recipe
    from ctseg.sources.catalogue import find_data

    print(f"{'seed':>6}{'precision':>12}{'last loss':>12}{'best validation Dice':>24}")
    found: dict[str, list[tuple[float, float]]] = {"float32": [], "bfloat16": []}
    for seed in range(seeds):
        for precision, values in found.items():
            recipe = load_recipe("spleen:small", [f"training.seed={seed}", *SHORT])
            run = folder / f"{precision}-{seed}"
            find = partial(find_data, recipe.data.manifest, folder / "data")
            result = train(recipe, run, find, start_runtime("cpu", precision), Silent(), folder / "bank")
            values.append((result.loss, result.best_mean_dice or 0.0))
            print(f"{seed:>6}{precision:>12}{values[-1][0]:>12.4f}{values[-1][1]:>24.4f}", flush=True)
    for n, name in enumerate(("last loss", "Dice")):
        one, other = ([v[n] for v in found[p]] for p in ("float32", "bfloat16"))
        difference, noise = statistics.mean(other) - statistics.mean(one), statistics.stdev(one)
        print(f"{name}: bfloat16 - float32 = {difference:+.4f}; standard deviation over seeds in float32 {noise:.4f}")


def main() -> None:
    """Parses the command line; a worker prints its figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="spleen")
    parser.add_argument("--cases", type=int, default=4)
    parser.add_argument("--patches", type=int, default=8, help="in a batch or a step")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", choices=("pipeline", "step"))
    parser.add_argument("--agreement", type=int, metavar="SEEDS")
    parser.add_argument("--manifest", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--bank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        from ctseg.recipe import load_recipe

        options.spec = load_recipe(options.recipe)
        measure = time_pipeline if options.worker[0] == "pipeline" else time_steps
        print(json.dumps(measure(options, options.worker[1])))
        return
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.agreement:
            agreement(options.agreement, folder)
        else:
            compare(options, folder)


def compare(options: argparse.Namespace, folder: Path) -> None:
    """Makes the cases and measures every kind in turn."""
    manifest = _made_cases(folder / "data", options.cases)
    for what, kinds in (("pipeline", PIPELINES), ("step", STEP_KINDS)):
        if options.only not in (None, what):
            continue
        common = ["--recipe", options.recipe, "--patches", str(options.patches), "--device", options.device]
        common += ["--manifest", str(manifest), "--bank", str(folder / "bank")]
        commands = {kind: [sys.executable, __file__, *common, "--worker", what, kind] for kind in kinds}
        title = "data pipeline, one thread" if what == "pipeline" else f"whole step on {options.device}"
        against = "ours" if what == "pipeline" else "ours, bfloat16"
        results = in_turn(commands, options.repetitions)
        print_table(f"{options.recipe}: {title}, batches of {options.patches} patches", results, against)


def _made_cases(folder: Path, number: int) -> Path:
    import nibabel

    from ctseg.io.images import write_labels
    from ctseg.sources.phantom import ADULT, centered_grid, make_phantom

    folder.mkdir(parents=True)
    entries = []
    for index in range(number):
        grid = centered_grid((512, 512, 120), (0.75, 0.75, 2.5))
        phantom = make_phantom(0, index, size=ADULT, grid=grid)
        image, label = folder / f"ct_{index}.nii.gz", folder / f"label_{index}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(phantom.image.array, grid.affine_ras), image)
        write_labels(label, phantom.labels().array, grid)
        entries.append({"image": image.name, "label": label.name})
    path = folder / "manifest.json"
    path.write_text(json.dumps({"name": "made", "training": entries}))
    return path


if __name__ == "__main__":
    main()
