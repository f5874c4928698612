"""Data lists: the shipped split, the grammar, names, missing files."""

import json
from pathlib import Path

import pytest

from ctseg.errors import ManifestError
from ctseg.manifest import (
    MAX_MANIFEST_BYTES,
    Case,
    check_files,
    data_folder,
    find_manifest,
    image_stem,
    read_manifest,
    shipped_manifest,
)
from ctseg.recipe import load_recipe

# fmt: off
MSD_SPLEEN = {
    "training": [29, 46, 25, 13, 62, 27, 44, 56, 60, 2, 53, 41, 22, 14, 18, 20, 32, 16, 12, 63, 28, 59, 47, 8, 6, 61,
                 10, 38, 45, 26, 49],
    "validation": [21, 24, 33, 9],
    "testing": [19, 31, 52, 40, 3, 17],
    "test": [15, 23, 1, 42, 50, 54, 37, 58, 39, 48, 35, 11, 7, 30, 43, 51, 36, 55, 57, 34],
}
# fmt: on


def write(path: Path, data: object) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    return str(caught.value)


def test_msd_spleen_is_the_published_split():
    manifest = read_manifest(shipped_manifest("msd_spleen"), Path("root"))
    assert {split: len(cases) for split, cases in MSD_SPLEEN.items()} == {
        "training": 31, "validation": 4, "testing": 6, "test": 20,
    }  # fmt: skip
    for split, numbers in MSD_SPLEEN.items():
        folder, labelled = ("imagesTs", False) if split == "test" else ("imagesTr", True)
        assert manifest.split(split) == tuple(
            Case(
                name=f"spleen_{n}",
                split=split,
                image=Path(f"root/{folder}/spleen_{n}.nii.gz"),
                label=Path(f"root/labelsTr/spleen_{n}.nii.gz") if labelled else None,
            )
            for n in numbers
        )
    assert len(manifest.cases) == len({case.name for case in manifest.cases}) == 61
    assert manifest.labels == {"0": "background", "1": "spleen"}
    assert manifest.licence == "CC-BY-SA 4.0"


SHIPPED = sorted(path.stem for path in shipped_manifest("msd_spleen").parent.glob("*.json"))
TEMPLATES = ["bone_lesion", "lung", "lung_soft_dice"]


@pytest.mark.parametrize("name", [name for name in SHIPPED if name not in TEMPLATES])
def test_shipped_manifests_name_source_and_licence(name: str):
    manifest = read_manifest(shipped_manifest(name))
    assert manifest.name == name
    assert manifest.source.startswith("http")
    assert manifest.licence != "unknown"


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_says_what_the_private_data_was(name: str, tmp_path: Path):
    content = json.loads(shipped_manifest(name).read_text())
    assert content["name"] == name
    assert content["licence"] == "private"
    assert content["labels"] == {"0": "background", **load_recipe(name).labels}
    assert "not public" in content["description"]
    with pytest.raises(ManifestError) as caught:
        find_manifest(name, tmp_path)
    assert str(caught.value) == (
        f"data set '{name}': the original data is not public, so ctseg has no list of it; give your own list with "
        f"--manifest FILE (its grammar stands in docs/recipes/{name}.md)"
    )
    page = (Path(__file__).parents[1] / "docs" / "recipes" / f"{name}.md").read_text()
    assert '"training": [{"image": ' in page


def test_the_public_stand_in_for_lungs_has_the_cases_in_hounsfield_units():
    manifest = read_manifest(shipped_manifest("covid19_ct_seg"), Path("root"))
    assert [case.name for case in manifest.cases] == [f"coronacases_{n:03d}" for n in range(1, 11)]
    assert {s: len(manifest.split(s)) for s in ("training", "validation", "testing")} == {
        "training": 6, "validation": 1, "testing": 3,
    }  # fmt: skip
    first = manifest.cases[0]
    assert first.image == Path("root/COVID-19-CT-Seg_20cases/coronacases_001.nii.gz")
    assert first.label == Path("root/Lung_Mask/coronacases_001.nii.gz")
    assert manifest.licence == "CC BY 4.0"


def test_entries_of_all_kinds(tmp_path: Path):
    data = {
        "training": [{"image": "a/x.nii.gz", "label": "b/x.nii.gz"}, {"image": "y.nrrd", "label": None}],
        "test": ["/abs/z.mha"],
        "numTraining": 2,
    }
    manifest = read_manifest(write(tmp_path / "mine.json", data), Path("root"))
    assert manifest.cases == (
        Case(name="x", split="training", image=Path("root/a/x.nii.gz"), label=Path("root/b/x.nii.gz")),
        Case(name="y", split="training", image=Path("root/y.nrrd"), label=None),
        Case(name="z", split="test", image=Path("/abs/z.mha"), label=None),
    )
    assert (manifest.name, manifest.licence, manifest.source, manifest.labels) == ("mine", "unknown", "unknown", {})


@pytest.mark.parametrize("name", ["list.txt", "list.json"])
def test_bare_lists_are_test_cases_beside_the_list(tmp_path: Path, name: str):
    content = "a.nii\n\n  b c.nii.gz \n" if name.endswith(".txt") else '["a.nii", "b c.nii.gz"]'
    (tmp_path / name).write_text("\ufeff" + content, encoding="utf-8")
    cases = read_manifest(tmp_path / name).split("test")
    assert [case.image for case in cases] == [tmp_path / "a.nii", tmp_path / "b c.nii.gz"]
    assert [case.name for case in cases] == ["a", "b c"]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ("5", "expected a JSON object or list, got int"),
        ("{", "not valid JSON: "),
        ("[" * 100_000, "not valid JSON: "),
        ("{}", "no cases; expected at least one of the keys training, validation, testing, test"),
        ({"trainning": ["a.nii"]}, "no cases; expected at least one of the keys"),
        ([], "no cases; "),
        ({"training": {"image": "a.nii"}}, "training: expected a list, got dict"),
        ({"training": "a.nii"}, "training: expected a list, got str"),
        (["nul\0.nii"], "test[0]: a path holds characters that no file name has; correct the list"),
        (["half \ud800.nii"], "test[0]: a path holds characters that no file name has; correct the list"),
        (
            {"training": [{"patient": "Doe^Jane", "img": "a.nii"}]},
            'training[0]: expected a path or {"image": path, "label": path}, got the keys patient, img',
        ),
        ([5], 'test[0]: expected a path or {"image": path, "label": path}, got int'),
        ({"testing": ["a.nii", {"img": "b.nii"}]}, "testing[1]: expected a path or"),
        ([{"image": ["a.nii", "b.nii"]}], "test[0]: expected a path or"),
        ([{"image": "a.nii", "label": 3}], "test[0].label: expected a path, got 3"),
        (["../a.nii"], "test[0]: relative paths may not contain '..', got '../a.nii'"),
        (["a/../../b.nii"], "test[0]: relative paths may not contain '..'"),
        ([{"image": "a.nii", "label": "../b.nii"}], "test[0]: relative paths may not contain '..', got '../b.nii'"),
        ([".nii.gz"], "test[0]: an image needs a name before its suffix, got '.nii.gz'"),
        (["a/...nii.gz"], "test[0]: an image needs a name before its suffix, got 'a/...nii.gz'"),
        (["a.nii", "./a.nii"], "image listed 2 times (test, test): "),
        (["a/ct.nii", "a/ct.mha"], "cases share the name 'a_ct', rename one: "),
        (["a/b/ct.nii", "a_b/ct.nii"], "cases share the name 'a_b_ct', rename one: "),
        (["a/ct.nii", "b/ct.nii", "a_ct.nii"], "cases share the name 'a_ct', rename one: "),
    ],
)
def test_wrong_lists(tmp_path: Path, data: object, problem: str):
    path = write(tmp_path / "list.json", data)
    assert refusal(path).startswith(f"manifest '{path}': {problem}")


def test_an_image_in_two_splits_is_refused_however_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "list.json", {"training": ["a.nii"], "testing": [str(tmp_path / "a.nii")]})
    path = Path("list.json")
    assert refusal(path) == f"manifest 'list.json': image listed 2 times (training, testing): {tmp_path / 'a.nii'}"


def test_all_problems_at_once(tmp_path: Path):
    path = write(tmp_path / "list.json", {"training": [1, "../a.nii"], "validation": 5, "test": ["b.nii", "b.nii"]})
    assert [line.split(":")[0] for line in refusal(path).splitlines()] == [
        f"manifest '{path}'",
        "  validation",
        "  training[0]",
        "  training[1]",
        "  image listed 2 times (test, test)",
    ]


def test_a_parent_in_an_absolute_path_is_the_users_own(tmp_path: Path):
    path = write(tmp_path / "list.json", [f"{tmp_path}/../a.nii"])
    assert read_manifest(path).cases[0].image == tmp_path / "../a.nii"


def test_equal_file_names_take_their_folders(tmp_path: Path):
    path = write(tmp_path / "list.json", ["p1/scan/ct.nii.gz", "p2/ct.nii.gz", "other.nii", "/far/ct.nii.gz"])
    assert [case.name for case in read_manifest(path).cases] == ["p1_scan_ct", "p2_ct", "other", "far_ct"]


def test_unreadable_lists(tmp_path: Path):
    assert "cannot be read: No such file" in refusal(tmp_path / "none.json")
    assert refusal(tmp_path) == (
        f"folder '{tmp_path}': expected imagesTr and labelsTr or images and labels in it, or name a list (.json, .txt, "
        f".csv)"
    )
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9.nii")
    assert "cannot be read: 'utf-8' codec" in refusal(tmp_path / "latin.txt")
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    assert "larger than 64 MiB, not a data list" in refusal(tmp_path / "huge.json")


def test_split_without_cases(tmp_path: Path):
    manifest = read_manifest(write(tmp_path / "mine.json", {"training": ["a.nii", "b.nii"], "test": ["c.nii"]}))
    with pytest.raises(ManifestError, match="'mine': split 'testing' has no cases; it has training 2, test 1"):
        manifest.split("testing")


def test_every_missing_file_is_listed(tmp_path: Path):
    (tmp_path / "a.nii").touch()
    (tmp_path / "folder.nii").mkdir()
    entries = [{"image": "a.nii", "label": "a_label.nii"}, "b.nii", "folder.nii"]
    manifest = read_manifest(write(tmp_path / "mine.json", entries))
    with pytest.raises(ManifestError) as caught:
        check_files(manifest)
    assert str(caught.value).splitlines() == [
        "manifest 'mine': 3 problems",
        *(f"  file not found: {tmp_path / name}" for name in ("a_label.nii", "b.nii", "folder.nii")),
    ]


def test_data_folder(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CTSEG_DATA", raising=False)
    assert data_folder() == Path("data")
    monkeypatch.setenv("CTSEG_DATA", "")
    assert data_folder() == Path("data")
    monkeypatch.setenv("CTSEG_DATA", "/big/disk")
    assert data_folder() == Path("/big/disk")


def make_msd_spleen(root: Path) -> None:
    for case in read_manifest(shipped_manifest("msd_spleen"), root).cases:
        for path in filter(None, (case.image, case.label)):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


@pytest.mark.parametrize("inner", ["", "Task09_Spleen"])
@pytest.mark.parametrize("by_environment", [True, False])
def test_shipped_manifest_finds_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inner: str, by_environment: bool
):
    make_msd_spleen(tmp_path / inner)
    monkeypatch.setenv("CTSEG_DATA", str(tmp_path if by_environment else tmp_path / "elsewhere"))
    manifest = find_manifest("msd_spleen", None if by_environment else tmp_path)
    assert len(manifest.cases) == 61
    assert manifest.cases[0].image == tmp_path / inner / "imagesTr/spleen_29.nii.gz"


def test_shipped_manifest_without_its_images(tmp_path: Path):
    with pytest.raises(ManifestError) as caught:
        find_manifest("msd_spleen", tmp_path)
    assert str(caught.value) == (
        f"data set 'msd_spleen': no image found below '{tmp_path / 'Task09_Spleen'}'; fetch it with "
        f"`ctseg download msd_spleen --data {tmp_path}`, or name its folder with --data DIR, or your own list with "
        "--manifest FILE"
    )
    make_msd_spleen(tmp_path)
    (tmp_path / "labelsTr/spleen_9.nii.gz").unlink()
    with pytest.raises(ManifestError, match=r"file not found: .*labelsTr/spleen_9\.nii\.gz"):
        find_manifest("msd_spleen", tmp_path)


def test_a_file_of_the_users(tmp_path: Path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.nii").touch()
    path = write(tmp_path / "list.txt", "a.nii")
    assert find_manifest(str(path), tmp_path / "data").cases[0].image == tmp_path / "data" / "a.nii"
    with pytest.raises(ManifestError, match="file not found"):
        find_manifest(str(path), None)


def test_unknown_name():
    with pytest.raises(ManifestError, match=r"'msd_nothing': not shipped with ctseg; known: .*msd_spleen.*, or name a"):
        find_manifest("msd_nothing", None)


@pytest.mark.parametrize(
    ("name", "stem"),
    [("a/ct.nii.gz", "ct"), ("CT.NII.GZ", "CT"), ("a.b.nrrd", "a.b"), ("x.nii", "x"), ("x.gz", "x"), ("x", "x")],
)
def test_image_stem(name: str, stem: str):
    assert image_stem(Path(name)) == stem


def test_names_do_not_depend_on_where_the_files_lie(tmp_path: Path) -> None:
    """Splits by chance follow from them."""
    names = []
    for site in ("here", "some/where/else"):
        images = [str(tmp_path / site / f"p{n}" / "ct.nii.gz") for n in range(3)]
        (tmp_path / "lists").mkdir(exist_ok=True)
        (tmp_path / "lists" / "list.json").write_text(json.dumps({"test": images}))
        names.append([case.name for case in read_manifest(tmp_path / "lists" / "list.json").cases])
    assert names == [["p0_ct", "p1_ct", "p2_ct"]] * 2
