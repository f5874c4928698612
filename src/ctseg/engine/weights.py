"""Weights to start a training from: read as plain data from any kind of file, and fitted to a recipe's network.

Known kinds: a checkpoint of ctseg, the `{"model": ..., "train_conf": ...}` of an MMAR, the `model.pt` of a MONAI
bundle, `{"state_dict": ...}`, and a bare state dict. Names of tensors are those of MONAI, which have not changed for
these networks since MONAI 0.4; those of a UNet from before are translated.

Files are hostile: no pickled code, no compressed archives (small files that unpack to huge ones), and no value of a
tensor is touched before its name and shape are known to fit.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ctseg.engine.checkpoint import FORMAT, check_version, file_sha256, load_plain
from ctseg.errors import CtsegError, ModelError, list_problems
from ctseg.networks import network_for
from ctseg.recipe import Recipe
from ctseg.specs import UNetSpec

MAX_TENSORS = 20_000
"""AHNet, the largest of the networks here, has 500."""
MAX_BYTES = 8 * 2**30
"""AHNet and the state of its optimizer take a third of a GiB."""
SHOWN = 8
"""So many names of each kind are listed in a message; a report holds all."""
PREFIXES = ("module.", "_orig_mod.")
"""What DataParallel and torch.compile put before every name."""
OLD_UNET_NAMES = ((re.compile(r"\.norm\.(?=[a-z_]+$)"), ".adn.N."), (re.compile(r"\.act\.(?=weight$)"), ".adn.A."))
"""MONAI before 0.4 -> now: normalisation and activation moved into a block of their own."""


@dataclass(frozen=True, eq=False)
class Weights:
    """The state dict of a file."""

    path: Path
    kind: str
    tensors: dict[str, Any]
    """By name, prefixes removed; values are not checked yet."""
    recipe: Any
    """The recipe that a checkpoint of ctseg carries, as plain data, else None."""
    notes: tuple[str, ...]
    """What was done to the names."""


@dataclass(frozen=True)
class FitReport:
    """How a file's tensors became a network's weights."""

    source: Path
    sha256: str
    kind: str
    matched: tuple[str, ...]
    new: tuple[str, ...]
    """Of another number of classes in the file: they start anew. Each with both shapes."""
    frozen: tuple[str, ...]
    """Parameters that training leaves as they are."""
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        lists = {key: list(getattr(self, key)) for key in ("matched", "new", "frozen", "notes")}
        return {"source": str(self.source), "sha256": self.sha256, "kind": self.kind, **lists}


def start_weights(recipe: Recipe, path: Path, new_head: bool) -> tuple[dict[str, Tensor], FitReport]:
    """The full state dict a training of `recipe` starts from, on the CPU, and how it came about.

    Args:
        recipe: Its network must be that of the file.
        path: The file.
        new_head: The file may have another number of classes: tensors that depend on it start anew, as a fresh
            training of the recipe would start them.

    Raises:
        ModelError: if the file cannot be trusted or read, or differs from the network.
        CtsegError: if `new_head` is set but all tensors fit, or `recipe.training.freeze` cannot be honoured.
    """
    torch.manual_seed(recipe.training.seed)
    network = network_for(recipe)
    weights = _translated(read_weights(path), recipe)
    state, new = _fitted(weights, network, _class_shapes(recipe) if new_head else {})
    if new_head and not new:
        raise CtsegError(f"--new-head: every tensor of '{path}' fits recipe '{recipe.name}' as it is; leave it out")
    frozen = check_freeze(recipe.training.freeze, network, new)
    report = FitReport(
        source=path,
        sha256=file_sha256(path),
        kind=weights.kind,
        matched=tuple(name for name in state if name not in new),
        new=tuple(new.values()),
        frozen=frozen,
        notes=(*weights.notes, *_preprocessing_notes(weights.recipe, recipe)),
    )
    return state, report


def read_weights(path: Path) -> Weights:
    """The state dict in `path`.

    Raises:
        ModelError: if the file is missing, damaged, holds more than plain data, or holds no state dict.
    """
    if path.exists() and path.stat().st_size > MAX_BYTES:
        raise ModelError(f"weights '{path}': larger than {MAX_BYTES >> 30} GiB; no network here has as much")
    content = load_plain(path, "weights")
    kind, tensors, recipe = _state_dict_of(content, path)
    if not tensors or len(tensors) > MAX_TENSORS:
        raise ModelError(f"weights '{path}': expected 1 to {MAX_TENSORS} tensors, got {len(tensors)}")
    notes = []
    for prefix in PREFIXES * 2:  # either may stand before the other
        if all(isinstance(name, str) and name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: value for name, value in tensors.items()}
            notes.append(f"prefix '{prefix}' removed from every name")
    return Weights(path, kind, {str(name): value for name, value in tensors.items()}, recipe, tuple(notes))


def check_freeze(prefixes: Iterable[str], network: nn.Module, new: Iterable[str] = ()) -> tuple[str, ...]:
    """The names of the parameters that start with one of `prefixes`.

    Raises:
        CtsegError: if a prefix matches none, nothing is left to train, or a parameter in `new` would be frozen.
    """
    names = [name for name, _ in network.named_parameters()]
    frozen = tuple(name for name in names if any(name.startswith(prefix) for prefix in prefixes))
    unknown = [prefix for prefix in prefixes if not any(name.startswith(prefix) for name in names)]
    problems = [f"no parameter starts with '{prefix}'; {_beginnings(names)}" for prefix in unknown]
    if len(frozen) == len(names):
        problems.append("nothing is left to train; freeze less")
    both = [name for name in new if name in frozen]
    if both:
        problems.append(f"parameters that start anew cannot be frozen: {_shown(both)}")
    if problems:
        raise CtsegError(list_problems("training.freeze (--freeze)", problems))
    return frozen


def _state_dict_of(content: Any, path: Path) -> tuple[str, Mapping[Any, Any], Any]:
    if not isinstance(content, Mapping):
        raise ModelError(f"weights '{path}': expected a state dict, got {type(content).__name__}")
    if isinstance(content.get("model"), Mapping):
        if content.get("format") == FORMAT:
            check_version(content.get("version"), "weights", path)
            average = content.get("average")  # what `validate` and `infer` use too
            state = average if isinstance(average, Mapping) else content["model"]
            return "ctseg checkpoint", state, content.get("recipe")
        return ("MMAR checkpoint" if "train_conf" in content else "checkpoint"), content["model"], None
    if isinstance(content.get("state_dict"), Mapping):
        return "checkpoint", content["state_dict"], None
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return "state dict", content, None
    found = _shown([str(key) for key in content]) or "nothing"
    raise ModelError(f"weights '{path}': no state dict; expected tensors, or 'model' or 'state_dict', got {found}")


def _translated(weights: Weights, recipe: Recipe) -> Weights:
    """The same with the names of today's MONAI."""
    if not isinstance(recipe.network, UNetSpec) or any(".adn." in name for name in weights.tensors):
        return weights
    tensors, changed = {}, 0
    for name, value in weights.tensors.items():
        new = name
        for pattern, replacement in OLD_UNET_NAMES:
            new = pattern.sub(replacement, new)
        changed += new != name
        tensors[new] = value
    if not changed or len(tensors) < len(weights.tensors):
        return weights
    note = f"{changed} names of a UNet from MONAI before 0.4 translated"
    return replace(weights, tensors=tensors, notes=(*weights.notes, note))


def _class_shapes(recipe: Recipe) -> dict[str, tuple[int | None, ...]]:
    """The tensors whose shape depends on the number of classes, None for the sizes that do."""
    shapes = []
    for count in (2, 3):
        other = replace(recipe, labels={str(n): str(n) for n in range(1, count)})
        with torch.device("meta"):  # shapes without values
            shapes.append({name: tensor.shape for name, tensor in network_for(other).state_dict().items()})
    return {
        name: tuple(a if a == b else None for a, b in zip(shape, shapes[1][name], strict=True))
        for name, shape in shapes[0].items()
        if shape != shapes[1][name]
    }


def _fitted(
    weights: Weights, network: nn.Module, class_shapes: dict[str, tuple[int | None, ...]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The network's state dict with the file's values, and the tensors that start anew with their shapes."""
    wanted = network.state_dict()
    missing = [f"{name} {_shape(value)}" for name, value in wanted.items() if name not in weights.tensors]
    unexpected = [f"{name[:120]} {_shape(value)}" for name, value in weights.tensors.items() if name not in wanted]
    differing: list[str] = []
    new: dict[str, str] = {}
    for name, target in wanted.items():
        value = weights.tensors.get(name, target)
        if _shape(value) == _shape(target):
            continue
        both = f"{name}: file {_shape(value)}, network {_shape(target)}"
        if name in class_shapes and _differs_in_classes_only(value, class_shapes[name]):
            new[name] = both
        else:
            differing.append(both)
    _refuse_differences(weights, missing, unexpected, differing)
    problems = [text for name in wanted if name not in new for text in _value_problems(name, weights, wanted[name])]
    if problems:
        raise ModelError(list_problems(f"weights '{weights.path}'", _cut(problems)))
    with torch.no_grad():
        for name, target in wanted.items():
            if name not in new:
                target.copy_(weights.tensors[name])
    return dict(wanted), new


def _refuse_differences(weights: Weights, missing: list[str], unexpected: list[str], differing: list[str]) -> None:
    kinds = {"missing in the file": missing, "not in the network": unexpected, "of another shape": differing}
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in kinds.items() if names)
    if not counts:
        return
    lines = [f"{kind}: {name}" for kind, names in kinds.items() for name in _cut(names)]
    hint = "; another number of classes is possible with --new-head" if differing and not missing + unexpected else ""
    head = f"weights '{weights.path}' ({weights.kind}): do not fit the recipe's network: {counts}{hint}"
    raise ModelError("\n  ".join([head, *lines]))


def _differs_in_classes_only(value: Any, shape: tuple[int | None, ...]) -> bool:
    return (
        isinstance(value, Tensor)
        and value.ndim == len(shape)
        and all(want is None or have == want for have, want in zip(value.shape, shape, strict=True))
    )


def _value_problems(name: str, weights: Weights, target: Tensor) -> list[str]:
    """What forbids a tensor of the right shape: another kind of number, or a value that is none."""
    value = weights.tensors[name]
    if value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_complex():
        return [f"{name}: expected plain numbers, got {value.dtype} {value.layout} on {value.device}"]
    if value.is_floating_point() != target.is_floating_point():
        return [f"{name}: expected {target.dtype}, got {value.dtype}"]
    if value.is_floating_point() and not bool(torch.isfinite(value.to(target.dtype)).all()):
        return [f"{name}: holds values that are not finite"]
    return []


def _preprocessing_notes(theirs: Any, recipe: Recipe) -> list[str]:
    """Where the weights saw other images than this recipe will give them."""
    old = theirs.get("preprocess") if isinstance(theirs, Mapping) else None
    new = recipe.to_dict()["preprocess"]
    if not isinstance(old, Mapping):
        return []
    keys = [key for key in ("spacing_mm", "hu_window") if key in old and old[key] != new[key]]
    told = {key: " ".join(repr(old[key]).split())[:60] for key in keys}  # of a stranger, and may be long
    return [f"the weights were trained with preprocess.{k} = {told[k]}, this recipe has {new[k]}" for k in keys]


def _beginnings(names: list[str]) -> str:
    """The first parts of names: `model.0`, `model.1`, ... where all share the first."""
    depth = 1
    while depth < 4 and len({tuple(name.split(".")[:depth]) for name in names}) < 2:
        depth += 1
    found = list(dict.fromkeys(".".join(name.split(".")[:depth]) for name in names))
    return f"names begin with {_shown(found)}"


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, Tensor) else f"({type(value).__name__})"


def _cut(lines: list[str]) -> list[str]:
    return lines if len(lines) <= SHOWN else [*lines[:SHOWN], f"... and {len(lines) - SHOWN} more"]


def _shown(names: list[str]) -> str:
    return ", ".join(_cut([name[:120] for name in names]))
