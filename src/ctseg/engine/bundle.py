"""A checkpoint as a MONAI bundle: a folder that `python -m monai.bundle run` predicts with, without ctseg.

Its chain is the one that `predict` equals: RAS, spacing, window, sliding window, softmax, back to the CT's own grid,
argmax. The recipe travels as `configs/ctseg_recipe.json`, so that `ctseg import-bundle` gives it back exactly.
"""

from __future__ import annotations

import importlib.metadata
import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ctseg
from ctseg.engine.model import Forward, forward_of
from ctseg.engine.runtime import Runtime
from ctseg.engine.weights import read_weights
from ctseg.errors import ModelError
from ctseg.files import atomic_path, make_folder, write_json, write_text
from ctseg.foreign.importing import WEIGHTS, network_values
from ctseg.networks import network_for
from ctseg.recipe import RECIPE_ENTRY, Recipe, recipe_from_dict
from ctseg.specs import AHNetSpec, NetworkSpec, SegResNetSpec, UNetSpec

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20220324.json"


def write_bundle(folder: Path, recipe: Recipe, network: nn.Module) -> None:
    """Writes the bundle's files into `folder`.

    Raises:
        OutputError: if a file cannot be written.
    """
    for name in ("configs", "models", "docs"):
        make_folder(folder / name)
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    with atomic_path(folder / WEIGHTS) as temporary:
        temporary.write_bytes(buffer.getbuffer())
    write_json(folder / "configs" / "metadata.json", _metadata(recipe))
    write_json(folder / "configs" / "inference.json", inference_config(recipe))
    write_json(folder / "configs" / RECIPE_ENTRY, recipe.to_dict())
    write_text(folder / "docs" / "README.md", _readme(recipe))
    write_text(folder / "LICENSE", _licence(recipe))


def bundle_forward(folder: Path, recipe: Recipe, runtime: Runtime) -> Forward:
    """The bundle's network, read back from its own network_def, as data, and its weights.

    Raises:
        CtsegError: if they cannot be read or do not fit each other.
    """
    plain = {**recipe.to_dict(), "network": network_values(folder / "configs" / "inference.json")}
    network = network_for(recipe_from_dict(plain, f"network_def of '{folder}'"))
    try:
        network.load_state_dict(read_weights(folder / WEIGHTS).tensors)
    except RuntimeError as error:
        raise ModelError(f"bundle '{folder}': its weights do not fit its network_def") from error
    return forward_of(network, runtime)


def network_definition(spec: NetworkSpec, out_channels: int) -> dict[str, Any]:
    """What MONAI's parser builds the recipe's network from."""
    common = {"spatial_dims": 3, "in_channels": 1, "out_channels": out_channels}
    if isinstance(spec, UNetSpec):
        levels = {"channels": list(spec.channels), "strides": list(spec.strides)}
        return {"_target_": "UNet", **common, **levels, "num_res_units": spec.num_res_units, "norm": spec.norm}
    if isinstance(spec, AHNetSpec):
        about = {"psp_block_num": spec.psp_block_num, "upsample_mode": spec.upsample_mode}
        return {"_target_": "AHNet", "layers": list(spec.layers), **common, **about}
    assert isinstance(spec, SegResNetSpec)
    blocks = {"blocks_down": list(spec.blocks_down), "blocks_up": list(spec.blocks_up)}
    dropout = {"dropout_prob": spec.dropout_prob or None}
    return {"_target_": "SegResNet", **common, "init_filters": spec.init_filters, **blocks, **dropout}


def inference_config(recipe: Recipe) -> dict[str, Any]:
    """`configs/inference.json`, in MONAI's grammar and with the ids that its bundles have in common."""
    low, high = recipe.preprocess.hu_window
    inference = recipe.inference
    return {
        "imports": ["$import glob", "$import os"],
        "bundle_root": ".",
        "output_dir": "$@bundle_root + '/eval'",
        "output_ext": ".nii.gz",
        "output_postfix": "seg",
        "dataset_dir": "$@bundle_root + '/data'",
        "datalist": "$sorted(glob.glob(os.path.join(@dataset_dir, '*.nii*')))",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": network_definition(recipe.network, recipe.num_classes),
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image"},
                {"_target_": "EnsureChannelFirstd", "keys": "image"},
                {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"},
                {
                    "_target_": "Spacingd",
                    "keys": "image",
                    "pixdim": list(recipe.preprocess.spacing_mm),
                    "mode": "bilinear",
                },
                {
                    "_target_": "ScaleIntensityRanged",
                    "keys": "image",
                    "a_min": low,
                    "a_max": high,
                    "b_min": 0.0,
                    "b_max": 1.0,
                    "clip": True,
                },
                {"_target_": "EnsureTyped", "keys": "image"},
            ],
        },
        "dataset": {
            "_target_": "Dataset",
            "data": "$[{'image': i} for i in @datalist]",
            "transform": "@preprocessing",
        },
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@dataset",
            "batch_size": 1,
            "shuffle": False,
            "num_workers": 0,
        },
        "inferer": {
            "_target_": "SlidingWindowInferer",
            "roi_size": list(inference.window_size),
            "sw_batch_size": inference.batch_windows,
            "overlap": inference.overlap,
        },
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Activationsd", "keys": "pred", "softmax": True},
                {
                    "_target_": "Invertd",
                    "keys": "pred",
                    "transform": "@preprocessing",
                    "orig_keys": "image",
                    "nearest_interp": False,
                    "to_tensor": True,
                },
                {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
                {
                    "_target_": "SaveImaged",
                    "keys": "pred",
                    "output_dir": "@output_dir",
                    "output_ext": "@output_ext",
                    "output_postfix": "@output_postfix",
                    "output_dtype": "$numpy.uint8",
                    "separate_folder": False,
                    "resample": False,
                },
            ],
        },
        "handlers": [{"_target_": "StatsHandler", "iteration_log": False}],
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "val_handlers": "@handlers",
            "amp": "$@device.type != 'cpu'" if recipe.training.amp else False,
        },
        "checkpointloader": {
            "_target_": "CheckpointLoader",
            "load_path": "$@bundle_root + '/models/model.pt'",
            "load_dict": {"model": "@network"},
            "map_location": "@device",
        },
        "initialize": ["$monai.utils.set_determinism(seed=0)", "$@checkpointloader(@evaluator)"],
        "run": ["$@evaluator.run()"],
    }


def _metadata(recipe: Recipe) -> dict[str, Any]:
    labels = {"0": "background", **recipe.labels}
    size = list(recipe.inference.window_size)
    patch = {"spatial_shape": size, "dtype": "float32", "value_range": [0, 1], "is_patch_data": True}
    image = {"type": "image", "format": "hounsfield", "modality": "CT", "num_channels": 1, **patch}
    scores = {"type": "image", "format": "segmentation", "num_channels": recipe.num_classes, **patch}
    metadata = {
        "schema": SCHEMA,
        "version": "0.1.0",
        "changelog": {"0.1.0": f"exported by ctseg {ctseg.__version__}"},
        "monai_version": importlib.metadata.version("monai"),
        "pytorch_version": torch.__version__.partition("+")[0],
        "numpy_version": importlib.metadata.version("numpy"),
        "required_packages_version": {
            "nibabel": importlib.metadata.version("nibabel"),
            "pytorch-ignite": "0.4.11",
        },
        "name": recipe.name,
        "task": f"Segmentation of {', '.join(recipe.labels.values())} in CT",
        "description": recipe.title,
        "authors": "trained with ctseg",
        "copyright": "that of whoever trained the weights; see LICENSE",
        "data_source": recipe.source,
        "data_type": "nibabel",
        "image_classes": "single channel CT in Hounsfield units",
        "label_classes": ", ".join(f"{value} is {name}" for value, name in labels.items()),
        "pred_classes": f"{recipe.num_classes} channels of scores, one for each class",
        "intended_use": "Research use only, not for diagnosis",
        "network_data_format": {
            "inputs": {"image": {**image, "channel_def": {"0": "image"}}},
            "outputs": {"pred": {**scores, "channel_def": labels}},
        },
    }
    plain: dict[str, Any] = _without_code(metadata)
    return plain


def _without_code(item: Any) -> Any:
    """The same with no text that MONAI's parser would take for an expression or a reference."""
    if isinstance(item, dict):
        return {key: _without_code(value) for key, value in item.items()}
    return item.lstrip("$@% ") if isinstance(item, str) else item


def _readme(recipe: Recipe) -> str:
    labels = "\n".join(f"- {value}: {name}" for value, name in recipe.labels.items())
    return f"""# {recipe.title}

Exported from a checkpoint of ctseg {ctseg.__version__} (recipe `{recipe.name}`). Research use only, not for diagnosis.

Source of the recipe: {recipe.source}

## Masks

Input: CT in Hounsfield units. Output: one mask for each CT, on its own grid, with the values

{labels}

```
pip install monai nibabel pytorch-ignite fire
python -m monai.bundle run --config_file configs/inference.json --bundle_root . --dataset_dir FOLDER --output_dir masks
```

Every `.nii` and `.nii.gz` in FOLDER is predicted. `configs/{RECIPE_ENTRY}` is the whole recipe: `ctseg import-bundle`
and `ctseg finetune --from` read this folder back.
"""


def _licence(recipe: Recipe) -> str:
    return f"""configs/ and docs/ were written by ctseg {ctseg.__version__} and may be used under Apache-2.0.

The weights in models/model.pt belong to whoever trained them, and the licence of the data they were trained on
(recipe '{recipe.name}', data set '{Path(recipe.data.manifest).stem}') may bind their use. Write your own terms here
before you pass the bundle on.
"""
