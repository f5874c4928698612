"""The spleen recipe, shortened, learns on real abdominal CT with spleen labels."""

from pathlib import Path

import pytest

from ctseg.engine.evaluate import evaluate
from ctseg.engine.model import load_model
from ctseg.engine.runtime import cpu_has_bfloat16, start_runtime
from ctseg.engine.train import train
from ctseg.manifest import Case, Manifest
from ctseg.progress import Silent
from ctseg.recipe import load_recipe

SHORTENED = [
    "training.epochs=260",
    "schedule.step_epochs=220",
    "training.batch_cases=3",
    "sampling.patches_per_case=2",
]


def spleens(real_data: Path, split: str) -> Manifest:
    crlm, msd = real_data / "crlm_abdomen", real_data / "msd_spleen8"
    files = [(msd / "imagesTr" / "spleen_8.nii.gz", msd / "labelsTr" / "spleen_8.nii.gz")]
    files += [(crlm / f"CRLM-CT-{n}_ct.nii.gz", crlm / f"CRLM-CT-{n}_spleen_pseudo.nii.gz") for n in (1004, 1006)]
    cases = tuple(Case(name=image.name, split=split, image=image, label=label) for image, label in files)
    return Manifest(name="real spleens", cases=cases, labels={"1": "spleen"}, licence="see NOTICE", source="public")


@pytest.mark.slow
def test_dice_on_the_trained_volumes_rises_above_085(real_data: Path, tmp_path: Path) -> None:
    """Three volumes seen in training: it shows that the pipeline learns, not how well the model generalises."""
    recipe = load_recipe("spleen", SHORTENED)
    runtime = start_runtime("auto", "bfloat16" if cpu_has_bfloat16() else "auto", amp=True)
    data = spleens(real_data, "training")
    result = train(recipe, tmp_path / "run", lambda _: data, runtime, Silent(), tmp_path / "prepared")
    model = load_model(result.checkpoint, runtime)
    evaluation = evaluate(model, spleens(real_data, "testing").split("testing"), Silent())
    dice = {score.case: score.dice for score in evaluation.scores}
    assert len(dice) == 3
    assert all(value is not None and value > 0.85 for value in dice.values()), dice
