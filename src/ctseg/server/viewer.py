"""The viewer library of the web page: one pinned file of NiiVue (BSD-2-Clause) from the npm registry.

The repository holds only what was written for it, so the library is brought in when the package is built
(`hatch_build.py`), or later by `python -m ctseg.server.viewer`. What is kept was checked twice: the archive against
the integrity the registry has for this version, the file against its own checksum. Standard library only, as it runs
where a package is built.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import os
import sys
import tarfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from ctseg.errors import CtsegError, DownloadError
from ctseg.files import atomic_path, make_folder

VERSION = "0.69.0"
ARCHIVE = f"@niivue/niivue/-/niivue-{VERSION}.tgz"
ARCHIVE_SHA512 = "YMjQvJgD1W2b7DuoxkwlC4VxbrgIePRJ5qyQzXKxi2v2MBVg285P/CIQyg46oDDGDIcaNlbd+MhtO/edMbXJkA=="
"""As in the registry's `integrity`: base64."""
MEMBER = "package/dist/index.js"
"""The ES module; `index.min.js` of this version is the same code as one percent-encoded string."""
MEMBER_SHA256 = "d6c2be4feb1ad53b2ac76b4196da8d8fd2263b662b511c55ca0fd127eb6a6532"
MAX_BYTES = 32 << 20
"""Neither the archive nor the file is read further."""
SILENCE_SECONDS = 15.0
WHOLE_SECONDS = 120.0
DEFAULT_REGISTRY = "https://registry.npmjs.org"
WEB_FOLDER = Path(__file__).parent / "web"
FILE = Path("vendor") / "niivue.js"


def is_here(folder: Path = WEB_FOLDER) -> bool:
    """True if the pinned library stands in the web page's `folder`."""
    path = folder / FILE
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == MEMBER_SHA256


def bring_viewer(folder: Path = WEB_FOLDER) -> Path:
    """The library's file in the web page's `folder`: the one that is there if it is the pinned one, else fetched.

    Raises:
        DownloadError: if it cannot be fetched, or is not what it should be.
        OutputError: if it cannot be written.
    """
    path = folder / FILE
    if is_here(folder):
        return path
    content = _member(_archive(f"{registry()}/{ARCHIVE}"))
    make_folder(path.parent)
    with atomic_path(path) as temporary:
        temporary.write_bytes(content)
    return path


def registry() -> str:
    """The npm registry to ask, without a closing slash: of the environment, else of `~/.npmrc`, else npm's own.

    Raises:
        DownloadError: if it is not an http or https address.
    """
    named = [value for name, value in os.environ.items() if name.lower() == "npm_config_registry" and value]
    address = (named or _npmrc_registries() or [DEFAULT_REGISTRY])[-1].strip("\"' ").rstrip("/")
    if urlsplit(address).scheme not in ("http", "https"):
        raise DownloadError("the npm registry is no http or https address; name one in NPM_CONFIG_REGISTRY")
    return address


def _npmrc_registries() -> list[str]:
    try:
        lines = (Path.home() / ".npmrc").read_text(encoding="utf-8").splitlines()
    except (OSError, RuntimeError, UnicodeDecodeError):  # none, no home folder, not a text
        return []
    pairs = [line.partition("=") for line in lines]
    return [value.strip() for key, _, value in pairs if key.strip() == "registry" and value.strip()]


def _archive(url: str) -> bytes:
    where = f"{urlsplit(url).hostname}/{ARCHIVE}"  # without a password that a registry's address may hold
    try:
        with urllib.request.urlopen(url, timeout=SILENCE_SECONDS) as response:
            content = _read(response, time.monotonic() + WHOLE_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        raise DownloadError(f"cannot fetch {where}: the npm registry answered {error.code}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise DownloadError(f"cannot fetch {where}: {reason or type(error).__name__}") from error
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != ARCHIVE_SHA512:
        raise DownloadError(f"{where} is not the archive that was tested: its SHA-512 differs")
    return content


def _read(response: http.client.HTTPResponse, deadline: float) -> bytes:
    content = bytearray()
    while block := response.read1(1 << 16):
        content += block
        if len(content) > MAX_BYTES:
            raise ValueError(f"more than {MAX_BYTES >> 20} MiB")
        if time.monotonic() > deadline:
            raise TimeoutError(f"not whole after {WHOLE_SECONDS:.0f} s")
    if response.length:
        raise ValueError(f"the answer ended {response.length} bytes early")
    return bytes(content)


def _member(archive: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as tar:
        stream = tar.extractfile(MEMBER)
        content = stream.read(MAX_BYTES) if stream else b""
    if hashlib.sha256(content).hexdigest() != MEMBER_SHA256:
        raise DownloadError(f"{MEMBER} in the viewer's archive is not the file that was tested: its SHA-256 differs")
    return content


def main() -> int:
    """Exit code 0 with the file's path on stdout, or 2 with the reason on stderr."""
    try:
        print(bring_viewer())
    except CtsegError as error:
        print(f"ctseg: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
