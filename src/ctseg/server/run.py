"""The server's process: a socket that is ours before a model is loaded, and an orderly end on a signal."""

from __future__ import annotations

import logging
import socket
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from fastapi import FastAPI

from ctseg.errors import CtsegError
from ctseg.progress import printable

LOG_LINES: deque[str] = deque(maxlen=5000)
"""The newest lines of the log, for clients that ask for them."""
GRACE_SECONDS = 5


@dataclass(frozen=True)
class Tls:
    """Files of a certificate and its key, in PEM."""

    certificate: Path
    key: Path


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens on `host` and `port`; port 0 is any free one.

    Raises:
        CtsegError: if it is not to be had.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(128)  # who comes before the models are loaded waits
    except OSError as error:
        raise CtsegError(f"--host {host} --port {port}: {error.strerror or error}; choose another one") from error
    return bound


def url_of(bound: socket.socket, tls: Tls | None) -> str:
    """The address for a browser."""
    host, port = bound.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if tls else 'http'}://{shown}:{port}/"


def run(app: FastAPI, bound: socket.socket, tls: Tls | None, stop_requested: Callable[[], bool]) -> None:
    """Serves until a stop is requested; requests that are running get some seconds to end.

    Raises:
        CtsegError: if the certificate or its key cannot be used.
    """
    files = {} if tls is None else {"ssl_certfile": str(tls.certificate), "ssl_keyfile": str(tls.key)}
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
        ws="none",
        **files,  # type: ignore[arg-type]
    )
    try:
        config.load()
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        raise CtsegError(f"--tls-cert, --tls-key: cannot be used: {error}") from error
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([bound],), name="http", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
        if stop_requested():
            server.should_exit = True


def start_log(quiet: bool) -> None:
    """Sends the log of this server to `LOG_LINES`, and to stderr unless `quiet`."""
    log = logging.getLogger("ctseg.server")
    log.setLevel(logging.INFO)
    log.propagate = False
    form = logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S")
    handlers: list[logging.Handler] = [_Memory()] if quiet else [_Memory(), logging.StreamHandler()]
    for handler in handlers:
        handler.setFormatter(form)
        log.addHandler(handler)


class _Memory(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """Keeps the record's lines."""
        LOG_LINES.extend(printable(line) for line in self.format(record).splitlines())
