"""Each class of MONAI that a recipe can express, and how its arguments become the recipe's numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from ctseg.foreign.configs import Component
from ctseg.foreign.draft import Draft, Left, has_expression, told


def _unet(draft: Draft, component: Component) -> None:
    if not _is_plain_network(draft, component, {"act": ("prelu", "PRELU"), "dropout": (0, 0.0, None), "bias": (True,)}):
        return
    norm = component.args.get("norm", "instance")
    if isinstance(norm, list) and len(norm) == 2 and norm[1] in ({}, None):
        norm = norm[0]
    draft.put("network.kind", "unet", component.where)
    draft.take("network.channels", component, "channels")
    draft.take("network.strides", component, "strides")
    draft.take("network.num_res_units", component, "num_res_units", 0)
    draft.put("network.norm", norm.lower() if isinstance(norm, str) else norm, component.where_of("norm"))


def _ahnet(draft: Draft, component: Component) -> None:
    if not _is_plain_network(draft, component, {}):
        return
    draft.put("network.kind", "ahnet", component.where)
    draft.take("network.layers", component, "layers", [3, 4, 6, 3])
    draft.take("network.psp_block_num", component, "psp_block_num", 4)
    draft.take("network.upsample_mode", component, "upsample_mode", "transpose")


def _segresnet(draft: Draft, component: Component) -> None:
    expected = {
        "norm_name": ("group", "GROUP", ""),
        "num_groups": (8,),
        "norm": (["GROUP", {"num_groups": 8}], ["group", {"num_groups": 8}]),
        "use_conv_final": (True,),
        "upsample_mode": ("nontrainable",),
        "act": ("relu", "RELU", ["RELU", {"inplace": True}], ["relu", {"inplace": True}]),
    }
    if not _is_plain_network(draft, component, expected):
        return
    draft.put("network.kind", "segresnet", component.where)
    draft.take("network.init_filters", component, "init_filters", 8)
    draft.take("network.blocks_down", component, "blocks_down", [1, 2, 2, 4])
    draft.take("network.blocks_up", component, "blocks_up", [1, 1, 1])
    draft.take("network.dropout_prob", component, "dropout_prob")


def _is_plain_network(draft: Draft, component: Component, expected: dict[str, tuple[Any, ...]]) -> bool:
    """True if a recipe can say all of it; else the reasons are listed, and a gap is left for the reader to refuse."""
    classes = component.args.get("out_channels")
    draft.num_classes = classes if isinstance(classes, int) else draft.num_classes
    if has_expression(classes):
        draft.leave_expression(classes, component.where_of("out_channels"), "labels")
    before = len(draft.left)
    for argument, allowed in {"spatial_dims": (3,), "dimensions": (3,), "in_channels": (1,), **expected}.items():
        draft.need(component, argument, *allowed)
    known = {*expected, "spatial_dims", "dimensions", "in_channels", "out_channels", *NETWORK_ARGUMENTS[component.name]}
    for argument in component.args.keys() - known:
        value = told(component.args[argument])
        draft.left.append(Left(component.where_of(argument), f"{argument}={value}", "a recipe's network has it not"))
    return len(draft.left) == before


NETWORK_ARGUMENTS = {
    "UNet": ("channels", "strides", "num_res_units", "norm"),
    "AHNet": ("layers", "psp_block_num", "upsample_mode"),
    "SegResNet": ("init_filters", "blocks_down", "blocks_up", "dropout_prob"),
}
Translator = Callable[[Draft, Component], None]
NETWORKS: dict[str, Translator] = {"UNet": _unet, "AHNet": _ahnet, "SegResNet": _segresnet}


def _loss(kind: str) -> Translator:
    def translate_loss(draft: Draft, component: Component) -> None:
        if component.args.get("softmax") is not True or component.args.get("to_onehot_y") is not True:
            draft.leave(component, "a recipe's loss is on softmax scores (softmax and to_onehot_y true)")
            return
        draft.put("objective.kind", kind, component.where)
        draft.take("objective.squared_pred", component, "squared_pred", False)
        draft.take("objective.batch", component, "batch", False)
        draft.take("objective.include_background", component, "include_background", True)
        known = {"softmax", "to_onehot_y", "squared_pred", "batch", "include_background"}
        same: dict[str, tuple[Any, ...]] = {
            "sigmoid": (False,),
            "jaccard": (False,),
            "reduction": ("mean",),
            "lambda_dice": (1, 1.0),
            "lambda_ce": (1, 1.0),
            "smooth_nr": (1e-5,),
            "smooth_dr": (1e-5,),
        }
        for argument in component.args.keys() - known:
            draft.need(component, argument, *same.get(argument, (None,)))

    return translate_loss


def _optimizer(kind: str) -> Translator:
    def translate_optimizer(draft: Draft, component: Component) -> None:
        draft.put("optimizer.kind", kind, component.where)
        draft.take("optimizer.lr", component, "lr", 0.001)
        same: dict[str, tuple[Any, ...]] = {
            "betas": ([0.9, 0.999],) if kind == "adam" else ([0.9, 0.98],),
            "eps": (1e-8,),
            "weight_decay": (0, 0.0),
            "amsgrad": (False,),
            "grad_averaging": (False,),
        }
        for argument in component.args.keys() - {"lr", "params"}:
            draft.need(component, argument, *same.get(argument, (None,)))

    return translate_optimizer


def _step_lr(draft: Draft, component: Component) -> None:
    draft.put("schedule.kind", "step", component.where)
    draft.take("schedule.step_epochs", component, "step_size")
    draft.take("schedule.gamma", component, "gamma", 0.1)


def _cosine(draft: Draft, component: Component) -> None:
    draft.put("schedule.kind", "cosine", component.where)
    lr, last, length = draft.values.get("optimizer.lr"), component.args.get("eta_min", 0), component.args.get("T_max")
    if isinstance(lr, int | float) and isinstance(last, int | float) and lr > 0 <= last:
        last = _ratio(last, lr)
    draft.put("schedule.final_fraction", last, component.where_of("eta_min"))
    draft.need(component, "T_max", draft.values.get("training.epochs", length))


LOSSES: dict[str, Translator] = {"DiceLoss": _loss("dice"), "DiceCELoss": _loss("dice_ce")}
OPTIMIZERS: dict[str, Translator] = {"Adam": _optimizer("adam"), "Novograd": _optimizer("novograd")}
SCHEDULES: dict[str, Translator] = {"StepLR": _step_lr, "CosineAnnealingLR": _cosine}


def _orientation(draft: Draft, component: Component) -> None:
    draft.need(component, "axcodes", "RAS")


def _spacing(draft: Draft, component: Component) -> None:
    if "image" in _keys(component):
        draft.take("preprocess.spacing_mm", component, "pixdim")
    mode = component.args.get("mode")
    modes = dict(zip(_keys(component), mode, strict=False)) if isinstance(mode, list) else {"image": mode}
    for key, wanted in (("image", "bilinear"), ("label", "nearest")):
        if modes.get(key) not in (None, wanted):
            name = f"Spacingd mode of {key} = {told(modes[key])}"
            draft.left.append(Left(component.where_of("mode"), name, f"ctseg has only {wanted}"))


def _window_of_intensity(draft: Draft, component: Component) -> None:
    limits = [component.args.get("a_min"), component.args.get("a_max")]
    low, high = component.args.get("b_min"), component.args.get("b_max")
    if [low, high] != [0, 1]:
        draft.leave(component, f"a recipe maps its window to 0..1, this one to {told(low)}..{told(high)}")
        return
    if component.args.get("clip") is not True:
        draft.left.append(Left(component.where_of("clip"), "ScaleIntensityRanged clip=false", "ctseg clips to 0..1"))
    if None not in limits:
        draft.put("preprocess.hu_window", limits, component.where_of("a_min, a_max"))


def _crop_foreground(draft: Draft, component: Component) -> None:
    draft.put("preprocess.crop_foreground", True, component.where)
    draft.need(component, "source_key", "image")
    draft.need(component, "margin", 0)
    draft.need(component, "select_fn", None)


def _pad(draft: Draft, component: Component) -> None:
    """Patches beyond an image's border are padded with 0, which is what the minimum is after windowing."""
    size, patch = component.args.get("spatial_size"), draft.values.get("sampling.patch_size")
    if patch is not None and size != patch:
        draft.leave(component, f"ctseg pads to the size of a patch, {told(patch)}, not to {told(size)}")


def _lambda(draft: Draft, component: Component) -> None:
    text = str(component.args.get("func", ""))
    above_zero = r"lambda(\w+):\(?\1(\.astype\([\w.]+\))?>0(\.0)?\)?(\.astype\([\w.]+\))?"
    if _keys(component) == ["label"] and re.fullmatch(above_zero, re.sub(r"\s+", "", text).lstrip("#$")):
        draft.put("preprocess.binarize_labels", True, component.where_of("func"))
    else:
        draft.leave(component, f"code is never run: {text[:80]}")


def _discrete(draft: Draft, component: Component) -> None:
    threshold = component.args.get("threshold", component.args.get("logit_thresh"))
    if component.args.get("threshold") is True or component.args.get("threshold_values") is True:
        threshold = component.args.get("logit_thresh", 0.5)
    if "transforms" not in component.path or "post" in component.path or _keys(component) != ["label"]:
        return  # of scores, after the network: ctseg's own decision
    if isinstance(threshold, int | float) and 0 < threshold <= 1:
        draft.put("preprocess.binarize_labels", True, component.where_of("threshold"))


def _patches(draft: Draft, component: Component) -> None:
    draft.take("sampling.patch_size", component, "spatial_size")
    draft.take("sampling.patches_per_case", component, "num_samples", 1)
    both, where = [component.args.get(name, 1) for name in ("pos", "neg")], component.where_of("pos : neg")
    if all(isinstance(n, int | float) and n >= 0 for n in both) and any(both):
        draft.put("sampling.positive_fraction", _ratio(both[0], sum(map(Fraction, both))), where)
    else:
        draft.left.append(Left(where, told(both), "no two numbers; give sampling.positive_fraction with --set"))


def _ratio(part: float | Fraction, whole: float | Fraction) -> float:
    """Exact before it is rounded, as numbers of a stranger may be beyond what a float holds."""
    return float(min(Fraction(part) / Fraction(whole), Fraction(10**9)))


def _shift(draft: Draft, component: Component) -> None:
    offsets = component.args.get("offsets")
    if isinstance(offsets, list) and len(offsets) == 2 and isinstance(offsets[1], int | float):
        if offsets[0] != -offsets[1]:
            draft.leave(component, f"a recipe shifts by as much up as down, this one by {told(offsets)}")
            return
        offsets = offsets[1]
    draft.put("augmentation.shift_offset", offsets, component.where_of("offsets"))
    draft.take("augmentation.shift_probability", component, "prob", 0.1)


def _flip(draft: Draft, component: Component) -> None:
    axis = component.args.get("spatial_axis")
    axes = axis if isinstance(axis, list) else [axis]
    if len(axes) != 1 or axes[0] not in (0, 1, 2):
        draft.leave(component, "a recipe flips each axis by itself, this one several at once")
        return
    if has_expression(component.args.get("prob")):
        draft.leave(component, "its probability is an expression; give augmentation.flip_probability with --set")
        return
    draft.take(f"flip.axis {int(axes[0])}", component, "prob", 0.1)


def _rotate90(draft: Draft, component: Component) -> None:
    if component.args.get("max_k", 3) != 3 or component.args.get("spatial_axes", [0, 1]) != [0, 1]:
        draft.leave(component, "a recipe turns by one, two or three quarters in the x-y plane")
        return
    draft.take("augmentation.rotate90_probability", component, "prob", 0.1)


DETERMINISTIC: dict[str, Translator] = {
    "Orientationd": _orientation,
    "Spacingd": _spacing,
    "ScaleIntensityRanged": _window_of_intensity,
    "CropForegroundd": _crop_foreground,
    "SpatialPadd": _pad,
    "Lambdad": _lambda,
    "AsDiscreted": _discrete,
}
RANDOM: dict[str, Translator] = {
    "RandCropByPosNegLabeld": _patches,
    "RandShiftIntensityd": _shift,
    "RandFlipd": _flip,
    "RandRotate90d": _rotate90,
}


def _loader(draft: Draft, component: Component) -> None:
    draft.take("training.batch_cases", component, "batch_size", 1)


def _trainer(draft: Draft, component: Component) -> None:
    for key, argument in (("training.epochs", "max_epochs"), ("training.amp", "amp")):
        if key not in draft.values:
            draft.take(key, component, argument)


def _validation(draft: Draft, component: Component) -> None:
    draft.take("training.validation_interval_epochs", component, "interval", 1)


ENGINE: dict[str, Translator] = {
    "DataLoader": _loader,
    "ThreadDataLoader": _loader,
    "SupervisedTrainer": _trainer,
    "ValidationHandler": _validation,
}


def _keys(component: Component) -> list[str]:
    keys = component.args.get("keys", [])
    return [key for key in (keys if isinstance(keys, list) else [keys]) if isinstance(key, str)]
