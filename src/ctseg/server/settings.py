"""What a server is told when it starts. Light: read before torch or FastAPI is imported."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from ctseg.errors import CtsegError

TOKEN_VARIABLE = "CTSEG_SERVE_TOKEN"
MIN_TOKEN_LENGTH = 16
MAX_TOKEN_BYTES = 4096


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The rules of one server.

    Attributes:
        studies: Folder of the images.
        host: Address it listens on.
        token: What every request must know; None: nobody is asked.
        host_names: Further names that it goes by where nobody is asked for a token.
        cors_origins: Web pages of other servers that may use this one, such as https://viewer.example.org.
        max_upload_bytes: Of the body of one request.
        max_voxels: Of one image.
        cache_bytes: Of images and prepared images kept in memory.
        max_waiting: Requests that may wait for the model.
        session_seconds: A session that nobody used so long is removed.
        max_sessions: Of each kind.
    """

    studies: Path
    host: str = "127.0.0.1"
    token: str | None = None
    host_names: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_upload_bytes: int = 2**30
    max_voxels: int = 2**29
    cache_bytes: int = 2 * 2**30
    max_waiting: int = 32
    session_seconds: float = 3600.0
    max_sessions: int = 64

    def goes_by(self, name: str) -> bool:
        """True for a name in a request's Host that means this server.

        A page of a stranger may have its own name lead to this machine once it is loaded (DNS rebinding). It cannot do
        so with an address, with `localhost`, or with a name that is not the stranger's.
        """
        if is_loopback(name) or name in self.host_names:
            return True
        own = (self.host.lower(), socket.gethostname().lower())
        return not is_loopback(self.host) and (_is_address(name) or name in own)


def find_token(file: Path | None) -> str | None:
    """The token in `file`, else in the environment; None where neither names one.

    Raises:
        CtsegError: if it cannot be read or is too easy to guess.
    """
    source, text = f"${TOKEN_VARIABLE}", os.environ.get(TOKEN_VARIABLE)
    if file is not None:
        source = f"--token-file {file}"
        try:
            with file.open(encoding="utf-8") as opened:
                text = opened.read(MAX_TOKEN_BYTES)
        except (OSError, ValueError) as error:
            raise CtsegError(f"{source}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if text is None:
        return None
    token = text.strip()
    if len(token) < MIN_TOKEN_LENGTH or not (token.isascii() and token.isprintable()) or " " in token:
        raise CtsegError(
            f"{source}: a token is {MIN_TOKEN_LENGTH} or more letters and digits without spaces; make one with "
            f"`openssl rand -hex 24`"
        )
    return token


def check_exposure(host: str, token: str | None, insecure: bool) -> None:
    """Passes if strangers cannot reach the server, or only with a token, or the user wants it so.

    Raises:
        CtsegError: if anyone who reaches this machine could read and write the studies.
    """
    if not (is_loopback(host) or token or insecure):
        raise CtsegError(
            f"--host {host}: others could read and write the studies; give a --token-file or ${TOKEN_VARIABLE}, or "
            f"allow everyone with --insecure"
        )


PORTS = {"http": 80, "https": 443}
"""Which browsers leave out of an origin."""


def check_origin(origin: str) -> str:
    """`origin` as browsers write it, if it is one, such as https://viewer.example.org.

    Raises:
        CtsegError: if it is not.
    """
    lower = origin.lower()
    try:
        parts = urlsplit(lower)
        port = parts.port
    except ValueError:
        parts, port = urlsplit(""), None
    is_origin = parts.scheme in PORTS and parts.hostname and "@" not in lower
    if not is_origin or lower != f"{parts.scheme}://{parts.netloc}":
        raise CtsegError(f"--cors {origin}: expected an origin such as https://viewer.example.org")
    return lower.removesuffix(f":{port}") if port == PORTS[parts.scheme] else lower


def check_host_name(name: str) -> str:
    """`name` in lower case, if it can be a host's.

    Raises:
        CtsegError: if it cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?", name):
        raise CtsegError(f"--allow-host {name}: expected a name such as viewer.example.org, without port")
    return name.lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """True for an address or name that only this machine reaches."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
