"""Every kind of network goes the whole way: train, validate, infer, export to both formats with the same answer."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ctseg.engine.evaluate import evaluate
from ctseg.engine.export import export
from ctseg.engine.infer import infer
from ctseg.engine.model import load_model
from ctseg.engine.predict import predict
from ctseg.engine.runtime import Runtime
from ctseg.engine.train import TrainResult, train
from ctseg.io.images import read_image, read_labels
from ctseg.jobs import find_jobs
from ctseg.manifest import Manifest
from ctseg.progress import Silent
from ctseg.recipe import load_recipe
from ctseg.sources.catalogue import find_data
from ctseg.workspace import EXPORT_SUFFIXES

TINY = [
    "preprocess.spacing_mm=[8,8,8]",
    "sampling.patch_size=[32,32,32]",
    "sampling.patches_per_case=2",
    "training.batch_cases=3",
    "training.epochs=2",
    "training.validation_interval_epochs=1",
    "inference.window_size=[32,32,32]",
]
TINIER = ["sampling.patch_size=[16,16,16]", "inference.window_size=[16,16,16]"]
RECIPES = {
    "ahnet": ("lung:small", TINY),
    "segresnet": ("bone_lesion:small", [*TINY, *TINIER, "network.dropout_prob=0.1"]),
}


@pytest.fixture(scope="module", params=RECIPES)
def trained(
    request: pytest.FixtureRequest,
    train_tiny: Callable[..., TrainResult],
    tmp_path_factory: pytest.TempPathFactory,
) -> TrainResult:
    """A short training of each kind of network on the tiny data."""
    name, overrides = RECIPES[request.param]
    recipe = load_recipe(name, overrides)
    assert recipe.network.kind == request.param
    return train_tiny(recipe, tmp_path_factory.mktemp(request.param) / "run")


def test_the_whole_way(trained: TrainResult, tiny_manifest: Manifest, tmp_path: Path, cpu: Runtime) -> None:
    assert trained.epochs == 2
    assert np.isfinite(trained.loss)
    model = load_model(trained.checkpoint, cpu)
    (case,) = tiny_manifest.split("testing")
    evaluation = evaluate(model, (case,), Silent())
    assert evaluation.failed == ()
    assert evaluation.mean_dice is not None
    assert (evaluation.lesions is not None) == (model.recipe.lesions is not None)
    infer(model, find_jobs([case.image], tmp_path), tmp_path, Silent())
    written = read_labels(tmp_path / f"{case.name}_seg.nii.gz").array
    assert np.array_equal(written, predict(model, read_image(case.image)))


@pytest.mark.parametrize("file_format", EXPORT_SUFFIXES)
def test_exports_answer_as_the_checkpoint(
    trained: TrainResult, file_format: str, tiny_manifest: Manifest, tmp_path: Path, cpu: Runtime
) -> None:
    """`export` itself compares logits on windows of made CT; here the masks of a whole CT are compared as well."""
    report = export(trained.checkpoint, file_format, tmp_path / f"model{EXPORT_SUFFIXES[file_format]}", cpu)
    assert report.largest_difference <= 1e-3 * report.largest_logit
    assert report.label_agreement >= 0.9999
    image = read_image(tiny_manifest.split("testing")[0].image)
    masks = [predict(load_model(path, cpu), image) for path in (trained.checkpoint, report.path)]
    assert (masks[0] == masks[1]).mean() > 0.9999


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "least"), [("lung:small", 0.9), ("lung_soft_dice:small", 0.9), ("bone_lesion:small", 0.75)]
)
def test_small_variants_learn_on_made_ct(name: str, least: float, tmp_path: Path, cpu: Runtime) -> None:
    """The bounds leave room for rounding: 0.95, 0.95 and 0.82 were measured."""
    recipe = load_recipe(name)
    manifest = find_data(recipe.data.manifest, tmp_path, Silent())
    result = train(recipe, tmp_path / "run", lambda _: manifest, cpu, Silent(), tmp_path / "prepared")
    evaluation = evaluate(load_model(result.checkpoint, cpu), manifest.split("testing"), Silent())
    assert evaluation.mean_dice is not None
    assert evaluation.mean_dice >= least
