"""The studies folder: an index that can be rebuilt, labels that are whole, and ids that are found quickly."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ctseg.errors import OutputError
from ctseg.io.images import read_geometry, read_labels, write_labels
from ctseg.server.datastore import Datastore
from ctseg.server.problems import Conflict, Invalid, NotHere
from ctseg.volume import Geometry


@pytest.fixture
def store(studies: Path) -> Iterator[Datastore]:
    store = Datastore(studies, {1: "spleen"})
    yield store
    store.close()


def test_without_its_index_every_label_is_found_again(store: Datastore, studies: Path, made: SimpleNamespace) -> None:
    geometry = read_geometry(studies / "one.nii.gz")
    store.save_structure("one", "final", "liver", made.box_mask(), geometry)
    store.update_image_info("one", {"reader": "A"})
    store.close()
    for content in ("", "{", "[]", '{"structures": {"900": "x", "a": 1}, "images": 3}', None):
        index = studies / "labels" / "index.json"
        index.unlink() if content is None else index.write_text(content)
        again = Datastore(studies, {1: "spleen"})
        try:
            assert again.structures["spleen"] == 1
            assert list(again.labels("one")) == ["final"]
            assert np.array_equal(read_labels(again.label("one", "final")).array == 2, made.box_mask() > 0)
            assert again.image_info("one") == {}
        finally:
            again.close()


def test_names_and_notes_outlive_the_server(store: Datastore, studies: Path, made: SimpleNamespace) -> None:
    store.save_structure("one", "final", "liver", made.box_mask(), read_geometry(studies / "one.nii.gz"))
    store.update_image_info("one", {"reader": "A"})
    store.close()
    again = Datastore(studies)
    assert again.structures == {"spleen": 1, "liver": 2}
    assert again.image_info("one") == {"reader": "A"}
    again.close()


def test_a_label_that_cannot_be_written_leaves_the_old_one(
    store: Datastore, studies: Path, made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    geometry = read_geometry(studies / "one.nii.gz")
    store.save_structure("one", "final", "liver", made.box_mask(), geometry)
    before = (studies / "labels/final/one.nii.gz").read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ctseg.io.nifti.gzip_writer", full)
    with pytest.raises(OutputError, match="No space left"):
        store.save_structure("one", "final", "kidney", made.box_mask(), geometry)
    assert (studies / "labels/final/one.nii.gz").read_bytes() == before
    assert not list(studies.rglob("*.tmp"))


def test_masks_on_another_grid_are_refused(store: Datastore, studies: Path, made: SimpleNamespace) -> None:
    geometry = read_geometry(studies / "one.nii.gz")
    affine = geometry.affine.copy()
    affine[0, 3] += 5
    with pytest.raises(Invalid, match="lies on its image's grid"):
        store.save_label("one", "final", made.box_mask(), Geometry(geometry.size, affine))
    with pytest.raises(NotHere):
        store.save_label("none", "final", made.box_mask(), geometry)
    with pytest.raises(Invalid, match="label value 1: has no name"):
        store.save_label("one", "final", made.box_mask(), geometry, names={2: "liver"})


@pytest.mark.parametrize("name", ["", " liver", "a\nb", "x" * 65, "\x00"])
def test_names_of_structures(store: Datastore, studies: Path, made: SimpleNamespace, name: str) -> None:
    with pytest.raises(Invalid, match="expected a name of at most 64 characters"):
        store.save_structure("one", "final", name, made.box_mask(), read_geometry(studies / "one.nii.gz"))


def test_no_more_structures_than_fit_a_byte(store: Datastore, studies: Path, made: SimpleNamespace) -> None:
    geometry = read_geometry(studies / "one.nii.gz")
    store._index._data["structures"] = {str(n): f"organ {n}" for n in range(1, 256)}
    with pytest.raises(Conflict, match="255 already"):
        store.save_structure("one", "final", "one more", made.box_mask(), geometry)


def test_images_that_come_and_go_are_seen_at_once(store: Datastore, studies: Path) -> None:
    content = (studies / "one.nii.gz").read_bytes()
    for number in range(50):
        (studies / f"new_{number}.nii.gz").write_bytes(content)
        assert f"new_{number}" in store.images()
    (studies / "new_7.nii.gz").unlink()
    assert "new_7" not in store.images()
    (studies / "one.nrrd").write_bytes(b"x")
    assert store.image("one").name == "one.nii.gz"  # of two with one id, the first


def test_a_thousand_images_are_no_burden(store: Datastore, studies: Path) -> None:
    for number in range(1000):
        (studies / f"many_{number}.nii.gz").touch()
    time.sleep(2.1)
    store.images()
    started = time.perf_counter()
    for number in range(1000):
        store.image_info(f"many_{number}")
    assert time.perf_counter() - started < 2.0  # a scan for each would take a minute


def test_notes_are_plain_and_small(store: Datastore, studies: Path) -> None:
    with pytest.raises(Invalid, match="at most 65536 bytes"):
        store.update_image_info("one", {"text": "x" * 70_000})
    with pytest.raises(Invalid, match="without NaN"):
        store.update_image_info("one", {"number": float("nan")})
    store.update_image_info("one", {"a": 1})
    assert json.loads((studies / "labels/index.json").read_text())["images"] == {"one": {"a": 1}}


def test_a_new_structure_never_takes_the_value_of_one_without_a_name(studies: Path, made: SimpleNamespace) -> None:
    path, geometry = studies / "labels/final/one.nii.gz", read_geometry(studies / "one.nii.gz")
    path.parent.mkdir(parents=True)
    left = np.asfortranarray(made.box_mask())
    store = Datastore(studies)
    try:
        write_labels(path, left, geometry)  # by hand, while the server runs
        right = np.zeros_like(left)
        right[30:, 30:, 30:] = 1
        assert store.save_structure("one", "final", "liver", right, geometry)[1] == 2
        assert np.array_equal(read_labels(path).array == 1, left > 0)
        assert store.structures == {"label_1": 1, "liver": 2}
    finally:
        store.close()


def test_values_in_label_files_are_named_when_the_folder_is_opened(studies: Path, made: SimpleNamespace) -> None:
    path = studies / "labels/final/one.nii.gz"
    path.parent.mkdir(parents=True)
    write_labels(path, np.asfortranarray(made.box_mask() * 3), read_geometry(studies / "one.nii.gz"))
    (path.parent / "two.nii.gz").write_bytes(b"damaged")
    store = Datastore(studies, {1: "spleen"})
    store.close()
    assert store.structures == {"spleen": 1, "label_3": 3}


@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000, '{"structures": {"1": "a", "2": "a"}}', "\ud800"])
def test_a_damaged_index_is_set_aside(studies: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    (studies / "labels").mkdir()
    written = content.encode(errors="surrogatepass")
    (studies / "labels/index.json").write_bytes(written)
    for number in (1, 2):
        store = Datastore(studies)
        store.update_image_info("one", {"a": 1})
        store.close()
        assert (studies / f"labels/index.json.damaged-{number}").read_bytes() == written
        (studies / "labels/index.json").write_bytes(written)


def test_an_index_without_damage_stays(store: Datastore, studies: Path, made: SimpleNamespace) -> None:
    store.save_structure("one", "final", "liver", made.box_mask(), read_geometry(studies / "one.nii.gz"))
    store.close()
    Datastore(studies).close()
    assert not list(studies.glob("labels/*damaged*"))


def test_values_without_a_name_are_refused(store: Datastore, studies: Path, made: SimpleNamespace) -> None:
    with pytest.raises(Invalid, match="label value 2: this folder knows no structure of it; send the names"):
        store.save_label("one", "final", made.box_mask() * 2, read_geometry(studies / "one.nii.gz"))
    assert not list(studies.glob("labels/final/*"))


def test_notes_tell_of_the_label_that_is_there(store: Datastore, studies: Path, made: SimpleNamespace) -> None:
    geometry, mask = read_geometry(studies / "one.nii.gz"), made.box_mask() * 7
    info = {"params": {"label_info": [{"name": "liver", "idx": 7, "color": "red"}]}}
    store.save_label("one", "final", mask, geometry, names={7: "liver"}, info=info)
    stored = store.label_info("one", "final")["params"]["label_info"]
    assert stored == [{"name": "liver", "idx": 2, "color": "red"}]
    store.save_label("one", "final", made.box_mask(), geometry)
    assert store.label_info("one", "final") == {}


def test_files_whose_names_are_no_text_are_not_images(store: Datastore, studies: Path) -> None:
    try:
        (studies / "caf\udce9.nii.gz").write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes such names only")
    assert list(store.images()) == ["one", "three", "two"]


@pytest.mark.parametrize("deep", [19, 20])
def test_notes_are_text_and_not_deep(store: Datastore, deep: int) -> None:
    for wrong in ({"a": "\ud800"}, {"\ud800": 1}):
        with pytest.raises(Invalid, match="half of a character"):
            store.update_image_info("one", wrong)
    notes: object = 1
    for _ in range(deep):
        notes = [notes]
    if deep == 19:
        store.update_image_info("one", {"a": notes})  # 20 with the object around it
    else:
        with pytest.raises(Invalid, match="at most 20"):
            store.update_image_info("one", {"a": notes})


def test_uploads_that_a_killed_server_left_are_removed(studies: Path) -> None:
    (studies / ".ctseg-upload-x").mkdir()
    (studies / ".ctseg-upload-x" / "upload.nii.gz").write_bytes(b"half")
    Datastore(studies).close()
    assert not (studies / ".ctseg-upload-x").exists()
