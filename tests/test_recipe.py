"""Recipes: the shipped numbers, the strict file, variants, `--set`."""

import dataclasses
import json
from pathlib import Path

import pytest

from ctseg.errors import RecipeError
from ctseg.foreign.render import render_recipe
from ctseg.recipe import Recipe, load_recipe, recipe_from_dict, recipe_names, recipe_path, variant_names
from ctseg.specs import (
    AdamSpec,
    AHNetSpec,
    Augmentation,
    BasicUNetSpec,
    ClicksSpec,
    CodeSpec,
    ConstantSpec,
    Data,
    DiceCESpec,
    DiceSpec,
    Inference,
    LesionSpec,
    NovogradSpec,
    Preprocess,
    Sampling,
    SegResNetSpec,
    StepSpec,
    Training,
    UNetSpec,
)

ANATOMY = ("91723000", "Anatomical Structure")
ALL_NAMES = [name for base in recipe_names() for name in (base, *(f"{base}:{v}" for v in variant_names(base)))]


def refusal(name: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, list(overrides))
    return str(caught.value)


def write_recipe(path: Path, **changes: object) -> str:
    """The shipped spleen recipe with other top-level keys, as JSON."""
    path.write_text(json.dumps({**load_recipe("spleen").to_dict(), **changes}))
    return str(path)


def test_spleen_holds_the_published_numbers():
    spleen = load_recipe("spleen")
    about = {"name": spleen.name, "title": spleen.title, "source": spleen.source}
    assert spleen == Recipe(
        **about,
        labels={"1": "spleen"},
        codes={"spleen": CodeSpec(category=ANATOMY, type=("78961009", "Spleen"))},
        data=Data(manifest="msd_spleen"),
        preprocess=Preprocess(spacing_mm=(1.5, 1.5, 2.0), hu_window=(-57.0, 164.0), crop_foreground=True),
        network=UNetSpec(
            kind="unet", channels=(16, 32, 64, 128, 256), strides=(2, 2, 2, 2), num_res_units=2, norm="batch"
        ),
        sampling=Sampling(patch_size=(96, 96, 96), patches_per_case=4, positive_fraction=0.5),
        augmentation=Augmentation(shift_offset=0.1, shift_probability=0.5),
        objective=DiceCESpec(kind="dice_ce", squared_pred=True, batch=True, include_background=True),
        optimizer=NovogradSpec(kind="novograd", lr=2e-3),
        schedule=StepSpec(kind="step", step_epochs=5000, gamma=0.1),
        training=Training(
            epochs=1260,
            batch_cases=4,
            validation_interval_epochs=1,
            validation_overlap=0.25,
            amp=True,
            seed=0,
        ),
        inference=Inference(window_size=(160, 160, 160), overlap=0.5, batch_windows=4),
    )
    assert spleen.name == "spleen"
    assert spleen.num_classes == 2


def test_spleen_network_has_the_published_number_of_parameters():
    from ctseg.networks import count_parameters, network_for

    assert count_parameters(network_for(load_recipe("spleen"))) == 4_808_917


LUNG = Recipe(
    name="lung",
    title="",
    source="",
    labels={"1": "lung"},
    codes={"lung": CodeSpec(category=ANATOMY, type=("39607008", "Lung"))},
    data=Data(manifest="lung"),
    preprocess=Preprocess(spacing_mm=(0.8, 0.8, 5.0), hu_window=(-1500.0, 500.0), crop_foreground=True),
    network=AHNetSpec(kind="ahnet", layers=(3, 4, 6, 3), psp_block_num=0, upsample_mode="trilinear"),
    sampling=Sampling(patch_size=(224, 224, 32), patches_per_case=2, positive_fraction=0.5),
    augmentation=Augmentation(shift_offset=0.1, shift_probability=0.5, flip_probability=0.1, rotate90_probability=0.1),
    objective=DiceSpec(kind="dice", squared_pred=True, batch=False, include_background=True),
    optimizer=AdamSpec(kind="adam", lr=1e-4),
    schedule=ConstantSpec(kind="constant"),
    training=Training(
        epochs=1250, batch_cases=4, validation_interval_epochs=20, validation_overlap=0.6, amp=True, seed=0
    ),
    inference=Inference(window_size=(224, 224, 32), overlap=0.6, batch_windows=2),
)


def untitled(name: str) -> Recipe:
    return dataclasses.replace(load_recipe(name), title="", source="")


def test_lung_holds_the_published_numbers():
    assert untitled("lung") == LUNG
    assert variant_names("lung") == ["finetune", "small"]


def test_the_first_lung_card_differs_in_loss_batch_and_data():
    assert untitled("lung_soft_dice") == dataclasses.replace(
        LUNG,
        name="lung_soft_dice",
        data=Data(manifest="lung_soft_dice"),
        objective=DiceSpec(kind="dice", squared_pred=False, batch=False, include_background=True),
        training=dataclasses.replace(LUNG.training, batch_cases=16),  # 4 cases on each of 4 GPUs
    )


DEEPGROW = Recipe(
    name="deepgrow_3d",
    title="",
    source="",
    labels={"1": "object"},
    data=Data(manifest="btcv"),
    preprocess=Preprocess(spacing_mm=(1.0, 1.0, 3.0), hu_window=(208.0, 596.0), clip=False, crop_foreground=False),
    network=BasicUNetSpec(kind="basic_unet", features=(32, 64, 128, 256, 512, 32), dimensions=3),
    sampling=Sampling(patch_size=(128, 128, 128), patches_per_case=1, positive_fraction=1.0),
    augmentation=Augmentation(shift_offset=0.0, shift_probability=0.0),
    objective=DiceSpec(kind="dice", squared_pred=True, batch=False, include_background=False),
    optimizer=AdamSpec(kind="adam", lr=1e-4),
    schedule=ConstantSpec(kind="constant"),
    training=Training(
        epochs=200, batch_cases=1, validation_interval_epochs=10, validation_overlap=0.0, amp=False, seed=0
    ),
    inference=Inference(window_size=(128, 128, 128), overlap=0.0, batch_windows=1),
    clicks=ClicksSpec(num_clicks=15, sigma_voxels=2.0, margin_voxels=20, min_voxels=8, partial_fraction=0.5),
)


def test_deepgrow_holds_the_published_numbers():
    assert untitled("deepgrow_3d") == DEEPGROW
    assert (DEEPGROW.input_channels, DEEPGROW.output_channels, DEEPGROW.is_2d) == (3, 1, False)
    shipped = untitled("deepgrow_3d:mmar")
    assert shipped.preprocess.spacing_mm == (1.0, 1.0, 1.0)
    assert shipped.sampling.patch_size == shipped.inference.window_size == (192, 192, 128), "128 x 192 x 192 in z, y, x"
    assert untitled("deepgrow_3d:residual").network.kind == "unet"


def test_deepgrow_2d_differs_in_slices():
    flat = untitled("deepgrow_2d")
    assert flat == dataclasses.replace(
        DEEPGROW,
        name="deepgrow_2d",
        preprocess=dataclasses.replace(DEEPGROW.preprocess, keep_slice_spacing=True),
        network=dataclasses.replace(DEEPGROW.network, dimensions=2),
        sampling=dataclasses.replace(DEEPGROW.sampling, patch_size=(256, 256, 1)),
        training=dataclasses.replace(DEEPGROW.training, batch_cases=16),
        inference=dataclasses.replace(DEEPGROW.inference, window_size=(256, 256, 1)),
        clicks=dataclasses.replace(DEEPGROW.clicks, min_voxels=16),
    )
    assert flat.is_2d


@pytest.mark.parametrize(
    ("name", "override", "problem"),
    [
        ("deepgrow_3d", "labels.2=x", "labels: a recipe with clicks has one structure"),
        ("deepgrow_3d", "objective.include_background=true", "objective.include_background: clicks have one score"),
        ("deepgrow_3d", "sampling.positive_fraction=0.5", "sampling.positive_fraction: clicks need 1"),
        ("deepgrow_3d", "inference.window_size=[96,96,96]", "inference.window_size: must be sampling.patch_size"),
        ("deepgrow_3d", "preprocess.binarize_labels=true", "preprocess.binarize_labels: not in a recipe with clicks"),
        (
            "deepgrow_3d",
            "preprocess.crop_foreground=true",
            "preprocess.crop_foreground: needs a window that is clipped",
        ),
        ("deepgrow_2d", "sampling.patch_size=[256,256,16]", "sampling.patch_size: a network with 2 dimensions takes"),
        ("deepgrow_2d", "sampling.patch_size=[16,16,1]", "sampling.patch_size: one size must be 32 or more"),
        ("deepgrow_2d", "sampling.patch_size=[256,100,1]", "sampling.patch_size: every size must be a multiple of 16"),
        ("deepgrow_3d", "lesions={volume_limits_ml=[1],min_overlap=0.1}", "lesions: not in a recipe with clicks"),
        ("deepgrow_3d", "clicks.num_clicks=0", "clicks.num_clicks: must be at least 1, got 0"),
    ],
)
def test_what_a_recipe_with_clicks_must_be(name: str, override: str, problem: str):
    assert problem in refusal(name, override)


def test_bone_lesion_holds_the_published_numbers():
    bone = untitled("bone_lesion")
    assert bone == Recipe(
        name="bone_lesion",
        title="",
        source="",
        labels={"1": "bone lesion"},
        codes={
            "bone lesion": CodeSpec(
                category=("49755003", "Morphologically Abnormal Structure"),
                type=("52988006", "Lesion"),
                region=("272673000", "Bone"),
            )
        },
        data=Data(manifest="bone_lesion"),
        preprocess=Preprocess(
            spacing_mm=(1.0, 1.0, 1.0), hu_window=(-500.0, 1300.0), crop_foreground=True, binarize_labels=True
        ),
        network=SegResNetSpec(
            kind="segresnet", init_filters=32, blocks_down=(1, 2, 2, 4), blocks_up=(1, 1, 1), dropout_prob=0.1
        ),
        sampling=Sampling(patch_size=(128, 128, 128), patches_per_case=2, positive_fraction=0.5),
        augmentation=Augmentation(
            shift_offset=0.1, shift_probability=0.5, flip_probability=0.5, rotate90_probability=0.1
        ),
        objective=DiceSpec(kind="dice", squared_pred=True, batch=False, include_background=True),
        optimizer=AdamSpec(kind="adam", lr=1e-4),
        schedule=ConstantSpec(kind="constant"),
        training=Training(
            epochs=1250, batch_cases=2, validation_interval_epochs=20, validation_overlap=0.625, amp=True, seed=0
        ),
        inference=Inference(window_size=(128, 128, 128), overlap=0.625, batch_windows=4),
        lesions=LesionSpec(volume_limits_ml=(0.5, 2.0, 10.0), min_overlap=0.1),
    )
    shipped = dataclasses.replace(
        bone,
        name="bone_lesion:mmar",
        preprocess=dataclasses.replace(bone.preprocess, hu_window=(-980.0, 2620.0)),
        augmentation=dataclasses.replace(bone.augmentation, rotate90_probability=0.0),
        objective=DiceCESpec(kind="dice_ce", squared_pred=True, batch=False, include_background=True),
    )
    assert untitled("bone_lesion:mmar") == shipped


@pytest.mark.parametrize("name", ["lung", "lung_soft_dice", "bone_lesion"])
def test_fine_tuning_is_shorter_and_slower(name: str):
    base, tuned = untitled(name), untitled(f"{name}:finetune")
    assert tuned == dataclasses.replace(
        base,
        name=f"{name}:finetune",
        optimizer=AdamSpec(kind="adam", lr=1e-5),
        training=dataclasses.replace(base.training, epochs=500),
    )


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_a_variant_that_a_cpu_can_train_on_made_data(name: str):
    from ctseg.sources.catalogue import is_made

    small = load_recipe(f"{name}:small")
    assert is_made(small.data.manifest)
    assert small.training.epochs <= 40


@pytest.mark.parametrize("name", recipe_names())
def test_every_number_of_a_recipe_names_its_source(name: str):
    """Each value, or the table it stands in, has a comment."""
    lines = recipe_path(name).read_text().splitlines()
    table_has_source, problems = False, []
    for line in lines:
        if line.startswith("["):
            table_has_source = "#" in line or line.startswith(("[labels]", "[variants"))
            if line.startswith("[variants.") and "#" not in line:
                problems.append(line)
        elif "=" in line and "#" not in line and not line.startswith(("name", "title", "source", "kind")):
            problems += [] if table_has_source else [line]
    assert problems == []


@pytest.mark.parametrize("setting", ["clip=false", "keep_slice_spacing=true"])
def test_only_clicks_take_other_intensities_and_slices(setting: str):
    key = setting.partition("=")[0]
    told = f"preprocess.{key}: only recipes with [clicks] may set it; leave it out"
    assert told in refusal("spleen", f"preprocess.{setting}", "preprocess.crop_foreground=false")


def test_binarised_labels_need_one_structure():
    problem = "recipe 'bone_lesion': preprocess.binarize_labels: needs exactly one structure, got 2; set it to false"
    assert refusal("bone_lesion", "labels.2=other") == problem


@pytest.mark.parametrize("limits", ["[2, 1]", "[1, 1]"])
def test_borders_of_lesion_volumes_rise(limits: str):
    assert "lesions.volume_limits_ml: every border must be above the one before it" in refusal(
        "bone_lesion", f"lesions.volume_limits_ml={limits}"
    )


def test_lesions_can_be_scored_by_any_recipe():
    recipe = load_recipe("spleen", ["lesions.volume_limits_ml=[]", "lesions.min_overlap=0.5"])
    assert recipe.lesions == LesionSpec(volume_limits_ml=(), min_overlap=0.5)
    assert load_recipe("spleen").lesions is None


@pytest.mark.parametrize("name", ALL_NAMES)
def test_every_shipped_recipe_loads_and_survives_json(name: str):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.slug == name.replace(":", "-")
    assert recipe_from_dict(json.loads(json.dumps(recipe.to_dict())), "copy") == recipe


def test_variants_change_what_they_name_and_nothing_else():
    base, v1 = load_recipe("spleen"), load_recipe("spleen:v1")
    assert variant_names("spleen") == ["v1", "model_zoo", "small"]
    assert v1 == dataclasses.replace(
        base,
        name="spleen:v1",
        preprocess=dataclasses.replace(base.preprocess, spacing_mm=(1.0, 1.0, 1.0)),
        objective=DiceSpec(kind="dice", squared_pred=True, batch=True, include_background=True),
        optimizer=v1.optimizer,
    )
    assert isinstance(v1.optimizer, AdamSpec)
    zoo = load_recipe("spleen:model_zoo")
    assert (zoo.training.batch_cases, zoo.inference.window_size, zoo.inference.overlap) == (2, (96, 96, 96), 0.5)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("optimizer.lr=1e-4", 1e-4),
        ("optimizer.lr=1", 1.0),
        (" optimizer.lr = 0.5 ", 0.5),
        ("preprocess.spacing_mm=[1,2,3.5]", (1.0, 2.0, 3.5)),
        ("preprocess.spacing_mm=[1, 2,\t3]  # comment", (1.0, 2.0, 3.0)),
        ("network.channels=[4,8,16,32,64]", (4, 8, 16, 32, 64)),
        ("training.amp=false", False),
        ("data.manifest=my list.json", "my list.json"),
        ("data.manifest=/abs/a=b.json", "/abs/a=b.json"),
        ('data.manifest="quoted.json"', "quoted.json"),
        ("title=Spleen, mine", "Spleen, mine"),
        ("network.norm=instance", "instance"),
    ],
)
def test_set(override: str, value: object):
    recipe = load_recipe("spleen", [override])
    section, _, key = override.partition("=")[0].strip().partition(".")
    found = getattr(getattr(recipe, section), key) if key else getattr(recipe, section)
    assert found == value
    assert type(found) is type(value)
    changed = [k for k, v in recipe.to_dict().items() if v != load_recipe("spleen").to_dict()[k]]
    assert changed == [section]


def test_set_of_a_table_and_of_kind():
    assert load_recipe("spleen", ["labels.2=liver"]).labels == {"1": "spleen", "2": "liver"}
    assert load_recipe("spleen", ['labels={1="a",2="b"}']).labels == {"1": "a", "2": "b"}
    adam = load_recipe("spleen", ["optimizer.kind=adam", "optimizer.lr=1e-3"]).optimizer
    assert adam == AdamSpec(kind="adam", lr=1e-3)
    assert refusal("spleen", "optimizer.kind=adam") == "recipe 'spleen': optimizer.lr: missing"


def test_the_last_set_wins():
    assert load_recipe("spleen", ["optimizer.lr=1", "optimizer.lr=2"]).optimizer.lr == 2.0


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("training.epochs", "--set training.epochs: expected section.key=value"),
        ("=5", "--set =5: expected section.key=value"),
        ("trainin.epochs=3", "trainin: unknown key; did you mean 'training'?"),
        ("training.epoch=3", "training.epoch: unknown key; did you mean 'epochs'?"),
        ("training.epochs=0", "training.epochs: must be at least 1, got 0"),
        ("training.epochs=2.5", "training.epochs: expected int, got 2.5"),
        ("training.epochs=", "training.epochs: expected int, got ''"),
        ("training=5", "training: expected a table, got 5"),
        ("training.seed=2147483648", "training.seed: must be at most 2147483647, got 2147483648"),
        ("preprocess.spacing_mm=[1,2", "preprocess.spacing_mm: expected 3 values, got '[1,2'"),
        ("preprocess.spacing_mm=2", "preprocess.spacing_mm: expected 3 values, got 2"),
        ("preprocess.spacing_mm=[1,0,1]", "preprocess.spacing_mm[1]: must be above 0, got 0.0"),
        ("preprocess.spacing_mm.x=1", "preprocess.spacing_mm: expected 3 values, got {'x': 1}"),
        ("preprocess.hu_window=[100,-100]", "preprocess.hu_window: the first value must be below the second"),
        ("preprocess.hu_window=[5,5]", "preprocess.hu_window: the first value must be below the second, got [5, 5]"),
        ("preprocess.hu_window=[nan,5]", "preprocess.hu_window[0]: expected a finite number, got nan"),
        ("inference.overlap=1", "inference.overlap: must be below 1, got 1.0"),
        ("network.kind=unett", "network.kind: expected one of unet, ahnet, segresnet, basic_unet, got 'unett'"),
        ("objective.kind=[1]", "objective.kind: expected one of dice, dice_ce, got [1]"),
        ("network.strides=[2,2]", "network.strides: expected one less than channels (5), got 2"),
        ("sampling.patch_size=[96,96,90]", "sampling.patch_size: every size must be a multiple of 16 (the network's"),
        ("inference.window_size=[8,16,16]", "inference.window_size: every size must be a multiple of 16"),
        ("codes.liver.type=['78961009','Spleen']", "codes.liver.category: missing"),
        (
            "codes.spleen.type=['T-C3000','Spleen']",
            "codes.spleen.type: expected a SNOMED CT code of digits and its meaning",
        ),
        ("codes.spleen.type=['78961009']", "codes.spleen.type: expected 2 values, got ['78961009']"),
        ("labels.3=liver", 'labels: expected "1", "2", ... without gaps, got 1, 3'),
        ("labels.2=spleen", "labels: every structure must have its own name, got spleen, spleen"),
        ("name=../up", "name: expected letters, digits, '_', '-' and '.', as it names folders, got '../up'"),
        ("optimizer.lr=" + "9" * 5000, "optimizer.lr: expected float, got"),
        ("optimizer.lr=" + "[" * 100_000, "optimizer.lr: expected float, got"),
    ],
)
def test_wrong_set(override: str, problem: str):
    assert refusal("spleen", override).startswith(f"recipe 'spleen': {problem}")


def test_a_second_line_in_a_set_is_not_dropped():
    assert "expected section.key=value" in refusal("spleen", "training.epochs=5\nx=3")


def test_all_problems_of_file_and_overrides_at_once(tmp_path: Path):
    preprocess = {"spacing": [1, 1, 1], "hu_window": [0], "crop_foreground": True}
    path = write_recipe(tmp_path / "r.json", preprocess=preprocess, extra=1)
    assert refusal(path, "nonsense", "training.epochs=0").splitlines() == [
        f"recipe '{path}': 6 problems",
        "  --set nonsense: expected section.key=value",
        "  extra: unknown key; known: name, title, source, labels, data, preprocess, network, sampling, augmentation, "
        "objective, optimizer, schedule, training, inference, lesions, clicks, codes",
        "  preprocess.spacing: unknown key; did you mean 'spacing_mm'?",
        "  preprocess.spacing_mm: missing",
        "  preprocess.hu_window: expected 2 values, got [0]",
        "  training.epochs: must be at least 1, got 0",
    ]


def test_names_that_are_no_recipe(tmp_path: Path):
    known = f"no such recipe; known: {', '.join(recipe_names())}"
    for name in ("splen", "splen:small", "none.toml", "none.toml:small", "", ":", str(tmp_path)):
        assert known in refusal(name)
    assert refusal("spleen:big") == "recipe 'spleen:big': no variant 'big'; known: v1, model_zoo, small"
    assert "no variant ''" in refusal("spleen:")
    (tmp_path / "r.txt").write_text("")
    assert known in refusal(str(tmp_path / "r.txt"))


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("r.toml", b"name = ", "cannot be read as TOML"),
        ("r.toml", b"\xff\xfe", "cannot be read as TOML"),
        ("r.toml", b"a = " + b"[" * 100_000, "cannot be read as TOML"),
        ("r.toml", b"a = " + b"9" * 5000, "cannot be read as TOML"),
        ("r.json", b"{", "cannot be read as JSON"),
        ("r.json", b"[" * 100_000, "cannot be read as JSON"),
        ("r.json", b"[]", "expected a JSON object, got list"),
        ("r.toml", b"", "14 problems"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, name: str, content: bytes, fragment: str):
    (tmp_path / name).write_bytes(content)
    assert fragment in refusal(str(tmp_path / name))


def test_a_file_and_its_variant(tmp_path: Path):
    path = tmp_path / "with:colon"
    path.mkdir()
    path /= "mine.toml"
    path.write_text(recipe_path("spleen").read_text())
    assert load_recipe(str(path)) == load_recipe("spleen")
    assert load_recipe(f"{path}:small") == load_recipe("spleen:small")


@pytest.mark.parametrize("variants", [5, [1, 2], {"small": 5}])
def test_wrong_variants(tmp_path: Path, variants: object):
    path = write_recipe(tmp_path / "r.json", variants=variants)
    assert "no variant 'small'" in refusal(f"{path}:small")


def test_recipe_inside_another_file():
    with pytest.raises(RecipeError, match=r"^recipe inside 'x\.pt': file: expected a table, got None$"):
        recipe_from_dict(None, "recipe inside 'x.pt'")


@pytest.mark.parametrize("name", ALL_NAMES)
def test_a_rendered_recipe_is_the_same_recipe(name: str, tmp_path: Path):
    """As `ctseg import-bundle` writes it."""
    recipe, file = load_recipe(name), tmp_path / "recipe.toml"
    file.write_text(render_recipe(recipe, {"training.epochs": "a card"}, ["Imported"]), encoding="utf-8")
    assert load_recipe(str(file)) == recipe
