"""The viewer library is fetched once, checked against what was tested, and never left half there."""

import base64
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctseg.errors import DownloadError
from ctseg.server import viewer
from file_server import FileServer, running_server

ROOT = Path(__file__).parents[2]
LIBRARY = b"export const one = 1;\n" * 1000


def made_archive(content: bytes, name: str = viewer.MEMBER) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def server() -> Iterator[FileServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def archive(server: FileServer, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A registry with another library, which is the pinned one now."""
    archive = made_archive(LIBRARY)
    monkeypatch.setenv("NPM_CONFIG_REGISTRY", server.url("/npm/"))
    monkeypatch.setattr(viewer, "ARCHIVE_SHA512", base64.b64encode(hashlib.sha512(archive).digest()).decode())
    monkeypatch.setattr(viewer, "MEMBER_SHA256", hashlib.sha256(LIBRARY).hexdigest())
    server.serve(f"/npm/{viewer.ARCHIVE}", archive)
    return archive


def test_the_library_is_fetched_once(archive: bytes, server: FileServer, tmp_path: Path) -> None:
    for _ in range(2):
        path = viewer.bring_viewer(tmp_path)
    assert path.read_bytes() == LIBRARY
    assert len(server.requests) == 1


def test_another_file_in_its_place_is_replaced(archive: bytes, tmp_path: Path) -> None:
    path = viewer.bring_viewer(tmp_path)
    path.write_bytes(b"something else")
    assert not viewer.is_here(tmp_path)
    assert viewer.bring_viewer(tmp_path).read_bytes() == LIBRARY


@pytest.mark.parametrize(
    ("served", "reason"),
    [
        ({}, "its SHA-512 differs"),
        ({"statuses": [(403, {})]}, "answered 403"),
        ({"drops": [100]}, "bytes early"),
        ({"claims": 10**6}, "bytes early"),
        ({"bytes_per_second": 200}, "not whole after"),
    ],
    ids=["other bytes", "refused", "dropped", "cut short", "too slow"],
)
def test_what_is_not_the_tested_archive_is_refused(
    served: dict[str, object], reason: str, archive: bytes, server: FileServer, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(viewer, "WHOLE_SECONDS", 0.2)
    server.serve(f"/npm/{viewer.ARCHIVE}", made_archive(b"console.log('evil')") if not served else archive, **served)
    with pytest.raises(DownloadError, match=reason):
        viewer.bring_viewer(tmp_path)
    assert not list(tmp_path.rglob("*.js*"))


def test_an_endless_answer_ends(archive: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(viewer, "MAX_BYTES", len(archive) - 1)
    with pytest.raises(DownloadError, match="more than"):
        viewer.bring_viewer(tmp_path)


def test_an_archive_with_another_file_is_refused(
    archive: bytes, server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = made_archive(LIBRARY + b"more")
    monkeypatch.setattr(viewer, "ARCHIVE_SHA512", base64.b64encode(hashlib.sha512(other).digest()).decode())
    server.serve(f"/npm/{viewer.ARCHIVE}", other)
    with pytest.raises(DownloadError, match="SHA-256"):
        viewer.bring_viewer(tmp_path)


def test_the_registry_is_that_of_the_environment_then_of_npmrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.lower() == "npm_config_registry"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert viewer.registry() == "https://registry.npmjs.org"
    (tmp_path / ".npmrc").write_text(
        "fund=false\n@some:registry=https://no.example\nregistry = https://npm.example/a/\n"
    )
    assert viewer.registry() == "https://npm.example/a"
    monkeypatch.setenv("npm_config_registry", "http://other.example")
    assert viewer.registry() == "http://other.example"
    monkeypatch.setenv("npm_config_registry", "file:///etc")
    with pytest.raises(DownloadError, match="no http or https address"):
        viewer.registry()


def test_without_a_registry_one_line_says_so(tmp_path: Path) -> None:
    script = "import sys; from ctseg.server import viewer; viewer.MEMBER_SHA256 = 'another'; sys.exit(viewer.main())"
    environment = {**os.environ, "NPM_CONFIG_REGISTRY": "http://user:secret@127.0.0.1:9", "no_proxy": "127.0.0.1"}
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith("ctseg: cannot fetch 127.0.0.1/@niivue")
    assert "secret" not in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_wheel_is_built_without_a_registry_too(tmp_path: Path) -> None:
    """From a copy of the sources that has no viewer: a warning, and the page without it."""
    tracked = subprocess.run(
        ["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True
    )
    for name in filter(None, tracked.stdout.decode().split("\0")):
        if name.split("/")[0] in ("src", "data", "pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
            target = tmp_path / "source" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    environment = {**os.environ, "NPM_CONFIG_REGISTRY": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"}
    result = subprocess.run(build, cwd=tmp_path / "source", env=environment, capture_output=True, text=True, check=True)
    assert "python -m ctseg.server.viewer" in result.stdout + result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "ctseg/server/web/index.html" in names
    assert "ctseg/server/web/vendor/niivue.js" not in names
