"""`ctseg import-mmar` and `import-bundle`: recipes with their sources, and what could not be carried over."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ctseg.manifest import read_manifest
from ctseg.networks import network_for
from ctseg.recipe import load_recipe

Json = dict[str, Any]
BOTH = {"keys": ["image", "label"]}


def component(name: str, **args: Any) -> Json:
    return {"name": name, "args": args}


def transforms(*, first: list[Json], patch: Any, more: list[Json]) -> list[Json]:
    window = {"keys": "image", "a_min": -57, "a_max": 164, "b_min": 0.0, "b_max": 1.0, "clip": True}
    return [
        component("LoadImaged", **BOTH),
        *first,
        component("ScaleIntensityRanged", **window),
        component("CropForegroundd", **BOTH, source_key="image"),
        component("RandCropByPosNegLabeld", **BOTH, label_key="label", spatial_size=patch, pos=2, neg=1, num_samples=3),
        component("RandShiftIntensityd", keys="image", offsets=0.1, prob=0.5),
        *more,
    ]


def mmar_40() -> dict[str, Json]:
    """The grammar of Clara Train 4.0: the older names of MONAI, lambdas as text, numbers in the networks' arguments."""
    spacing = component("Spacingd", **BOTH, pixdim=[1.5, 1.5, 2.0], mode=["bilinear", "nearest"])
    network = component(
        "UNet",
        **{"dimensions": 3, "in_channels": 1, "out_channels": 2, "channels": [4, 8], "strides": [2]},
        num_res_units=2,
        norm="batch",
    )
    training = {
        "epochs": 30,
        "num_interval_per_valid": 20,
        "learning_rate": 2e-4,
        "multi_gpu": False,
        "amp": True,
        "determinism": {"random_seed": 5},
        "dont_load_ckpt_model": True,
        "train": {
            "loss": component("DiceLoss", to_onehot_y=True, softmax=True),
            "optimizer": component("Adam", lr="{learning_rate}"),
            "lr_scheduler": component("StepLR", step_size=5000, gamma=0.1),
            "model": network,
            "pre_transforms": transforms(
                first=[component("AddChanneld", **BOTH), component("Orientationd", **BOTH, axcodes="RAS"), spacing],
                patch=[16, 16, 16],
                more=[component("ToTensord", **BOTH)],
            ),
            "dataset": {
                "name": "CacheDataset",
                "data_list_file_path": "{DATASET_JSON}",
                "data_file_base_dir": "{DATA_ROOT}",
                "data_list_key": "training",
                "args": {"cache_num": 32, "num_workers": 4},
            },
            "dataloader": component("DataLoader", batch_size=2, shuffle=True),
            "inferer": {"name": "SimpleInferer"},
            "handlers": [
                {
                    "name": "CheckpointLoader",
                    "disabled": "{dont_load_ckpt_model}",
                    "args": {"load_path": "{MMAR_CKPT}"},
                },
                component("ValidationHandler", epoch_level=True, interval="{num_interval_per_valid}"),
                component("StatsHandler", output_transform="lambda x: x['loss']"),
            ],
            "trainer": component("SupervisedTrainer", max_epochs="{epochs}"),
        },
        "validate": {
            "pre_transforms": [{"ref": "LoadImaged"}, {"ref": "Spacingd"}],
            "dataset": {"name": "CacheDataset", "data_list_key": "validation"},
            "inferer": component("SlidingWindowInferer", roi_size=[32, 32, 32], sw_batch_size=4, overlap=0.25),
        },
    }
    inferer = component("SlidingWindowInferer", roi_size=[32, 32, 32], sw_batch_size=4, overlap=0.5)
    return {
        "config_train.json": training,
        "config_validation.json": {"inferer": inferer, "dataset": {"name": "Dataset", "data_list_key": "testing"}},
        "config_inference.json": {"inferer": inferer, "dataset": {"name": "Dataset", "data_list_key": "test"}},
        "environment.json": {"DATA_ROOT": "/no/such/folder", "DATASET_JSON": "config/dataset_0.json"},
        "dataset_0.json": {
            "name": "Spleen",
            "labels": {"0": "background", "1": "spleen"},
            "training": [{"image": "./tr/a.nii.gz", "label": "./tr/a_label.nii.gz"}],
            "validation": [{"image": "tr/b.nii.gz", "label": "tr/b_label.nii.gz"}],
            "testing": [{"image": "tr/c.nii.gz", "label": "tr/c_label.nii.gz"}],
            "test": ["ts/d.nii.gz"],
        },
    }


def mmar_41() -> dict[str, Json]:
    """The grammar of 4.1: references and expressions, sizes as variables, split names in the environment."""
    files = mmar_40()
    flips = [component("RandFlipd", **BOTH, spatial_axis=[axis], prob=0.5) for axis in range(3)]
    size = ["{roi_x}", "{roi_y}", "{roi_z}"]
    lambda_text = "lambda x: (x.astype(np.float16) > 0.0).astype(np.float16)"
    train = {
        "loss": component("DiceCELoss", jaccard=False, to_onehot_y=True, softmax=True, squared_pred=True, batch=True),
        "optimizer": component("Novograd", params="#@model.parameters()", lr="{learning_rate}"),
        "lr_scheduler": component("StepLR", optimizer="@optimizer", step_size=20, gamma=0.5),
        "model": component(
            "SegResNet",
            **{"spatial_dims": 3, "in_channels": "{INPUT_CHANNELS}", "out_channels": "{out_classes}"},
            **{"init_filters": 8, "dropout_prob": 0.1, "norm_name": "group", "num_groups": 8},
            blocks_down=[1, 2],
            blocks_up=[1],
        ),
        "pre_transforms": transforms(
            first=[
                component("Lambdad", keys=["label"], func=lambda_text),
                component("EnsureChannelFirstd", **BOTH),
                component("Orientationd", **BOTH, axcodes="RAS"),
                component("Spacingd", **BOTH, pixdim=[1.0, 1.0, 1.0], mode=["bilinear", "nearest"]),
                component("SpatialPadd", **BOTH, spatial_size=size, mode=["minimum", "constant"]),
            ],
            patch=size,
            more=[*flips, component("RandRotate90d", **BOTH, prob=0.2, max_k=3)],
        ),
        "dataset": {
            "name": "CacheDataset",
            "data_list_file_path": "{DATASET_JSON}",
            "data_file_base_dir": "{DATA_ROOT}",
            "data_list_key": "{TRAIN_DATALIST_KEY}",
            "args": {"transform": "@pre_transforms"},
        },
        "dataloader": component("ThreadDataLoader", dataset="@dataset", batch_size=4),
        "handlers": [component("ValidationHandler", validator="@evaluator", interval="{num_interval_per_valid}")],
        "trainer": component("SupervisedTrainer", max_epochs="{epochs}", network="@model", amp="{amp}"),
    }
    files["config_train.json"] |= {"roi_x": 32, "roi_y": 32, "roi_z": 16, "out_classes": 2, "train": train}
    files["config_train.json"]["network_summary"] = {"network": "@model", "input_size": [2, "{INPUT_CHANNELS}"]}
    files["environment.json"] |= {"INPUT_CHANNELS": 1, "OUTPUT_CHANNELS": 2, "TRAIN_DATALIST_KEY": "fold_1"}
    files["dataset_0.json"]["fold_1"] = files["dataset_0.json"].pop("training")
    return files


def bundle() -> dict[str, Json]:
    """A MONAI bundle: `_target_`, references, copies and expressions."""
    target: Callable[..., Json] = lambda name, **args: {"_target_": name, **args}  # noqa: E731  # as a literal's word
    deterministic = [
        {"_target_": t["name"], **t["args"]} for t in transforms(first=[], patch=[16, 16, 16], more=[])[:2]
    ]
    spacing = target("Spacingd", keys="image", pixdim=[1.5, 1.5, 2.0], mode="bilinear")
    network = target(
        "monai.networks.nets.UNet",
        **{"spatial_dims": 3, "in_channels": 1, "out_channels": 3, "channels": "@widths", "strides": [2]},
        num_res_units=2,
        norm=["BATCH", {}],
    )
    return {
        "metadata.json": {
            "name": "two organs",
            "network_data_format": {"outputs": {"pred": {"channel_def": {"0": "bg", "1": "liver", "2": "spleen"}}}},
        },
        "train.json": {
            "imports": ["$import glob"],
            "widths": [4, 8],
            "epochs": 30,
            "dataset_dir": "/workspace/data",
            "images": "$sorted(glob.glob(@dataset_dir + '/*.nii.gz'))",
            "network_def": network,
            "network": "$@network_def.to(@device)",
            "loss": target("DiceCELoss", to_onehot_y=True, softmax=True, lambda_ce=0.5),
            "optimizer": target("torch.optim.Adam", params="$@network.parameters()", lr=1e-4),
            "train": {
                "deterministic_transforms": [
                    *deterministic,
                    target("Orientationd", **BOTH, axcodes="RAS"),
                    spacing,
                ],
                "random_transforms": [
                    target("RandCropByPosNegLabeld", **BOTH, spatial_size=[16, 16, 16], num_samples=4),
                    target("RandGaussianNoised", keys="image", prob=0.1),
                ],
                "dataset": target("CacheDataset", data="$[{'image': i} for i in @images]"),
                "dataloader": target("DataLoader", dataset="@train#dataset", batch_size=2),
                "handlers": [target("ValidationHandler", interval="@val_interval")],
                "trainer": target("SupervisedTrainer", max_epochs="@epochs", amp=True),
            },
            "val_interval": 5,
            "validate": {
                "preprocessing": target("Compose", transforms="%train#deterministic_transforms"),
                "inferer": target("SlidingWindowInferer", roi_size=[16, 16, 16], sw_batch_size=4, overlap=0.5),
            },
            "initialize": ["$monai.utils.set_determinism(seed=123)"],
            "run": ["$@train#trainer.run()"],
        },
    }


def write_files(folder: Path, files: dict[str, Json], state: Any = None) -> Path:
    configs = folder / ("config" if "environment.json" in files else "configs")
    configs.mkdir(parents=True)
    for name, content in files.items():
        (configs / name).write_text(json.dumps(content))
    if state is not None:
        (folder / "models").mkdir()
        torch.save(state, folder / "models" / "model.pt")
    return folder


def test_an_mmar_of_4_0(cli: Callable[..., Any], tmp_path: Path):
    write_files(tmp_path / "clara spleen_1", mmar_40(), {"a": torch.zeros(1)})
    result = cli("import-mmar", "clara spleen_1", "--output", "new")
    assert (result.code, result.err) == (0, "")
    recipe = load_recipe(str(tmp_path / "new" / "recipe.toml"))
    plain = recipe.to_dict()
    assert (recipe.name, recipe.labels) == ("clara_spleen_1", {"1": "spleen"})
    assert plain["preprocess"] == {
        "spacing_mm": [1.5, 1.5, 2.0],
        "hu_window": [-57.0, 164.0],
        "crop_foreground": True,
        "binarize_labels": False,
        "clip": True,
        "keep_slice_spacing": False,
    }
    network = {"kind": "unet", "channels": [4, 8], "strides": [2], "num_res_units": 2, "norm": "batch"}
    assert plain["network"] == network
    assert plain["sampling"] == {"patch_size": [16, 16, 16], "patches_per_case": 3, "positive_fraction": 2 / 3}
    assert plain["augmentation"]["shift_offset"] == 0.1
    objective = {"kind": "dice", "squared_pred": False, "batch": False, "include_background": True}
    assert plain["objective"].items() >= objective.items()
    assert plain["optimizer"].items() >= {"kind": "adam", "lr": 2e-4}.items()
    assert plain["schedule"].items() >= {"kind": "step", "step_epochs": 5000, "gamma": 0.1}.items()
    training = {"epochs": 30, "batch_cases": 2, "validation_interval_epochs": 20, "validation_overlap": 0.25}
    assert plain["training"].items() >= {**training, "amp": True, "seed": 5}.items()
    assert plain["inference"] == {"window_size": [32, 32, 32], "overlap": 0.5, "batch_windows": 4}
    lines = result.out.splitlines()
    assert lines[-1].split(maxsplit=1) == ["next", "ctseg finetune new/recipe.toml --from 'clara spleen_1'"]
    assert "not carried over  0" in result.out


def test_every_number_has_its_source(cli: Callable[..., Any], tmp_path: Path):
    write_files(tmp_path / "old", mmar_40())
    cli("import-mmar", "old", "--output", "new", "--set", "training.seed=9")
    text = (tmp_path / "new" / "recipe.toml").read_text()
    lines = {line.partition(" = ")[0]: line.partition(" # ")[2] for line in text.splitlines() if " = " in line}
    assert lines["spacing_mm"] == "config_train.json train.pre_transforms[3].args.pixdim"
    assert lines["epochs"] == "config_train.json epochs"
    assert lines["lr"] == "config_train.json train.optimizer.args.lr"
    assert lines["overlap"] == "config_inference.json inferer.args.overlap"
    assert lines["squared_pred"] == "default of MONAI's DiceLoss"
    assert lines["seed"] == "", "given by --set, so not of the MMAR"
    assert load_recipe(str(tmp_path / "new" / "recipe.toml")).training.seed == 9
    report = json.loads((tmp_path / "new" / "import.json").read_text())
    assert report["carried_over"]["training.epochs"] == "config_train.json epochs"


def test_an_mmar_of_4_1(cli: Callable[..., Any], tmp_path: Path):
    write_files(tmp_path / "bone", mmar_41())
    result = cli("import-mmar", "bone", "--output", "new", "--json")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out) == json.loads((tmp_path / "new" / "import.json").read_text())
    assert json.loads(result.out)["not_carried_over"] == []
    plain = load_recipe(str(tmp_path / "new" / "recipe.toml")).to_dict()
    assert plain["preprocess"]["binarize_labels"] is True
    network = {"kind": "segresnet", "init_filters": 8, "blocks_down": [1, 2], "blocks_up": [1], "dropout_prob": 0.1}
    assert plain["network"] == network
    assert plain["sampling"]["patch_size"] == [32, 32, 16]
    assert plain["augmentation"]["flip_probability"] == 0.5
    assert plain["augmentation"]["rotate90_probability"] == 0.2
    assert plain["objective"]["kind"] == "dice_ce"
    assert plain["optimizer"]["kind"] == "novograd"
    assert plain["training"]["batch_cases"] == 4
    manifest = read_manifest(tmp_path / "new" / "manifest.json", tmp_path)
    assert [(case.name, case.split) for case in manifest.cases] == [
        ("a", "training"),
        ("b", "validation"),
        ("c", "testing"),
        ("d", "test"),
    ]
    assert manifest.cases[0].image == tmp_path / "tr/a.nii.gz"


def test_ahnet_with_its_defaults_and_half_a_cosine(cli: Callable[..., Any], tmp_path: Path):
    files = mmar_41()
    train = files["config_train.json"]["train"]
    files["config_train.json"]["roi_z"] = 32
    train["model"] = component("AHNet", dimensions=3, in_channels=1, out_channels=2, upsample_mode="trilinear")
    train["lr_scheduler"] = component("CosineAnnealingLR", T_max=30, eta_min=2e-5)
    write_files(tmp_path / "lung", files)
    assert cli("import-mmar", "lung", "--output", "new").code == 0
    plain = load_recipe(str(tmp_path / "new" / "recipe.toml")).to_dict()
    network = {"kind": "ahnet", "layers": [3, 4, 6, 3], "psp_block_num": 4, "upsample_mode": "trilinear"}
    assert plain["network"] == network
    assert plain["schedule"]["kind"] == "cosine"
    assert plain["schedule"]["final_fraction"] == pytest.approx(0.1)


@pytest.mark.parametrize(("old", "new"), [("Unet", "UNet"), ("unet", "UNet"), ("SegResnet", "SegResNet")])
def test_networks_by_their_names_before_monai_1_0(cli: Callable[..., Any], tmp_path: Path, old: str, new: str):
    files = mmar_40() if new == "UNet" else mmar_41()
    training = files["config_train.json"]["train"]
    assert training["model"]["name"] == new
    write_files(tmp_path / "new", files)
    training["model"]["name"] = old
    write_files(tmp_path / "old", files)
    recipes = []
    for name in ("new", "old"):
        assert cli("import-mmar", name, "--output", f"from-{name}").code == 0
        recipes.append(load_recipe(str(tmp_path / f"from-{name}" / "recipe.toml")).network)
    assert recipes[0] == recipes[1]


def test_data_named_at_import_becomes_absolute(cli: Callable[..., Any], tmp_path: Path):
    write_files(tmp_path / "old", mmar_40())
    result = cli("import-mmar", "old", "--output", "new", "--data", "images")
    assert "the folder of the images is not known here" not in result.out
    content = json.loads((tmp_path / "new" / "manifest.json").read_text())
    assert content["training"][0]["image"] == str(tmp_path / "images" / "tr" / "a.nii.gz")


@pytest.mark.parametrize("kind", ["mmar", "bundle"])
def test_finetune_goes_on_from_it(cli: Callable[..., Any], tiny_data: Path, tmp_path: Path, kind: str):
    """The whole way: import, train on from the weights that lie in the folder."""
    files = mmar_40() if kind == "mmar" else bundle()
    if kind == "bundle":
        files["train.json"]["network_def"]["out_channels"] = 2
    write_files(tmp_path / "old", files)
    options = ["--set", "preprocess.spacing_mm=[8,8,8]", "--set", "training.epochs=1", "--set", "labels={1='spleen'}"]
    assert cli(f"import-{kind}", "old", "--output", "new", "--manifest", tiny_data, *options).code == 0
    state = network_for(load_recipe(str(tmp_path / "new/recipe.toml"))).state_dict()
    (tmp_path / "old" / "models").mkdir()
    torch.save({"model": state, "train_conf": files}, tmp_path / "old" / "models" / "model.pt")
    command = ["finetune", "new/recipe.toml", "--from", "old", "--json", "--quiet"]
    result = cli(*command)
    assert (result.code, result.err) == (0, "")
    answer = json.loads(result.out)
    assert answer["run"] == "runs/old-finetuned-001"
    assert answer["start"]["kind"] == "MMAR checkpoint"
    assert len(answer["start"]["matched"]) == len(state)


def test_what_is_not_carried_over_is_listed_with_its_reason(cli: Callable[..., Any], tmp_path: Path):
    files = mmar_40()
    train = files["config_train.json"]["train"]
    files["config_train.json"]["multi_gpu"] = True
    train["loss"]["args"] |= {"jaccard": True, "weight": [1, 2]}
    train["pre_transforms"] += [
        {"path": "my_code.Sharpen", "args": {"keys": "image"}},
        component("RandFlipd", **BOTH, spatial_axis=[0], prob=0.5),
        component("RandGaussianNoised", keys="image", prob=0.1),
        component("Lambdad", keys=["label"], func="lambda x: __import__('os').system('true')"),
    ]
    files["config_validation.json"]["inferer"] = component("SlidingWindowInferer", roi_size=[64, 64, 64], overlap=0.5)
    files["config_inference.json"]["post_transforms"] = [component("KeepLargestConnectedComponentd", keys="pred")]
    write_files(tmp_path / "old", files)
    result = cli("import-mmar", "old", "--output", "new", "--json")
    assert result.code == 0
    left = {(entry["where"], entry["reason"]) for entry in json.loads(result.out)["not_carried_over"]}
    assert left == {
        ("config_train.json multi_gpu", "not of the recipe; train with --gpus N"),
        ("config_train.json train.loss.args.jaccard", "ctseg has only False"),
        ("config_train.json train.loss.args.weight", "a recipe has it not"),
        ("config_train.json train.pre_transforms[9]", "own code of the pipeline (my_code), which is never run"),
        (
            "config_train.json train.pre_transforms[10].args.prob",
            "a recipe flips along all three axes with one probability, or not at all",
        ),
        ("config_train.json train.pre_transforms[11]", "a recipe has nothing of the kind"),
        (
            "config_train.json train.pre_transforms[12]",
            "code is never run: lambda x: __import__('os').system('true')",
        ),
        (
            "config_validation.json inferer.args.roi_size",
            "differs from config_inference.json inferer.args.roi_size, which gave inference.window_size",
        ),
        ("default of MONAI's SlidingWindowInferer", "differs from config_inference.json inferer.args.sw_batch_size, "
         "which gave inference.batch_windows"),
        ("config_inference.json post_transforms[0]", "a recipe has nothing of the kind"),
    }  # fmt: skip
    assert all(reason in (tmp_path / "new" / "recipe.toml").read_text() for _, reason in left)


def test_a_bundle(cli: Callable[..., Any], tmp_path: Path):
    write_files(tmp_path / "organs", bundle())
    result = cli("import-bundle", "organs", "--output", "new", "--json")
    assert (result.code, result.err) == (0, "")
    recipe = load_recipe(str(tmp_path / "new" / "recipe.toml"))
    plain = recipe.to_dict()
    assert recipe.labels == {"1": "liver", "2": "spleen"}
    assert recipe.title == "two organs, imported from its MONAI bundle"
    assert plain["network"]["channels"] == [4, 8]
    assert plain["network"]["norm"] == "batch"
    training = {"epochs": 30, "batch_cases": 2, "validation_interval_epochs": 5, "validation_overlap": 0.5}
    assert plain["training"].items() >= {**training, "amp": True, "seed": 123}.items()
    assert plain["inference"]["window_size"] == [16, 16, 16]
    report = json.loads(result.out)
    assert [(entry["where"], entry["name"]) for entry in report["not_carried_over"]] == [
        ("train.json loss.lambda_ce", "DiceCELoss lambda_ce=0.5"),
        ("train.json train.random_transforms[1]", "RandGaussianNoised"),
    ]
    assert report["manifest"] is None
    assert "no data list was carried over" in report["notes"][0]


Change = Callable[[dict[str, Json]], None]


def change_train(path: str, value: Any, **data_list: Any) -> Change:
    """A function that sets a value below `train` of config_train.json."""

    def change(files: dict[str, Json]) -> None:
        files["dataset_0.json"] |= data_list
        *parents, last = path.split(".")
        table = files["config_train.json"]["train"]
        for parent in parents:
            table = table[parent]
        table[last] = value

    return change


def without(name: str) -> Change:
    def change(files: dict[str, Json]) -> None:
        train = files["config_train.json"]["train"]
        train["pre_transforms"] = [t for t in train["pre_transforms"] if t["name"] != name]

    return change


def unet(channels: list[int], strides: list[int]) -> Json:
    return component("UNet", out_channels=2, channels=channels, strides=strides, norm="batch")


def cosine(last: Any) -> Json:
    return component("CosineAnnealingLR", T_max=30, eta_min=last)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            change_train("model.name", "DynUNet"),
            "network 'DynUNet' is not one that a recipe knows (UNet, AHNet, SegRes",
        ),
        (change_train("model", {"path": "mine.UNet", "args": {}}), "network 'UNet' is not one that a recipe knows"),
        (change_train("model.args.in_channels", 3), "UNet in_channels=3: ctseg has only 1"),
        (change_train("model.args.dimensions", 2), "UNet dimensions=2: ctseg has only 3"),
        (change_train("model.args.act", "relu"), "UNet act=relu: ctseg has only prelu or PRELU"),
        (change_train("model.args.norm", "group"), "network.norm: expected one of batch, instance, got 'group'"),
        (change_train("model.args.channels", "#[2**n for n in range(3)]"), "an expression, which is not evaluated"),
        (change_train("model.args.channels", "{nowhere}"), "an expression, which is not evaluated"),
        (change_train("loss.name", "FocalLoss"), "a recipe knows DiceLoss, DiceCELoss; choose one with --set"),
        (change_train("loss.args.softmax", False), "a recipe's loss is on softmax scores"),
        (change_train("optimizer.name", "SGD"), "a recipe knows Adam, Novograd; choose one with --set"),
        (without("Spacingd"), "preprocess.spacing_mm: missing"),
        (without("ScaleIntensityRanged"), "preprocess.hu_window: missing"),
        (without("RandCropByPosNegLabeld"), "sampling: missing"),
        (change_train("dataloader.args.batch_size", 1e999), "Infinity is not a number"),
        (change_train("optimizer.args.lr", -1), "optimizer.lr: must be above 0"),
        (change_train("model", unet([4] * 20_001, [2] * 20_000)), "channels: at most 16 levels, got 20001"),
        (change_train("model.args.out_channels", 10**4000), "labels: at most 255 fit a uint8 mask, got 256"),
        (change_train("lr_scheduler", cosine(10**4000)), "schedule.final_fraction: must be at most 1"),
        (change_train("lr_scheduler", cosine("#lr")), "eta_min: #lr: an expression, which is not evaluated; give sche"),
        (change_train("pre_transforms", [component("RandShiftIntensityd", offsets="#x")]), "give augmentation.shift_o"),
        (change_train("dataloader.args.batch_size", "#x"), "batch_cases: expected int, got the expression '#x'"),
        (lambda files: files["config_train.json"].update(amp="#x"), "amp: expected bool, got the expression '#x'"),
        (change_train("model.args.out_channels", "#x", labels={}), "out_channels: #x: an expression, which is not ev"),
        (change_train("pre_transforms", [component("RandCropByPosNegLabeld", pos="#x")]), "give sampling.positive_fra"),
        (change_train("model.args.strides", [3]), "every size must be a multiple of 3"),
    ],
)
def test_what_no_recipe_can_say_is_refused(cli: Callable[..., Any], tmp_path: Path, change: Change, message: str):
    files = mmar_40()
    change(files)
    write_files(tmp_path / "old", files)
    result = cli("import-mmar", "old", "--output", "new")
    assert (result.code, result.out) == (2, "")
    assert message in result.message
    assert not (tmp_path / "new").exists()


def test_what_is_missing_can_be_given(cli: Callable[..., Any], tmp_path: Path):
    files = mmar_40()
    without("Spacingd")(files)
    write_files(tmp_path / "old", files)
    result = cli("import-mmar", "old", "--output", "new", "--set", "preprocess.spacing_mm=[1,1,1]")
    assert result.code == 0
    assert load_recipe(str(tmp_path / "new/recipe.toml")).preprocess.spacing_mm == (1.0, 1.0, 1.0)


HOSTILE_LISTS = {
    "outside": ({"training": [{"image": "../../etc/passwd"}]}, "relative paths may not contain '..'"),
    "no list": ({"training": "all"}, "expected a list, got str"),
    "no path": ({"training": [{"image": ["a", "b"]}]}, "expected a path or"),
    "twice": ({"training": ["a.nii"], "validation": ["a.nii"]}, "image listed 2 times"),
    "no cases": ({"name": "x"}, "no cases"),
}


@pytest.mark.parametrize("kind", HOSTILE_LISTS)
def test_a_data_list_that_breaks_a_rule_is_left_behind(cli: Callable[..., Any], tmp_path: Path, kind: str):
    content, message = HOSTILE_LISTS[kind]
    files = mmar_40()
    files["dataset_0.json"] = content
    write_files(tmp_path / "old", files)
    result = cli("import-mmar", "old", "--output", "new", "--json")
    assert result.code == 0
    assert message in str(json.loads(result.out)["not_carried_over"])
    assert not (tmp_path / "new" / "manifest.json").exists()


@pytest.mark.parametrize(
    "path", ["../secret.json", "/etc/hostname", "link.json", "config", "none.json", "a\0b", "a" * 5000]
)
def test_a_data_list_outside_of_the_folder_is_not_read(cli: Callable[..., Any], tmp_path: Path, path: str):
    files = mmar_40()
    files["environment.json"]["DATASET_JSON"] = path
    write_files(tmp_path / "old", files)
    (tmp_path / "secret.json").write_text(json.dumps({"training": ["secret.nii"]}))
    (tmp_path / "old" / "link.json").symlink_to(tmp_path / "secret.json")
    files["environment.json"]["DATA_ROOT"] = "/" + "a" * 5000
    result = cli("import-mmar", "old", "--output", "new", "--json")
    assert result.code == 0
    assert "no such file inside the folder" in json.loads(result.out)["not_carried_over"][0]["reason"]
    assert not (tmp_path / "new" / "manifest.json").exists()


def test_numbers_beyond_what_a_float_holds(cli: Callable[..., Any], tmp_path: Path):
    files = mmar_40()
    files["config_train.json"]["train"]["pre_transforms"][6]["args"] |= {"pos": 10**400, "neg": 0.5}
    write_files(tmp_path / "old", files)
    assert cli("import-mmar", "old", "--output", "new").code == 0
    assert load_recipe(str(tmp_path / "new/recipe.toml")).sampling.positive_fraction == 1.0


def deep(levels: int) -> str:
    return '{"a":' * levels + "1" + "}" * levels


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"epochs": NaN}', "NaN is not a number"),
        ('{"epochs": 1e999}', "1e999 is not a number"),
        ('{"epochs": 1, "epochs": 2}', "key 'epochs' stands twice"),
        ('{"a": [' + '{"name": "x"},' * 10_000 + '{"name": "x"}]}', "more than 10000 components"),
        (deep(100), "nested deeper than 32 levels"),
        (deep(100_000), "cannot be read as JSON"),
        ('{"a": "' + "x" * (4 * 2**20) + '"}', "larger than 4 MiB"),
        ('{"epochs": 1' + "0" * 5000 + "}", "cannot be read as JSON"),
        ('{"epochs": "{epochs}", "train": {"model": {"name": "UNet", "args": {}}}}', "does not say all that a recipe"),
    ],
)
def test_hostile_configurations(cli: Callable[..., Any], tmp_path: Path, text: str, message: str):
    write_files(tmp_path / "old", mmar_40())
    (tmp_path / "old" / "config" / "config_train.json").write_text(text)
    result = cli("import-mmar", "old", "--output", "new")
    assert result.code == 2
    assert message in result.message
    assert not (tmp_path / "new").exists()


def test_a_large_configuration_takes_no_long(cli: Callable[..., Any], tmp_path: Path):
    """As large as is read at all, of names and references."""
    files = mmar_40()
    files["config_train.json"] |= {f"v{n}": "{epochs}" for n in range(100_000)}
    write_files(tmp_path / "old", files)
    start = time.monotonic()
    assert cli("import-mmar", "old", "--output", "new").code == 0
    organs = bundle()
    organs["train.json"] |= {"long": list(range(100_000)), **{f"v{n}": "@long" for n in range(100_000)}}
    write_files(tmp_path / "organs", organs)
    assert cli("import-bundle", "organs", "--output", "newer").code == 0
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    "values",
    [
        {"a": "x" * 10**6, "b": "{a}" * 10**6},
        {"a": "x" * 250, **{f"b{n}": "{a}" * 80 for n in range(10_000)}},
        {"k" * 10**6: [{"name": "x"}] * 9_000},
    ],
    ids=["long in long", "many of many", "long keys"],
)
def test_a_small_configuration_does_not_fill_the_memory(tmp_path: Path, values: Json):
    """As text with all names inside replaced, and as places, these are a hundred GB, or ten."""
    path = write_files(tmp_path / "old", {"environment.json": {}, "config_train.json": values})
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))"
    run = "from ctseg.foreign.configs import mmar_config; mmar_config(pathlib.Path(sys.argv[1]), {})"
    command = [sys.executable, "-c", f"import pathlib, sys; {limit}; {run}", path / "config" / "config_train.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_messages_stay_short(cli: Callable[..., Any], tmp_path: Path):
    files = mmar_40()
    files["config_train.json"]["train"]["pre_transforms"][3]["args"]["pixdim"] = [1] * 10**5
    write_files(tmp_path / "old", files)
    result = cli("import-mmar", "old", "--output", "new")
    assert "preprocess.spacing_mm: expected 3 values, got [1, 1, 1" in result.message
    assert len(result.message) < 1000


@pytest.mark.parametrize("name", ["manifest.json", "import.json"])
def test_no_file_is_replaced(cli: Callable[..., Any], tmp_path: Path, name: str):
    write_files(tmp_path / "old", mmar_40())
    (tmp_path / name).write_text("precious")
    result = cli("import-mmar", "old", "--output", ".")
    assert (result.code, result.out) == (2, "")
    assert result.message == f"--output .: already holds a {name}; name another folder"
    assert (tmp_path / name).read_text() == "precious"


def test_a_full_disk_leaves_nothing(cli: Callable[..., Any], tmp_path: Path, mount: Callable[[str], Path]):
    files = mmar_40()
    files["config_train.json"]["train"]["odd"] = [component(f"Odd{n}") for n in range(200)]
    write_files(tmp_path / "old", files)
    disk = mount("size=32k")
    result = cli("import-mmar", "old", "--output", disk / "new")
    assert (result.code, result.out) == (2, "")
    assert "No space left on device" in result.message
    assert not list((disk / "new").iterdir())


def test_a_data_list_of_ones_own_is_named_in_messages(cli: Callable[..., Any], tmp_path: Path):
    write_files(tmp_path / "old", mmar_40())
    for text, message in (
        ('{"training": 3}', "training: expected a list"),
        ('{"training": [{"image": "a.nii", "weight": 1e999}]}', "expected a number above 0 and at most 1e+06, got inf"),
        ("3", "expected a JSON object or list, got int"),
    ):
        (tmp_path / "mine.json").write_text(text)
        result = cli("import-mmar", "old", "--output", "new", "--manifest", "mine.json")
        assert result.code == 2
        assert "'mine.json': " in result.message
        assert message in result.message


def test_names_cannot_break_out_of_a_comment(cli: Callable[..., Any], tmp_path: Path):
    """Keys and values of a stranger end up in comments and strings of the recipe, and on the terminal."""
    files = mmar_40()
    files["config_train.json"]["train"]["evil\n[training]\nepochs = 1\n"] = component("x\nepochs = 2\x1b[31m", a=1)
    files["dataset_0.json"]["labels"]["1"] = 'a"\nb = 1\x1b\ud800\\'
    write_files(tmp_path / "old", files)
    result = cli("import-mmar", "old", "--output", "new")
    assert result.code == 0
    assert "\x1b" not in result.out
    recipe = load_recipe(str(tmp_path / "new" / "recipe.toml"))
    assert recipe.training.epochs == 30
    assert recipe.labels == {"1": 'a"?b = 1??\\'}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["import-mmar", "empty", "--output", "new"], "'empty' is not an MMAR: it has no config/config_train.json"),
        (["import-mmar", "a" * 5000, "--output", "new"], "File name too long; name another path or ask for access"),
        (["import-bundle", "empty", "--output", "new"], "'empty' is not a MONAI bundle that can be read"),
        (["import-mmar", "old", "--output", "full"], "--output full: already holds a recipe.toml"),
        (
            ["import-mmar", "old", "--output", "new", "--manifest", "none.json"],
            "'none.json': cannot be read: No such file or directory; check the path",
        ),
        (["import-mmar", "old", "--output", "new", "--set", "training.epoch=1"], "unknown key; did you mean 'epochs'?"),
        (["import-mmar", "old"], "Missing option '--output'"),
    ],
)
def test_wrong_use(cli: Callable[..., Any], tmp_path: Path, arguments: list[str], message: str):
    write_files(tmp_path / "old", mmar_40())
    for name in ("empty", "full"):
        (tmp_path / name).mkdir()
    (tmp_path / "full" / "recipe.toml").write_text("")
    result = cli(*arguments)
    assert (result.code, result.out) == (2, "")
    assert message in result.message
    assert not (tmp_path / "new").exists()
