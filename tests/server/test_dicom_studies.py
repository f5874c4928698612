"""DICOM series in the studies folder: images like any other, on their own grid, under names that tell of no patient."""

import gzip
import hashlib
import io
import json
import os
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.datadict import tag_for_keyword

from ctseg.errors import CtsegError
from ctseg.io.images import read_labels
from ctseg.server import finder
from ctseg.server.datastore import Datastore
from ctseg.server.images import SeriesImage
from ctseg.server.problems import Conflict, NotHere
from ctseg.server.run import LOG_LINES
from dicom_maker import Plan, write_enhanced, write_series

# MONAI Label's client leaves files open, and its `cgi` goes away with Python 3.13.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
SIZE = (24, 20, 16)
SECRETS = (b"Muster", b"4711", b"ACC-99", b"made for tests", b"1.2.826")


def bright_box(points: np.ndarray) -> np.ndarray:
    """HU of a box of 100 in -150."""
    return np.where((np.abs(points - [30.0, 40.0, 130.0]) < 22).all(axis=-1), 100.0, -150.0)


def plan(**changes: Any) -> Plan:
    return Plan(**{"size": SIZE, "spacing_mm": (5.0, 5.0, 5.0), "hu": bright_box, **changes})


def settle(folder: Path) -> None:
    """Makes everything in a folder an hour old."""
    old = time.time() - 3600
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (old, old))


def as_zip(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*.dcm")):
            archive.write(file, file.relative_to(folder))
    return path


def in_folder(studies: Path) -> None:
    write_series(studies / "Muster_Maria", plan())


def nested(studies: Path) -> None:
    write_series(studies / "a" / "b" / "Muster", plan())


def loose(studies: Path) -> None:
    write_series(studies, plan())


def zipped(studies: Path) -> None:
    as_zip(write_series(studies.parent / "elsewhere", plan()), studies / "Muster.zip")


def zipped_below(studies: Path) -> None:
    (studies / "sub").mkdir()
    as_zip(write_series(studies.parent / "elsewhere", plan()), studies / "sub" / "Muster.zip")


def multi_frame(studies: Path) -> None:
    write_enhanced(studies / "Muster-4711", plan())


PLACES = [in_folder, nested, loose, zipped, zipped_below, multi_frame]


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the pseudonyms; else one is made in the home folder."""
    monkeypatch.setenv("CTSEG_PSEUDONYM_KEY", "k" * 40)


@pytest.fixture
def empty(studies: Path) -> Path:
    for path in studies.iterdir():
        path.unlink()
    return studies


@pytest.fixture
def store(empty: Path) -> Iterator[Callable[[], Datastore]]:
    opened: list[Datastore] = []

    def again() -> Datastore:
        for one in opened:
            one.close()
        settle(empty)
        opened.append(Datastore(empty))
        return opened[-1]

    yield again
    for one in opened:
        one.close()


def only(store: Datastore) -> SeriesImage:
    images = list(store.images().values())
    assert len(images) == 1
    assert isinstance(images[0], SeriesImage)
    return images[0]


@pytest.mark.parametrize("place", PLACES)
def test_a_series_is_an_image_wherever_it_lies(store: Any, empty: Path, place: Callable[[Path], None]) -> None:
    place(empty)
    image = only(store())
    volume = image.read()
    assert volume.geometry.size == SIZE
    assert volume.geometry.agrees_with(image.extent().geometry)
    points = np.stack(np.meshgrid(*map(np.arange, SIZE), indexing="ij"), axis=-1) @ volume.geometry.affine[:3, :3].T
    assert np.array_equal(volume.array, bright_box(points + volume.geometry.affine[:3, 3]))
    assert image.id.startswith("ct-")
    assert not any(secret in f"{image.id} {image.name} {image!r}".encode() for secret in SECRETS)


def test_its_id_depends_on_the_series_alone(store: Any, empty: Path) -> None:
    write_series(empty / "x", plan())
    first = only(store()).id
    write_series(empty / "other", plan())
    known = store().images()
    assert first in known
    assert len(known) == 2
    shutil.rmtree(empty / "other")
    (empty / "x").rename(empty / "renamed")
    assert only(store()).id == first


def test_a_key_that_is_no_key_is_told(store: Any, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTSEG_PSEUDONYM_KEY", "short")
    write_series(empty / "x", plan())
    with pytest.raises(CtsegError, match="CTSEG_PSEUDONYM_KEY: expected at least 32 characters"):
        store().images()


def test_it_is_asked_for_by_its_uid_too(store: Any, empty: Path) -> None:
    write_series(empty / "x", plan())
    write_enhanced(empty / "two.dcm", plan())
    opened = store()
    for image_id, image in opened.images().items():
        assert opened.find(image.uid) == (image_id, image)
    with pytest.raises(NotHere):
        opened.find("1.2.3.4.5")
    with pytest.raises(NotHere):
        opened.find("")


def test_a_uid_of_several_series_is_asked_back(store: Any, empty: Path) -> None:
    tags = {"SeriesInstanceUID": "1.2.826.0.1.3680043.8.498.77"}
    write_series(empty / "x", plan(tags=tags))
    write_series(empty / "x", plan(tags={**tags, "AcquisitionNumber": 2}), prefix="second")
    opened = store()
    ids = set(opened.images())
    assert len(ids) == 2
    with pytest.raises(Conflict, match="several series have this SeriesInstanceUID; name one of ct-"):
        opened.find(tags["SeriesInstanceUID"])


def test_what_is_no_sound_ct_is_left_out(store: Any, empty: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_series(empty / "gap", plan(missing=(3,)))
    write_series(empty / "mr", plan(tags={"Modality": "MR"}))
    write_series(empty / "good", plan())
    (empty / "damaged.zip").write_bytes(b"PK\x03\x04 no archive")
    (empty / "notes.txt").write_text("no image")
    before = len(LOG_LINES)
    assert len(store().images()) == 1
    told = "\n".join(list(LOG_LINES)[before:])
    assert "CT series were left out: gaps (1)" in told
    assert "one place cannot be searched: ImageError" in told
    assert not any(secret.decode() in told for secret in SECRETS)


def test_links_that_lead_out_are_not_followed(store: Any, empty: Path, tmp_path: Path) -> None:
    outside = write_series(tmp_path / "outside", plan())
    (empty / "folder").symlink_to(outside)
    (empty / "inside").mkdir()
    (empty / "inside" / "folder").symlink_to(outside)
    (empty / "one.dcm").symlink_to(write_enhanced(tmp_path / "one.dcm", plan()))
    assert store().images() == {}


def test_series_that_come_and_go_are_seen(empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Datastore(empty)
    try:
        folder = write_series(empty / "x", plan())
        assert opened.images() == {}  # it may still be copied
        settle(empty)
        time.sleep(finder.COPYING_SECONDS)
        image = only(opened)
        reads: list[int] = []
        search = finder.find_series
        monkeypatch.setattr(finder, "find_series", lambda paths: reads.append(1) or search(paths))
        for _ in range(20):
            assert only(opened) is image
        assert not reads  # headers are read again only where something has changed
        write_series(empty / "x" / "more", plan())
        assert only(opened) is image  # who works on it goes on while another one is copied
        settle(empty)
        time.sleep(finder.COPYING_SECONDS)
        assert len(opened.images()) == 2
        shutil.rmtree(folder)
        assert opened.images() == {}
        with pytest.raises(NotHere):
            image.version()
    finally:
        opened.close()


def test_files_that_were_exchanged_are_noticed(store: Any, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_series(empty / "x", plan(tags={"SeriesInstanceUID": "1.2.826.0.1.3680043.8.498.5"}))
    opened = store()
    image, version = only(opened), only(opened).version()
    other = write_series(
        empty.parent / "other", plan(size=(10, 10, 16), tags={"SeriesInstanceUID": "1.2.826.0.1.3680043.8.498.5"})
    )
    for path in folder.iterdir():
        path.write_bytes((other / path.name).read_bytes())  # in place: no folder changes
    settle(empty)
    assert image.version() != version
    with pytest.raises(Exception, match="have changed since they were listed"):
        image.read()
    monkeypatch.setattr(finder, "LOOK_SECONDS", 0.0)
    next(iter(opened._finder._places.values()))._due = 0.0
    assert only(opened).read().geometry.size == (10, 10, 16)


@pytest.fixture
def dicom(empty: Path, start: Callable[..., Any]) -> SimpleNamespace:
    """A live server of one series, the id and the UID of it."""
    write_series(empty / "Muster_Maria", plan(axes="oblique", origin_mm=(10.0, 20.0, 110.0)))
    settle(empty)
    live = start()
    image = only(live.service.datastore)
    return SimpleNamespace(live=live, id=image.id, uid=image.uid, image=image, studies=empty)


def test_clicks_and_their_mask_on_the_series_own_grid(dicom: SimpleNamespace) -> None:
    live, geometry = dicom.live, dicom.image.extent().geometry
    session = live.json("POST", "/api/sessions", json={"image": dicom.id, "model": "deepgrow"})["session"]
    click = {"position": [12, 9, 8]}
    answer = live.call("POST", f"/api/sessions/{session}/clicks", json=click)
    mask = nibabel.Nifti1Image.from_bytes(gzip.decompress(answer.content))
    assert np.allclose(mask.affine, geometry.affine_ras, atol=1e-3)
    places = np.argwhere(np.asarray(mask.dataobj))
    assert np.linalg.norm(places.mean(axis=0) - [12, 9, 8]) < 1.5
    live.json("POST", f"/api/sessions/{session}/save", json={"label": "spleen"})
    saved = read_labels(dicom.studies / "labels" / "final" / f"{dicom.id}.nii.gz")
    assert np.array_equal(saved.array, np.asarray(mask.dataobj))
    assert saved.geometry.agrees_with(geometry)


def test_slicer_gets_a_nifti_of_it(dicom: SimpleNamespace, connect: Callable[[Any], Any], tmp_path: Path) -> None:
    client = connect(dicom.live)
    sample = client.next_sample("first", {})
    assert sample["id"] == dicom.id
    content = dicom.live.call("GET", f"/datastore/image?image={dicom.id}").content
    assert sample["checksum"] == f"SHA256:{hashlib.sha256(content).hexdigest()}"
    assert sample["name"] == f"{dicom.id}.nii.gz"
    (tmp_path / sample["name"]).write_bytes(content)
    image = SimpleITK.ReadImage(str(tmp_path / sample["name"]))
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(dicom.studies / "Muster_Maria")))
    judge = reader.Execute()
    assert np.array_equal(SimpleITK.GetArrayFromImage(image), SimpleITK.GetArrayFromImage(judge))
    assert np.allclose(image.GetOrigin(), judge.GetOrigin(), atol=1e-3)
    assert np.allclose(image.GetDirection(), judge.GetDirection(), atol=1e-5)
    path, _ = client.infer("spleen", sample["id"], {})
    client.save_label(sample["id"], path, params={"label_info": [{"name": "spleen", "idx": 1}]})
    label = client.download_label(sample["id"], "final")
    assert np.array_equal(nibabel.load(label).dataobj, (SimpleITK.GetArrayFromImage(judge).T > 0).astype(np.uint8))
    assert client.info()["datastore"]["completed"] == 1


def test_ohif_asks_by_its_uid(dicom: SimpleNamespace) -> None:
    live, before = dicom.live, len(LOG_LINES)
    sample = live.json("POST", "/activelearning/first", json={})
    header = pydicom.dcmread(next((dicom.studies / "Muster_Maria").iterdir()))
    assert sample["SeriesInstanceUID"] == dicom.uid == header.SeriesInstanceUID
    assert sample["StudyInstanceUID"] == header.StudyInstanceUID
    params = {"result_extension": ".nrrd", "result_dtype": "uint8", "result_compress": False}
    form = {"params": (None, json.dumps(params))}
    answer = live.call("POST", f"/infer/spleen?image={dicom.uid}&output=image", files=form)
    voxels = answer.content.partition(b"\n\n")[2]
    assert len(voxels) == np.prod(SIZE)
    assert np.array_equal(np.frombuffer(voxels, np.uint8).reshape(SIZE[::-1]).T, dicom.image.read().array > 0)
    files = {"params": (None, '{"label_info": [{"name": "spleen", "idx": 1}]}'), "label": ("label.bin", voxels)}
    live.json("PUT", f"/datastore/label?image={dicom.uid}", files=files)
    saved = read_labels(dicom.studies / "labels" / "final" / f"{dicom.id}.nii.gz")
    assert np.array_equal(saved.array, dicom.image.read().array > 0)
    assert live.json("GET", f"/datastore/label/info?label={dicom.uid}")["params"]["label_info"]
    assert live.call("GET", f"/api/images/{dicom.uid}/labels/final").ok
    assert live.call("GET", f"/datastore/label?label={dicom.uid}&tag=final").ok
    told = without_request_ids("\n".join(list(LOG_LINES)[before:]))
    assert "/infer/{model} 200" in told
    for secret in (dicom.uid, dicom.id, header.StudyInstanceUID, "Muster", "4711"):
        assert secret not in told


def without_request_ids(log: str) -> str:
    """They are made by chance, and may hold any four digits."""
    return re.sub(r"request [0-9a-f]{12}", "request", log)


def test_nothing_of_the_patient_leaves_the_server(dicom: SimpleNamespace) -> None:
    live = dicom.live
    calls = ["/api/images", "/datastore/?output=all", "/info/", "/logs/", f"/api/images/{dicom.id}/file"]
    for call in [*calls, f"/datastore/image?image={dicom.id}"]:
        content = live.call("GET", call).content
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)[:2000]
        content = without_request_ids(content.decode("latin-1")).encode("latin-1")
        assert not any(secret in content for secret in SECRETS), call
    live.json("PUT", f"/datastore/image/info?image={dicom.uid}", data={"info": "{}"})
    index = (dicom.studies / "labels" / "index.json").read_bytes()
    assert dicom.id.encode() in index
    assert not any(secret in index for secret in SECRETS)


def test_without_the_index_its_labels_are_found_again(dicom: SimpleNamespace, start: Callable[..., Any]) -> None:
    mask = (dicom.image.read().array > 0).astype(np.uint8)
    store = dicom.live.service.datastore
    store.save_structure(dicom.id, "final", "spleen", mask, dicom.image.extent().geometry)
    (dicom.studies / "labels" / "index.json").unlink()
    dicom.live.close()
    again = start()
    listed = again.json("GET", "/api/images")["images"]
    assert [(one["id"], one["labels"]) for one in listed] == [(dicom.id, [{"tag": "final"}])]


def test_training_gets_a_file_of_it(dicom: SimpleNamespace, tmp_path: Path) -> None:
    from ctseg.server.training import _write_manifest

    service = dicom.live.service
    mask = (dicom.image.read().array > 0).astype(np.uint8)
    service.datastore.save_structure(dicom.id, "final", "spleen", mask, dicom.image.extent().geometry)
    manifest = json.loads(_write_manifest(service, service.model("deepgrow"), tmp_path).read_text())
    (case,) = manifest["training"]
    image = nibabel.load(case["image"])
    assert np.array_equal(image.dataobj, dicom.image.read().array)
    assert not any(secret.decode() in json.dumps(manifest).replace(str(tmp_path), "") for secret in SECRETS[1:])


def test_a_series_that_is_damaged_inside_is_told_of(dicom: SimpleNamespace) -> None:
    path = sorted((dicom.studies / "Muster_Maria").iterdir())[3]
    path.write_bytes(path.read_bytes()[:-200])
    status, detail = dicom.live.refused("POST", "/api/segment", json={"image": dicom.id, "model": "spleen"})
    assert status == 422
    assert str(dicom.studies) not in detail


@pytest.mark.parametrize(
    "name", ["totalsegmentator_example/example_ct_dicom.zip", "dicom_oddities/gantry_tilt_philips_p16.5.zip"]
)
def test_real_series(real_data: Path, store: Any, empty: Path, name: str) -> None:
    shutil.copyfile(real_data / name, empty / "real.zip")
    images = list(store().images().values())
    if "tilt" in name:
        assert images == []  # `ctseg convert --tilt shear` first
        return
    (image,) = images
    volume = image.read()
    assert volume.geometry.agrees_with(image.extent().geometry)
    with zipfile.ZipFile(empty / "real.zip") as archive:
        archive.extractall(empty.parent / "unpacked")
    files = [path for path in (empty.parent / "unpacked").rglob("*") if path.is_file()]
    files.sort(key=lambda path: float(pydicom.dcmread(path, stop_before_pixels=True).ImagePositionPatient[2]))
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames([str(path) for path in files])
    judge = reader.Execute()
    assert np.array_equal(volume.array, SimpleITK.GetArrayFromImage(judge).T)
    assert np.allclose(volume.geometry.origin_mm, judge.GetOrigin(), atol=1e-3)


def as_form(params: dict[str, Any]) -> dict[str, tuple[None, str]]:
    return {"params": (None, json.dumps(params))}


def test_a_mask_as_dicom_seg_lies_on_the_series_images(dicom: SimpleNamespace, tmp_path: Path) -> None:
    """highdicom's reader is the judge."""
    import highdicom

    answer = dicom.live.call("POST", f"/infer/spleen?image={dicom.uid}&output=dicom_seg", files=as_form({}))
    assert answer.headers["Content-Type"] == "application/dicom"
    (tmp_path / "mask.dcm").write_bytes(answer.content)
    seg = highdicom.seg.segread(tmp_path / "mask.dcm")
    assert [seg.get_segment_description(n).segment_label for n in seg.segment_numbers] == ["spleen"]
    slices = [pydicom.dcmread(path) for path in (dicom.studies / "Muster_Maria").iterdir()]
    frames = seg.get_pixels_by_source_instance([one.SOPInstanceUID for one in slices], combine_segments=True)
    expected = np.stack([one.pixel_array * one.RescaleSlope + one.RescaleIntercept > 0 for one in slices])
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(frames, expected)
    assert seg.PatientID == slices[0].PatientID


def test_label_info_names_the_segments_of_a_seg(dicom: SimpleNamespace, tmp_path: Path) -> None:
    """OHIF's form; what clicks segment has no name of its own."""
    for model, params in (("spleen", {}), ("deepgrow", {"foreground": [[12, 9, 8]], "background": []})):
        form = as_form({**params, "label_info": [{"name": "milt"}]})
        answer = dicom.live.call("POST", f"/infer/{model}?image={dicom.id}&output=dicom_seg", files=form)
        (tmp_path / "mask.dcm").write_bytes(answer.content)
        seg = pydicom.dcmread(tmp_path / "mask.dcm")
        assert [segment.SegmentLabel for segment in seg.SegmentSequence] == ["milt"]
        assert seg.pixel_array.any()
    for wrong, part in (
        (["milt"], "expected a list of objects with a name and an idx"),
        ([{"name": "a\\b"}], "expected a name of at most 64 characters"),
        ([{"name": ""}], "expected a name of at most 64 characters"),
        ([{"name": None}], "expected a name of at most 64 characters"),
        ([{"name": "milt", "idx": 7}], "expected an idx of 1, got 7"),
    ):
        form = as_form({"label_info": wrong})
        status, reason = dicom.live.refused("POST", f"/infer/spleen?image={dicom.id}&output=dicom_seg", files=form)
        assert status == 422
        assert reason.startswith("label_info: ")
        assert part in reason


def test_a_seg_of_another_file_is_refused(live: Any) -> None:
    status, reason = live.refused("POST", "/infer/spleen?image=one&output=dicom_seg", files=as_form({}))
    assert status == 422
    assert reason == "output: dicom_seg needs a DICOM series, the image is another file; ask for output=image"


@pytest.fixture
def slices(tmp_path: Path) -> list[Path]:
    """The files of a series, which nobody has sent yet."""
    return sorted(write_series(tmp_path / "mine", plan()).iterdir())


def test_slices_that_slicer_sends_one_by_one_become_an_image(
    empty: Path, start: Callable[..., Any], connect: Callable[[Any], Any], slices: list[Path], monkeypatch
) -> None:
    """One alone, which is all that Slicer's own option sends, is kept but is no image."""
    monkeypatch.setattr(finder, "SETTLED_NS", 0)
    live = start()
    client = connect(live)
    ids = {client.upload_image(slices[0], "first")["image"]}
    (kept,) = (empty / next(iter(ids))).iterdir()
    assert kept.read_bytes() == slices[0].read_bytes()
    assert live.json("GET", "/datastore/")["total"] == 0
    for path in slices[1:]:
        ids.add(client.upload_image(path, path.stem)["image"])
    (image_id,) = ids
    assert live.json("GET", "/datastore/")["total"] == 1
    image = live.service.datastore.image(image_id).read()
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(slices[0].parent)))
    np.testing.assert_array_equal(image.array, SimpleITK.GetArrayFromImage(reader.Execute()).T)
    other = pydicom.dcmread(slices[1])
    other.SOPInstanceUID = other.file_meta.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    other.PixelData = bytes(len(other.PixelData))
    other.save_as(slices[1])
    status, reason = live.refused("PUT", "/datastore/image", files={"file": ("new.dcm", slices[1].read_bytes())})
    assert (status, "has a slice at this place already" in reason) == (409, True)
    whole = write_enhanced(empty.parent / "all.dcm", plan()).read_bytes()
    twice = pydicom.dcmread(empty.parent / "all.dcm")
    twice.SeriesInstanceUID = other.SeriesInstanceUID
    twice.save_as(empty.parent / "same.dcm")
    for name, wanted in (("same.dcm", 409), ("all.dcm", 200), ("all.dcm", 409)):
        sent = {"file": (name, (empty.parent / name).read_bytes())}
        assert live.call("PUT", "/datastore/image", files=sent).status_code == wanted
    assert whole in [path.read_bytes() for path in empty.glob("*/frames.dcm")]
    np.testing.assert_array_equal(live.service.datastore.image(image_id).read().array, image.array)


def send(live: Any, path: Path) -> int:
    status: int = live.call("PUT", "/datastore/image", files={"file": ("a.dcm", path.read_bytes())}).status_code
    return status


@pytest.mark.parametrize("whole_first", [True, False])
def test_a_series_is_sent_as_slices_or_as_a_whole(
    live: Any, studies: Path, tmp_path: Path, slices: list[Path], whole_first: bool
) -> None:
    """At once, before the server has looked at what came."""
    uid = pydicom.dcmread(slices[0]).SeriesInstanceUID
    dataset = pydicom.dcmread(write_enhanced(tmp_path / "whole.dcm", plan()))
    dataset.SeriesInstanceUID = uid
    dataset.save_as(tmp_path / "whole.dcm")
    sent = [tmp_path / "whole.dcm", slices[3]]
    assert [send(live, path) for path in (sent if whole_first else sent[::-1])] == [200, 409]
    assert len(list(studies.glob("ct-*/*"))) == 1


def test_two_slices_a_hair_apart_are_at_one_place(live: Any, slices: list[Path]) -> None:
    """As the reader of series takes them."""
    x, y, z = pydicom.dcmread(slices[0]).ImagePositionPatient
    (slices[0].parent / "near.dcm").write_bytes(changed(slices[0], ImagePositionPatient=[x, y, z + 0.008]))
    (slices[0].parent / "next.dcm").write_bytes(changed(slices[0], ImagePositionPatient=[x, y, z + 0.5]))
    folder = slices[0].parent
    assert [send(live, path) for path in (slices[0], folder / "near.dcm", folder / "next.dcm")] == [200, 409, 200]


def test_a_series_of_a_persons_folder_takes_no_slices_of_clients(dicom: SimpleNamespace, slices: list[Path]) -> None:
    """They would come between its own."""
    slice_of_it = pydicom.dcmread(slices[0])
    slice_of_it.SeriesInstanceUID = dicom.uid
    slice_of_it.save_as(slices[0])
    before = sorted(dicom.studies.rglob("*"))
    sent = {"file": ("a.dcm", slices[0].read_bytes())}
    status, reason = dicom.live.refused("PUT", "/datastore/image", files=sent)
    assert (status, "is there already" in reason) == (409, True)
    assert sorted(dicom.studies.rglob("*")) == before


@pytest.mark.parametrize("way", ["file", "session"])
def test_a_multi_frame_file_is_segmented_without_being_kept(
    empty: Path, start: Callable[..., Any], tmp_path: Path, slices: list[Path], way: str
) -> None:
    live = start()
    path = write_enhanced(tmp_path / "all.dcm", plan())
    if way == "file":
        answer = live.call(
            "POST",
            "/infer/spleen?output=dicom_seg",
            files={**as_form({}), "file": ("all.dcm", path.read_bytes())},
        )
    else:
        session = live.json("PUT", "/session/", files={"files": ("all.dcm", path.read_bytes())})["session_id"]
        assert live.call("GET", f"/session/{session}?image=true").content == path.read_bytes()
        answer = live.call("POST", f"/infer/spleen?session_id={session}&output=dicom_seg", files=as_form({}))
        live.json("DELETE", f"/session/{session}")
    (tmp_path / "mask.dcm").write_bytes(answer.content)
    found = pydicom.dcmread(tmp_path / "mask.dcm").pixel_array
    volume = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage([str(one) for one in slices])) > 0
    assert found.sum() == volume.sum() > 0
    assert [one.name for one in empty.iterdir()] == ["labels"]
    assert not list(live.service.scratch.iterdir())


@pytest.mark.parametrize(
    ("content", "status", "reason"),
    [
        (b"PK\x03\x04" + bytes(124) + b"DICM" + bytes(200), 415, "must be DICOM of a CT with its preamble"),
        (bytes(300), 415, "must be DICOM of a CT with its preamble"),
        (b"", 415, "must be DICOM of a CT with its preamble"),
        (bytes(128) + b"DICM" + bytes(range(200)), 415, "must be DICOM of a CT with its preamble"),
    ],
    ids=["archive", "no_dicom", "empty", "noise"],
)
def test_what_only_says_it_is_dicom_is_refused(
    live: Any, studies: Path, content: bytes, status: int, reason: str
) -> None:
    before = sorted(studies.rglob("*"))
    for method, call, files in (
        ("PUT", "/datastore/image", {"file": ("a.dcm", content)}),
        ("PUT", "/session/", {"files": ("a.dcm", content)}),
        ("POST", "/infer/spleen", {"file": ("a.dcm", content)}),
    ):
        found = live.refused(method, call, files=files)
        assert found[0] == status, call
        assert reason in found[1]
    assert sorted(studies.rglob("*")) == before


def changed(path: Path, **tags: Any) -> bytes:
    dataset = pydicom.dcmread(path)
    for keyword, value in tags.items():
        is_meta = keyword in dataset.file_meta or tag_for_keyword(keyword) >> 16 == 2
        setattr(dataset.file_meta if is_meta else dataset, keyword, value)
    content = io.BytesIO()
    dataset.save_as(content)
    return content.getvalue()


@pytest.mark.parametrize(
    ("tags", "status"),
    [
        ({"Modality": "MR"}, 422),
        ({"SeriesInstanceUID": ""}, 422),
        ({"MediaStorageSOPClassUID": pydicom.uid.MRImageStorage}, 415),
        ({"TransferSyntaxUID": pydicom.uid.DeflatedExplicitVRLittleEndian}, 415),
        ({"ImplementationVersionName": pydicom.uid.DeflatedExplicitVRLittleEndian[:16]}, 200),
        ({"PrivateInformationCreatorUID": pydicom.uid.DeflatedExplicitVRLittleEndian}, 415),
    ],
    ids=["modality", "no_series", "class", "deflated", "sound", "deflated_by_another_tag"],
)
def test_other_slices_are_refused(live: Any, slices: list[Path], tags: dict[str, Any], status: int) -> None:
    """A deflated file of 4 MB could unpack to 4 GB, and the reader takes one for deflated that says so anywhere."""
    sent = {"file": ("a.dcm", changed(slices[0], **tags))}
    assert live.call("PUT", "/datastore/image", files=sent).status_code == status


def test_a_slice_that_is_cut_short_is_refused(live: Any, slices: list[Path]) -> None:
    data = slices[0].read_bytes()
    assert live.refused("PUT", "/datastore/image", files={"file": ("a.dcm", data[: len(data) * 2 // 3])})[0] == 422


def test_one_slice_alone_is_not_segmented(live: Any, slices: list[Path]) -> None:
    files = {"file": ("a.dcm", slices[0].read_bytes())}
    status, reason = live.refused("POST", "/infer/spleen", files=files)
    assert (status, "multi-frame DICOM file (single)" in reason) == (422, True)


def test_a_slice_may_not_be_larger_than_an_image(start: Callable[..., Any], slices: list[Path]) -> None:
    live = start(max_voxels=100)
    status, reason = live.refused("PUT", "/datastore/image", files={"file": ("a.dcm", slices[0].read_bytes())})
    assert (status, "at most 100 voxels, got 480" in reason) == (413, True)


def test_real_slices_sent_one_by_one_and_their_mask_as_seg(
    real_data: Path, empty: Path, start: Callable[..., Any], tmp_path: Path, monkeypatch
) -> None:
    """highdicom's reader is the judge of the mask, SimpleITK of the voxels."""
    import highdicom

    monkeypatch.setattr(finder, "SETTLED_NS", 0)
    with zipfile.ZipFile(real_data / "totalsegmentator_example" / "example_ct_dicom.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    files = [path for path in (tmp_path / "unpacked").rglob("*") if path.is_file()]
    live = start()
    uid = pydicom.uid.generate_uid()
    for number, path in enumerate(files):
        header = pydicom.dcmread(path)
        header.SeriesInstanceUID = uid  # was taken away with the patient's name
        header.save_as(path)
        sent = {"file": (f"{number}.dcm", path.read_bytes())}
        image_id = live.json("PUT", "/datastore/image", files=sent)["image"]
    answer = live.call("POST", f"/infer/spleen?image={image_id}&output=dicom_seg", files=as_form({}))
    (tmp_path / "mask.dcm").write_bytes(answer.content)
    seg = highdicom.seg.segread(tmp_path / "mask.dcm")
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in files]
    uids = [header.SOPInstanceUID or header.file_meta.MediaStorageSOPInstanceUID for header in headers]
    frames = seg.get_pixels_by_source_instance(uids, combine_segments=True, assert_missing_frames_are_empty=True)
    stored = [SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))[0] for path in files]
    assert len(files) > 10
    found = nibabel.Nifti1Image.from_bytes(
        gzip.decompress(live.call("POST", f"/infer/spleen?image={image_id}&output=image", files=as_form({})).content)
    )
    assert frames.sum() == np.asarray(found.dataobj).sum() > 0
    inside = np.stack(stored)[frames > 0]
    assert inside.mean() > np.stack(stored)[frames == 0].mean() + 100  # bright voxels were marked
