"""Weights from any file fit a network by name and shape, or are refused with the names that differ."""

import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ctseg.engine.checkpoint import save_checkpoint
from ctseg.engine.weights import check_freeze, read_weights, start_weights
from ctseg.errors import CtsegError, ModelError
from ctseg.networks import network_for
from ctseg.recipe import Recipe, load_recipe, recipe_from_dict

State = dict[str, Tensor]
NETWORKS = {
    "unet": {"kind": "unet", "channels": [4, 8], "strides": [2], "num_res_units": 2, "norm": "batch"},
    "plain_unet": {"kind": "unet", "channels": [4, 8], "strides": [2], "num_res_units": 0, "norm": "instance"},
    "segresnet": {"kind": "segresnet", "init_filters": 8, "blocks_down": [1, 1], "blocks_up": [1]},
    "ahnet": {"kind": "ahnet", "layers": [1, 1, 1, 1], "psp_block_num": 0, "upsample_mode": "transpose"},
}
HEADS = {
    "unet": {"model.2.0.conv.weight", "model.2.1.conv.unit0.conv.bias", "model.2.0.adn.N.running_mean"},
    "plain_unet": {"model.2.conv.weight", "model.2.conv.bias"},
    "segresnet": {"conv_final.2.conv.weight", "conv_final.2.conv.bias"},
    "ahnet": {"final.conv.weight", "final.up.weight"},
}


def with_network(recipe: Recipe, kind: str) -> Recipe:
    sizes = {"sampling": {"patch_size": [32] * 3}, "inference": {"window_size": [32] * 3}}
    plain = recipe.to_dict()
    for section, values in sizes.items():
        plain[section].update(values)
    return recipe_from_dict({**plain, "network": NETWORKS[kind]}, "test")


def with_classes(recipe: Recipe, number: int) -> Recipe:
    return replace(recipe, labels={str(n): f"organ {n}" for n in range(1, number)})


def random_state(recipe: Recipe, seed: int = 1) -> State:
    torch.manual_seed(seed)
    return {
        name: torch.randn(value.shape) if value.is_floating_point() else torch.tensor(7)
        for name, value in network_for(recipe).state_dict().items()
    }


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[Any], Path]:
    """A function that saves plain data with PyTorch: content -> path."""

    def save(content: Any, name: str = "model.pt") -> Path:
        torch.save(content, tmp_path / name)
        return tmp_path / name

    return save


KINDS = {
    "state dict": lambda state: OrderedDict(state),
    "MMAR checkpoint": lambda state: {
        "model": OrderedDict(state),
        "optimizer": {"state": {}, "param_groups": [{"lr": 0.1, "betas": (0.9, 0.98)}]},
        "train_conf": {"epochs": 1260, "train": {"loss": {"name": "DiceCELoss"}}, "odd": (None, True, {1, 2})},
    },
    "checkpoint": lambda state: {"state_dict": state, "epoch": 3},
}


@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_its_weights(
    tiny_recipe: Recipe, saved: Callable[..., Path], kind: str, prefix: str
) -> None:
    state = random_state(tiny_recipe)
    path = saved(KINDS[kind]({prefix + name: value for name, value in state.items()}))
    got, report = start_weights(tiny_recipe, path, new_head=False)
    assert all(torch.equal(got[name], value) for name, value in state.items())
    assert list(got) == list(network_for(tiny_recipe).state_dict())
    assert (report.kind, report.matched, report.new) == (kind, tuple(state), ())
    assert len(report.notes) == prefix.count("."), "removed prefixes are told"
    json.dumps(report.to_dict())


def test_a_checkpoint_of_ctseg(tiny_recipe: Recipe, tmp_path: Path) -> None:
    other = replace(tiny_recipe, preprocess=replace(tiny_recipe.preprocess, spacing_mm=(5.0, 5.0, 5.0)))
    state = random_state(tiny_recipe)
    save_checkpoint(tmp_path / "best.pt", {"recipe": other.to_dict(), "model": state, "epoch": 3})
    got, report = start_weights(tiny_recipe, tmp_path / "best.pt", new_head=False)
    assert torch.equal(got["model.0.residual.weight"], state["model.0.residual.weight"])
    assert report.kind == "ctseg checkpoint"
    assert report.notes == (
        "the weights were trained with preprocess.spacing_mm = [5.0, 5.0, 5.0], this recipe has [8.0, 8.0, 8.0]",
    )


def test_the_moving_average_is_the_model(tiny_recipe: Recipe, tmp_path: Path) -> None:
    """As for `infer`: of a checkpoint that has both, `last.pt` say, the average goes on."""
    state, average = random_state(tiny_recipe), random_state(tiny_recipe, seed=2)
    save_checkpoint(tmp_path / "last.pt", {"recipe": tiny_recipe.to_dict(), "model": state, "average": average})
    got, _ = start_weights(tiny_recipe, tmp_path / "last.pt", new_head=False)
    assert torch.equal(got["model.0.residual.weight"], average["model.0.residual.weight"])


def test_a_file_without_a_zip_archive_inside(tiny_recipe: Recipe, tmp_path: Path) -> None:
    state = random_state(tiny_recipe)
    torch.save(state, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    got, _ = start_weights(tiny_recipe, tmp_path / "model.pt", new_head=False)
    assert torch.equal(got["model.0.residual.weight"], state["model.0.residual.weight"])


def test_half_precision_becomes_float32(tiny_recipe: Recipe, saved: Callable[..., Path]) -> None:
    state = {n: v.half() if v.is_floating_point() else v for n, v in random_state(tiny_recipe).items()}
    got, _ = start_weights(tiny_recipe, saved(state), new_head=False)
    assert got["model.0.residual.weight"].dtype == torch.float32
    assert torch.equal(got["model.0.residual.weight"], state["model.0.residual.weight"].float())


@pytest.mark.parametrize("kind", ["unet", "plain_unet"])
def test_names_of_monai_before_0_4(tiny_recipe: Recipe, saved: Callable[..., Path], kind: str) -> None:
    """There a convolution's normalisation and activation were its own children, not those of a block `adn`."""
    recipe = with_network(tiny_recipe, kind)
    state = random_state(recipe)
    old = {name.replace(".adn.N.", ".norm.").replace(".adn.A.", ".act."): value for name, value in state.items()}
    got, report = start_weights(recipe, saved(old), new_head=False)
    assert all(torch.equal(got[name], value) for name, value in state.items())
    assert "names of a UNet from MONAI before 0.4 translated" in report.notes[0]


@pytest.mark.parametrize("kind", NETWORKS)
def test_new_head(tiny_recipe: Recipe, saved: Callable[..., Path], kind: str) -> None:
    """Only what depends on the number of classes starts anew, with the values of a fresh training."""
    recipe = with_network(tiny_recipe, kind)
    state = random_state(with_classes(recipe, 4))
    path = saved(state)
    with pytest.raises(ModelError, match=r"of another shape.*; another number of classes is possible with --new-head"):
        start_weights(recipe, path, new_head=False)
    got, report = start_weights(recipe, path, new_head=True)
    torch.manual_seed(recipe.training.seed)
    fresh = network_for(recipe).state_dict()
    new = {line.partition(":")[0] for line in report.new}
    assert new >= HEADS[kind]
    assert {name for name, value in fresh.items() if value.shape != state[name].shape} == new
    assert all(torch.equal(got[name], fresh[name] if name in new else state[name]) for name in got)
    assert "file [4" in report.new[-1] or "file [8, 4" in report.new[-1]
    assert set(report.matched) == set(got) - new


def test_new_head_where_all_fits_is_refused(tiny_recipe: Recipe, saved: Callable[..., Path]) -> None:
    with pytest.raises(CtsegError, match=r"--new-head: every tensor of .* fits recipe"):
        start_weights(tiny_recipe, saved(random_state(tiny_recipe)), new_head=True)


def test_new_head_does_not_excuse_another_width(tiny_recipe: Recipe, saved: Callable[..., Path]) -> None:
    wide = recipe_from_dict({**tiny_recipe.to_dict(), "network": {**NETWORKS["unet"], "channels": [6, 8]}}, "test")
    with pytest.raises(
        ModelError, match=r"model\.0\.conv\.unit0\.conv\.weight: file \[6, 1, 3, 3, 3\], network \[4, 1"
    ):
        start_weights(tiny_recipe, saved(random_state(with_classes(wide, 3))), new_head=True)


def test_differences_are_named(tiny_recipe: Recipe, saved: Callable[..., Path]) -> None:
    state = random_state(tiny_recipe)
    del state["model.0.residual.bias"]
    state["model.0.residual.weight"] = torch.zeros(4, 2, 3, 3, 3)
    state["extra"] = torch.zeros(3)
    with pytest.raises(ModelError) as caught:
        start_weights(tiny_recipe, saved({"model": {**state, "odd": 3}}), new_head=True)
    lines = str(caught.value).splitlines()
    assert lines[0].endswith("1 missing in the file, 2 not in the network, 1 of another shape")
    assert [line.strip() for line in lines[1:]] == [
        "missing in the file: model.0.residual.bias [4]",
        "not in the network: extra [3]",
        "not in the network: odd (int)",
        "of another shape: model.0.residual.weight: file [4, 2, 3, 3, 3], network [4, 1, 3, 3, 3]",
    ]


def test_a_long_list_of_differences_is_cut(tiny_recipe: Recipe, saved: Callable[..., Path]) -> None:
    state = {**random_state(tiny_recipe), **{f"more.{n}": torch.zeros(1) for n in range(30)}}
    with pytest.raises(ModelError, match=r"30 not in the network\n(.*\n){8}.*\.\.\. and 22 more$"):
        start_weights(tiny_recipe, saved(state), new_head=False)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.full((4,), float("nan")), "model.0.residual.bias: holds values that are not finite"),
        (torch.tensor([1.0, 2.0, float("inf"), 0.0]), "holds values that are not finite"),
        (torch.full((4,), 1e300, dtype=torch.float64), "holds values that are not finite"),
        (torch.zeros(4, dtype=torch.int64), "expected torch.float32, got torch.int64"),
        (torch.zeros(4, dtype=torch.complex64), "expected plain numbers, got torch.complex64"),
        (torch.zeros(4).to_sparse(), "expected plain numbers, got torch.float32 torch.sparse_coo"),
        (torch.zeros(4, device="meta"), "expected plain numbers, got torch.float32 torch.strided on meta"),
    ],
)
def test_values_that_are_no_weights(
    tiny_recipe: Recipe, saved: Callable[..., Path], value: Tensor, message: str
) -> None:
    path = saved({**random_state(tiny_recipe), "model.0.residual.bias": value})
    with pytest.raises(ModelError) as caught:
        start_weights(tiny_recipe, path, new_head=False)
    assert message in str(caught.value)


def test_a_tensor_that_claims_to_be_huge_is_not_touched(tiny_recipe: Recipe, saved: Callable[..., Path]) -> None:
    huge = torch.zeros(1).expand(2**40)
    with pytest.raises(ModelError, match=r"not in the network: huge \[1099511627776\]"):
        start_weights(tiny_recipe, saved({**random_state(tiny_recipe), "huge": huge}), new_head=False)


class Evil:
    """Pickled code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch pwned",))


@pytest.mark.parametrize("content", [Evil(), {"model": {"a": torch.zeros(1)}, "train_conf": Evil()}, {"a": Evil()}])
def test_pickled_code_is_refused(
    saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"holds more than plain data \(or is damaged\); refused"):
        read_weights(saved(content))
    assert not (tmp_path / "pwned").exists()


def damaged(tmp_path: Path, kind: str) -> Path:
    path = tmp_path / "model.pt"
    torch.save({"a": torch.arange(1000.0)}, path)
    whole = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif kind == "changed":
        at = whole.index(torch.arange(1000.0).numpy().tobytes()[400:440])
        path.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
    elif kind == "compressed":
        with zipfile.ZipFile(io.BytesIO(whole)) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for name in archive.namelist():
                packed.writestr(name, archive.read(name))
    elif kind == "overlapping":
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("first", whole)
            part = archive.filelist[-1]
            archive.filelist.extend([part] * 100)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("<html>not found</html>")
    elif kind == "legacy pickle":
        path.write_bytes(pickle.dumps(Evil()))
    return path


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("truncated", "damaged or no weights"),
        ("changed", r"damaged or no weights \(the checksum of .* is wrong; copy the file again\)"),
        ("compressed", "its parts are compressed, as torch never does"),
        ("overlapping", "its parts claim more than the file holds"),
        ("empty", "damaged or no weights"),
        ("text", "holds more than plain data"),
        ("legacy pickle", "holds more than plain data"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, kind: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        read_weights(damaged(tmp_path, kind))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "expected a state dict, got list"),
        ({}, "no state dict; expected tensors, or 'model' or 'state_dict', got nothing"),
        ({"epoch": 3, "net": {}}, "got epoch, net"),
        ({"model": {}}, "expected 1 to 20000 tensors, got 0"),
        ({str(n): torch.zeros(1) for n in range(20_001)}, "expected 1 to 20000 tensors, got 20001"),
        ({"format": "ctseg-checkpoint", "version": 9, "model": {}}, "format version 9, this ctseg reads 1"),
        ({"format": "ctseg-checkpoint", "version": torch.zeros(2), "model": {}}, "format version Tensor, this ctseg"),
    ],
)
def test_other_content_is_refused(saved: Callable[..., Path], content: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        read_weights(saved(content))


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "model.pt").open("wb") as file:
        file.truncate(9 * 2**30)
    with pytest.raises(ModelError, match="larger than 8 GiB"):
        read_weights(tmp_path / "model.pt")


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file"):
        read_weights(tmp_path / "none.pt")


def test_deep_nesting_is_no_crash(tiny_recipe: Recipe, saved: Callable[..., Path], tmp_path: Path) -> None:
    deep: Any = {}
    for _ in range(200):
        deep = {"a": deep}
    got, _ = start_weights(tiny_recipe, saved({"model": random_state(tiny_recipe), "train_conf": deep}), new_head=False)
    assert got
    with (tmp_path / "deep.pt").open("wb") as file:  # pickle's own lists in lists, far beyond any recursion limit
        file.write(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".")
    with pytest.raises(ModelError):
        read_weights(tmp_path / "deep.pt")


def test_freeze(tiny_recipe: Recipe) -> None:
    network = network_for(tiny_recipe)
    names = [name for name, _ in network.named_parameters()]
    assert check_freeze((), network) == ()
    assert check_freeze(("model.0.", "model.1."), network) == tuple(n for n in names if not n.startswith("model.2"))
    with pytest.raises(
        CtsegError, match=r"no parameter starts with 'encoder'; names begin with model\.0, model\.1, mo"
    ):
        check_freeze(("encoder", "model.0"), network)
    with pytest.raises(CtsegError, match="nothing is left to train"):
        check_freeze(("model",), network)
    with pytest.raises(CtsegError, match=r"parameters that start anew cannot be frozen: model\.2\.0\.conv\.weight"):
        check_freeze(("model.2",), network, ["model.2.0.conv.weight"])


@pytest.mark.slow
def test_the_full_recipes_accept_their_own_weights(saved: Callable[..., Path]) -> None:
    recipe = load_recipe("spleen")
    got, report = start_weights(recipe, saved({"model": random_state(recipe), "train_conf": {}}), new_head=False)
    assert len(got) == len(report.matched)
