"""What the answers of an HTTP server mean for a file that is being fetched: go on, come back later, or go elsewhere."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    import requests

MAX_REDIRECTS = 10
PASSING = {408, 425, 429, *range(500, 600)}
"""HTTP statuses that may be others a moment later."""


class AddressFails(Exception):
    """An address cannot give the file."""


class TryAgain(Exception):
    """Something that may pass."""

    weight = 1
    """As how many tries it counts."""

    def __init__(self, reason: str, pause_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.pause_seconds = pause_seconds


class Unreachable(TryAgain):
    """No connection could be made."""


def check_answer(response: requests.Response, url: str, has_checksum: bool) -> None:
    """Raises AddressFails or TryAgain if the answer to a request for `url` is not the file or a part of it."""
    status = response.status_code
    if status in PASSING:
        after = response.headers.get("Retry-After", "")
        raise TryAgain(f"HTTP status {status}", float(after) if re.fullmatch(r"\d{1,6}", after) else None)
    if status == 416:
        return
    if status not in (200, 206):
        raise AddressFails(f"HTTP status {status}{' (not there)' if status in (404, 410) else ''}")
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise AddressFails("the server sends it compressed, although asked not to")
    hops = [url, *(answer.url for answer in response.history), response.url]
    secure = [urlsplit(hop).scheme == "https" for hop in hops]
    if secure[0] and not all(secure) and not has_checksum:
        raise AddressFails("redirects from https to http, and there is no checksum to notice a forged file")


def total_bytes(response: requests.Response, offset: int) -> int | None:
    """The size of the whole file, as far as the server says it."""
    if response.status_code == 206 and (total := range_total(response)) is not None:
        return total
    length = response.headers.get("Content-Length", "")
    return offset + int(length) if re.fullmatch(r"\d{1,18}", length) else None


def range_total(response: requests.Response) -> int | None:
    """The size of the whole file in an answer about a part of it."""
    total = re.search(r"/(\d{1,18})$", response.headers.get("Content-Range", ""))
    return int(total[1]) if total else None


def connection_problem(error: Exception) -> Exception:
    """What it means that a request got no answer."""
    from requests import exceptions

    text = str(error)
    if isinstance(error, exceptions.SSLError):
        return AddressFails("its certificate is not trusted here; set REQUESTS_CA_BUNDLE to your site's certificates")
    if isinstance(error, exceptions.ProxyError):
        return Unreachable("the proxy named in HTTPS_PROXY or HTTP_PROXY does not let it through")
    if isinstance(error, exceptions.ConnectTimeout):
        return Unreachable("no network here, or not to there: no answer")
    if isinstance(error, exceptions.ConnectionError) and "NameResolutionError" in text:
        return Unreachable("no network here: its name cannot be resolved")
    if isinstance(error, exceptions.ConnectionError) and "NewConnectionError" in text:
        return Unreachable("no network here, or not to there: no connection")
    if isinstance(error, exceptions.Timeout | exceptions.ConnectionError | exceptions.ChunkedEncodingError):
        return TryAgain(f"the connection broke ({type(error).__name__})")
    if isinstance(error, exceptions.TooManyRedirects):
        return AddressFails(f"redirects more than {MAX_REDIRECTS} times")
    if isinstance(error, exceptions.InvalidSchema | exceptions.MissingSchema | ValueError):
        return AddressFails("leads to what is no http or https address")
    return AddressFails(f"no answer ({type(error).__name__})")


def validator_of(response: requests.Response) -> str | None:
    """What names this version of the file: a strong ETag, else its date."""
    etag = str(response.headers.get("ETag", ""))
    if etag.startswith('"'):
        return etag
    date = response.headers.get("Last-Modified")
    return None if date is None else str(date)


def shown(url: str) -> str:
    """The address without what may be a secret in it: a user's name, a password, a token."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"[:500]
