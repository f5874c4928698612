"""The server's process: a socket that is ours before a model is loaded, and an orderly end on a signal."""

from __future__ import annotations

import asyncio
import atexit
import logging
import queue
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from logging.handlers import QueueHandler, QueueListener
from pathlib import Path

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from ctseg.errors import CtsegError
from ctseg.progress import printable

LOG_LINES: deque[str] = deque(maxlen=5000)
"""The newest lines of the log, for clients that ask for them."""
GRACE_SECONDS = 5
MAX_CONNECTIONS = 512
"""More are answered by 503 at once."""
HEADER_SECONDS = 20.0
"""A connection on which no request began for so long is closed."""
MAX_UNWRITTEN = 1000
"""Lines of log that may wait for a slow stderr."""


@dataclass(frozen=True)
class Tls:
    """Files of a certificate and its key, in PEM."""

    certificate: Path
    key: Path


class _Patient(H11Protocol):
    """uvicorn's connection; one that sends nothing, or half a header, is closed after some time."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begins to look at the connection now and then."""
        super().connection_made(transport)
        self.loop.call_later(HEADER_SECONDS, self._look, None)

    def _look(self, before: object) -> None:
        waits = self.cycle is None or self.cycle.response_complete
        if waits and self.cycle is before:
            self.transport.close()
        if not self.transport.is_closing():
            self.loop.call_later(HEADER_SECONDS, self._look, self.cycle)


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens on `host` and `port`; port 0 is any free one.

    Raises:
        CtsegError: if it is not to be had.
    """
    bound = None
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # named, else asyncio leaves Nagle on
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(128)  # who comes before the models are loaded waits
    except (OSError, UnicodeError) as error:  # a name with an empty part, or one that is too long, is the latter
        if bound is not None:
            bound.close()
        reason = getattr(error, "strerror", None) or error
        raise CtsegError(f"--host {host[:80]} --port {port}: {reason}; choose another one") from error
    return bound


def check_tls(tls: Tls) -> None:
    """Raises CtsegError unless the certificate and its key can be used."""

    def no_password() -> str:
        raise ValueError("the key is encrypted; give one without a password")

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(tls.certificate, tls.key, no_password)
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        reason = getattr(error, "strerror", None) or error
        raise CtsegError(f"--tls-cert {tls.certificate}, --tls-key {tls.key}: cannot be used: {reason}") from error


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
        limit_concurrency=MAX_CONNECTIONS,
        http=_Patient,
        ws="none",
        **files,  # type: ignore[arg-type]
    )
    try:
        config.load()
    except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
        bound.close()
        raise CtsegError(f"--tls-cert, --tls-key: cannot be used: {error}") from error
    silence_uvicorn()
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([bound],), name="http", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.05)
        if stop_requested():
            server.should_exit = True


def silence_uvicorn() -> None:
    """Has uvicorn tell nothing: its tracebacks name files, which may be called as patients are. Our own log tells."""
    log = logging.getLogger("uvicorn")
    log.propagate = False
    log.handlers = [logging.NullHandler()]


def start_log(quiet: bool) -> None:
    """Sends the log of this server to `LOG_LINES`, and to stderr unless `quiet`."""
    log = logging.getLogger("ctseg.server")
    log.setLevel(logging.INFO)
    log.propagate = False
    form = logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S")
    handlers: list[logging.Handler] = [_Memory()]
    if not quiet:
        to_stderr = logging.StreamHandler()
        to_stderr.setFormatter(form)
        lines: queue.Queue[logging.LogRecord] = queue.Queue(MAX_UNWRITTEN)
        listener = QueueListener(lines, to_stderr)
        listener.start()
        atexit.register(listener.stop)  # the last lines are written before the process ends
        handlers.append(_Dropping(lines))
    for handler in handlers:
        handler.setFormatter(form)
        log.addHandler(handler)


class _Memory(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        """Keeps the record's lines."""
        LOG_LINES.extend(printable(line) for line in self.format(record).splitlines())


class _Dropping(QueueHandler):
    """A stderr that nobody reads must not stop the server: what does not fit into the queue is dropped."""

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """The record as it is; the listener formats it."""
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        """Puts the record into the queue if there is room."""
        with suppress(queue.Full):
            self.queue.put_nowait(record)
