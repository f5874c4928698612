"""Public data sets: from archives to a folder that the manifest finds, whatever happens on the way."""

import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import pytest

from ctseg.errors import DownloadError, ManifestError
from ctseg.files import write_json
from ctseg.manifest import find_manifest, read_manifest, shipped_manifest
from ctseg.progress import Silent
from ctseg.recipe import load_recipe, recipe_names
from ctseg.sources.answers import shown
from ctseg.sources.archives import SOURCE_FILE, Order, _remote, check_obtainable
from ctseg.sources.public import DataSet, data_sets, download_data_set, read_data_set
from file_server import FileServer, running_server

SETS = data_sets()


@pytest.fixture(scope="module")
def one_server() -> Iterator[FileServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def server(one_server: FileServer, monkeypatch: pytest.MonkeyPatch) -> FileServer:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    one_server.files.clear()
    one_server.requests.clear()
    return one_server


def content_of(path: PurePosixPath) -> bytes:
    return f"contents of {path} ".encode() * 50


def spleen_tar(folder: Path, leave_out: int = 0) -> Path:
    """A tar of the files of MSD Task09, as it was packed: one top folder, junk of macOS."""
    root = folder / "Task09_Spleen"
    files = SETS["msd_spleen"].files[: len(SETS["msd_spleen"].files) - leave_out]
    for file in [*files, PurePosixPath("dataset.json"), PurePosixPath("imagesTr/._spleen_29.nii.gz")]:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(content_of(file))
    subprocess.run(["tar", "-cf", folder / "Task09_Spleen.tar", "-C", folder, "Task09_Spleen"], check=True)
    return folder / "Task09_Spleen.tar"


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return spleen_tar(tmp_path_factory.mktemp("made"))


def with_archives(name: str, folder: Path, **archives: object) -> DataSet:
    """The shipped data set with other archives: `file` without suffix -> changes."""
    content = json.loads(shipped_manifest(name).read_text())
    for archive in content["download"]["archives"]:
        archive.update(archives[archive["file"].partition(".")[0].replace("-", "_")])
    path = folder / f"{name}.json"
    write_json(path, content)
    return read_data_set(path, content)


def served_spleen(server: FileServer, tar: Path, folder: Path, **how: object) -> DataSet:
    url = server.serve("/Task09_Spleen.tar", tar.read_bytes(), **how)
    md5 = hashlib.md5(tar.read_bytes()).hexdigest()
    return with_archives("msd_spleen", folder, Task09_Spleen={"urls": [url], "digests": {"md5": md5}})


def test_what_can_be_downloaded():
    assert set(SETS) == {"msd_spleen", "msd_liver", "msd_lung_images", "covid19_ct_seg", "btcv"}
    for data_set in SETS.values():
        assert data_set.files
        assert all(url.startswith("https://") for archive in data_set.download.archives for url in archive.urls)
        assert data_set.download.steps or all(archive.urls for archive in data_set.download.archives)
        assert all(archive.digests for archive in data_set.download.archives if archive.urls)


def test_addresses_and_checksums_are_those_that_monai_uses():
    from monai.apps.datasets import DecathlonDataset

    for name in ("msd_spleen", "msd_liver", "msd_lung_images"):
        (archive,) = SETS[name].download.archives
        task = archive.file.removesuffix(".tar")
        assert SETS[name].folder == task
        assert archive.digests == {"md5": DecathlonDataset.md5[task]}
        assert archive.urls[0] == DecathlonDataset.resource[task]


@pytest.mark.parametrize(("name", "split", "count"), [
    ("msd_liver", "training", 131), ("msd_lung_images", "test", 63), ("btcv", "training", 30),
])  # fmt: skip
def test_cases_of_the_other_data_sets(name: str, split: str, count: int):
    manifest = read_manifest(shipped_manifest(name))
    assert len(manifest.cases) == len(manifest.split(split)) == count
    labelled = [case for case in manifest.cases if case.label is not None]
    assert len(labelled) == (0 if split == "test" else count)
    numbers = [case.image.name for case in labelled], [case.label.name for case in labelled if case.label]
    assert [n.replace("img", "label") for n in numbers[0]] == numbers[1]


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_has_public_data_or_says_that_it_has_not(name: str, tmp_path: Path):
    manifest = load_recipe(name).data.manifest
    if manifest not in SETS:
        with pytest.raises(ManifestError, match="the original data is not public"):
            find_manifest(manifest, tmp_path)


def test_after_it_the_manifest_finds_its_images(server: FileServer, tar: Path, tmp_path: Path):
    data_set = served_spleen(server, tar, tmp_path)
    about = download_data_set(data_set, tmp_path / "data", None, False, Silent())
    manifest = find_manifest("msd_spleen", tmp_path / "data")
    assert len(manifest.cases) == 61
    assert manifest.cases[0].image.read_bytes() == content_of(PurePosixPath("imagesTr/spleen_29.nii.gz"))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["Task09_Spleen"]
    assert not list((tmp_path / "data").rglob("._*"))
    assert about is not None
    assert json.loads((tmp_path / "data" / "Task09_Spleen" / SOURCE_FILE).read_text()) == about
    assert (about["name"], about["licence"]) == ("msd_spleen", "CC-BY-SA 4.0")
    (archive,) = about["archives"]
    assert archive["verified"]
    assert archive["url"] == server.url("/Task09_Spleen.tar")
    assert archive["digests"]["sha256"] == hashlib.sha256(tar.read_bytes()).hexdigest()
    assert archive["num_bytes"] == tar.stat().st_size


def test_a_second_time_nothing_is_done(server: FileServer, tar: Path, tmp_path: Path):
    data_set = served_spleen(server, tar, tmp_path)
    about = download_data_set(data_set, tmp_path, None, False, Silent())
    server.requests.clear()
    assert download_data_set(data_set, tmp_path, None, False, Silent()) == about
    assert server.requests == []


def test_the_archive_is_kept_on_request(server: FileServer, tar: Path, tmp_path: Path):
    download_data_set(served_spleen(server, tar, tmp_path), tmp_path / "data", None, True, Silent())
    assert (tmp_path / "data" / "Task09_Spleen.tar").read_bytes() == tar.read_bytes()


@pytest.mark.parametrize("by_folder", [True, False])
def test_from_a_file_without_a_network(server: FileServer, tar: Path, tmp_path: Path, by_folder: bool):
    data_set = served_spleen(server, tar, tmp_path)
    about = download_data_set(data_set, tmp_path / "data", tar.parent if by_folder else tar, False, Silent())
    assert server.requests == []
    assert tar.is_file(), "the user's own archive stays"
    assert about is not None
    assert about["archives"][0]["file"] == "Task09_Spleen.tar"
    assert "/" not in about["archives"][0]["file"]
    assert len(find_manifest("msd_spleen", tmp_path / "data").cases) == 61


def test_another_file_than_published_is_refused(tar: Path, tmp_path: Path):
    with pytest.raises(DownloadError, match="wrong checksum: md5 expected 410d4a301da4e5b2f6f86ec3ddba524e, got"):
        download_data_set(SETS["msd_spleen"], tmp_path / "data", tar, False, Silent())
    assert not (tmp_path / "data" / "Task09_Spleen").exists()


def test_from_what_is_not_there(tmp_path: Path):
    with pytest.raises(DownloadError, match=r"--from .*none\.tar: no such file or folder"):
        download_data_set(SETS["msd_spleen"], tmp_path, tmp_path / "none.tar", False, Silent())
    with pytest.raises(
        DownloadError, match=r"2 problems\n  no COVID-19-CT-Seg_20cases\.zip \(.*\) in it\n  no Lung_Mask"
    ):
        download_data_set(SETS["covid19_ct_seg"], tmp_path, tmp_path, False, Silent())
    (tmp_path / "Lung_Mask.zip").touch()
    with pytest.raises(DownloadError, match="name the folder that holds them"):
        download_data_set(SETS["covid19_ct_seg"], tmp_path, tmp_path / "Lung_Mask.zip", False, Silent())


def make_zip(path: Path, files: dict[str, bytes]) -> Path:
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("top", ["", "COVID-19-CT-Seg_20cases/", "any/depth/"])
def test_two_archives_each_into_its_folder(server: FileServer, tmp_path: Path, top: str):
    """However deep their files lie, and with files that no manifest names."""
    names = [f"coronacases_{n:03d}.nii.gz" for n in range(1, 11)] + ["radiopaedia_1.nii.gz"]
    archives = {}
    for stem, where in (("COVID-19-CT-Seg_20cases", top), ("Lung_Mask", "")):
        made = make_zip(tmp_path / f"{stem}.zip", {where + name: f"{stem} {name}".encode() for name in names})
        digests = {"sha256": hashlib.sha256(made.read_bytes()).hexdigest()}
        url = server.serve(f"/{stem}.zip", made.read_bytes())
        archives[stem.replace("-", "_")] = {"urls": [url], "digests": digests}
    data_set = with_archives("covid19_ct_seg", tmp_path, **archives)
    download_data_set(data_set, tmp_path / "data", None, False, Silent())
    manifest = find_manifest("covid19_ct_seg", tmp_path / "data")
    for case in manifest.cases:
        assert case.image.read_bytes() == f"COVID-19-CT-Seg_20cases {case.image.name}".encode()
        assert case.label is not None
        assert case.label.read_bytes() == f"Lung_Mask {case.image.name}".encode()
    extra = tmp_path / "data" / "COVID-19-CT-Seg" / "Lung_Mask" / "radiopaedia_1.nii.gz"
    assert extra.is_file()


def btcv_files(leave_out: tuple[str, ...] = ()) -> dict[str, bytes]:
    files = [*SETS["btcv"].files, PurePosixPath("Testing/img/img0061.nii.gz")]
    return {f"RawData/{file}": content_of(file) for file in files if file.name not in leave_out}


def test_a_login_is_explained_step_by_step(tmp_path: Path):
    with pytest.raises(DownloadError) as caught:
        download_data_set(SETS["btcv"], tmp_path / "data", None, False, Silent())
    lines = str(caught.value).splitlines()
    assert lines[0] == "'btcv' cannot be fetched without a login:"
    assert [line[:5] for line in lines[1:]] == ["  1. ", "  2. ", "  3. ", "  4. "]
    assert "syn3193805" in lines[2]
    assert "ctseg download btcv --from RawData.zip" in lines[4]
    assert not (tmp_path / "data").exists()


def test_what_the_user_fetched_is_verified_and_unpacked(tmp_path: Path):
    archive = make_zip(tmp_path / "RawData (1).zip", btcv_files())
    about = download_data_set(SETS["btcv"], tmp_path / "data", archive, False, Silent())
    assert about is not None
    assert about["archives"][0]["verified"] is False, "nobody publishes a checksum"
    assert about["archives"][0]["digests"] == {"sha256": hashlib.sha256(archive.read_bytes()).hexdigest()}
    cases = find_manifest("btcv", tmp_path / "data").cases
    assert [case.name for case in cases] == [f"img{n:04d}" for n in [*range(1, 11), *range(21, 41)]]
    assert all(case.label is not None and case.label.is_file() for case in cases)


def test_missing_cases_are_named_before_anything_is_unpacked(tmp_path: Path):
    archive = make_zip(tmp_path / "RawData.zip", btcv_files(("label0003.nii.gz", "img0040.nii.gz")))
    with pytest.raises(DownloadError) as caught:
        download_data_set(SETS["btcv"], tmp_path / "data", archive, False, Silent())
    assert str(caught.value) == (
        f"archive '{archive}': lacks 2 of 60 files of 'btcv' (Training/label/label0003.nii.gz, "
        f"Training/img/img0040.nii.gz); is it the right one?"
    )
    assert not list((tmp_path / "data").iterdir())


LOGIN = b"<html>please log in</html>" * 100


def test_a_page_that_came_instead_of_the_archive_is_removed(server: FileServer, tmp_path: Path):
    """Nobody publishes a checksum of it: only the next fetch can bring the right one."""
    url = server.serve("/RawData.zip", LOGIN)
    data_set = with_archives("btcv", tmp_path, RawData={"urls": [url]})
    wanted = r"damaged, or neither tar nor zip .*; it was removed, run again to fetch it, or use --from$"
    with pytest.raises(DownloadError, match=wanted):
        download_data_set(data_set, tmp_path / "data", None, False, Silent())
    assert not list((tmp_path / "data").iterdir())
    server.serve("/RawData.zip", make_zip(tmp_path / "right.zip", btcv_files()).read_bytes())
    assert download_data_set(data_set, tmp_path / "data", None, False, Silent()) is not None


def test_what_the_user_gave_is_never_removed(tmp_path: Path):
    (tmp_path / "RawData.zip").write_bytes(LOGIN)
    with pytest.raises(DownloadError, match=r"neither tar nor zip \([^)]*\)$"):
        download_data_set(SETS["btcv"], tmp_path / "data", tmp_path / "RawData.zip", False, Silent())
    assert (tmp_path / "RawData.zip").read_bytes() == LOGIN


def test_a_verified_archive_that_cannot_be_unpacked_is_kept(server: FileServer, tmp_path: Path):
    digests = {"sha256": hashlib.sha256(LOGIN).hexdigest()}
    data_set = with_archives("btcv", tmp_path, RawData={"urls": [server.serve("/a", LOGIN)], "digests": digests})
    with pytest.raises(DownloadError, match=r"neither tar nor zip \([^)]*\)$"):
        download_data_set(data_set, tmp_path / "data", None, False, Silent())
    assert [path.name for path in (tmp_path / "data").rglob("*.zip")] == ["RawData.zip"]


def test_every_archive_of_a_data_set_is_named_with_its_address(tmp_path: Path):
    data_set = SETS["covid19_ct_seg"]
    addresses = [archive.urls[0] for archive in data_set.download.archives]
    assert len(addresses) > 1
    (tmp_path / "one.zip").touch()
    order = Order(name=data_set.name, archives=data_set.download.archives, max_bytes=1)
    for given in (tmp_path / "one.zip", tmp_path):
        with pytest.raises(DownloadError) as caught:
            check_obtainable(order, given)
        assert all(f"({shown(url)})" in str(caught.value) for url in addresses)
    remote = _remote(order, order.archives[1])
    both = " and ".join(shown(url) for url in addresses)
    assert remote.by_hand == (
        f"fetch {both} on another machine, then `ctseg download covid19_ct_seg --from FOLDER` here"
    )


def test_a_hostile_archive_leaves_nothing(tmp_path: Path):
    archive = make_zip(tmp_path / "RawData.zip", {**btcv_files(), "../../outside": b"x"})
    with pytest.raises(DownloadError, match="leads out of the folder"):
        download_data_set(SETS["btcv"], tmp_path / "data", archive, False, Silent())
    assert not list((tmp_path / "data").iterdir())
    assert not (tmp_path / "outside").exists()


def test_a_folder_of_the_users_is_left_alone(tar: Path, tmp_path: Path):
    data_set = SETS["msd_spleen"]
    target = tmp_path / "Task09_Spleen"
    (target / "imagesTr").mkdir(parents=True)
    with pytest.raises(DownloadError, match=r"Task09_Spleen' is there but lacks 102 of 102 files of .*; move it away"):
        download_data_set(data_set, tmp_path, tar, False, Silent())
    for file in data_set.files:
        (target / file).parent.mkdir(exist_ok=True)
        (target / file).touch()
    assert download_data_set(data_set, tmp_path, None, False, Silent()) is None


def test_all_problems_of_the_table_at_once(tmp_path: Path):
    archive = {"file": "../x", "urls": ["file:///x"], "digests": {"crc": "1", "md5": "xyz"}, "sha": 1}
    content = {"test": ["a.nii"], "download": {"purpose": 3, "gigabytes": 0, "archives": [archive], "size": 1}}
    with pytest.raises(ManifestError) as caught:
        read_data_set(tmp_path / "x.json", content)
    assert "4 problems" in str(caught.value)
    content["download"] = {"purpose": "x", "gigabytes": 1, "archives": [{**archive}]}
    del content["download"]["archives"][0]["sha"]
    with pytest.raises(ManifestError) as caught:
        read_data_set(tmp_path / "x.json", content)
    for text in (
        "digests.crc: unknown kind",
        "digests.md5: expected 32",
        "file: expected a plain",
        "urls: expected http",
    ):
        assert text in str(caught.value)


KILLED = """
import json, sys
from pathlib import Path
from ctseg.progress import Silent
from ctseg.sources.public import download_data_set, read_data_set
manifest, base = map(Path, sys.argv[1:])
download_data_set(read_data_set(manifest, json.loads(manifest.read_text())), base, None, False, Silent())
"""


def killed_when(command: list[str], ready: Callable[[], bool]) -> bool:
    """Starts the command and kills it once `ready`; False if it came to its end before."""
    process = subprocess.Popen(command)
    deadline = time.monotonic() + 30
    while process.poll() is None and not ready() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    return process.wait() != 0


def test_killed_anywhere_and_run_again_it_ends_complete(server: FileServer, tar: Path, tmp_path: Path):
    """While bytes arrive, while they are checked and while they are unpacked; the folder is absent or whole."""
    big = tmp_path / "big"
    big.mkdir()
    files = {f"Task09_Spleen/{file}": content_of(file) * 40 for file in SETS["msd_spleen"].files}
    archive = make_zip(big / "Task09_Spleen.tar", files)  # a zip under that name unpacks too
    data_set = served_spleen(server, archive, tmp_path, bytes_per_second=8_000_000)
    base = tmp_path / "data"
    target, work = base / "Task09_Spleen", base / ".Task09_Spleen.download"
    part, whole, images = work / "Task09_Spleen.tar.part", work / "Task09_Spleen.tar", work / "unpacked" / "imagesTr"
    command = [sys.executable, "-c", KILLED, str(tmp_path / "msd_spleen.json"), str(base)]
    moments: list[Callable[[], bool]] = [
        part.exists,
        lambda: part.exists() and part.stat().st_size > 2_000_000,
        lambda: part.exists() and part.stat().st_size > archive.stat().st_size * 0.9,
        whole.exists,
        images.exists,
        lambda: images.exists() and sum(1 for _ in images.iterdir()) > 10,
        target.exists,
    ]
    killed = []
    for ready in moments:
        killed.append(killed_when(command, ready))
        assert not target.exists() or find_manifest("msd_spleen", base), "absent or whole"
    assert all(killed[:4])
    subprocess.run(command, check=True)
    assert [path.name for path in base.iterdir()] == ["Task09_Spleen"]
    assert all((target / file).read_bytes() == content_of(file) * 40 for file in data_set.files)
    starts = [text for text in server.ranges() if text]
    assert starts, "bytes that had arrived were not asked for again"
