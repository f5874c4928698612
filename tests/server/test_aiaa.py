"""AIAA's calls as its Python client makes them: the same bytes out, and the answer parsed by the same library."""

import http.client
import json
import warnings
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest

from ctseg.io.images import write_image

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    cgi = pytest.importorskip("cgi", reason="Python 3.13 lacks cgi: pip install legacy-cgi")

BOUNDARY = "----------lImIt_of_THE_fIle_eW_$"


def send(live: Any, selector: str, params: dict[str, Any] | None = None, file: Path | None = None, *, method="POST"):
    """Status, form and files of an answer; the form is written as AIAA's client writes it."""
    parts = []
    if params is not None:
        parts.append(b'Content-Disposition: form-data; name="params"\r\n\r\n' + json.dumps(params).encode())
    if file is not None:
        name = "image" if method == "PUT" else "datapoint"
        head = f'Content-Disposition: form-data; name="{name}"; filename="{file}"\r\nContent-Type: application/gzip'
        parts.append(head.encode() + b"\r\n\r\n" + file.read_bytes())
    body = b"".join(b"--" + BOUNDARY.encode() + b"\r\n" + part + b"\r\n" for part in parts)
    body += f"--{BOUNDARY}--\r\n\r\n".encode()
    headers = {"content-type": f"multipart/form-data; boundary={BOUNDARY}", "content-length": str(len(body))}
    with closing(http.client.HTTPConnection(*live.socket.getsockname(), timeout=30)) as connection:
        connection.request(method, selector, body, headers)
        with connection.getresponse() as response:
            if "multipart" not in response.getheader("content-type", ""):
                return response.status, json.loads(response.read()), {}
            fields = cgi.FieldStorage(fp=response.fp, environ={"REQUEST_METHOD": "POST"}, headers=response.msg)
            form = {part.name: part.value for part in fields.list if not part.filename}
            return response.status, form, {part.filename: part.value for part in fields.list if part.filename}


def mask_in(files: dict[str, bytes], folder: Path) -> nibabel.Nifti1Image:
    ((_, content),) = files.items()
    (folder / "answer.nii.gz").write_bytes(content)
    return nibabel.load(folder / "answer.nii.gz")


@pytest.fixture
def scan(tmp_path: Path, made: SimpleNamespace) -> Path:
    write_image(tmp_path / "scan.nii.gz", made.ct("RAS", 4))
    return tmp_path / "scan.nii.gz"


def test_models_are_listed_and_found_by_name_and_label(live: Any) -> None:
    listed = live.json("GET", "/v1/models")
    assert [(m["name"], m["type"], m["labels"]) for m in listed] == [
        ("deepgrow", "deepgrow", []),
        ("spleen", "segmentation", ["spleen"]),
    ]
    assert live.json("GET", "/v1/models?label=spleen") == listed[1:]
    assert live.json("GET", "/v1/models?model=deepgrow") == listed[0]
    assert live.refused("GET", "/v1/models?model=nothing")[0] == 404


def test_segmentation_with_the_image_sent_along(live: Any, scan: Path, tmp_path: Path, made: SimpleNamespace) -> None:
    status, form, files = send(live, "/v1/segmentation?model=spleen", {}, scan)
    assert status == 200
    mask = mask_in(files, tmp_path)
    assert np.array_equal(np.asarray(mask.dataobj), made.box_mask())
    assert np.allclose(mask.affine, nibabel.load(scan).affine, atol=1e-3)
    points = json.loads(form["params"])["points"]
    assert json.loads(form["points"]) == points
    assert [point[n // 2] for n, point in enumerate(points)] == [10, 19, 8, 17, 6, 15]
