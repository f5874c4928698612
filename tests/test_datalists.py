"""Data lists as CSV files and folders: what is understood, and every problem at once."""

from pathlib import Path

import pytest

from ctseg.errors import ManifestError
from ctseg.manifest import Case, find_manifest, read_manifest
from ctseg.sources.made import write_made
from ctseg.sources.phantom import phantom_data


def table(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def problems(path: Path) -> list[str]:
    """What a refusal lists, without the name of the list."""
    with pytest.raises(ManifestError) as caught:
        read_manifest(path)
    first, *lines = str(caught.value).split("\n  ")
    return lines or [first.partition("': ")[2]]


ROWS = (
    Case(name="a", split="training", image=Path("ct/a.nii"), label=Path("seg/a.nii"), weight=2.5, patient="P 1"),
    Case(name="b", split="validation", image=Path("ct/b.nii"), label=Path("seg/b.nii"), patient="P 2"),
    Case(name="c", split="training", image=Path("ct/c.nii"), label=Path("seg/c.nii")),
    Case(name="d", split="test", image=Path("ct/d.nii"), label=None, patient="P 1"),
)
COLUMNS = "image,label,split,patient,weight\n"
TABLE = COLUMNS + "ct/a.nii,seg/a.nii,training,P 1,2.5\nct/b.nii,seg/b.nii,validation,P 2,\n"
TABLE += "ct/c.nii, seg/c.nii ,,,\n,,,,\n\nct/d.nii,,,P 1\n"


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize(("encoding", "newline"), [("utf-8", "\n"), ("utf-8-sig", "\r\n")])
def test_a_table_is_understood_whoever_saved_it(tmp_path: Path, separator: str, encoding: str, newline: str):
    path = table(tmp_path / "list.csv", TABLE.replace(",", separator).replace("\n", newline), encoding)
    cases = read_manifest(path, Path()).cases
    assert sorted(cases, key=lambda case: case.name) == list(ROWS)


def test_columns_in_any_order_and_case_and_quoted_separators(tmp_path: Path):
    path = table(tmp_path / "LIST.CSV", 'Label,IMAGE\n"seg/a, b.nii","ct/a, b.nii"\n')
    assert read_manifest(path).cases == (
        Case(name="a, b", split="training", image=tmp_path / "ct/a, b.nii", label=tmp_path / "seg/a, b.nii"),
    )
    touch(tmp_path, "seg/a, b.nii", "ct/a, b.nii")
    assert find_manifest(str(path), None).name == "LIST"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ["no column 'image'; the first row must be the names of the columns"]),
        ("image,lable\n", [
            "the first row must be the names of the columns; unknown column 'lable'; did you mean 'label'?",
        ]),
        (
            "a.nii,b.nii\nc.nii,d.nii\n",
            [
                "the first row must be the names of the columns; unknown column 'a.nii'; known: image, label, split, "
                "patient, weight",
                "the first row must be the names of the columns; unknown column 'b.nii'; known: image, label, split, "
                "patient, weight",
                "no column 'image'; the first row must be the names of the columns",
            ],
        ),
        ("image,label,image\n", ["column 'image' stands 2 times"]),
        ("image,split\na.nii,train\n", [
            "row 2: split: expected one of training, validation, testing, test",
        ]),
        ("image,label\n,b.nii\na.nii,b.nii,c.nii\n", [
            "row 2: image is empty", "row 3: 3 cells, but the header has 2; quote the separator",
        ]),
        ("image,weight\na.nii,much\n", ["test[0].weight: expected a number above 0, got 'much'"]),
        ("image,weight\na.nii,nan\n", ["test[0].weight: expected a number above 0, got nan"]),
        ("image\n../a.nii\n", ["test[0]: relative paths may not contain '..', got '../a.nii'"]),
        ('image\n"a.nii\n', ["not valid CSV: unexpected end of data"]),
        ("image\n" + "a" * 200_000 + "\n", ["not valid CSV: field larger than field limit (131072)"]),
        ("image\n", ["no cases; expected at least one of the keys training, validation, testing, test"]),
    ],
)  # fmt: skip
def test_wrong_tables(tmp_path: Path, text: str, expected: list[str]):
    assert problems(table(tmp_path / "list.csv", text)) == expected


def test_a_table_that_is_no_text(tmp_path: Path):
    assert problems(table(tmp_path / "list.csv", "café", "latin-1"))[0].startswith("cannot be read: 'utf-8' codec")


def test_a_patient_is_text_and_a_wrong_one_is_not_repeated(tmp_path: Path):
    path = table(tmp_path / "list.json", '[{"image": "a.nii", "patient": 4711}, {"image": "b.nii", "patient": " "}]')
    assert problems(path) == [
        "test[0].patient: expected text, got int; put it in quotes or leave it out",
        "test[1].patient: expected text, got an empty one; put it in quotes or leave it out",
    ]


@pytest.mark.parametrize(("images", "labels"), [("imagesTr", "labelsTr"), ("images", "labels")])
def test_a_folder_pairs_images_and_labels_by_name(tmp_path: Path, images: str, labels: str):
    touch(tmp_path / "Task", f"{images}/b.nii.gz", f"{labels}/b.nii.gz", f"{images}/a.mha", f"{labels}/a.nrrd")
    touch(tmp_path / "Task", f"{images}/._a.nii.gz", f"{labels}/._a.nii.gz", f"{images}/notes.txt", "dataset.json")
    manifest = find_manifest(str(tmp_path / "Task"), None)
    root = tmp_path / "Task"
    assert manifest.name == "Task"
    assert manifest.cases == (
        Case(name="a", split="training", image=root / images / "a.mha", label=root / labels / "a.nrrd"),
        Case(name="b", split="training", image=root / images / "b.nii.gz", label=root / labels / "b.nii.gz"),
    )


def test_an_nnunet_folder(tmp_path: Path):
    touch(
        tmp_path, "imagesTr/s_1_0000.nii.gz", "labelsTr/s_1.nii.gz", "imagesTs/s_2_0000.nii.gz", "labelsTs/s_2.nii.gz"
    )
    touch(tmp_path, "imagesTs/s_3_0000.nii.gz")
    cases = find_manifest(str(tmp_path), None).cases
    assert [(c.name, c.split, c.label and c.label.name) for c in cases] == [
        ("s_1_0000", "training", "s_1.nii.gz"),
        ("s_2_0000", "testing", "s_2.nii.gz"),
        ("s_3_0000", "test", None),
    ]


def test_an_image_whose_label_ends_alike_is_no_first_channel(tmp_path: Path):
    touch(tmp_path, "images/a_0000.nii", "labels/a_0000.nii", "images/a.nii", "labels/a.nii")
    cases = find_manifest(str(tmp_path), None).cases
    assert {c.image.name: c.label.name for c in cases if c.label} == {"a_0000.nii": "a_0000.nii", "a.nii": "a.nii"}


def test_everything_unmatched_in_a_folder_is_told_at_once(tmp_path: Path):
    touch(tmp_path, "imagesTr/a.nii", "imagesTr/b_0001.nii", "labelsTr/b.nii", "labelsTr/c.nii", "labelsTr/c.mha")
    touch(tmp_path, "labelsTs/d.nii")
    assert problems(tmp_path) == [
        "labelsTr/c.mha and labelsTr/c.nii are labels of one name, remove one",
        "no image for labelsTr/b.nii: expected imagesTr/NAME",
        "no image for labelsTr/c.nii: expected imagesTr/NAME",
        "no label for imagesTr/a.nii: expected labelsTr/NAME",
        "no label for imagesTr/b_0001.nii: expected labelsTr/NAME",
        "no image for labelsTs/d.nii: expected imagesTs/NAME",
    ]


def test_a_folder_without_images(tmp_path: Path):
    (tmp_path / "imagesTr").mkdir()
    assert problems(tmp_path) == ["imagesTr holds no images (.nii.gz, .nii, .nrrd, .mha)"]


def test_two_images_for_one_label(tmp_path: Path):
    touch(tmp_path, "images/a.nii.gz", "images/a_0000.nii.gz", "labels/a.nii.gz")
    assert problems(tmp_path) == ["two images for labels/a.nii.gz, the second is images/a_0000.nii.gz; remove one"]


def test_a_folder_named_in_any_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    touch(tmp_path / "msd_spleen", "images/own.nii", "labels/own.nii")
    touch(tmp_path / "mine", "images/own.nii", "labels/own.nii")
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "./msd_spleen", "mine/", str(tmp_path / "mine")):
        assert [case.name for case in find_manifest(name, None).cases] == ["own"]
    with pytest.raises(ManifestError, match="data set 'msd_spleen': no image found"):
        find_manifest("msd_spleen", None)
    with pytest.raises(ManifestError, match="folder 'mine': its images lie in it, so --data cannot be given"):
        find_manifest("mine", tmp_path)
    monkeypatch.chdir("mine")
    assert find_manifest(".", None).name == "mine"


def test_the_folder_of_made_data_is_one_of_these(tmp_path: Path):
    made = read_manifest(write_made(tmp_path, phantom_data(), {"training": 1, "test": 1}, 0, lambda _: None))
    assert find_manifest(str(tmp_path), None).cases == made.cases


def test_a_decathlon_list_as_it_is_published(tmp_path: Path):
    text = """{"name": "Spleen", "labels": {"0": "background", "1": "spleen"}, "numTraining": 1, "numTest": 1,
    "training": [{"image": "./imagesTr/a.nii.gz", "label": "./labelsTr/a.nii.gz"}], "test": ["./imagesTs/b.nii.gz"]}"""
    touch(tmp_path, "imagesTr/a.nii.gz", "labelsTr/a.nii.gz", "imagesTs/b.nii.gz")
    listed = find_manifest(str(table(tmp_path / "dataset.json", text)), None)
    assert listed.cases == find_manifest(str(tmp_path), None).cases


def test_an_nnunet_list_has_no_cases_but_its_folder_has(tmp_path: Path):
    text = '{"channel_names": {"0": "CT"}, "labels": {"background": 0, "spleen": 1}, "numTraining": 1}'
    assert problems(table(tmp_path / "dataset.json", text))[0].endswith(
        "name the folder of its images and labels instead"
    )
