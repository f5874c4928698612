"""A checkpoint's network is compiled once, comes from the cache after that, and runs on the fastest backend."""

import functools
import importlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ctseg.engine import compiled
from ctseg.engine.checkpoint import file_sha256
from ctseg.engine.compiled import CHOICES, Compiled, compiled_network, is_installed, ready_without_torch
from ctseg.engine.model import load_model, load_network
from ctseg.engine.runtime import Runtime
from ctseg.errors import DeviceError, ModelError
from ctseg.recipe import Recipe
from marks import needs_openvino

BACKENDS = [
    "torch",
    pytest.param("onnxruntime", marks=pytest.mark.slow),
    pytest.param("openvino", marks=needs_openvino),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of one test."""
    monkeypatch.setenv("CTSEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_recipe: Recipe, made_checkpoint: Callable[[Recipe, Path], Path]) -> Path:
    """A checkpoint of made weights."""
    return made_checkpoint(tiny_recipe, tmp_path / "best.pt")


@pytest.fixture
def image() -> Tensor:
    """Two windows."""
    return torch.rand((2, 1, 16, 16, 16), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """A function after whose call nothing can build a network any more."""

    def forbid() -> None:
        def build(*_: object) -> None:
            raise AssertionError("the network is built again")

        monkeypatch.setattr("ctseg.engine.model.load_network", build)

    return forbid


def expected(checkpoint: Path, image: Tensor) -> Tensor:
    """Of a compiled UNet with two classes: the difference of their logits."""
    with torch.inference_mode():
        logits: Tensor = load_network(checkpoint)[1].eval()(image)
    return logits[:, 1:] - logits[:, :1]


def networks(cache: Path) -> list[Path]:
    """The entries that hold a network."""
    entries = {path: compiled.read_entry(path.stem) for path in cache.iterdir()}
    return [path for path, entry in entries.items() if entry is not None and entry.content]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_second_run_builds_nothing_and_answers_the_same(
    checkpoint: Path, cpu: Runtime, image: Tensor, no_network: Callable[[], None], backend: str
) -> None:
    notes: list[str] = []
    first = load_model(checkpoint, cpu, backend, notes.append)
    assert first.backend == backend
    assert len(notes) == 1
    logits = first.forward(image)
    torch.testing.assert_close(logits, expected(checkpoint, image), rtol=1e-4, atol=1e-6)
    no_network()
    again = load_model(checkpoint, cpu, backend, notes.append)
    assert len(notes) == 1
    assert again.recipe == first.recipe
    assert again.backend == backend
    assert torch.equal(again.forward(image), logits)


PROGRAM = """
import json, sys
from pathlib import Path
from ctseg.engine.infer import infer
from ctseg.engine.model import load_model
from ctseg.engine.runtime import start_runtime
model = load_model(Path(sys.argv[1]), start_runtime("cpu"), sys.argv[2])
print(json.dumps({"modules": [m for m in sys.modules if "." not in m], "backend": model.backend}))
"""


@pytest.mark.parametrize("backend", [BACKENDS[0], BACKENDS[2]])
def test_the_second_run_imports_no_monai(checkpoint: Path, backend: str) -> None:
    command = [sys.executable, "-c", PROGRAM, str(checkpoint), backend]
    first, second = (json.loads(subprocess.check_output(command, timeout=120)) for _ in range(2))
    assert first["backend"] == second["backend"] == backend
    assert "monai" in first["modules"]
    assert "monai" not in second["modules"]


@pytest.mark.parametrize("change", ["weights", "precision", "version"])
def test_what_is_kept_is_for_one_checkpoint_precision_and_version(
    tmp_path: Path, checkpoint: Path, image: Tensor, cache: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    cpu = Runtime(torch.device("cpu"))
    before = load_model(checkpoint, cpu).forward(image)
    if change == "weights":
        content = torch.load(checkpoint, weights_only=True)
        content["model"] = {name: value * 1.5 for name, value in content["model"].items()}
        torch.save(content, checkpoint)
    elif change == "precision":
        cpu = replace(cpu, precision="bfloat16")
    else:
        monkeypatch.setattr(compiled, "VERSION", compiled.VERSION + 1)
    after = load_model(checkpoint, cpu).forward(image)
    assert len(networks(cache)) == 2
    assert torch.equal(before, after) == (change == "version")


@pytest.mark.parametrize("backend", ["torch", pytest.param("openvino", marks=needs_openvino)])
def test_reduced_precision_has_the_exact_network_at_hand(
    checkpoint: Path, image: Tensor, cache: Path, no_network: Callable[[], None], backend: str
) -> None:
    """Compiled with the other at the first run, so that a later one needs no network."""
    reduced = Runtime(torch.device("cpu"), "bfloat16")
    sha256 = file_sha256(checkpoint)
    assert load_model(checkpoint, reduced, backend).exact is None, "unless it is asked for"
    assert ready_without_torch(sha256, reduced, backend) == (backend != "torch")
    assert not ready_without_torch(sha256, reduced, backend, exact=True)
    load_model(checkpoint, reduced, backend, exact=True)
    assert len(networks(cache)) == 2
    no_network()
    model = load_model(checkpoint, reduced, backend, exact=True)
    assert ready_without_torch(sha256, reduced, backend, exact=True) == (backend != "torch")
    assert model.exact is not None
    torch.testing.assert_close(model.exact(image), expected(checkpoint, image), atol=1e-4, rtol=1e-4)
    assert load_model(checkpoint, replace(reduced, precision="float32"), backend, exact=True).exact is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_library_is_imported_before_its_network_is_loaded_beside_the_rest(
    checkpoint: Path, image: Tensor, cache: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    runtime = Runtime(torch.device("cpu"))
    load_model(checkpoint, runtime, backend)
    module = compiled._module(backend)
    import_library, load = module.import_library, module.load
    threads: dict[str, threading.Thread] = {}

    def record(name: str, function: Callable[..., object], *arguments: object) -> object:
        threads.setdefault(name, threading.current_thread())
        return function(*arguments)

    monkeypatch.setattr(module, "import_library", functools.partial(record, "import", import_library))
    monkeypatch.setattr(module, "load", functools.partial(record, "load", load))
    load_model(checkpoint, runtime, backend).forward(image)
    assert list(threads) == ["import", "load"]
    assert threads["import"] is threading.current_thread() is not threads["load"]


def test_without_a_cache_the_exact_network_is_compiled_with_the_other(
    checkpoint: Path, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "can_keep", lambda: False)
    monkeypatch.setattr(compiled, "write_entry", lambda *_: None)
    precisions: list[str] = []
    torchs = importlib.import_module("ctseg.engine.backends.torchscript")
    compile_it = torchs.compile_network

    def compile_network(network: nn.Module, window: tuple[int, int, int], runtime: Runtime) -> bytes:
        precisions.append(runtime.precision)
        content: bytes = compile_it(network, window, runtime)
        return content

    monkeypatch.setattr(torchs, "compile_network", compile_network)
    wanted = expected(checkpoint, image)
    model = load_model(checkpoint, Runtime(torch.device("cpu"), "bfloat16"), "torch", exact=True)
    assert precisions == ["bfloat16", "float32"]
    assert model.exact is not None
    checkpoint.write_bytes(b"another")
    for _ in range(2):
        torch.testing.assert_close(model.exact(image), wanted, atol=1e-4, rtol=1e-4)
    assert precisions == ["bfloat16", "float32"]


def test_a_checkpoint_that_has_changed_is_not_taken_for_what_it_was(
    checkpoint: Path, cache: Path, image: Tensor
) -> None:
    """Its exact network went from the cache before it was used."""
    model = load_model(checkpoint, Runtime(torch.device("cpu"), "bfloat16"), "torch", exact=True)
    model = load_model(checkpoint, Runtime(torch.device("cpu"), "bfloat16"), "torch", exact=True)
    model.forward(image)
    for entry in networks(cache):
        entry.unlink()
    checkpoint.write_bytes(checkpoint.read_bytes() + b"more")
    assert model.exact is not None
    with pytest.raises(ModelError, match="has changed since this run began; start it again"):
        model.exact(image)


@pytest.mark.parametrize("damage", [b"", b"half", None])
@pytest.mark.parametrize("backend", [BACKENDS[0], BACKENDS[2]])
def test_what_was_damaged_is_made_again(
    checkpoint: Path, cpu: Runtime, image: Tensor, cache: Path, backend: str, damage: bytes | None
) -> None:
    wanted = load_model(checkpoint, cpu, backend).forward(image)
    (path,) = networks(cache)
    good = path.read_bytes()
    path.write_bytes(damage if damage is not None else good[:-1] + bytes([good[-1] ^ 1]))
    assert compiled.read_entry(path.stem) is None
    assert torch.equal(load_model(checkpoint, cpu, backend).forward(image), wanted)
    assert compiled.read_entry(path.stem) is not None


@pytest.mark.parametrize("backend", [BACKENDS[0], BACKENDS[2]])
def test_a_whole_entry_that_no_library_can_read_is_made_again(
    checkpoint: Path, cpu: Runtime, image: Tensor, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    wanted = load_model(checkpoint, cpu, backend).forward(image)
    read = compiled.read_entry
    monkeypatch.setattr(compiled, "read_entry", lambda key: replace(read(key), content=b"of another version"))
    assert torch.equal(load_model(checkpoint, cpu, backend).forward(image), wanted)


def test_without_a_cache_it_runs_all_the_same(
    tmp_path: Path, checkpoint: Path, cpu: Runtime, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CTSEG_CACHE", str(tmp_path / "file"))
    for backend in ("torch", "auto"):
        model = load_model(checkpoint, cpu, backend)
        assert model.backend == "torch"
        torch.testing.assert_close(model.forward(image), expected(checkpoint, image), rtol=1e-4, atol=1e-6)


def test_a_cache_of_code_that_another_user_wrote_is_not_run(
    checkpoint: Path, cpu: Runtime, image: Tensor, cache: Path
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files away")
    load_model(checkpoint, cpu)
    (path,) = networks(cache)
    foreign = checkpoint.with_name("other.pt")
    content = torch.load(checkpoint, weights_only=True)
    content["model"] = {name: value * 2 for name, value in content["model"].items()}
    torch.save(content, foreign)
    load_model(foreign, cpu)
    (other,) = set(networks(cache)) - {path}
    path.write_bytes(other.read_bytes())
    os.chown(path, 12345, 12345)
    torch.testing.assert_close(
        load_model(checkpoint, cpu).forward(image), expected(checkpoint, image), rtol=1e-4, atol=1e-6
    )
    assert path.stat().st_uid == os.geteuid()


def test_a_damaged_checkpoint_is_refused_and_leaves_nothing(tmp_path: Path, cpu: Runtime, cache: Path) -> None:
    (tmp_path / "bad.pt").write_bytes(b"x" * 1000)
    for backend in ("auto", *filter(is_installed, CHOICES[1:])):
        with pytest.raises(ModelError):
            load_model(tmp_path / "bad.pt", cpu, backend)
    assert not cache.exists() or list(cache.iterdir()) == []


# The choice


class FakeBackends:
    """Backends whose answer, and the time that it takes, a test decides."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, recipe: Recipe) -> None:
        self.seconds = {"torch": 1.0, "openvino": 1.0}
        self.error = 0.0
        self.measured: list[list[str]] = []
        monkeypatch.setattr(compiled, "_open", lambda sha256, folded, runtime, name: self._opened(recipe, name))
        monkeypatch.setattr(compiled, "measure", self._measure)
        monkeypatch.setattr(compiled, "is_installed", lambda name: name in self.seconds)

    def _opened(self, recipe: Recipe, name: str) -> Compiled:
        error = 0.0 if name == "torch" else self.error
        return Compiled(recipe, lambda image_BCXYZ: image_BCXYZ * (1 + error), name)

    def _measure(self, forwards: dict[str, object], image_BCXYZ: Tensor) -> dict[str, float]:
        assert image_BCXYZ.shape == (1, 1, 16, 16, 16)
        self.measured.append(list(forwards))
        return {name: self.seconds[name] for name in forwards}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch, tiny_recipe: Recipe) -> FakeBackends:
    return FakeBackends(monkeypatch, tiny_recipe)


def choose(runtime: Runtime, sha256: str = "a") -> str:
    return compiled_network(sha256, lambda: pytest.fail("not needed"), runtime, "auto", pytest.fail).backend


@pytest.mark.parametrize(
    ("seconds", "error", "chosen"),
    [
        (0.84, 0.0, "openvino"),
        (0.86, 0.0, "torch"),
        (1.5, 0.0, "torch"),
        (0.1, 9e-4, "openvino"),
        (0.1, 2e-3, "torch"),
        (0.1, float("nan"), "torch"),
    ],
)
@needs_openvino
def test_another_backend_must_be_faster_by_15_percent_and_give_the_same_answer(
    fakes: FakeBackends, cpu: Runtime, seconds: float, error: float, chosen: str
) -> None:
    fakes.seconds["openvino"] = seconds
    fakes.error = error
    assert choose(cpu) == chosen


@needs_openvino
def test_what_was_measured_is_remembered_for_a_model_a_precision_and_a_number_of_threads(
    fakes: FakeBackends, cpu: Runtime
) -> None:
    fakes.seconds["openvino"] = 0.5
    assert [choose(cpu) for _ in range(2)] == ["openvino"] * 2
    assert fakes.measured == [["torch", "openvino"]]
    fakes.seconds["openvino"] = 2.0
    assert choose(cpu) == "openvino"
    assert choose(cpu, sha256="b") == "torch"
    assert choose(replace(cpu, precision="bfloat16")) == "torch"
    torch.set_num_threads(2)
    assert choose(cpu) == "torch"
    assert len(fakes.measured) == 4


@needs_openvino
def test_a_choice_that_cannot_be_kept_is_torch_and_not_measured(
    fakes: FakeBackends, cpu: Runtime, mount: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = mount("size=64k,mode=0700")
    monkeypatch.setenv("CTSEG_CACHE", str(disk))
    fakes.seconds["openvino"] = 0.5
    assert choose(cpu) == "openvino"
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert [choose(cpu), choose(cpu, sha256="b")] == ["openvino", "torch"]
    assert len(fakes.measured) == 1


@needs_openvino
@pytest.mark.parametrize("error", [RuntimeError("unsupported operation"), ImportError("libopenvino.so")])
def test_a_backend_that_cannot_be_used_is_not_chosen(
    checkpoint: Path, cpu: Runtime, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("ctseg.engine.backends.openvino.compile_network", fail)
    assert load_model(checkpoint, cpu, "auto").backend == "torch"


def test_with_torch_alone_nothing_is_measured(fakes: FakeBackends, cpu: Runtime) -> None:
    del fakes.seconds["openvino"]
    assert choose(cpu) == "torch"
    assert fakes.measured == []


@needs_openvino
def test_auto_measures_real_backends_once(checkpoint: Path, cpu: Runtime, image: Tensor, cache: Path) -> None:
    model = load_model(checkpoint, cpu, "auto")
    torch.testing.assert_close(model.forward(image), expected(checkpoint, image), rtol=1e-4, atol=1e-6)
    assert len(networks(cache)) == 2  # two compiled networks and the choice
    assert load_model(checkpoint, cpu, "auto").backend == model.backend


# What cannot be had


def test_an_unknown_backend_is_refused(checkpoint: Path, cpu: Runtime) -> None:
    with pytest.raises(DeviceError, match="backend 'tpu': expected one of auto, torch, onnxruntime, openvino"):
        load_model(checkpoint, cpu, "tpu")


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_gpus_are_torchs(checkpoint: Path, backend: str) -> None:
    with pytest.raises(DeviceError, match="runs on the CPU; choose --device cpu or --backend torch"):
        load_model(checkpoint, Runtime(torch.device("cuda", 0)), backend)


def test_a_missing_library_is_named_with_how_to_get_it(
    checkpoint: Path, cpu: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DeviceError, match=r"not installed here; run pip install 'ctseg\[openvino\]'"):
        load_model(checkpoint, cpu, "openvino")


def test_onnxruntime_has_no_reduced_precision(checkpoint: Path) -> None:
    with pytest.raises(DeviceError, match="has no bfloat16; choose --precision float32"):
        load_model(checkpoint, Runtime(torch.device("cpu"), "bfloat16"), "onnxruntime")


def test_an_exported_file_runs_on_its_own_backend_only(tmp_path: Path, cpu: Runtime) -> None:
    for suffix, backend, own in ((".ts", "openvino", "torch"), (".onnx", "torch", "onnxruntime")):
        path = tmp_path / f"model{suffix}"
        path.write_bytes(b"x")
        with pytest.raises(DeviceError, match=f"a {suffix} file runs on {own} only; name its checkpoint"):
            load_model(path, cpu, backend)
