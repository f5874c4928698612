"""From components of another pipeline to the numbers of a recipe, each with the place it came from.

What a recipe cannot say is never guessed: it is listed with its place and the reason. Steps that ctseg does by itself
(loading, batching, logging, checkpoints, turning scores back to the CT's grid) are neither.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from ctseg.foreign.configs import Component, Config, Expression
from ctseg.foreign.draft import Draft, Left
from ctseg.foreign.parts import DETERMINISTIC, ENGINE, LOSSES, NETWORKS, OPTIMIZERS, RANDOM, SCHEDULES

OLD_NAMES = {"Unet": "UNet", "unet": "UNet", "AHnet": "AHNet", "SegResnet": "SegResNet", "BasicUnet": "BasicUNet"}
"""Spellings of MONAI before 1.0."""
NETWORK_KEYS = ("model", "network_def", "network", "net")
BUILT_IN = {
    "LoadImaged", "EnsureChannelFirstd", "AddChanneld", "AsChannelFirstd", "ToTensord", "EnsureTyped", "ToDeviced",
    "CastToTyped", "CopyItemsd", "SelectItemsd", "FgBgToIndicesd", "Activationsd", "AsDiscreted", "Invertd",
    "SaveImaged", "Compose", "Dataset", "CacheDataset", "PersistentDataset", "SmartCacheDataset", "DataLoader",
    "ThreadDataLoader", "SimpleInferer", "SlidingWindowInferer", "StatsHandler", "TensorBoardStatsHandler",
    "CheckpointSaver", "CheckpointLoader", "LrScheduleHandler", "ValidationHandler", "MetricsSaver",
    "SegmentationSaver", "TransformInverter", "MeanDice", "Accuracy", "SupervisedTrainer", "SupervisedEvaluator",
    "Inferer",
}  # fmt: skip
"""What ctseg does by itself, or what only says how the original did it."""
FIRST = ("RandCropByPosNegLabeld", "SupervisedTrainer", "Adam", "Novograd")
"""Others are compared with their values."""


def translate(training: Config | None, others: Iterable[Config], draft: Draft | None = None) -> Draft:
    """What a recipe can say of these configurations.

    Args:
        training: The one that trains, if there is one.
        others: Those that predict, the most telling first; they fill what the first leaves open.
        draft: Values that go before all of them.
    """
    draft = Draft() if draft is None else draft
    configs = [*([training] if training else []), *others]
    _network(draft, configs)
    if training is not None:
        _scalars(draft, training)
    for config in configs:
        for component in sorted(config.components, key=lambda c: c.name not in FIRST):
            if config is not training or component.path.startswith("validate"):
                _when_predicting(draft, component, config is training)
            else:
                _when_training(draft, component)
    if training is not None:  # only where no other configuration says how to predict
        for component in training.components:
            if component.name == "SlidingWindowInferer" and "inference.window_size" not in draft.values:
                _window(draft, component)
    _defaults(draft)
    _list_unknown(draft, configs)
    if not any(c.name == "Orientationd" for config in configs for c in config.components):
        draft.notes.append("no Orientationd: the network saw each file's own axis order, here it will see RAS")
    return draft


def _scalars(draft: Draft, training: Config) -> None:
    file, values = training.file, training.values
    for key, names in (
        ("training.epochs", ("epochs", "max_epochs")),
        ("training.amp", ("amp",)),
        ("training.seed", ("determinism.random_seed", "initialize")),
    ):
        for name in names:
            if isinstance(values.get(name), int | Expression):
                draft.put(key, values[name], f"{file} {name}")
    if values.get("multi_gpu") is True:
        draft.left.append(Left(f"{file} multi_gpu", "true", "not of the recipe; train with --gpus N"))


def _network(draft: Draft, configs: list[Config]) -> None:
    for config in configs:
        for component in config.components:
            name = OLD_NAMES.get(component.name, component.name)
            if re.split(r"[.\[]", component.path)[-1].rstrip("]") not in NETWORK_KEYS and name not in NETWORKS:
                continue
            if component.is_own_code or name not in NETWORKS:
                known = ", ".join(NETWORKS)
                draft.leave(component, f"network '{component.name}' is not one that a recipe knows ({known})")
                continue
            if "network.kind" not in draft.values:
                NETWORKS[name](draft, replace(component, name=name))
            draft.used.add(component.where)


def _when_training(draft: Draft, component: Component) -> None:
    if component.is_own_code:
        return
    last = re.split(r"[.\[]", component.path)[-1]
    for keys, table in (
        (("loss", "loss_function"), LOSSES),
        (("optimizer",), OPTIMIZERS),
        (("lr_scheduler", "scheduler"), SCHEDULES),
    ):
        if last in keys and component.name not in table:
            known = ", ".join(table)
            draft.leave(component, f"a recipe knows {known}; choose one with --set")
            return
    translators = {**LOSSES, **OPTIMIZERS, **SCHEDULES, **DETERMINISTIC, **RANDOM, **ENGINE}
    if component.name in translators:
        draft.used.add(component.where)
        translators[component.name](draft, component)


def _when_predicting(draft: Draft, component: Component, in_training: bool) -> None:
    if component.is_own_code:
        return
    if component.name in DETERMINISTIC:
        draft.used.add(component.where)
        DETERMINISTIC[component.name](draft, component)
    if component.name == "SlidingWindowInferer":
        if in_training:
            draft.take("training.validation_overlap", component, "overlap", 0.25)
        else:
            _window(draft, component)


def _window(draft: Draft, component: Component) -> None:
    draft.take("inference.window_size", component, "roi_size")
    draft.take("inference.overlap", component, "overlap", 0.25)
    draft.take("inference.batch_windows", component, "sw_batch_size", 1)
    draft.need(component, "mode", "constant")
    draft.need(component, "padding_mode", "constant")


def _defaults(draft: Draft) -> None:
    """What a configuration may leave out without being another one."""
    if "inference.overlap" in draft.values:
        draft.put_default("training.validation_overlap", draft.values["inference.overlap"], "as in inference")
    for key, value, reason in (
        ("preprocess.crop_foreground", False, "no CropForegroundd"),
        ("augmentation.shift_offset", 0.0, "no RandShiftIntensityd"),
        ("augmentation.shift_probability", 0.0, "no RandShiftIntensityd"),
        ("schedule.kind", "constant", "no lr_scheduler"),
        ("training.validation_interval_epochs", 1, "no ValidationHandler"),
        ("training.seed", 0, "none given"),
        ("training.amp", False, "none given"),
    ):
        draft.put_default(key, value, reason)
    _flips(draft)


def _flips(draft: Draft) -> None:
    """One probability for all three axes, each turned by itself, or none."""
    flips = {key: draft.values.pop(key) for key in list(draft.values) if key.startswith("flip.")}
    sources = {key: draft.sources.pop(key) for key in flips}
    if len(flips) == 3 and len(set(flips.values())) == 1:
        draft.put(
            "augmentation.flip_probability",
            next(iter(flips.values())),
            f"{next(iter(sources.values()))} and the next two axes",
        )
        return
    reason = "a recipe flips along all three axes with one probability, or not at all"
    draft.left.extend(Left(sources[key], f"RandFlipd {key[5:]} prob={value}", reason) for key, value in flips.items())


def _list_unknown(draft: Draft, configs: list[Config]) -> None:
    for config in configs:
        for component in config.components:
            if component.where in draft.used:
                continue
            if component.is_own_code:
                draft.leave(component, f"own code of the pipeline ({component.module}), which is never run")
            elif component.name not in BUILT_IN:
                draft.leave(component, "a recipe has nothing of the kind")
