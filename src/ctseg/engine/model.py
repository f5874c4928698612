"""A model ready to predict: its recipe and its network, whichever kind of file they came from."""

from __future__ import annotations

import functools
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ctseg.arrays import HOST
from ctseg.engine.backends import Forward as Forward
from ctseg.engine.backends.onnx import forward_of_session, has_cuda, open_session
from ctseg.engine.checkpoint import file_sha256, read_checkpoint
from ctseg.engine.compiled import check_backend, compiled_network, is_installed, ready_without_torch, recipe_of
from ctseg.engine.runtime import Runtime, may_have_gpu, memory_errors, running, start_on_host, start_runtime
from ctseg.errors import DeviceError, ModelError
from ctseg.jobs import ModelChoice
from ctseg.recipe import RECIPE_ENTRY, Recipe, recipe_from_dict
from ctseg.specs import UNetSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

Reader = Callable[[Path, Runtime], tuple[Recipe, Forward]]


@dataclass(frozen=True, eq=False)
class Model:
    """A network that maps windows to scores, and the recipe it was made for."""

    recipe: Recipe
    forward: Forward
    runtime: Runtime
    path: Path
    sha256: str
    backend: str = "torch"
    on_cpu: Callable[[], Model] | None = None
    """The same on the CPU, for a CT that a GPU has no memory for."""
    exact: Forward | None = None
    """The network in float32, for windows where the rounding of `forward` may turn the mask."""


def load_model(
    path: Path,
    runtime: Runtime,
    backend: str | None = None,
    note: Callable[[str], None] = lambda _: None,
    *,
    exact: bool = False,
) -> Model:
    """The model in a checkpoint (`.pt`), a TorchScript file (`.ts`) or an ONNX file (`.onnx`).

    A checkpoint runs on any backend; on a CPU its compiled network is kept in the cache, see `ctseg.engine.compiled`.
    An exported file runs on the one it was made for.

    Args:
        path: The file.
        runtime: Device and precision.
        backend: torch, onnxruntime, openvino, or auto: the one that is fastest for a checkpoint on this CPU. None is
            torch for a checkpoint.
        note: Told when the network has to be compiled first, which takes seconds.
        exact: Whether a checkpoint that runs in reduced precision on a CPU is to be at hand in float32 too.

    Raises:
        ModelError: if the file cannot be read, is not from ctseg, or does not fit its own recipe.
        DeviceError: if the backend is not to be had here, or not for this file.
    """
    readers: dict[str, tuple[str, Reader]] = {
        ".pt": ("torch", _from_checkpoint),
        ".ts": ("torch", _from_torchscript),
        ".onnx": ("onnxruntime", _from_onnx),
    }
    if path.suffix not in readers:
        raise ModelError(f"model '{path}': unknown kind of file; known: {', '.join(readers)}")
    own, reader = readers[path.suffix]
    if path.suffix == ".pt":
        check_backend(backend or own, runtime)
    elif backend not in (None, "auto", own):
        raise DeviceError(f"backend '{backend}': a {path.suffix} file runs on {own} only; name its checkpoint")
    if path.suffix == ".onnx" and runtime.precision != "float32":
        if runtime.device.type == "cpu":
            raise DeviceError(f"precision '{runtime.precision}': a .onnx file is in float32; name its checkpoint")
        runtime = replace(runtime, precision="float32")  # on a GPU less is what "auto" means
    sha256 = _sha256(path)
    if path.suffix == ".pt" and runtime.device.type == "cpu":
        source = functools.partial(_load_unchanged, path, sha256)
        found = compiled_network(sha256, source, runtime, backend or own, note, exact=exact)
        return Model(found.recipe, found.forward, runtime, path, sha256, found.backend, exact=found.exact)
    if path.suffix == ".onnx" and runtime.device.type != "cpu" and not has_cuda():
        note("onnxruntime here is a build without CUDA: the model runs on the CPU")
        runtime = Runtime(HOST)
    with memory_errors(f"the network in '{path}'", runtime.device):
        recipe, forward = reader(path, runtime)
    if runtime.device.type == "cpu":
        return Model(recipe, forward, runtime, path, sha256, own)
    on_cpu = functools.cache(lambda: load_model(path, start_runtime("cpu", alone=True), note=note))
    return Model(recipe, forward, runtime, path, sha256, own, on_cpu)


@contextmanager
def runtime_for(choice: ModelChoice) -> Iterator[Runtime]:
    """The runtime to segment with, as `running` has it; without torch, which takes long to import, where that will do.

    It will for an ONNX file, and for a checkpoint whose network is in the cache for another backend than torch.

    Raises:
        DeviceError: as `start_runtime`.
        ModelError: if the file cannot be read.
    """
    host = _ready_host(choice)
    if host is not None:
        yield host
        return
    fast = choice.fast and fast_in_bfloat16(choice.path, choice.backend)
    with running(choice.device, choice.precision, amp=True, alone=True, fast=fast) as runtime:
        yield runtime


def _ready_host(choice: ModelChoice) -> Runtime | None:
    path, backend = choice.path, choice.backend
    if choice.device not in ("auto", "cpu") or (choice.device == "auto" and may_have_gpu()):
        return None
    if path.suffix == ".onnx":
        return start_on_host(choice.precision)
    if path.suffix != ".pt" or backend in (None, "torch"):
        return None
    host = start_on_host(choice.precision, fast=choice.fast and fast_in_bfloat16(path, backend))
    exact = settles_rounding(path, fast=choice.fast)
    return host if ready_without_torch(_sha256(path), host, backend, exact=exact) else None


def next_run_is_leaner(model: Model) -> bool:
    """Whether this process has torch, to compile the network or to look for a GPU, and the next one will do without."""
    if model.path.suffix != ".pt" or model.runtime.device.type != "cpu" or "torch" not in sys.modules:
        return False
    return ready_without_torch(model.sha256, model.runtime, model.backend, exact=model.exact is not None)


def _sha256(path: Path) -> str:
    """As `file_sha256`, computed once while the file stays as it is: a start asks for it several times."""
    try:
        status = path.stat()
    except OSError:
        return file_sha256(path)
    return _sha256_of_version(path, (status.st_ino, status.st_mtime_ns, status.st_size))


@functools.lru_cache(maxsize=8)
def _sha256_of_version(path: Path, _: tuple[int, int, int]) -> str:
    return file_sha256(path)


def fast_in_bfloat16(path: Path, backend: str | None = None) -> bool:
    """Whether `--fast` may run the model in bfloat16 on a CPU: it may with a checkpoint where that is faster.

    On OpenVINO it is; on torch it is with a UNet, while others can lose by it; onnxruntime has no bfloat16.

    Raises:
        ModelError: if the checkpoint cannot be read.
    """
    if path.suffix != ".pt" or backend == "onnxruntime":
        return False
    return (backend in ("auto", "openvino") and is_installed("openvino")) or _is_unet(path)


def settles_rounding(path: Path, *, fast: bool) -> bool:
    """Whether a model in reduced precision is to have its network in float32 beside it, see `ctseg.engine.rounding`.

    With `--fast` a UNet's checkpoint is not: its rounding alone was seen to cost less than `--fast` may, and to run a
    single window again would cost a twentieth of the time.

    Raises:
        ModelError: if the checkpoint cannot be read.
    """
    return not (fast and path.suffix == ".pt" and _is_unet(path))


def load_to_segment(choice: ModelChoice, runtime: Runtime, note: Callable[[str], None] = lambda _: None) -> Model:
    """`load_model` for `ctseg infer` and `ctseg validate`, with the exact network beside it where that is needed.

    Where the backend was to be measured and torch was the fastest, `--fast` is in float32 but for UNets, as it is where
    torch was asked for; a `precision` that was asked for stays.

    Raises:
        As `load_model`.
    """
    path, backend = choice.path, choice.backend
    model = load_model(path, runtime, backend, note, exact=settles_rounding(path, fast=choice.fast))
    if choice.fast and choice.precision == "auto" and model.backend == "torch" and model.exact is not None:
        return load_model(path, replace(runtime, precision="float32"), backend, note)
    return model


def _is_unet(checkpoint: Path) -> bool:
    return isinstance(_recipe_of_version(checkpoint, _sha256(checkpoint)).network, UNetSpec)


@functools.lru_cache(maxsize=8)
def _recipe_of_version(checkpoint: Path, sha256: str) -> Recipe:
    return recipe_of(
        sha256, lambda: recipe_from_dict(read_checkpoint(checkpoint).get("recipe"), f"recipe inside '{checkpoint}'")
    )


def forward_of(network: nn.Module, runtime: Runtime) -> Forward:
    """The network in evaluation mode, channels last, in the runtime's precision."""
    import torch

    from ctseg.networks import channels_last

    channels_last(network.eval()).to(runtime.device)

    def forward(image_BCXYZ: Tensor) -> Tensor:
        with torch.inference_mode(), runtime.autocast():
            logits: Tensor = network(image_BCXYZ.contiguous(memory_format=torch.channels_last_3d))
        return logits.float()

    return forward


def load_network(path: Path) -> tuple[Recipe, nn.Module]:
    """The recipe and the network with weights of a checkpoint, their moving average if it has one, on the CPU.

    Raises:
        ModelError: if the checkpoint is damaged or its weights do not fit its recipe.
    """
    from ctseg.networks import network_for

    content = read_checkpoint(path)
    recipe = recipe_from_dict(content.get("recipe"), f"recipe inside '{path}'")
    try:
        network = network_for(recipe)
        state = content.get("average") or content["model"]
        _check_numbers(state, path)
        network.load_state_dict(state)
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        raise ModelError(f"checkpoint '{path}': its weights do not fit its recipe's network") from error
    return recipe, network


def _check_numbers(state: Mapping[str, Tensor], path: Path) -> None:
    """Raises ModelError for weights that are not all finite numbers: their masks would be empty."""
    import torch

    for name, value in state.items():
        if value.is_complex() or not bool(torch.isfinite(value).all()):
            raise ModelError(
                f"checkpoint '{path}': {name[:80]} holds values that are not finite numbers; train it anew"
            )


def _load_unchanged(path: Path, sha256: str) -> tuple[Recipe, nn.Module]:
    """`load_network`, unless it is another file by now: it may be asked for long after the start."""
    if _sha256(path) != sha256:
        raise ModelError(f"checkpoint '{path}': has changed since this run began; start it again")
    return load_network(path)


def _from_checkpoint(path: Path, runtime: Runtime) -> tuple[Recipe, Forward]:
    from ctseg.networks import fold_for_inference

    recipe, network = load_network(path)
    return recipe, forward_of(fold_for_inference(network), runtime)


def _from_torchscript(path: Path, runtime: Runtime) -> tuple[Recipe, Forward]:
    import torch

    extra: dict[str, Any] = {RECIPE_ENTRY: ""}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit is frozen, not gone
            network = torch.jit.load(str(path), map_location=runtime.device, _extra_files=extra)  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError, OSError) as error:
        raise ModelError(f"model '{path}': not a readable TorchScript file") from error
    recipe = _recipe_entry(extra[RECIPE_ENTRY], path)
    return recipe, forward_of(network, runtime)


def _from_onnx(path: Path, runtime: Runtime) -> tuple[Recipe, Forward]:
    try:
        session = open_session(path.read_bytes(), runtime)
    except Exception as error:  # onnxruntime raises its own classes, derived from Exception alone
        raise ModelError(f"model '{path}': not a readable ONNX file") from error
    recipe = _recipe_entry(session.get_modelmeta().custom_metadata_map.get(RECIPE_ENTRY, ""), path)
    return recipe, forward_of_session(session)


def _recipe_entry(text: str | bytes, path: Path) -> Recipe:
    if not text:
        raise ModelError(f"model '{path}': carries no ctseg recipe; export it with `ctseg export`")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"model '{path}': the recipe inside is not valid JSON") from error
    return recipe_from_dict(data, f"recipe inside '{path}'")
