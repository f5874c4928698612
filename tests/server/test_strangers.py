"""What web pages of other servers and small files that unpack to much cannot do."""

import gzip
import json
import os
import re
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK

from ctseg.errors import CtsegError
from ctseg.server import images, service
from ctseg.server.masks import DTYPES, ResultForm
from ctseg.server.settings import Settings, check_host_name
from ctseg.volume import Volume

FOREIGN = [
    {"Origin": "https://evil.example.org"},
    {"Origin": "https://evil.example.org", "Sec-Fetch-Site": "cross-site"},
    {"Origin": "null"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
    {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"},
]


@pytest.mark.parametrize("headers", FOREIGN)
@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/activelearning/first"), ("GET", "/activelearning/first"), ("POST", "/api/images")]
)
def test_a_foreign_page_can_do_nothing(
    live: Any, studies: Path, headers: dict[str, str], method: str, path: str
) -> None:
    files = {"file": ("new.nii.gz", (studies / "one.nii.gz").read_bytes())}
    answer = live.call(method, path, headers=headers, files=files if path == "/api/images" else None)
    assert answer.status_code == 403
    assert not (studies / "new.nii.gz").exists()
    assert not (studies / "labels" / "index.json").exists()  # nobody was handed an image


def test_links_to_the_page_and_its_own_requests_work(live: Any) -> None:
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert live.call("GET", "/", headers=link).status_code == 200
    own = {"Sec-Fetch-Site": "same-origin", "Sec-Fetch-Mode": "cors", "Origin": live.url}
    assert live.call("POST", "/activelearning/first", headers=own).status_code == 200
    typed = {"Sec-Fetch-Site": "none", "Sec-Fetch-Mode": "navigate"}
    assert live.call("GET", "/api/docs", headers=typed).status_code == 200


def test_an_allowed_page_is_told_by_its_origin(start: Callable[..., Any]) -> None:
    live = start(cors_origins=("https://viewer.example.org",))
    headers = {"Origin": "https://viewer.example.org", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}
    assert live.call("POST", "/activelearning/first", headers=headers).status_code == 200


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("evil.example.org", 400),
        ("127.0.0.1.evil.example.org", 400),
        ("", 400),
        ("192.168.1.7:8000", 200),
        ("[::1]:8000", 200),
        ("localhost", 200),
        ("ct.hospital.example:8000", 200),
        ("CT.hospital.example", 200),
        (os.uname().nodename, 200),
    ],
)
def test_names_of_a_server_that_everyone_reaches(start: Callable[..., Any], name: str, status: int) -> None:
    live = start(host="0.0.0.0", host_names=("ct.hospital.example",))
    live.url = live.url.replace("0.0.0.0", "127.0.0.1")
    assert live.call("GET", "/info/", headers={"Host": name}).status_code == status


def test_a_server_of_this_machine_has_its_names_only() -> None:
    settings = Settings(studies=Path(), host_names=("ct.hospital.example",))
    assert settings.goes_by("127.0.0.1")
    assert settings.goes_by("ct.hospital.example")
    assert not settings.goes_by("192.168.1.7")
    assert not settings.goes_by(os.uname().nodename)


@pytest.mark.parametrize("name", ["", "a b", "http://x", "x:80", "-x", "a/b", "x" * 254])
def test_names_that_no_host_has(name: str) -> None:
    with pytest.raises(CtsegError, match="--allow-host"):
        check_host_name(name)


def zeros(path: Path, voxels: int, dtype: str) -> bytes:
    """A small file whose header is right and whose voxels are many."""
    side = (voxels // 1000, 40, 25)
    image = nibabel.Nifti1Image(np.zeros(side, dtype), np.eye(4), dtype=dtype)
    image.header["sform_code"] = 1
    nibabel.save(image, path)
    return path.read_bytes()


@pytest.mark.parametrize("dtype", ["float64", "int64"])
def test_a_small_file_that_unpacks_to_much_is_refused_by_its_header(
    start: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    live = start(max_voxels=100_000)
    content = zeros(tmp_path / "a.nii.gz", 90_000, dtype)
    assert len(content) < 8000

    def never(*_: object, **__: object) -> None:
        raise AssertionError("memory was taken for its voxels")

    monkeypatch.setattr("ctseg.io.new_array", never)
    for method, path, field in (
        ("POST", "/api/images", "file"),
        ("PUT", "/datastore/image?image=x", "file"),
        ("PUT", "/session/", "files"),
        ("POST", "/infer/spleen", "file"),
        ("PUT", "/datastore/label?image=one", "label"),
        ("PUT", "/api/images/one/labels/final", "file"),
        ("POST", "/v1/segmentation?model=spleen", "datapoint"),
        ("POST", "/v1/mask2polygon", "datapoint"),
    ):
        status, detail = live.refused(method, path, files={field: ("a.nii.gz", content)})
        assert status == 413, path
        assert re.search(r"unpacking it takes \d+ bytes, at most 600000; store it as int16", detail), path


def test_voxels_far_behind_the_header_are_refused(live: Any, studies: Path) -> None:
    plain = bytearray(gzip.decompress((studies / "one.nii.gz").read_bytes()))
    plain[108:112] = struct.pack("<f", 2.0**30)
    packed = gzip.compress(bytes(plain)) + gzip.compress(np.random.default_rng(0).bytes(2**21))
    status, detail = live.refused("PUT", "/session/", files={"files": ("a.nii.gz", packed)})
    assert status == 422
    assert "must begin in the first" in detail


def test_few_files_are_unpacked_at_once(live: Any, studies: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, most, lock, read = [], [], Lock(), images.read_image

    def slow(path: Path) -> Volume:
        with lock:
            inside.append(path)
            most.append(len(inside))
        time.sleep(0.05)
        volume = read(path)
        with lock:
            inside.remove(path)
        return volume

    monkeypatch.setattr(images, "read_image", slow)
    content = (studies / "one.nii.gz").read_bytes()

    def send(number: int) -> int:
        return int(live.call("POST", "/api/images", files={"file": (f"n{number}.nii.gz", content)}).status_code)

    with ThreadPoolExecutor(10) as threads:
        assert set(threads.map(send, range(10))) == {201}
    assert max(most) == service.MAX_UNPACKING


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float32"])
@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd"])
def test_the_type_of_voxels_that_was_asked_for(
    live: Any, tmp_path: Path, made: SimpleNamespace, dtype: str, suffix: str
) -> None:
    form = {"params": (None, json.dumps({"result_dtype": dtype, "result_extension": suffix}))}
    answer = live.call("POST", "/infer/spleen?image=one&output=image", files=form)
    path = tmp_path / f"mask{suffix}"
    path.write_bytes(answer.content)
    image = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
    assert image.dtype == np.dtype(dtype)
    assert np.array_equal(image.T, made.box_mask())


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64", "O", "float128", 7, [], "uint8; rm"])
@pytest.mark.parametrize("path", ["/infer/spleen?image=one", "/v1/segmentation?model=spleen"])
def test_types_that_cannot_hold_labels_are_refused(live: Any, studies: Path, dtype: Any, path: str) -> None:
    files: dict[str, Any] = {"params": (None, json.dumps({"result_dtype": dtype}))}
    if path.startswith("/v1"):
        files["datapoint"] = ("one.nii.gz", (studies / "one.nii.gz").read_bytes())
    answer = live.call("POST", path, files=files)
    known = dtype == []  # empty: as if it were not there
    assert answer.status_code == (200 if known else 422)
    assert known or "result_dtype: expected one of uint8, uint16" in answer.json()["detail"]


def test_labels_of_any_value_survive_each_type(tmp_path: Path, made: SimpleNamespace) -> None:
    mask = np.asfortranarray(np.arange(256, dtype=np.uint8).reshape(8, 8, 4))
    geometry = made.ct().geometry
    for dtype in DTYPES:
        path = tmp_path / "mask.nrrd"
        path.write_bytes(ResultForm(".nrrd", dtype, False).content(mask, type(geometry)(mask.shape, geometry.affine)))
        assert np.array_equal(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))).T, mask)
